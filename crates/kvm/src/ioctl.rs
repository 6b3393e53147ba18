//! The calls on KVM's file descriptors.

#![expect(unsafe_code, reason = "system calls")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use msrgate_core::abi::{self, EnableCap, OneMsr, RawFilter};
use msrgate_core::{Filter, Msr, Reasons};

use crate::OsError;

fn checked(result: libc::c_int) -> Result<libc::c_int, OsError> {
    if result < 0 { Err(OsError::last()) } else { Ok(result) }
}

/// A second descriptor of the same open file, so that nobody can close it under us.
pub(crate) fn duplicate(fd: &impl AsRawFd) -> Result<OwnedFd, OsError> {
    // SAFETY: F_DUPFD_CLOEXEC takes an int and touches no memory; a number that is no descriptor gives EBADF.
    let fd = checked(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: `fd` is the new descriptor that the kernel just returned, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// KVM_CHECK_EXTENSION, on /dev/kvm or a VM.
pub(crate) fn check_extension(fd: &impl AsRawFd, capability: u32) -> Result<bool, OsError> {
    // SAFETY: the argument is a number; KVM_CHECK_EXTENSION touches no memory of ours.
    let value = unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::c_ulong::from(abi::CHECK_EXTENSION),
            libc::c_ulong::from(capability),
        )
    };
    checked(value).map(|value| value > 0)
}

/// KVM_ENABLE_CAP of `KVM_CAP_X86_USER_SPACE_MSR`: which accesses that fail are handed to user space.
pub(crate) fn set_mask(vm: &OwnedFd, reasons: Reasons) -> Result<(), OsError> {
    let cap = EnableCap::mask(reasons).to_bytes();
    // SAFETY: KVM_ENABLE_CAP reads one `struct kvm_enable_cap`; `cap` is one, and lives over the call.
    let result = unsafe { libc::ioctl(vm.as_raw_fd(), libc::c_ulong::from(abi::ENABLE_CAP), cap.as_ptr()) };
    checked(result).map(drop)
}

/// KVM_X86_SET_MSR_FILTER. Replaces the filter as a whole, and has waited for every reader of the old one when it
/// returns.
pub(crate) fn set_filter(vm: &OwnedFd, filter: &Filter) -> Result<(), OsError> {
    let raw = RawFilter::of(filter, |range| range.bitmap().as_ptr().expose_provenance() as u64).to_bytes();
    // SAFETY: the kernel reads one `struct kvm_msr_filter`, and for each range `nmsrs` bits rounded up to whole longs from
    // `bitmap`, and writes nothing (`memdup_user` in `kvm_add_msr_filter`). `raw` is one and lives over the call; each
    // bitmap is borrowed from `filter`, which does too, and `FilterRange` holds exactly `nmsrs.div_ceil(64)` words. A slot
    // that is not used has `nmsrs` 0, and the kernel does not look at its pointer.
    let result = unsafe { libc::ioctl(vm.as_raw_fd(), libc::c_ulong::from(abi::SET_MSR_FILTER), raw.as_ptr()) };
    checked(result).map(drop)
}

/// Whether the descriptor is a vCPU's: KVM_GET_CPUID2, which nothing but a vCPU has, with room for no entry. Where the vCPU has
/// entries the kernel says so with E2BIG.
pub(crate) fn is_vcpu(fd: &OwnedFd) -> Result<(), OsError> {
    // `struct kvm_cpuid2` without entries: their number, and padding.
    let mut none = [0u32; 2];
    // SAFETY: KVM_GET_CPUID2 reads the number, writes as many entries as that says, which is none, and the number of those
    // that there are; `none` is that structure, and is borrowed for the call alone.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(abi::GET_CPUID2), none.as_mut_ptr()) };
    match checked(done) {
        Err(error) if error.errno() != libc::E2BIG => Err(error),
        _ => Ok(()),
    }
}

/// KVM_GET_MSRS of one MSR; `None` where the kernel does not give it.
pub(crate) fn get_msr(vcpu: &OwnedFd, msr: Msr) -> Option<u64> {
    let mut one = OneMsr { msr, value: 0 }.to_bytes();
    // SAFETY: KVM_GET_MSRS reads the header, then reads and writes as many entries behind it as that says; `one` is a
    // header that says one, and that entry, and is borrowed for the call alone.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), libc::c_ulong::from(abi::GET_MSRS), one.as_mut_ptr()) };
    (done == 1).then(|| OneMsr::from_bytes(&one).value)
}

/// KVM_SET_MSRS of one MSR; `None` where the kernel does not take it.
pub(crate) fn set_msr(vcpu: &OwnedFd, msr: Msr, value: u64) -> Option<()> {
    let one = OneMsr { msr, value }.to_bytes();
    // SAFETY: KVM_SET_MSRS reads the header and as many entries behind it as that says; `one` is a header that says one,
    // and that entry, and lives over the call.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), libc::c_ulong::from(abi::SET_MSRS), one.as_ptr()) };
    (done == 1).then_some(())
}

/// KVM_RUN.
pub(crate) fn run(vcpu: &OwnedFd) -> Result<(), OsError> {
    // SAFETY: KVM_RUN takes no argument. What the kernel writes it writes to the shared page, which the caller gives
    // up for the call, and to the guest's memory, which is the VMM's contract with KVM and not ours.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), libc::c_ulong::from(abi::RUN), 0) };
    checked(result).map(drop)
}
