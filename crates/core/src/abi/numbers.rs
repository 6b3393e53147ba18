// Numbers alone: the answerer, which is built by itself, takes this file as it is.

/// `KVM_CAP_X86_USER_SPACE_MSR`: a VM capability; its argument is the mask of reasons handed to user space.
pub const CAP_X86_USER_SPACE_MSR: u32 = 188;
/// `KVM_CAP_X86_MSR_FILTER`: present where the filter is; cannot be enabled.
pub const CAP_X86_MSR_FILTER: u32 = 189;

/// `KVM_CREATE_VM`.
pub const CREATE_VM: u32 = 0xae01;
/// `KVM_CHECK_EXTENSION`.
pub const CHECK_EXTENSION: u32 = 0xae03;
/// `KVM_CREATE_VCPU`.
pub const CREATE_VCPU: u32 = 0xae41;
/// `KVM_RUN`.
pub const RUN: u32 = 0xae80;
/// `KVM_GET_REGS`.
pub const GET_REGS: u32 = 0x8090_ae81;
/// `KVM_GET_SREGS`.
pub const GET_SREGS: u32 = 0x8138_ae83;
/// `KVM_GET_MSRS`; its size is that of the header, which the entries follow.
pub const GET_MSRS: u32 = 0xc008_ae88;
/// `KVM_SET_MSRS`.
pub const SET_MSRS: u32 = 0x4008_ae89;
/// `KVM_SET_CPUID`; its size is that of the header, which the entries follow.
pub const SET_CPUID: u32 = 0x4008_ae8a;
/// `KVM_SET_CPUID2`.
pub const SET_CPUID2: u32 = 0x4008_ae90;
/// `KVM_GET_CPUID2`.
pub const GET_CPUID2: u32 = 0xc008_ae91;
/// `KVM_SET_MP_STATE`.
pub const SET_MP_STATE: u32 = 0x4004_ae99;
/// `KVM_ENABLE_CAP`.
pub const ENABLE_CAP: u32 = 0x4068_aea3;
/// `KVM_GET_ONE_REG`, which newer kernels take for MSRs too.
pub const GET_ONE_REG: u32 = 0x4010_aeab;
/// `KVM_SET_ONE_REG`.
pub const SET_ONE_REG: u32 = 0x4010_aeac;
/// `KVM_X86_SET_MSR_FILTER` of a 64-bit process.
pub const SET_MSR_FILTER: u32 = 0x4188_aec6;
/// `KVM_X86_SET_MSR_FILTER` of a 32-bit process on a 64-bit kernel.
pub const SET_MSR_FILTER_COMPAT: u32 = 0x4104_aec6;
/// `KVM_GET_STATS_FD`.
pub const GET_STATS_FD: u32 = 0xaece;

/// `KVM_EXIT_INTR`.
pub const EXIT_INTR: u32 = 10;
/// `KVM_EXIT_X86_RDMSR`.
pub const EXIT_X86_RDMSR: u32 = 29;
/// `KVM_EXIT_X86_WRMSR`.
pub const EXIT_X86_WRMSR: u32 = 30;

/// `KVM_MSR_EXIT_REASON_INVAL`.
pub const REASON_INVALID: u32 = 1;
/// `KVM_MSR_EXIT_REASON_UNKNOWN`.
pub const REASON_UNKNOWN: u32 = 2;
/// `KVM_MSR_EXIT_REASON_FILTER`.
pub const REASON_FILTER: u32 = 4;

/// `KVM_RUN_X86_SMM`, in `kvm_run.flags`.
pub const RUN_X86_SMM: u16 = 1;
/// `KVM_RUN_X86_GUEST_MODE`, in `kvm_run.flags` from Linux 6.11 on.
pub const RUN_X86_GUEST_MODE: u16 = 4;

/// `MAX_IO_MSRS`: KVM_GET_MSRS and KVM_SET_MSRS take fewer entries.
pub const MAX_IO_MSRS: u32 = 256;
/// `KVM_MSR_FILTER_MAX_RANGES`.
pub const MAX_RANGES: usize = 16;
/// `KVM_MSR_FILTER_MAX_BITMAP_SIZE`: bytes of one range's bitmap.
pub const MAX_BITMAP_BYTES: u32 = 0x600;
/// MSRs that one range's bitmap can hold.
pub const MAX_RANGE_MSRS: u32 = MAX_BITMAP_BYTES * 8;
/// `KVM_MSR_FILTER_DEFAULT_DENY` in the filter's `flags`.
pub const FILTER_DEFAULT_DENY: u32 = 1;

/// Bytes of `struct kvm_regs`: sixteen general registers, RIP, RFLAGS.
pub const REGS_BYTES: usize = 144;
/// Where RIP is in it.
pub const REGS_RIP: usize = 128;
/// Bytes of `struct kvm_sregs`, whose first field is CS.
pub const SREGS_BYTES: usize = 0x138;

/// Where the fields of `struct kvm_run` are, in bytes.
pub mod kvm_run {
    /// `immediate_exit`, one byte.
    pub const IMMEDIATE_EXIT: usize = 1;
    /// `exit_reason`.
    pub const EXIT_REASON: usize = 8;
    /// `flags`, two bytes.
    pub const FLAGS: usize = 14;
    /// `msr`, of an exit of an MSR.
    pub const MSR: usize = 32;
    /// `msr.error`, one byte: the guest gets #GP where it is not 0.
    pub const ERROR: usize = MSR;
    /// `msr.reason`.
    pub const REASON: usize = MSR + 8;
    /// `msr.index`.
    pub const INDEX: usize = MSR + 12;
    /// `msr.data`.
    pub const DATA: usize = MSR + 16;
    /// Bytes of `msr`.
    pub const MSR_BYTES: usize = 24;
    /// `kvm_valid_regs`.
    pub const VALID_REGS: usize = 288;
    /// `kvm_dirty_regs`.
    pub const DIRTY_REGS: usize = 296;
    /// `s.regs.regs`, a `struct kvm_regs`.
    pub const REGS: usize = 304;
    /// `KVM_SYNC_X86_REGS`, in `kvm_valid_regs` and `kvm_dirty_regs`.
    pub const SYNC_REGS: u64 = 1;
}
