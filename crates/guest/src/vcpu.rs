//! One vCPU: runs lists of accesses, and tells what each got.

use std::io;

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, kvm_dtable, kvm_mp_state, kvm_regs, kvm_run, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use msrgate_core::{Access, Answer, Msr, Op, Outcome, ReadOutcome, WriteOutcome};
use msrgate_kvm::{Answered, Dispatch, VcpuGate};

use crate::code::{FAULTED, NOT_DONE, PORT_DONE, PORT_EXCEPTION, WRITE};
use crate::error::{GuestDied, GuestError};
use crate::memory::{self, Entry, MAX_ENTRIES, Table};
use crate::mode::Mode;
use crate::stats;

/// What an access got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    /// The value or the fault that the guest saw.
    pub outcome: Outcome,
    /// The exit that the access made, or the last where it made several; `None` where the kernel answered.
    pub exit: Option<SeenExit>,
}

/// An exit that an access made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SeenExit {
    /// The kernel's number for the exit's reason.
    pub reason_bits: u32,
    /// The answer that a gate gave; `None` where no gate answered.
    pub answer: Option<Answer>,
}

/// One vCPU of a [`crate::Guest`].
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    mode: Mode,
    id: usize,
    /// The segment and control registers as they are before the first access.
    sregs: kvm_sregs,
    table: Table,
    seen: Vec<Seen>,
    stats: Option<stats::Exits>,
}

/// An access that waits for an answer. Without an answer the access faults.
#[derive(Debug)]
pub struct Pending<'a> {
    fd: &'a mut VcpuFd,
    position: usize,
    access: Access,
    exit: SeenExit,
}

impl Pending<'_> {
    /// Position of the access in the list, from 0.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The access, as the kernel reports it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Why the kernel does not answer the access: the kernel's number for the reason.
    pub fn reason_bits(&self) -> u32 {
        self.exit.reason_bits
    }

    /// Where the guest is: the address of the RDMSR or WRMSR, in real mode the offset in its segment.
    pub fn rip(&self) -> u64 {
        self.fd.sync_regs().regs.rip
    }

    /// The vCPU's descriptor, for callers that do more than answer. The vCPU is as it came out of KVM_RUN, except that a fault is ready to be
    /// delivered.
    pub fn fd(&mut self) -> &mut VcpuFd {
        self.fd
    }

    /// Answers: with what `read` says of a read, or what `write` says of a write.
    #[expect(unsafe_code, reason = "the exit is a union")]
    pub fn answer(&mut self, read: impl FnOnce(Msr) -> ReadOutcome, write: impl FnOnce(Msr, u64) -> WriteOutcome) {
        let outcome = match self.access {
            Access::Read { msr } => read(msr).map(Some),
            Access::Write { msr, value } => write(msr, value).map(|()| None),
        };
        self.exit.answer = None;
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit that waits is one of an MSR, as `Vcpu::table_done` found, and only KVM_RUN makes another;
        // the field is made of integers alone, so even after that it may be written.
        let fields = unsafe { &mut run.__bindgen_anon_1.msr };
        fields.error = outcome.is_err().into();
        if let Ok(Some(value)) = outcome {
            fields.data = value;
        }
    }

    /// Has `gate` answer, and tells what it did; `None` where it did not take the exit for one of its own.
    pub fn dispatch(&mut self, gate: &VcpuGate) -> Option<Answered> {
        match gate.dispatch_vcpu(self.fd) {
            Dispatch::Answered(answered) => {
                self.exit.answer = Some(answered.answer);
                Some(answered)
            }
            Dispatch::NotAnMsrExit => None,
        }
    }
}

impl Vcpu {
    pub(crate) fn new(mut fd: VcpuFd, id: usize, mode: Mode, table: Table) -> Result<Vcpu, GuestError> {
        // So that the instruction pointer is known at each exit, without another call.
        fd.set_sync_valid_reg(SyncReg::Register);
        let mut sregs = fd.get_sregs().map_err(GuestError::of("KVM_GET_SREGS"))?;
        match mode {
            Mode::Real => real_mode(&mut sregs, id),
            Mode::Long => long_mode(&mut sregs),
        }
        let mut vcpu = Vcpu {
            fd,
            mode,
            id,
            sregs,
            table,
            seen: Vec::new(),
            stats: None,
        };
        vcpu.reset()?;
        vcpu.stats = stats::Exits::open(&vcpu.fd).ok();
        Ok(vcpu)
    }

