//! Cases instead of Linux: somebody outside of the machine, who has its memory too, makes a VM's calls and says which accesses the
//! guest makes, one after the other, and is told what came of each. Or a module holds a record of all that.
//!
//! `suite/src/bare.rs` is at the other end, where the messages are described. The guest is `case_guest` of `boot.s`. Behind the
//! filter are the few MSRs that the cases leave to the kernel, as the hardware has them.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{Ordering, fence};

use msrgate_core::{
    Exit as MsrExit, FaultCause, Msr, MsrBackend, MsrRange, Op, Ops, Outcome, PassthroughMsr, VcpuState, Verdict,
};
use msrgate_engine::{
    Caller, Descriptor, Fault, Intercepts, Msrs, Path, Process, Refusal, Step, UnknownMsrs, Vcpu, Vm,
};
use msrgate_plan::Plan;

use crate::bitmap;
use crate::machine::{Serial, rdmsr, wrmsr};
use crate::processor::{Exit, Guest, Processor};
use crate::{memory, say};

const PAT: u32 = 0x277;
/// SYSENTER, STAR, bases of FS and GS, PAT.
const REGISTERS: [u32; 8] = [
    0x174,
    0x175,
    0x176,
    0xc000_0081,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    PAT,
];
const PAGE: usize = 4096;

/// A vCPU's bitmap, which opens what of these the hardware keeps for the guest.
fn intercepts(amd: bool) -> Intercepts {
    let candidates: Vec<PassthroughMsr> = REGISTERS
        .iter()
        .filter(|msr| **msr != PAT)
        .map(|msr| PassthroughMsr::new(MsrRange::single(Msr(*msr)), Ops::BOTH))
        .collect();
    match amd {
        true => Intercepts::svm(candidates),
        false => Intercepts::vmx(candidates),
    }
}

/// A message, read from its start.
struct Message(Vec<u8>, usize);

/// Where messages come and go.
enum Line {
    /// Memory that somebody outside of the machine has too, and the number of the last message.
    Shared(u32),
    /// A record of messages and of what was answered to them, each with its size: from where on, and to where.
    Record(Range<u64>),
}

impl Line {
    /// Numbers of the last message and of the last answer, and their sizes.
    const ASKED: u64 = 0x400_0000;
    const ANSWERED: u64 = Line::ASKED + 4;
    const SIZES: [u64; 2] = [Line::ASKED + 8, Line::ASKED + 12];
    const MESSAGE: u64 = 0x410_0000;
    const ANSWER: u64 = 0x420_0000;

    /// The next message; at the end of a record one that turns the machine off.
    fn receive(&mut self) -> Message {
        match self {
            Line::Shared(turn) => {
                while memory::u32(Line::ASKED) == *turn {
                    core::hint::spin_loop();
                }
                *turn = memory::u32(Line::ASKED);
                fence(Ordering::SeqCst);
                Message(memory::bytes(Line::MESSAGE, memory::u32(Line::SIZES[0]) as usize), 0)
            }
            Line::Record(record) if record.is_empty() => Message(Vec::from(*b"q"), 0),
            Line::Record(record) => Message(recorded(record), 0),
        }
    }

    /// Answers it. What a record has is to be the same.
    fn answer(&mut self, bytes: &[u8]) {
        match self {
            Line::Shared(turn) => {
                memory::write(Line::ANSWER, bytes);
                memory::write(Line::SIZES[1], &(bytes.len() as u32).to_le_bytes());
                fence(Ordering::SeqCst);
                memory::write(Line::ANSWERED, &turn.to_le_bytes());
            }
            Line::Record(record) => assert!(
                recorded(record) == bytes,
                "answered {bytes:x?}, before {:#x}",
                record.start
            ),
        }
    }
}

fn recorded(record: &mut Range<u64>) -> Vec<u8> {
    let size = memory::u32(record.start);
    let bytes = memory::bytes(record.start + 4, size as usize);
    record.start += 4 + u64::from(size);
    bytes
}

impl Message {
    fn bytes(&mut self, size: usize) -> &[u8] {
        let start = self.1;
        self.1 += size;
        &self.0[start..self.1]
    }

    fn number<const N: usize>(&mut self) -> u64 {
        let bytes = self.bytes(N);
        bytes
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn rest(&self) -> &[u8] {
        &self.0[self.1..]
    }
}

/// What the calls and accesses are made on.
struct Subject<'a> {
    guest: &'a mut Guest,
    vm: Arc<Vm>,
    plan: Option<(Plan, VcpuState)>,
}

/// An access that the guest makes.
struct Access {
    msr: Msr,
    op: Op,
    value: u64,
    answer: Outcome,
    /// The message that it came by, at the calls that are due while it waits.
    message: Message,
}

