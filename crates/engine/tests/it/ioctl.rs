//! KVM_ENABLE_CAP, KVM_CHECK_EXTENSION, and which descriptor of which process takes which request.

use msrgate_core::abi::{self, Layout};
use msrgate_core::{Reason, Reasons};
use msrgate_engine::{Caller, Descriptor, Errno, Process as Kind, Profile, Vm};

use crate::process::*;

/// A `struct kvm_enable_cap` whose unused arguments and padding are all ones.
fn capability(cap: u32, flags: u32, mask: u64) -> Vec<u8> {
    let mut bytes = vec![0xff; 104];
    bytes[..4].copy_from_slice(&cap.to_le_bytes());
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..16].copy_from_slice(&mask.to_le_bytes());
    bytes
}

#[track_caller]
fn check_cap(profile: Profile, bytes: &[u8], expected: Result<Reasons, Errno>) {
    let vm = Vm::new().with_profile(profile);
    vm.set_reasons(Reasons::of(Reason::Unknown));
    let process = Process::new().map(ARGP, bytes);
    let result = vm.ioctl(abi::ENABLE_CAP, ARGP, &process, Caller::NATIVE);
    assert_eq!(result, expected.map(|_| 0));
    let left = expected.unwrap_or(Reasons::of(Reason::Unknown));
    assert_eq!(vm.reasons(), left, "a refused mask changes nothing");
}

#[test]
fn a_mask_is_accepted_where_all_its_64_bits_are_known() {
    for bit in 0..64 {
        let mask = 1u64 << bit;
        let expected = Reasons::from_bits(mask).ok_or(Errno::Einval);
        assert_eq!(expected.is_ok(), bit < 3);
        check_cap(Profile::NEWEST, &capability(188, 0, mask), expected);
        check_cap(
            Profile::NEWEST,
            &capability(188, 0, mask | 4),
            expected.map(|r| r.union(Reasons::of(Reason::Filter))),
        );
    }
}

#[test]
fn a_mask_of_zero_turns_deflection_off() {
    check_cap(Profile::NEWEST, &capability(188, 0, 0), Ok(Reasons::NONE));
}

#[test]
fn the_other_arguments_and_the_padding_do_not_count() {
    check_cap(Profile::NEWEST, &capability(188, 0, 7), Ok(Reasons::ALL));
}

#[test]
fn flags_of_a_capability_must_be_zero() {
    for bit in 0..32 {
        check_cap(Profile::NEWEST, &capability(188, 1 << bit, 7), Err(Errno::Einval));
        check_cap(Profile::V5_10, &capability(188, 1 << bit, 7), Err(Errno::Einval));
    }
}

#[test]
fn an_unreadable_capability_is_efault() {
    check_cap(Profile::NEWEST, &capability(188, 1, !0)[..103], Err(Errno::Efault));
}

#[test]
fn only_the_mask_of_exit_reasons_can_be_enabled() {
    for cap in [0, 187, abi::CAP_X86_MSR_FILTER, 190, !0] {
        check_cap(Profile::NEWEST, &capability(cap, 0, 0), Err(Errno::Einval));
    }
}

#[test]
fn before_5_19_a_mask_was_cut_to_32_bits_and_its_unknown_bits_were_kept_without_effect() {
    check_cap(Profile::V5_10, &capability(188, 0, !0), Ok(Reasons::ALL));
    check_cap(Profile::V5_10, &capability(188, 0, 1 << 32), Ok(Reasons::NONE));
    check_cap(
        Profile::V5_10,
        &capability(188, 0, 0x8000_0004),
        Ok(Reasons::of(Reason::Filter)),
    );
    check_cap(Profile::V5_18, &capability(188, 0, 8), Ok(Reasons::NONE));
    check_cap(Profile::V5_19, &capability(188, 0, 8), Err(Errno::Einval));
}

#[test]
fn both_capabilities_are_present_on_the_system_and_on_a_vm() {
    let vm = Vm::new();
    for descriptor in [Descriptor::System, Descriptor::Vm] {
        let caller = Caller::new(Kind::Native, descriptor);
        for (cap, expected) in [(188, 1), (189, 1), (187, 0), (190, 0), ((1 << 32) + 188, 0)] {
            let result = vm.ioctl(abi::CHECK_EXTENSION, cap, &Process::new(), caller);
            assert_eq!(result, Ok(expected), "{cap}");
        }
    }
}

