//! The hypervisor's own MSRs.

use msrgate_core::Msr;

use crate::Errno;

/// What answers an access that the filter allows (`kvm_get_msr`, `kvm_set_msr`).
pub trait Msrs {
    /// The value of `msr`.
    fn read(&mut self, msr: Msr) -> Result<u64, Refusal>;
    /// Gives `msr` the value.
    fn write(&mut self, msr: Msr, value: u64) -> Result<(), Refusal>;
}

/// Why the hypervisor does not answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It does not know the MSR, or this model of vCPU has none (`KVM_MSR_RET_UNSUPPORTED`).
    Unknown,
    /// It knows the MSR and refuses the access: reserved bits, a bad value, a bad mode.
    Invalid,
    /// It failed itself; the kernel's negative results. Handed to user space like [`Refusal::Invalid`]. Where that is
    /// off, a read faults and a write ends KVM_RUN with the error. In the emulator it is never handed on.
    Error(Errno),
}