/// Serves for good, or until `power_off`.
pub(crate) fn serve(guest: &mut Guest, amd: bool, record: Option<Range<u64>>, power_off: impl Fn()) -> ! {
    let mut subject = Subject {
        vm: Arc::clone(guest.vcpu.vm()),
        guest,
        plan: None,
    };
    // To where it asks for the first access.
    subject
        .guest
        .processor
        .set_bitmap(bitmap::hardware(subject.guest.vcpu.pick_up().intercepts).0);
    assert!(subject.enter() == Exit::Cpuid, "the guest asks");
    let mut line = record.map_or(Line::Shared(0), Line::Record);
    let mut answered = 0;
    loop {
        let mut message = line.receive();
        match message.number::<1>() as u8 {
            b'v' => {
                let unknown = match message.number::<1>() {
                    0 => UnknownMsrs::Refused,
                    _ => UnknownMsrs::Ignored,
                };
                subject.renew(unknown, intercepts(amd));
                line.answer(&[]);
            }
            b'p' => line.answer(&[u8::from(!subject.replace(message.rest()))]),
            b'c' => line.answer(&call(&subject.vm, &mut message).to_le_bytes()),
            b'k' => {
                subject.vm.kill();
                line.answer(&[]);
            }
            b'a' => line.answer(&subject.access(Access::of(message))),
            _ => {
                say!("cases {answered}");
                Serial.flush();
                power_off();
            }
        }
        answered += 1;
    }
}

/// An ioctl of a process whose memory comes with it. Gives its error, or 0.
fn call(vm: &Vm, message: &mut Message) -> u32 {
    let process = match message.number::<1>() {
        0 => Process::Native,
        _ => Process::Compat,
    };
    let descriptor = match message.number::<1>() {
        0 => Descriptor::System,
        1 => Descriptor::Vm,
        _ => Descriptor::Vcpu,
    };
    let (request, argp) = (message.number::<4>() as u32, message.number::<8>());
    // Pages with a gap behind each.
    let (start, count) = (message.number::<8>(), message.number::<1>());
    let pages: Vec<(usize, Vec<u8>)> = (0..count)
        .map(|_| {
            let (at, size) = (message.number::<2>() as usize, message.number::<2>() as usize);
            (at, message.bytes(size).to_vec())
        })
        .collect();
    let memory = |address: u64, to: &mut [u8]| {
        let at = address
            .checked_sub(start)
            .and_then(|at| usize::try_from(at).ok())
            .ok_or(Fault)?;
        let (page, offset) = (at / (2 * PAGE), at % (2 * PAGE));
        let (first, bytes) = pages.get(page).ok_or(Fault)?;
        if offset + to.len() > PAGE {
            return Err(Fault);
        }
        for (byte, at) in to.iter_mut().zip(offset..) {
            *byte = at
                .checked_sub(*first)
                .and_then(|at| bytes.get(at))
                .copied()
                .unwrap_or(0);
        }
        Ok(())
    };
    match vm.ioctl(request, argp, &memory, Caller::new(process, descriptor)) {
        Ok(_) => 0,
        Err(errno) => errno as u32,
    }
}

impl Access {
    fn of(mut message: Message) -> Access {
        let op = if message.number::<1>() == 0 {
            Op::Read
        } else {
            Op::Write
        };
        Access {
            op,
            msr: Msr(message.number::<4>() as u32),
            value: message.number::<8>(),
            answer: match (message.number::<1>(), message.number::<8>()) {
                (0, _) => Outcome::Fault,
                (1, value) => Outcome::Value(value),
                _ => Outcome::Done,
            },
            message,
        }
    }
}