    /// The vCPU's descriptor, to make a gate for it.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The vCPU's descriptor, to change the vCPU's state.
    pub fn fd_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }

    /// Lets the guest make the accesses in order, and tells what each got.
    ///
    /// `exits` is called for each that the kernel hands to user space, and answers it: by a gate with
    /// [`Pending::dispatch`], or by itself with [`Pending::answer`]. One that it leaves alone faults; so for a VM
    /// without a filter `&mut |_| {}` does.
    ///
    /// Where an access breaks the guest, the error names it, [`Vcpu::seen`] has what those before it got, and the guest
    /// is as new, but for its MSRs.
    pub fn run(&mut self, accesses: &[Access], exits: &mut dyn FnMut(&mut Pending<'_>)) -> Result<&[Seen], GuestError> {
        self.seen.clear();
        self.seen.reserve(accesses.len());
        for batch in accesses.chunks(MAX_ENTRIES) {
            let first = self.seen.len();
            for (index, access) in batch.iter().enumerate() {
                self.table.set(index, entry(*access));
                self.seen.push(Seen {
                    outcome: Outcome::Fault,
                    exit: None,
                });
            }
            self.table.set_len(u16::try_from(batch.len()).unwrap_or(0));
            let broke = self.table_done(batch, first, exits).err();
            let done = self.collect(batch, first);
            if let Some(how) = broke {
                self.seen.truncate(first + done);
                self.reset()?;
                let access = batch.get(done).or(batch.last());
                return Err(GuestError::GuestDied {
                    position: first + done,
                    access: *access.unwrap_or(&Access::Read { msr: Msr::MIN }),
                    how,
                });
            }
        }
        Ok(&self.seen)
    }

    /// What the accesses of the last run got, as far as they were made.
    pub fn seen(&self) -> &[Seen] {
        &self.seen
    }

    /// How often the vCPU has left the guest: the kernel's `exits` statistic. With it a program can tell, without
    /// measuring time, whether an access is passed through to the hardware, answered in the kernel or handed over.
    pub fn exits(&self) -> Result<u64, GuestError> {
        let exits = match &self.stats {
            Some(stats) => stats.read(),
            None => Err(io::ErrorKind::Unsupported.into()),
        };
        exits.map_err(|source| GuestError::Kvm {
            doing: "reading the vCPU's statistics",
            source,
        })
    }

    /// Puts the registers back as they are before the first access. MSRs that are no part of KVM_SET_SREGS stay.
    pub fn reset(&mut self) -> Result<(), GuestError> {
        // What is pending would be completed into the new registers.
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
        self.fd
            .set_mp_state(kvm_mp_state {
                mp_state: KVM_MP_STATE_RUNNABLE,
            })
            .map_err(GuestError::of("KVM_SET_MP_STATE"))?;
        self.fd
            .set_sregs(&self.sregs)
            .map_err(GuestError::of("KVM_SET_SREGS"))?;
        let (rip, rsp) = match self.mode {
            Mode::Real => (u64::from(memory::REAL_IP), memory::STACK),
            Mode::Long => (memory::LONG_CODE, memory::stack_address(self.id) + memory::STACK),
        };
        self.fd
            .set_regs(&kvm_regs {
                rip,
                rsp,
                rdi: memory::table_address(self.id),
                // The bit that is always set; interrupts are off.
                rflags: 2,
                ..Default::default()
            })
            .map_err(GuestError::of("KVM_SET_REGS"))?;
        self.fd
            .set_vcpu_events(&kvm_vcpu_events::default())
            .map_err(GuestError::of("KVM_SET_VCPU_EVENTS"))
    }

    /// Runs until the guest is through with its table.
    fn table_done(
        &mut self,
        batch: &[Access],
        first: usize,
        exits: &mut dyn FnMut(&mut Pending<'_>),
    ) -> Result<(), GuestDied> {
        let mut done = 0;
        loop {
            let (op, msr, value) = match self.fd.run() {
                Ok(VcpuExit::IoOut(PORT_DONE, _)) => return Ok(()),
                Ok(VcpuExit::IoOut(PORT_EXCEPTION, _)) => return Err(GuestDied::Exception),
                Ok(VcpuExit::X86Rdmsr(exit)) => {
                    *exit.error = 1;
                    (Op::Read, exit.index, 0)
                }
                Ok(VcpuExit::X86Wrmsr(exit)) => {
                    *exit.error = 1;
                    (Op::Write, exit.index, exit.data)
                }
                Ok(VcpuExit::Shutdown) => return Err(GuestDied::Shutdown),
                Ok(VcpuExit::FailEntry(reason, _)) => return Err(GuestDied::FailEntry { reason }),
                Ok(VcpuExit::InternalError) => return Err(GuestDied::InternalError),
                Ok(exit) => {
                    return Err(GuestDied::Exit {
                        exit: format!("{exit:?}"),
                    });
                }
                // Whatever `kvm_run` holds then is no exit.
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(error) => {
                    return Err(GuestDied::Run {
                        source: io::Error::from_raw_os_error(error.errno()),
                    });
                }
            };
            while done < batch.len() && self.table.get(done).is_some_and(|entry| entry.done != NOT_DONE) {
                done += 1;
            }
            let msr = Msr(msr);
            let reason_bits = reason_bits(self.fd.get_kvm_run());
            let mut pending = Pending {
                fd: &mut self.fd,
                position: first + done,
                access: match op {
                    Op::Read => Access::Read { msr },
                    Op::Write => Access::Write { msr, value },
                },
                exit: SeenExit {
                    reason_bits,
                    answer: None,
                },
            };
            exits(&mut pending);
            let exit = pending.exit;
            if let Some(seen) = self.seen.get_mut(first + done) {
                seen.exit = Some(exit);
            }
        }
    }

    /// Reads what the guest wrote into its table: how many of `batch` it has finished.
    fn collect(&mut self, batch: &[Access], first: usize) -> usize {
        let seen = self.seen.iter_mut().skip(first);
        for (index, (access, seen)) in batch.iter().zip(seen).enumerate() {
            let Some(entry) = self.table.get(index).filter(|entry| entry.done != NOT_DONE) else {
                return index;
            };
            seen.outcome = match access {
                _ if entry.done & FAULTED != 0 => Outcome::Fault,
                Access::Read { .. } => Outcome::Value(u64::from(entry.edx) << 32 | u64::from(entry.eax)),
                Access::Write { .. } => Outcome::Done,
            };
        }
        batch.len()
    }
}

/// All of the kernel's number, of which kvm-ioctls leaves out what it does not know.
#[expect(unsafe_code, reason = "the exit is a union")]
fn reason_bits(run: &kvm_run) -> u32 {
    // SAFETY: made of integers alone, for which all bits are values.
    unsafe { run.__bindgen_anon_1.msr }.reason
}

fn entry(access: Access) -> Entry {
    // A read that leaves EAX and EDX alone shows.
    let (op, value) = match access {
        Access::Read { .. } => (0, 0x5a5a_5a5a_a5a5_a5a5),
        Access::Write { value, .. } => (WRITE, value),
    };
    Entry {
        msr: access.msr().0,
        op,
        done: NOT_DONE,
        eax: value as u32,
        edx: (value >> 32) as u32,
    }
}

fn real_mode(sregs: &mut kvm_sregs, vcpu: usize) {
    sregs.cr0 = 0x6000_0010;
    // Physical address extension, which does nothing without paging. QEMU's emulation of SVM needs it to leave a guest
    // that has set EFER.LME (`cpu_x86_update_cr0`).
    sregs.cr4 = 0x20;
    sregs.efer = 0;
    let segment = |base, selector, type_| kvm_segment {
        base,
        limit: 0xffff,
        selector,
        type_,
        present: 1,
        s: 1,
        ..Default::default()
    };
    // Bases that no selector gives: they hold until the segment register is loaded, which nothing but an interrupt
    // does, and that loads CS alone.
    let data = segment(memory::table_address(vcpu), 0, 3);
    sregs.cs = segment(u64::from(memory::REAL_SELECTOR) << 4, memory::REAL_SELECTOR, 0xb);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data);
    sregs.ss = segment(memory::stack_address(vcpu), 0, 3);
    sregs.idt = kvm_dtable {
        base: memory::IVT,
        limit: 0x3ff,
        ..Default::default()
    };
}

fn long_mode(sregs: &mut kvm_sregs) {
    // Paging, numeric error, extension type, monitor coprocessor, protection.
    sregs.cr0 = 0x8000_0033;
    // Physical address extension.
    sregs.cr4 = 0x20;
    sregs.cr3 = memory::PML4;
    // Long mode enabled, and active.
    sregs.efer = 0x500;
    let segment = |selector, type_, l, db| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db,
        g: 1,
        ..Default::default()
    };
    let data = segment(0x10, 3, 0, 1);
    sregs.cs = segment(8, 0xb, 1, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt = kvm_dtable {
        base: memory::GDT,
        limit: 0x17,
        ..Default::default()
    };
    sregs.idt = kvm_dtable {
        base: memory::IDT,
        limit: 0xfff,
        ..Default::default()
    };
}
