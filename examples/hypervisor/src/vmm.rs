//! The VMM: installs filters, answers exits, and moves the VM to another one in the middle.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use msrgate_core::{Access, Exit, Reason, abi};
use msrgate_engine::{Errno, Fault, UserMemory, Vendor};

use crate::guest::Site;
use crate::hypervisor::{State, Stop, Vcpu, Vm};
use crate::msrs::{MICROCODE_REVISION, Registers, SYSENTER_CS};
use crate::processor::Processor;

const VCPUS: usize = 2;
/// The microcode revision that the guest is to see.
pub(crate) const MICROCODE: u64 = 0x2b00_0643;
/// What the VMM answers for IA32_SYSENTER_CS while the filter denies it.
pub(crate) const EMULATED_CS: u64 = 0x10;

/// What came of it.
pub(crate) struct Report {
    pub(crate) vcpus: Vec<VcpuReport>,
}

/// What one vCPU's guest saw, and who gave it.
pub(crate) struct VcpuReport {
    processor: Processor,
    pub(crate) answered: Answered,
    pub(crate) faults: u64,
    pub(crate) passed_through: u64,
    /// Of these, how many there were when the vCPU was saved.
    pub(crate) passed_through_when_saved: u64,
}

impl VcpuReport {
    pub(crate) fn seen(&self, site: Site) -> BTreeMap<u64, u64> {
        self.processor.notes.values(site)
    }

    pub(crate) fn changes(&self, site: Site) -> u64 {
        self.processor.notes.changes(site)
    }

    pub(crate) fn rounds(&self) -> u64 {
        self.seen(Site::Round).values().sum()
    }
}

impl fmt::Display for VcpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Answered {
            microcode,
            sysenter_cs,
            unknown,
        } = self.answered;
        let changes = self.changes(Site::SysenterCs);
        write!(
            f,
            "{} rounds; answered by the VMM: {microcode} of 0x8b, {sysenter_cs} of 0x174, {unknown} unknown; \
             {} of 0x174 without an exit, {} of them before it was saved; its value changed {changes} time(s); {} #GP",
            self.rounds(),
            self.passed_through,
            self.passed_through_when_saved,
            self.faults
        )
    }
}

/// How many exits the VMM answered.
#[derive(Clone, Copy, Default)]
pub(crate) struct Answered {
    pub(crate) microcode: u64,
    pub(crate) sysenter_cs: u64,
    pub(crate) unknown: u64,
}

/// Runs a guest on two vCPUs under one filter, then another, saves it and lets a second VM end it.
pub(crate) fn demonstrate(vendor: Vendor, say: &dyn Fn(&str)) -> Result<Report, Box<dyn Error>> {
    let go = Arc::new(AtomicBool::new(false));
    let mut memory = ProcessMemory::new();
    let new = State {
        processor: Processor::default(),
        registers: Registers::new(go.clone()),
    };

    let vm = Vm::new(vendor, VCPUS);
    set_reasons(&vm, &mut memory)?;
    set_filter(&vm, &mut memory, &[MICROCODE_REVISION, SYSENTER_CS])?;
    say("denied: 0x8b and 0x174; the guest starts");
    let first = run(&vm, vec![new; VCPUS], &mut |rounds| {
        rounds.more(100);
        let refused = vm.ioctl(abi::SET_MSR_FILTER, memory.end() - 8, &memory);
        say(&format!(
            "a filter that ends beyond the VMM's memory: {refused:?}; the old one stays"
        ));
        set_filter(&vm, &mut memory, &[MICROCODE_REVISION])?;
        say("denied: 0x8b only; the guest did not stop for it");
        rounds.more(100);
        say("both vCPUs are drained and saved");
        Ok(())
    })?;

    // The filter and the reasons are no part of a vCPU's state: the VMM makes them again.
    let vm = Vm::new(vendor, VCPUS);
    set_reasons(&vm, &mut memory)?;
    set_filter(&vm, &mut memory, &[MICROCODE_REVISION])?;
    let saved: Vec<(u64, Answered)> = first
        .iter()
        .map(|(state, answered)| (state.processor.passed_through, *answered))
        .collect();
    let states = first.into_iter().map(|(state, _)| state).collect();
    let second = run(&vm, states, &mut |rounds| {
        rounds.more(100);
        go.store(true, Ordering::Relaxed);
        rounds.until_ended();
        say("a second VM took the guest over and ran it to its end");
        Ok(())
    })?;

    let report = |((state, later), (passed, earlier)): ((State, Answered), (u64, Answered))| VcpuReport {
        answered: Answered {
            microcode: earlier.microcode + later.microcode,
            sysenter_cs: earlier.sysenter_cs + later.sysenter_cs,
            unknown: earlier.unknown + later.unknown,
        },
        faults: state.processor.faults,
        passed_through: state.processor.passed_through,
        passed_through_when_saved: passed,
        processor: state.processor,
    };
    let vcpus = second.into_iter().zip(saved).map(report).collect();
    Ok(Report { vcpus })
}

