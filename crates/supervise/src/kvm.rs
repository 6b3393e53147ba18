//! The calls of KVM's interface that matter here, as the kernel takes them: the lower 32 bits of the request
//! (`include/uapi/linux/kvm.h`, `arch/x86/include/uapi/asm/kvm.h`).

pub(crate) use msrgate_core::abi::{ENABLE_CAP, SET_MSR_FILTER};

/// `_IO(KVMIO, 0x01)`.
pub(crate) const CREATE_VM: u32 = 0xae01;
/// `_IO(KVMIO, 0x41)`.
pub(crate) const CREATE_VCPU: u32 = 0xae41;
/// `_IO(KVMIO, 0x80)`.
pub(crate) const RUN: u32 = 0xae80;
/// `_IOR(KVMIO, 0x81, struct kvm_regs)`.
pub(crate) const GET_REGS: u32 = 0x8090_ae81;
/// `_IOR(KVMIO, 0x83, struct kvm_sregs)`.
pub(crate) const GET_SREGS: u32 = 0x8138_ae83;
/// `_IOWR(KVMIO, 0x88, struct kvm_msrs)`; the size is that of the header.
pub(crate) const GET_MSRS: u32 = 0xc008_ae88;
/// `_IOW(KVMIO, 0x89, struct kvm_msrs)`.
pub(crate) const SET_MSRS: u32 = 0x4008_ae89;
/// `_IOW(KVMIO, 0x8a, struct kvm_cpuid)`; the size is that of the header.
pub(crate) const SET_CPUID: u32 = 0x4008_ae8a;
/// `_IOW(KVMIO, 0x90, struct kvm_cpuid2)`.
pub(crate) const SET_CPUID2: u32 = 0x4008_ae90;
/// `_IOW(KVMIO, 0x99, struct kvm_mp_state)`.
pub(crate) const SET_MP_STATE: u32 = 0x4004_ae99;
/// `_IOW(KVMIO, 0xab, struct kvm_one_reg)`, which newer kernels take for MSRs too.
pub(crate) const GET_ONE_REG: u32 = 0x4010_aeab;
/// `_IOW(KVMIO, 0xac, struct kvm_one_reg)`.
pub(crate) const SET_ONE_REG: u32 = 0x4010_aeac;
/// Bytes of `struct kvm_enable_cap`.
pub(crate) const ENABLE_CAP_BYTES: usize = 104;
/// `KVM_MAX_CPUID_ENTRIES`.
pub(crate) const MAX_CPUID_ENTRIES: usize = 256;
/// Bytes of `struct kvm_sregs`.
pub(crate) const SREGS_BYTES: usize = 0x138;
