//! What the calls take. Most of it is in the cases of `testdata/cases`; here is what takes loops.

use kvm_ioctls::Kvm;
use msrgate_core::{Ops, abi};
use msrgate_guest::raw::{Arena, Caller, Request};
use msrgate_suite::{Call, RawRange, Target};

use super::hypervisor::{
    Came, Descriptor, EFAULT, EINVAL, FILTER, SYSENTER_CS, UNKNOWN, UNKNOWN_MSR, everywhere, on_the_kernel,
};
use super::raw_filter::{self, placed, set_filter};

fn range(flags: u32, nmsrs: u32, base: u32) -> RawRange {
    raw_filter::range(flags, nmsrs, base, vec![0; 16])
}

#[test]
fn of_the_bits_of_the_mask_only_the_lowest_three_are_taken() {
    everywhere(|vm| {
        for bit in 0..64 {
            let expected = if bit < 3 { Ok(()) } else { Err(EINVAL) };
            assert_eq!(vm.mask(1 << bit), expected, "bit {bit}");
        }
    });
}

#[test]
fn of_the_bits_of_the_capabilitys_flags_none_is_taken() {
    everywhere(|vm| {
        for bit in 0..32 {
            let mut call = Call::enable_cap(FILTER);
            if let Target::EnableCap { flags, .. } = &mut call.target {
                *flags = 1 << bit;
            }
            assert_eq!(vm.make(Request::EnableCap, &call), Err(EINVAL), "bit {bit}");
        }
    });
}

#[test]
fn of_the_bits_of_the_filters_flags_only_the_lowest_is_taken() {
    everywhere(|vm| {
        for bit in 0..32 {
            let expected = if bit < 1 { Ok(()) } else { Err(EINVAL) };
            assert_eq!(vm.set_filter(1 << bit, &[range(3, 1, 0)]), expected, "bit {bit}");
        }
    });
}

#[test]
fn of_the_bits_of_a_ranges_flags_only_the_lowest_two_are_taken() {
    everywhere(|vm| {
        for bit in 0..32 {
            let expected = if bit < 2 { Ok(()) } else { Err(EINVAL) };
            assert_eq!(vm.set_filter(0, &[range(1 << bit, 1, 0)]), expected, "bit {bit}");
        }
    });
}

#[test]
fn every_slot_is_checked_and_the_first_at_fault_decides() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        for slot in 0..abi::MAX_RANGES {
            let mut ranges = vec![range(3, 1, UNKNOWN.0); abi::MAX_RANGES];
            ranges[slot].nmsrs = 12289;
            assert_eq!(vm.set_filter(0, &ranges), Err(EINVAL), "slot {slot}");
            // And with a slot behind it that has another error.
            let (mut arena, argp) = placed(&set_filter(0, ranges));
            if let Some(pointer) = (slot + 1 < abi::MAX_RANGES).then_some(8 + 24 * (slot + 1) + 16) {
                arena.page(0).unwrap()[pointer..pointer + 8].fill(0);
                let calls = vm.calls();
                let result = calls.call(Descriptor::Vm, Request::SetMsrFilter, argp, &arena);
                assert_eq!(result, Err(EINVAL), "slot {slot}");
            }
        }
        // None of them is in force.
        assert_eq!(vm.read(SYSENTER_CS).reason(), 4);
        assert_eq!(vm.read(UNKNOWN), Came::Fault);
    });
}

#[test]
fn every_structure_that_lacks_a_readable_byte_is_efault() {
    everywhere(|vm| {
        // Its last bytes are on the page's last ones; then each start behind that lacks some.
        for (request, len) in [(Request::SetMsrFilter, 392), (Request::EnableCap, 104)] {
            let arena = Arena::new(1).unwrap();
            let end = arena.address(0).unwrap() + 0x1000;
            let calls = vm.calls();
            for missing in [1, 2, 8, len / 2, len - 1, len] {
                let result = calls.call(Descriptor::Vm, request, end - len + missing, &arena);
                assert_eq!(result, Err(EFAULT), "{request:?}, {missing}");
            }
            // A structure of zeros: an empty filter, and a capability that no kernel has.
            let whole = match request {
                Request::SetMsrFilter => Ok(()),
                _ => Err(EINVAL),
            };
            assert_eq!(calls.call(Descriptor::Vm, request, end - len, &arena), whole);
        }
    });
}

#[test]
fn a_filter_is_taken_before_a_vcpu_exists_and_after() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        vm.another_vcpu();
        assert_eq!(vm.read(SYSENTER_CS).reason(), 4);
        vm.deny(Ops::BOTH, &[UNKNOWN]);
        assert!(matches!(vm.read(SYSENTER_CS), Came::Done { .. }));
        assert_eq!(vm.read(UNKNOWN).reason(), 4);
    });
    on_the_kernel(|_| {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        let caller = Caller::of(&vm).unwrap();
        let (_arena, argp) = placed(&set_filter(0, [range(3, 1, 0)]));
        caller.call(Request::SetMsrFilter, argp).unwrap();
    });
}

#[test]
fn a_mask_may_be_changed_any_number_of_times() {
    everywhere(|vm| {
        for round in 0..20 {
            vm.mask(UNKNOWN_MSR * (round % 2)).unwrap();
            let expected = 2 * (round % 2) as u32;
            assert_eq!(vm.read(UNKNOWN).reason(), expected, "round {round}");
        }
    });
}