/// How far the vCPUs are, as their threads see it.
struct Rounds([AtomicU64; VCPUS]);

impl Rounds {
    /// Stands for a vCPU that runs no more.
    const ENDED: u64 = u64::MAX;

    /// Waits until each vCPU has had this many more exits for the microcode revision, or has ended.
    fn more(&self, count: u64) {
        let now = || self.0.each_ref().map(|rounds| rounds.load(Ordering::Acquire));
        let start = now();
        let behind = |(now, start): (u64, u64)| now < start.saturating_add(count);
        while now().into_iter().zip(start).any(behind) {
            thread::yield_now();
        }
    }

    fn until_ended(&self) {
        while self
            .0
            .iter()
            .any(|rounds| rounds.load(Ordering::Acquire) != Self::ENDED)
        {
            thread::yield_now();
        }
    }
}

/// Runs each vCPU on a thread while `meanwhile` goes on, then stops them where they are.
fn run(
    vm: &Vm,
    states: Vec<State>,
    meanwhile: &mut dyn FnMut(&Rounds) -> Result<(), Errno>,
) -> Result<Vec<(State, Answered)>, Box<dyn Error>> {
    let rounds = Rounds(Default::default());
    let stopping = AtomicBool::new(false);
    thread::scope(|scope| {
        let vcpus = states
            .into_iter()
            .enumerate()
            .map(|(number, state)| vm.vcpu(number, state));
        let threads: Vec<_> = vcpus
            .zip(&rounds.0)
            .map(|(vcpu, rounds)| {
                let stopping = &stopping;
                scope.spawn(move || {
                    let ended = serve(vcpu, rounds, stopping);
                    rounds.store(Rounds::ENDED, Ordering::Release);
                    ended
                })
            })
            .collect();
        let done = meanwhile(&rounds);
        stopping.store(true, Ordering::Release);
        // The first vCPU stops at its next exit, with an access to drain. Who cannot wait for one sends a signal.
        for doorbell in vm.doorbells().iter().skip(1) {
            doorbell.signal.store(true, Ordering::Release);
        }
        let ended = threads.into_iter().map(|thread| {
            let ended = thread.join().map_err(|_| "a vCPU's thread panicked")?;
            ended.map_err(|error| Box::<dyn Error>::from(error.to_string()))
        });
        let ended = ended.collect();
        done?;
        ended
    })
}