impl Subject<'_> {
    /// A new VM with a vCPU, whose MSRs are as after a reset.
    fn renew(&mut self, unknown: UnknownMsrs, intercepts: Intercepts) {
        self.vm = Arc::new(Vm::new().with_unknown_msrs(unknown));
        self.guest.vcpu = Vcpu::new(Arc::clone(&self.vm), intercepts);
        self.plan = None;
        let mut registers = Registers(&mut *self.guest.processor);
        for msr in REGISTERS {
            let value = if msr == PAT { 0x0007_0406_0007_0406 } else { 0 };
            let _ = registers.write(Msr(msr), value);
        }
    }

    fn replace(&mut self, bytes: &[u8]) -> bool {
        let Ok(next) = Plan::from_bytes(bytes) else {
            return false;
        };
        let state = match &self.plan {
            Some((plan, state)) => state.carried(plan.table(), next.table()),
            None => next.table().vcpu_state(),
        };
        self.vm
            .install(next.filter().clone(), next.reasons(), next.table().clone());
        self.plan = Some((next, state));
        true
    }

    fn enter(&mut self) -> Exit {
        self.guest.processor.enter(&mut self.guest.registers)
    }

    /// Lets the guest make an access. Gives what it came to: verdict, the bit of the bitmap, how often the guest left for it, the
    /// exit's reason, what the guest got, and the results of calls meanwhile.
    fn access(&mut self, mut access: Access) -> Vec<u8> {
        let verdict = self.guest.vcpu.verdict(access.msr, access.op);
        let picked = self.guest.vcpu.pick_up();
        let intercepted = picked.intercepts.intercepts(access.msr, access.op);
        self.guest.processor.set_bitmap(bitmap::hardware(picked.intercepts).0);
        let registers = &mut self.guest.registers;
        // The upper halves do not count. RCX's has to be 0 all the same: QEMU's emulator takes it for a part of the place in the
        // map.
        const JUNK: u64 = 0xdead_beef << 32;
        registers.rbx = (access.op == Op::Write).into();
        registers.rcx = access.msr.0.into();
        registers.rax = JUNK | access.value & 0xffff_ffff;
        registers.rdx = JUNK | access.value >> 32;
        self.guest.processor.skip();
        let (mut left, mut reason, mut calls) = (0, 0, Vec::new());
        loop {
            match self.enter() {
                Exit::Msr(op) => {
                    assert!(
                        (op, self.guest.registers.rcx as u32) == (access.op, access.msr.0),
                        "another access"
                    );
                    left += 1;
                    let instruction = self.guest.instruction(op);
                    let mut registers = Registers(&mut *self.guest.processor);
                    let completion = match self.guest.vcpu.execute(instruction, Path::VmExit, &mut registers) {
                        Ok(Step::Complete(completion)) => completion,
                        Ok(Step::Exit(exit)) => {
                            reason = exit.reason as u8;
                            while !access.message.rest().is_empty() {
                                calls.extend(call(&self.vm, &mut access.message).to_le_bytes());
                            }
                            let outcome = self.answer(exit, access.answer);
                            self.guest.vcpu.answer(outcome).expect("it waits")
                        }
                        other => panic!("{other:?}"),
                    };
                    self.guest.complete(completion);
                }
                Exit::Cpuid => break,
                other => panic!("{other:x?}"),
            }
        }
        let registers = &self.guest.registers;
        let value = registers.r9 << 32 | registers.r8 & 0xffff_ffff;
        // A read gives EDX:EAX with nothing above.
        let upper = access.op == Op::Read && (registers.r8 | registers.r9) >> 32 != 0;
        let (sees, value) = match (registers.r10, access.op) {
            (0, Op::Read) if upper => (3, value),
            (0, Op::Read) => (1, value),
            (0, Op::Write) => (2, 0),
            _ => (0, 0),
        };
        let head = [
            u8::from(verdict == Verdict::Allow),
            u8::from(intercepted),
            left,
            reason,
            sees,
        ];
        [&head[..], &value.to_le_bytes(), &calls].concat()
    }

    fn answer(&mut self, exit: MsrExit, answer: Outcome) -> Outcome {
        let Some((_, state)) = &mut self.plan else {
            return answer;
        };
        let table = self.guest.vcpu.table().expect("plans come with tables");
        table
            .answer(exit, state, &mut Registers(&mut *self.guest.processor))
            .outcome
    }
}

/// The MSRs behind the filter.
struct Registers<'a>(&'a mut dyn Processor);

fn check(msr: Msr, value: u64) -> Result<(), Refusal> {
    match msr {
        // There is no local APIC that the guest was given.
        _ if MsrRange::X2APIC.contains(msr) => Err(Refusal::Invalid),
        _ if !REGISTERS.contains(&msr.0) => Err(Refusal::Unknown),
        Msr(0xc000_0100..=0xc000_0102) if !matches!(value >> 47, 0 | 0x1_ffff) => Err(Refusal::Invalid),
        _ => Ok(()),
    }
}

impl Msrs for Registers<'_> {
    fn read(&mut self, msr: Msr) -> Result<u64, Refusal> {
        check(msr, 0)?;
        self.0.held(msr.0).or_else(|| rdmsr(msr.0)).ok_or(Refusal::Unknown)
    }

    fn write(&mut self, msr: Msr, value: u64) -> Result<(), Refusal> {
        check(msr, value)?;
        self.0
            .hold(msr.0, value)
            .or_else(|| wrmsr(msr.0, value))
            .ok_or(Refusal::Invalid)
    }
}

impl MsrBackend for Registers<'_> {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        self.read(msr).map_err(|_| FaultCause::KernelRefused)
    }

    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause> {
        self.write(msr, value).map_err(|_| FaultCause::KernelRefused)
    }

    fn host_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::HostUnreadable)
    }

    // The suite's handler: `Machine::handler`.
    fn handler_read(&mut self, name: &str, msr: Msr) -> Result<u64, FaultCause> {
        if name == "suite" {
            Ok(msr.0.into())
        } else {
            Err(FaultCause::NoHandler)
        }
    }

    fn handler_write(&mut self, _: &str, _: Msr, value: u64) -> Result<(), FaultCause> {
        if value == 0 {
            Err(FaultCause::HandlerFault)
        } else {
            Ok(())
        }
    }
}
