//! The instruction that a guest executes, and what becomes of it.

use msrgate_core::{Access, Exit, Msr, Outcome};

use crate::{Errno, Vendor};

/// An instruction that touches an MSR, with the registers it uses.
///
/// That the guest runs at CPL 0 is for the processor or the emulator to see to, before this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Instruction {
    /// RDMSR.
    Rdmsr {
        /// RCX; the upper half does not count.
        rcx: u64,
    },
    /// WRMSR and WRMSRNS; the upper halves of all three registers do not count.
    Wrmsr {
        /// RCX: the index.
        rcx: u64,
        /// RAX: the value's lower half.
        rax: u64,
        /// RDX: the value's upper half.
        rdx: u64,
    },
    /// RDMSR with the index as an immediate (VMX exit reason 84).
    RdmsrImmediate {
        /// The immediate.
        msr: u32,
        /// The number of the destination register, for [`Written::Register`].
        register: u8,
    },
    /// WRMSRNS with the index as an immediate (VMX exit reason 85).
    WrmsrImmediate {
        /// The immediate.
        msr: u32,
        /// All 64 bits of the source register.
        value: u64,
    },
}

/// RDMSR or WRMSR, with nothing in the upper halves of its registers.
impl From<Access> for Instruction {
    fn from(access: Access) -> Instruction {
        match access {
            Access::Read { msr } => Instruction::Rdmsr { rcx: msr.0.into() },
            Access::Write { msr, value } => Instruction::Wrmsr {
                rcx: msr.0.into(),
                rax: value & 0xffff_ffff,
                rdx: value >> 32,
            },
        }
    }
}

impl Instruction {
    /// What it tries.
    pub const fn access(self) -> Access {
        match self {
            Instruction::Rdmsr { rcx } => Access::Read { msr: Msr(rcx as u32) },
            Instruction::Wrmsr { rcx, rax, rdx } => Access::Write {
                msr: Msr(rcx as u32),
                value: rdx << 32 | rax & 0xffff_ffff,
            },
            Instruction::RdmsrImmediate { msr, .. } => Access::Read { msr: Msr(msr) },
            Instruction::WrmsrImmediate { msr, value } => Access::Write { msr: Msr(msr), value },
        }
    }

    /// The destination of a read, where it is not EDX:EAX.
    pub(crate) const fn register(self) -> Option<u8> {
        match self {
            Instruction::RdmsrImmediate { register, .. } => Some(register),
            _ => None,
        }
    }
}

/// How an instruction came to the hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Path {
    /// A VM exit: the hypervisor skips the instruction by the length that the hardware gave ([`Advance::Skip`]).
    VmExit,
    /// A VM exit that the kernel's fast path may complete, which matters to writes of IA32_TSC_DEADLINE only
    /// ([`crate::TscDeadline`]). Say so only where the path applies: not in L2; before 6.18 with a usable VMX preemption
    /// timer; from 6.18 on AMD with NRIPS, and while no mediated PMU counter counts instructions.
    Fastpath(Vendor),
    /// The instruction emulator, which has decoded the instruction and so knows where the next one is.
    Emulator {
        /// RIP after the instruction.
        next_rip: u64,
    },
}

impl Path {
    pub(crate) const fn advance(self) -> Advance {
        match self {
            Path::VmExit | Path::Fastpath(_) => Advance::Skip,
            Path::Emulator { next_rip } => Advance::To(next_rip),
        }
    }
}

/// How far an instruction came.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The instruction is over.
    Complete(Completion),
    /// It waits for user space: KVM_RUN returns 0 with [`KvmRunMsr`](crate::KvmRunMsr), RIP and the other registers are as before, and the
    /// vCPU executes nothing until [`crate::Vcpu::complete`] or a sister of it was called.
    Exit(Exit),
    /// KVM_RUN fails with this error; the guest's state is as before.
    Failed(Errno),
    /// The emulator cannot carry the instruction out, for this error: what the hypervisor does with any instruction
    /// that it fails to emulate.
    EmulationFailed(Errno),
}

/// How an instruction ends.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Completion {
    /// The access succeeded: write what it gives, then go on. A single-step trap and the count of retired instructions are due.
    Done {
        /// What the guest's registers get.
        written: Written,
        /// Where RIP goes.
        advance: Advance,
    },
    /// #GP(0), RIP and the other registers as before. A confidential guest hears of it through its GHCB, or as status
    /// 0x8000000000000000 of its TDVMCALL.
    Fault,
}

impl Completion {
    /// What the access got.
    pub const fn outcome(self) -> Outcome {
        match self {
            Completion::Fault => Outcome::Fault,
            Completion::Done { written, .. } => match written {
                Written::Nothing => Outcome::Done,
                Written::RaxRdx { rax, rdx } => Outcome::Value(rdx << 32 | rax),
                Written::Register { value, .. } => Outcome::Value(value),
            },
        }
    }
}

/// Which of the guest's registers change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// None: a write.
    Nothing,
    /// All 64 bits of RAX and RDX.
    RaxRdx {
        /// The value's lower half, zero-extended.
        rax: u64,
        /// The value's upper half, zero-extended.
        rdx: u64,
    },
    /// All 64 bits of the register that an immediate form names.
    Register {
        /// The register's number.
        register: u8,
        /// What it gets.
        value: u64,
    },
}

/// Where RIP goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Advance {
    /// Past the instruction. VMX gives its length with the exit; SVM gives the next RIP where the processor has NRIPS
    /// (CPUID 0x8000000A, EDX bit 3). Without NRIPS, whoever skips looks at the instruction for its prefixes: RDMSR and WRMSR
    /// are two bytes long where they have none.
    Skip,
    /// To this address.
    To(u64),
}
