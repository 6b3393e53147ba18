//! Numbers and layouts of the kernel's interface (`include/uapi/linux/kvm.h`, `arch/x86/include/uapi/asm/kvm.h`).

/// `KVM_CAP_X86_USER_SPACE_MSR`: a VM capability; its argument is the mask of [`crate::Reasons`] handed to user space.
pub const CAP_X86_USER_SPACE_MSR: u32 = 188;
/// `KVM_CAP_X86_MSR_FILTER`: present where the filter is; cannot be enabled.
pub const CAP_X86_MSR_FILTER: u32 = 189;
/// `KVM_X86_SET_MSR_FILTER` of a 64-bit process.
pub const SET_MSR_FILTER: u32 = 0x4188_aec6;
/// `KVM_X86_SET_MSR_FILTER` of a 32-bit process on a 64-bit kernel.
pub const SET_MSR_FILTER_COMPAT: u32 = 0x4104_aec6;
/// `KVM_ENABLE_CAP`.
pub const ENABLE_CAP: u32 = 0x4068_aea3;
/// `KVM_CHECK_EXTENSION`.
pub const CHECK_EXTENSION: u32 = 0xae03;
/// `KVM_EXIT_X86_RDMSR`.
pub const EXIT_X86_RDMSR: u32 = 29;
/// `KVM_EXIT_X86_WRMSR`.
pub const EXIT_X86_WRMSR: u32 = 30;
/// `KVM_EXIT_INTR`.
pub const EXIT_INTR: u32 = 10;

/// `KVM_MSR_FILTER_MAX_RANGES`.
pub const MAX_RANGES: usize = 16;
/// `KVM_MSR_FILTER_MAX_BITMAP_SIZE`: bytes of one range's bitmap.
pub const MAX_BITMAP_BYTES: u32 = 0x600;
/// MSRs that one range's bitmap can hold.
pub const MAX_RANGE_MSRS: u32 = MAX_BITMAP_BYTES * 8;

/// `KVM_MSR_FILTER_DEFAULT_DENY` in the filter's `flags`.
pub const FILTER_DEFAULT_DENY: u32 = 1;

/// The two layouts of `struct kvm_msr_filter`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Bytes of the whole structure.
    pub filter_size: usize,
    /// Offset of the first range.
    pub ranges: usize,
    /// Bytes of one range.
    pub range_size: usize,
    /// Offset of the bitmap pointer in a range; `flags`, `nmsrs` and `base` lie at 0, 4 and 8 in both layouts.
    pub bitmap: usize,
    /// Bytes of the bitmap pointer.
    pub pointer_size: usize,
}

impl Layout {
    /// A 64-bit process: 392 bytes.
    pub const NATIVE: Layout = Layout {
        filter_size: 392,
        ranges: 8,
        range_size: 24,
        bitmap: 16,
        pointer_size: 8,
    };
    /// A 32-bit process: 260 bytes.
    pub const COMPAT: Layout = Layout {
        filter_size: 260,
        ranges: 4,
        range_size: 16,
        bitmap: 12,
        pointer_size: 4,
    };
}

const _: () = assert!(Layout::NATIVE.ranges + MAX_RANGES * Layout::NATIVE.range_size == Layout::NATIVE.filter_size);
const _: () = assert!(Layout::COMPAT.ranges + MAX_RANGES * Layout::COMPAT.range_size == Layout::COMPAT.filter_size);
const _: () = assert!(MAX_RANGE_MSRS == 12288);