/// A process with an empty filter at `ARGP` that suits both layouts.
fn process() -> Process {
    Process::new().map(ARGP, RawFilter::default().to_bytes(Layout::NATIVE))
}

#[track_caller]
fn check_request(profile: Profile, caller: Caller, request: u32, expected: Result<u32, Errno>) {
    let vm = Vm::new().with_profile(profile);
    assert_eq!(vm.ioctl(request, ARGP, &process(), caller), expected);
}

#[test]
fn a_64_bit_process_has_the_native_number_only() {
    check_request(Profile::NEWEST, Caller::NATIVE, abi::SET_MSR_FILTER, Ok(0));
    check_request(
        Profile::NEWEST,
        Caller::NATIVE,
        abi::SET_MSR_FILTER_COMPAT,
        Err(Errno::Enotty),
    );
}

#[test]
fn a_32_bit_process_has_both_numbers() {
    check_request(Profile::NEWEST, Caller::COMPAT, abi::SET_MSR_FILTER, Ok(0));
    check_request(Profile::NEWEST, Caller::COMPAT, abi::SET_MSR_FILTER_COMPAT, Ok(0));
}

#[test]
fn before_6_1_a_32_bit_process_had_the_native_number_only() {
    check_request(Profile::V5_19, Caller::COMPAT, abi::SET_MSR_FILTER, Ok(0));
    check_request(
        Profile::V5_19,
        Caller::COMPAT,
        abi::SET_MSR_FILTER_COMPAT,
        Err(Errno::Enotty),
    );
    check_request(Profile::V6_1, Caller::COMPAT, abi::SET_MSR_FILTER_COMPAT, Ok(0));
}

#[test]
fn the_number_chooses_the_layout() {
    for (request, size) in [(abi::SET_MSR_FILTER, 392), (abi::SET_MSR_FILTER_COMPAT, 260)] {
        let process = process();
        Vm::new().ioctl(request, ARGP, &process, Caller::COMPAT).unwrap();
        assert_eq!(*process.reads.borrow(), [(ARGP, size)]);
    }
}

#[test]
fn an_unknown_request_on_a_vm_is_enotty() {
    for request in [0, 0xae80, 0x4188_aec5, 0xc188_aec6] {
        check_request(Profile::NEWEST, Caller::NATIVE, request, Err(Errno::Enotty));
    }
}

#[test]
fn the_system_and_a_vcpu_refuse_the_requests_of_a_vm() {
    for process in [Kind::Native, Kind::Compat] {
        for descriptor in [Descriptor::System, Descriptor::Vcpu] {
            for request in [abi::SET_MSR_FILTER, abi::SET_MSR_FILTER_COMPAT, abi::ENABLE_CAP] {
                let caller = Caller::new(process, descriptor);
                check_request(Profile::NEWEST, caller, request, Err(Errno::Einval));
            }
        }
    }
}

#[test]
fn a_vcpu_copies_a_capability_before_it_refuses_it() {
    let caller = Caller::new(Kind::Native, Descriptor::Vcpu);
    let result = Vm::new().ioctl(abi::ENABLE_CAP, WILD, &Process::new(), caller);
    assert_eq!(result, Err(Errno::Efault));
}

#[test]
fn a_dead_vm_answers_no_request_but_the_system_does() {
    let vm = Vm::new();
    vm.kill();
    for descriptor in [Descriptor::Vm, Descriptor::Vcpu] {
        for request in [abi::SET_MSR_FILTER, abi::ENABLE_CAP, abi::CHECK_EXTENSION, 0] {
            let caller = Caller::new(Kind::Native, descriptor);
            assert_eq!(vm.ioctl(request, ARGP, &process(), caller), Err(Errno::Eio));
        }
    }
    let caller = Caller::new(Kind::Native, Descriptor::System);
    assert_eq!(vm.ioctl(abi::CHECK_EXTENSION, 188, &process(), caller), Ok(1));
}

#[test]
fn errors_have_linux_numbers() {
    let numbers = [
        Errno::Eintr,
        Errno::Eio,
        Errno::Enomem,
        Errno::Efault,
        Errno::Einval,
        Errno::Enotty,
    ];
    assert_eq!(numbers.map(|errno| errno as i32), [4, 5, 12, 14, 22, 25]);
}
