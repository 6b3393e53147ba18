//! The calls on KVM's file descriptors.

#![expect(unsafe_code, reason = "system calls")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use kvm_bindings::{KVMIO, kvm_enable_cap, kvm_msr_entry, kvm_msr_filter, kvm_msr_filter_range, kvm_run};
use msrgate_core::{Filter, FilterRange, Msr, Reasons, Verdict, abi};

const KVM_RUN: u32 = KVMIO << 8 | 0x80;
/// `_IOWR(KVMIO, 0x88, struct kvm_msrs)`; the size is that of the header, the entries follow it.
const KVM_GET_MSRS: u32 = 0xc008_0000 | KVMIO << 8 | 0x88;
/// `_IOW(KVMIO, 0x89, struct kvm_msrs)`.
const KVM_SET_MSRS: u32 = 0x4008_0000 | KVMIO << 8 | 0x89;

const _: () = {
    use std::mem::{offset_of, size_of};

    use kvm_bindings as kernel;
    use msrgate_core::{Ops, Reason};

    assert!(abi::CAP_X86_USER_SPACE_MSR == kernel::KVM_CAP_X86_USER_SPACE_MSR);
    assert!(abi::CAP_X86_MSR_FILTER == kernel::KVM_CAP_X86_MSR_FILTER);
    assert!(abi::EXIT_X86_RDMSR == kernel::KVM_EXIT_X86_RDMSR);
    assert!(abi::EXIT_X86_WRMSR == kernel::KVM_EXIT_X86_WRMSR);
    assert!(abi::EXIT_INTR == kernel::KVM_EXIT_INTR);
    assert!(Reason::Invalid as u32 == kernel::KVM_MSR_EXIT_REASON_INVAL);
    assert!(Reason::Unknown as u32 == kernel::KVM_MSR_EXIT_REASON_UNKNOWN);
    assert!(Reason::Filter as u32 == kernel::KVM_MSR_EXIT_REASON_FILTER);
    assert!(Reasons::ALL.bits() == kernel::KVM_MSR_EXIT_REASON_VALID_MASK);
    assert!(Ops::READ.bits() == kernel::KVM_MSR_FILTER_READ);
    assert!(Ops::WRITE.bits() == kernel::KVM_MSR_FILTER_WRITE);
    assert!(abi::FILTER_DEFAULT_DENY == kernel::KVM_MSR_FILTER_DEFAULT_DENY);
    assert!(abi::MAX_RANGES == kernel::KVM_MSR_FILTER_MAX_RANGES as usize);
    assert!(abi::MAX_BITMAP_BYTES == kernel::KVM_MSR_FILTER_MAX_BITMAP_SIZE);
    assert!(abi::Layout::NATIVE.filter_size == size_of::<kvm_msr_filter>());
    assert!(abi::Layout::NATIVE.ranges == offset_of!(kvm_msr_filter, ranges));
    assert!(abi::Layout::NATIVE.range_size == size_of::<kvm_msr_filter_range>());
    assert!(abi::Layout::NATIVE.bitmap == offset_of!(kvm_msr_filter_range, bitmap));
    assert!(offset_of!(kvm_msr_filter_range, flags) == 0);
    assert!(offset_of!(kvm_msr_filter_range, nmsrs) == 4);
    assert!(offset_of!(kvm_msr_filter_range, base) == 8);
    assert!(offset_of!(kvm_run, exit_reason) == 8);
    assert!(offset_of!(kvm_run, __bindgen_anon_1) == 32);
    // `_IOW`: direction 1 in bits 31:30, the size in 29:16.
    assert!(abi::SET_MSR_FILTER == 1 << 30 | (size_of::<kvm_msr_filter>() as u32) << 16 | KVMIO << 8 | 0xc6);
    assert!(abi::ENABLE_CAP == 1 << 30 | (size_of::<kvm_enable_cap>() as u32) << 16 | KVMIO << 8 | 0xa3);
    assert!(abi::CHECK_EXTENSION == KVMIO << 8 | 0x03);
    assert!(size_of::<OneMsr>() == 24 && offset_of!(OneMsr, entry) == 8);
};

/// `struct kvm_msrs` with room for one entry.
#[repr(C)]
struct OneMsr {
    nmsrs: u32,
    pad: u32,
    entry: kvm_msr_entry,
}

