//! `kvm_run` of an exit of an MSR.

use super::{EXIT_X86_RDMSR, EXIT_X86_WRMSR, kvm_run, long, put, word};
use crate::{Access, Exit, Msr};

/// `kvm_run.msr` and `kvm_run.exit_reason` of an exit.
///
/// Of these, only `error` and, for reads, `data` mean anything on the way back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvmRunMsr {
    /// KVM_EXIT_X86_RDMSR or KVM_EXIT_X86_WRMSR.
    pub exit_reason: u32,
    /// 0.
    pub error: u8,
    /// Exactly one bit.
    pub reason: u32,
    /// The MSR.
    pub index: u32,
    /// What a write writes; 0 for a read.
    pub data: u64,
}

/// An exit as the kernel gives it: whether the reason is one that is known has not been looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct RawExit {
    /// What the guest tries.
    pub access: Access,
    /// Why the kernel does not answer it.
    pub reason: u32,
}

impl KvmRunMsr {
    /// Where the union with `msr` starts in `kvm_run`, in bytes.
    pub const OFFSET: usize = kvm_run::MSR;

    /// The bytes at [`Self::OFFSET`], padding zeroed.
    pub fn to_bytes(self) -> [u8; kvm_run::MSR_BYTES] {
        let mut bytes = [0; kvm_run::MSR_BYTES];
        put(&mut bytes, kvm_run::ERROR - Self::OFFSET, &[self.error]);
        put(&mut bytes, kvm_run::REASON - Self::OFFSET, &self.reason.to_le_bytes());
        put(&mut bytes, kvm_run::INDEX - Self::OFFSET, &self.index.to_le_bytes());
        put(&mut bytes, kvm_run::DATA - Self::OFFSET, &self.data.to_le_bytes());
        bytes
    }
}

impl RawExit {
    /// From `kvm_run.exit_reason` and the bytes at [`KvmRunMsr::OFFSET`]; `None` for an exit of something else.
    pub fn read(exit_reason: u32, msr: &[u8; kvm_run::MSR_BYTES]) -> Option<RawExit> {
        let index = Msr(word(msr, kvm_run::INDEX - kvm_run::MSR));
        let access = match exit_reason {
            EXIT_X86_RDMSR => Access::Read { msr: index },
            EXIT_X86_WRMSR => Access::Write {
                msr: index,
                value: long(msr, kvm_run::DATA - kvm_run::MSR),
            },
            _ => return None,
        };
        Some(RawExit {
            access,
            reason: word(msr, kvm_run::REASON - kvm_run::MSR),
        })
    }
}

impl From<Exit> for KvmRunMsr {
    fn from(exit: Exit) -> KvmRunMsr {
        let (exit_reason, data) = match exit.access {
            Access::Read { .. } => (EXIT_X86_RDMSR, 0),
            Access::Write { value, .. } => (EXIT_X86_WRMSR, value),
        };
        KvmRunMsr {
            exit_reason,
            error: 0,
            reason: exit.reason as u32,
            index: exit.access.msr().0,
            data,
        }
    }
}
