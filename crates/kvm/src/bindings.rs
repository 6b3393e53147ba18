//! `msrgate_core::abi` against the kernel's headers, as kvm-bindings has them: where a number differs the tests do not compile.

use std::mem::{offset_of, size_of};

use kvm_bindings as kernel;
use kvm_bindings::{KVMIO, kvm_enable_cap, kvm_msr_entry, kvm_msr_filter, kvm_msr_filter_range, kvm_msrs, kvm_run};
use msrgate_core::abi::{self, kvm_run as field};
use msrgate_core::{Ops, Reason, Reasons};

/// `_IO(KVMIO, nr)`.
const fn io(nr: u32) -> u32 {
    KVMIO << 8 | nr
}

/// `_IOW(KVMIO, nr, type of that size)`.
const fn iow(nr: u32, size: usize) -> u32 {
    1 << 30 | (size as u32) << 16 | io(nr)
}

/// `_IOR(KVMIO, nr, type of that size)`.
const fn ior(nr: u32, size: usize) -> u32 {
    2 << 30 | (size as u32) << 16 | io(nr)
}

const _: () = {
    assert!(abi::CAP_X86_USER_SPACE_MSR == kernel::KVM_CAP_X86_USER_SPACE_MSR);
    assert!(abi::CAP_X86_MSR_FILTER == kernel::KVM_CAP_X86_MSR_FILTER);
    assert!(abi::EXIT_X86_RDMSR == kernel::KVM_EXIT_X86_RDMSR);
    assert!(abi::EXIT_X86_WRMSR == kernel::KVM_EXIT_X86_WRMSR);
    assert!(abi::EXIT_INTR == kernel::KVM_EXIT_INTR);
};

// Exit reasons and filters.
const _: () = {
    assert!(Reason::Invalid as u32 == kernel::KVM_MSR_EXIT_REASON_INVAL);
    assert!(Reason::Unknown as u32 == kernel::KVM_MSR_EXIT_REASON_UNKNOWN);
    assert!(Reason::Filter as u32 == kernel::KVM_MSR_EXIT_REASON_FILTER);
    assert!(abi::REASON_INVALID == kernel::KVM_MSR_EXIT_REASON_INVAL);
    assert!(abi::REASON_UNKNOWN == kernel::KVM_MSR_EXIT_REASON_UNKNOWN);
    assert!(abi::REASON_FILTER == kernel::KVM_MSR_EXIT_REASON_FILTER);
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
    assert!(offset_of!(kvm_msr_filter, flags) == 0);
    assert!(offset_of!(kvm_msr_filter_range, flags) == 0);
    assert!(offset_of!(kvm_msr_filter_range, nmsrs) == 4);
    assert!(offset_of!(kvm_msr_filter_range, base) == 8);
};

// Structures of other calls.
const _: () = {
    assert!(abi::EnableCap::BYTES == size_of::<kvm_enable_cap>());
    assert!(offset_of!(kvm_enable_cap, cap) == 0 && offset_of!(kvm_enable_cap, flags) == 4);
    assert!(offset_of!(kvm_enable_cap, args) == 8);
    assert!(abi::OneMsr::BYTES == size_of::<kvm_msrs>() + size_of::<kvm_msr_entry>());
    assert!(offset_of!(kvm_msrs, nmsrs) == 0 && offset_of!(kvm_msrs, entries) == 8);
    assert!(offset_of!(kvm_msr_entry, index) == 0 && offset_of!(kvm_msr_entry, data) == 8);
    assert!(abi::REGS_BYTES == size_of::<kernel::kvm_regs>());
    assert!(abi::REGS_RIP == offset_of!(kernel::kvm_regs, rip));
    assert!(abi::SREGS_BYTES == size_of::<kernel::kvm_sregs>());
};

// `struct kvm_run`.
const _: () = {
    assert!(field::IMMEDIATE_EXIT == offset_of!(kvm_run, immediate_exit));
    assert!(field::EXIT_REASON == offset_of!(kvm_run, exit_reason));
    assert!(field::FLAGS == offset_of!(kvm_run, flags));
    assert!(abi::RUN_X86_SMM as u32 == kernel::KVM_RUN_X86_SMM);
    assert!(abi::RUN_X86_GUEST_MODE as u32 == kernel::KVM_RUN_X86_GUEST_MODE);
    assert!(field::MSR == offset_of!(kvm_run, __bindgen_anon_1));
    assert!(field::VALID_REGS == offset_of!(kvm_run, kvm_valid_regs));
    assert!(field::DIRTY_REGS == offset_of!(kvm_run, kvm_dirty_regs));
    assert!(field::REGS == offset_of!(kvm_run, s));
    assert!(field::SYNC_REGS == kernel::KVM_SYNC_X86_REGS as u64);
};

// Requests.
const _: () = {
    assert!(abi::CREATE_VM == io(0x01));
    assert!(abi::CHECK_EXTENSION == io(0x03));
    assert!(abi::CREATE_VCPU == io(0x41));
    assert!(abi::RUN == io(0x80));
    assert!(abi::GET_REGS == ior(0x81, size_of::<kernel::kvm_regs>()));
    assert!(abi::GET_SREGS == ior(0x83, size_of::<kernel::kvm_sregs>()));
    assert!(abi::GET_MSRS == iow(0x88, size_of::<kvm_msrs>()) | 2 << 30);
    assert!(abi::SET_MSRS == iow(0x89, size_of::<kvm_msrs>()));
    assert!(abi::SET_CPUID == iow(0x8a, size_of::<kernel::kvm_cpuid>()));
    assert!(abi::GET_CPUID2 == 3 << 30 | (size_of::<kernel::kvm_cpuid2>() as u32) << 16 | io(0x91));
    assert!(abi::SET_CPUID2 == iow(0x90, size_of::<kernel::kvm_cpuid2>()));
    assert!(abi::SET_MP_STATE == iow(0x99, size_of::<kernel::kvm_mp_state>()));
    assert!(abi::ENABLE_CAP == iow(0xa3, size_of::<kvm_enable_cap>()));
    assert!(abi::GET_ONE_REG == iow(0xab, size_of::<kernel::kvm_one_reg>()));
    assert!(abi::SET_ONE_REG == iow(0xac, size_of::<kernel::kvm_one_reg>()));
    assert!(abi::SET_MSR_FILTER == iow(0xc6, size_of::<kvm_msr_filter>()));
    assert!(abi::GET_STATS_FD == io(0xce));
};