impl OneMsr {
    fn new(msr: Msr, data: u64) -> OneMsr {
        OneMsr {
            nmsrs: 1,
            pad: 0,
            entry: kvm_msr_entry {
                index: msr.0,
                reserved: 0,
                data,
            },
        }
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A second descriptor of the same open file, so that nobody can close it under us.
pub(crate) fn duplicate(fd: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes an int and touches no memory; a number that is no descriptor gives EBADF.
    let fd = checked(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: `fd` is the new descriptor that the kernel just returned, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// KVM_CHECK_EXTENSION, on /dev/kvm or a VM.
pub(crate) fn check_extension(fd: &impl AsRawFd, capability: u32) -> io::Result<bool> {
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
pub(crate) fn set_mask(vm: &OwnedFd, reasons: Reasons) -> io::Result<()> {
    let cap = kvm_enable_cap {
        cap: abi::CAP_X86_USER_SPACE_MSR,
        args: [u64::from(reasons.bits()), 0, 0, 0],
        ..Default::default()
    };
    // SAFETY: KVM_ENABLE_CAP reads one `struct kvm_enable_cap`, whose size the asserts above compare with the request's;
    // `cap` is one and lives over the call.
    let result = unsafe { libc::ioctl(vm.as_raw_fd(), libc::c_ulong::from(abi::ENABLE_CAP), &raw const cap) };
    checked(result).map(drop)
}

fn raw_range(range: &FilterRange) -> kvm_msr_filter_range {
    kvm_msr_filter_range {
        flags: range.ops().bits(),
        nmsrs: range.nmsrs(),
        base: range.base(),
        // The kernel only reads through it (`memdup_user` in `kvm_add_msr_filter`).
        bitmap: range.bitmap().as_ptr().cast::<u8>().cast_mut(),
    }
}

/// KVM_X86_SET_MSR_FILTER. Replaces the filter as a whole, and has waited for every reader of the old one when it
/// returns.
pub(crate) fn set_filter(vm: &OwnedFd, filter: &Filter) -> io::Result<()> {
    let mut raw = kvm_msr_filter {
        flags: match filter.default_verdict() {
            Verdict::Allow => 0,
            Verdict::Deny => abi::FILTER_DEFAULT_DENY,
        },
        ..Default::default()
    };
    for (slot, range) in raw.ranges.iter_mut().zip(filter.ranges()) {
        *slot = raw_range(range);
    }
    // SAFETY: the kernel reads one `struct kvm_msr_filter` (the asserts above compare its size with the request's), and
    // for each range `nmsrs` bits rounded up to whole longs from `bitmap`. `raw` lives over the call; each bitmap is
    // borrowed from `filter`, which does too, and `FilterRange` holds exactly `nmsrs.div_ceil(64)` words. A slot that
    // is not used has `nmsrs` 0, and the kernel does not look at its pointer.
    let result = unsafe { libc::ioctl(vm.as_raw_fd(), libc::c_ulong::from(abi::SET_MSR_FILTER), &raw const raw) };
    checked(result).map(drop)
}

/// KVM_GET_MSRS of one MSR; `None` where the kernel does not give it.
pub(crate) fn get_msr(vcpu: &OwnedFd, msr: Msr) -> Option<u64> {
    let mut one = OneMsr::new(msr, 0);
    // SAFETY: KVM_GET_MSRS reads the header, then reads and writes `nmsrs` entries behind it; `one` is a header and one
    // entry in the kernel's layout (asserted above), `nmsrs` is 1, and it is borrowed for the call alone.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), libc::c_ulong::from(KVM_GET_MSRS), &raw mut one) };
    (done == 1).then_some(one.entry.data)
}

/// KVM_SET_MSRS of one MSR; `None` where the kernel does not take it.
pub(crate) fn set_msr(vcpu: &OwnedFd, msr: Msr, value: u64) -> Option<()> {
    let one = OneMsr::new(msr, value);
    // SAFETY: KVM_SET_MSRS reads the header and `nmsrs` entries behind it; `one` is a header and one entry in the
    // kernel's layout (asserted above), `nmsrs` is 1, and it lives over the call.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), libc::c_ulong::from(KVM_SET_MSRS), &raw const one) };
    (done == 1).then_some(())
}

/// KVM_RUN.
pub(crate) fn run(vcpu: &OwnedFd) -> io::Result<()> {
    // SAFETY: KVM_RUN takes no argument. What the kernel writes it writes to the shared page, which the caller gives
    // up for the call, and to the guest's memory, which is the VMM's contract with KVM and not ours.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), libc::c_ulong::from(KVM_RUN), 0) };
    checked(result).map(drop)
}