/// One vCPU's thread: runs it and answers its exits until it halts or the VMM wants it to stop.
fn serve(mut vcpu: Vcpu, rounds: &AtomicU64, stopping: &AtomicBool) -> Result<(State, Answered), Errno> {
    let mut answered = Answered::default();
    loop {
        match vcpu.run()? {
            Stop::Msr(exit) => {
                (vcpu.error, vcpu.data) = answer(exit, &mut answered);
                rounds.store(answered.microcode, Ordering::Release);
                // The access is answered, but not over: one more call ends it without running the guest on.
                vcpu.immediate_exit = stopping.load(Ordering::Acquire);
            }
            Stop::Interrupted if !stopping.load(Ordering::Acquire) => {}
            Stop::Interrupted | Stop::Halt => {
                let state = vcpu.save().map_err(|_| Errno::Einval)?;
                return Ok((state, answered));
            }
        }
    }
}

/// The VMM's error and data for an access.
fn answer(exit: Exit, answered: &mut Answered) -> (u8, u64) {
    match (exit.reason, exit.access) {
        (Reason::Filter, Access::Read { msr }) if msr.0 == MICROCODE_REVISION => {
            answered.microcode += 1;
            // The revision stands in the upper half.
            (0, MICROCODE << 32)
        }
        (Reason::Filter, Access::Read { msr }) if msr.0 == SYSENTER_CS => {
            answered.sysenter_cs += 1;
            (0, EMULATED_CS)
        }
        _ => {
            answered.unknown += 1;
            (1, 0)
        }
    }
}

/// Accesses that the filter denies, and those of MSRs that the hypervisor does not know, come to the VMM.
fn set_reasons(vm: &Vm, memory: &mut ProcessMemory) -> Result<(), Errno> {
    // struct kvm_enable_cap: cap, flags, args[0], and 88 bytes that mean nothing here.
    let mut bytes = abi::CAP_X86_USER_SPACE_MSR.to_le_bytes().to_vec();
    bytes.extend(0u32.to_le_bytes());
    bytes.extend((Reason::Filter as u64 | Reason::Unknown as u64).to_le_bytes());
    bytes.resize(104, 0);
    memory.put(ProcessMemory::STRUCTURE, &bytes);
    vm.ioctl(abi::ENABLE_CAP, ProcessMemory::STRUCTURE, memory).map(drop)
}

/// Denies reads and writes of these MSRs, allows all others.
fn set_filter(vm: &Vm, memory: &mut ProcessMemory, denied: &[u32]) -> Result<(), Errno> {
    // The kernel copies whole longs, so the smallest bitmap has 8 bytes; a bit that is clear denies.
    memory.put(ProcessMemory::BITMAP, &[0; 8]);
    // struct kvm_msr_filter: flags (allow by default) and padding, then 16 ranges.
    let mut bytes = vec![0; 8];
    for msr in denied {
        // struct kvm_msr_filter_range: flags (reads and writes), nmsrs, base, padding, bitmap.
        for word in [3, 1, *msr, 0] {
            bytes.extend(u32::to_le_bytes(word));
        }
        bytes.extend(ProcessMemory::BITMAP.to_le_bytes());
    }
    bytes.resize(abi::Layout::NATIVE.filter_size, 0);
    memory.put(ProcessMemory::STRUCTURE, &bytes);
    vm.ioctl(abi::SET_MSR_FILTER, ProcessMemory::STRUCTURE, memory)
        .map(drop)
}

/// The VMM's own memory, which the hypervisor copies from: one mapping.
struct ProcessMemory(Vec<u8>);

impl ProcessMemory {
    const START: u64 = 0x7f00_0000_0000;
    const STRUCTURE: u64 = Self::START;
    const BITMAP: u64 = Self::START + 0x800;

    fn new() -> ProcessMemory {
        ProcessMemory(vec![0; 0x1000])
    }

    fn end(&self) -> u64 {
        Self::START + self.0.len() as u64
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        let offset = (address - Self::START) as usize;
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

impl UserMemory for ProcessMemory {
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let offset = address
            .checked_sub(Self::START)
            .and_then(|offset| usize::try_from(offset).ok());
        let bytes = offset.and_then(|offset| self.0.get(offset..)?.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or(Fault)?);
        Ok(())
    }
}
