//! KVM_X86_SET_MSR_FILTER: which structures are refused, with which error, and what a call leaves behind.

use msrgate_core::abi::Layout;
use msrgate_core::{Msr, Op, Verdict};
use msrgate_engine::{Errno, Origin, Profile, Vm};

use crate::process::*;

/// Makes the call in both layouts on a VM that denies 0x1 alone, and sees that a refused call changes nothing.
#[track_caller]
fn check(filter: RawFilter, expected: Result<(), Errno>) {
    check_on(Profile::NEWEST, filter, expected);
}

#[track_caller]
fn check_on(profile: Profile, filter: RawFilter, expected: Result<(), Errno>) {
    for layout in LAYOUTS {
        let vm = vm_that_denies_one().with_profile(profile);
        assert_eq!(
            Process::new().set_msr_filter(&vm, layout, filter),
            expected,
            "{layout:?}"
        );
        if expected.is_err() {
            assert_eq!(verdict(&vm, 1, Op::Read), Verdict::Deny, "the old filter is gone");
            assert_eq!(verdict(&vm, 2, Op::Read), Verdict::Allow, "the old filter is gone");
        }
    }
}

fn vm_that_denies_one() -> Vm {
    let vm = Vm::new();
    let old = RawFilter::new(0, &[range(BOTH, 1, 1, ZEROS)]);
    Process::new().set_msr_filter(&vm, Layout::NATIVE, old).unwrap();
    vm
}

fn verdict(vm: &Vm, msr: u32, op: Op) -> Verdict {
    vm.allows(Origin::Instruction, Msr(msr), op)
}

// The order of the checks.

#[test]
fn a_dead_vm_fails_before_the_structure_is_read() {
    let vm = Vm::new();
    vm.kill();
    let process = Process::new();
    assert_eq!(vm.set_msr_filter(WILD, Layout::NATIVE, &process), Err(Errno::Eio));
    assert_eq!(vm.enable_cap(WILD, &process), Err(Errno::Eio));
    assert!(process.reads.borrow().is_empty());
}

#[test]
fn an_unreadable_structure_is_efault_and_null_is_not_special() {
    for layout in LAYOUTS {
        let vm = vm_that_denies_one();
        for argp in [WILD, 0, u64::MAX] {
            assert_eq!(vm.set_msr_filter(argp, layout, &Process::new()), Err(Errno::Efault));
        }
        assert_eq!(verdict(&vm, 1, Op::Read), Verdict::Deny);
        let at_null = Process::new().map(0, RawFilter::default().to_bytes(layout));
        assert_eq!(vm.set_msr_filter(0, layout, &at_null), Ok(()));
    }
}

#[test]
fn a_structure_that_lacks_its_last_byte_is_efault() {
    for layout in LAYOUTS {
        let bytes = RawFilter::default().to_bytes(layout);
        assert_eq!(bytes.len(), layout.filter_size);
        let short = Process::new().map(ARGP, &bytes[1..]);
        assert_eq!(Vm::new().set_msr_filter(ARGP, layout, &short), Err(Errno::Efault));
        let exact = Process::new().map(ARGP, bytes);
        assert_eq!(Vm::new().set_msr_filter(ARGP, layout, &exact), Ok(()));
        assert_eq!(*exact.reads.borrow(), [(ARGP, layout.filter_size)]);
    }
}

#[test]
fn an_unreadable_structure_comes_before_everything_it_may_say() {
    let mut bytes = RawFilter::new(!0, &[]).to_bytes(Layout::NATIVE);
    bytes.pop();
    let process = Process::new().map(ARGP, bytes);
    assert_eq!(
        Vm::new().set_msr_filter(ARGP, Layout::NATIVE, &process),
        Err(Errno::Efault)
    );
}

#[test]
fn each_unknown_filter_flag_is_einval() {
    for bit in 0..32 {
        let expected = if bit == 0 { Ok(()) } else { Err(Errno::Einval) };
        check(RawFilter::new(1 << bit, &[range(BOTH, 0, 1, ONES)]), expected);
    }
}

#[test]
fn unknown_filter_flags_come_before_an_unreadable_bitmap() {
    check(RawFilter::new(2, &[range(BOTH, 0, 1, WILD)]), Err(Errno::Einval));
}

#[test]
fn unknown_filter_flags_were_accepted_before_5_19() {
    let filter = RawFilter::new(!0, &[range(BOTH, 0, 1, ONES)]);
    for profile in [Profile::V5_10, Profile::V5_12, Profile::V5_13, Profile::V5_18] {
        check_on(profile, filter, Ok(()));
    }
    check_on(Profile::V5_19, filter, Err(Errno::Einval));
    let vm = Vm::new().with_profile(Profile::V5_10);
    Process::new().set_msr_filter(&vm, Layout::NATIVE, filter).unwrap();
    assert_eq!(verdict(&vm, 5, Op::Read), Verdict::Deny, "the known bit still counts");
}

#[test]
fn default_deny_without_ranges_is_einval() {
    check(RawFilter::new(DENY, &[]), Err(Errno::Einval));
    let unused = range(!0, 7, 0, WILD);
    check(RawFilter::new(DENY, &[unused; 16]), Err(Errno::Einval));
}

#[test]
fn an_unused_slot_is_not_looked_at() {
    check(RawFilter::new(0, &[range(!0, !0, 0, WILD)]), Ok(()));
    check(
        RawFilter::new(DENY, &[range(!0, !0, 0, WILD), range(READ, 0, 1, ONES)]),
        Ok(()),
    );
}

#[test]
fn each_unknown_range_flag_is_einval() {
    for bit in 0..32 {
        let expected = if bit < 2 { Ok(()) } else { Err(Errno::Einval) };
        check(RawFilter::new(0, &[range(1 << bit, 0, 1, ONES)]), expected);
        check(RawFilter::new(0, &[range(READ | 1 << bit, 0, 1, ONES)]), expected);
    }
    check_on(
        Profile::V5_12,
        RawFilter::new(0, &[range(4, 0, 1, ONES)]),
        Err(Errno::Einval),
    );
}

#[test]
fn before_5_13_a_bitmap_was_copied_before_the_flags_of_its_range_were_checked() {
    for flags in [0, 4, !0] {
        let unreadable = RawFilter::new(0, &[range(flags, 0, 1, 0)]);
        for profile in [Profile::V5_12, Profile::V5_13, Profile::V5_18] {
            let first = profile != Profile::V5_12;
            let expected = if first { Errno::Einval } else { Errno::Efault };
            check_on(profile, unreadable, Err(expected));
            check_on(
                profile,
                RawFilter::new(0, &[range(flags, 0, 1, ONES)]),
                Err(Errno::Einval),
            );
            // The size came before the bitmap always.
            check_on(
                profile,
                RawFilter::new(0, &[range(flags, 0, 12289, 0)]),
                Err(Errno::Einval),
            );
        }
    }
}

#[test]
fn a_bitmap_is_copied_once_whenever_it_is_copied() {
    for profile in [Profile::V5_10, Profile::V5_12, Profile::V5_13, Profile::NEWEST] {
        let vm = Vm::new().with_profile(profile);
        let filter = RawFilter::new(0, &[range(BOTH, 0, 65, ZEROS)]);
        let process = Process::new().map(ARGP, filter.to_bytes(Layout::NATIVE));
        assert_eq!(vm.set_msr_filter(ARGP, Layout::NATIVE, &process), Ok(()));
        let expected = [(ARGP, Layout::NATIVE.filter_size), (ZEROS, 16)];
        assert_eq!(*process.reads.borrow(), expected, "{profile:?}");
    }
}

#[test]
fn before_5_12_a_call_that_failed_at_a_range_left_the_default_and_the_ranges_before_it() {
    for layout in LAYOUTS {
        let after = |filter| {
            let vm = vm_that_denies_one().with_profile(Profile::V5_10);
            let result = Process::new().set_msr_filter(&vm, layout, filter);
            let read = [1, 2, 0x10].map(|msr| verdict(&vm, msr, Op::Read));
            (result, read)
        };
        let (allow, deny) = (Verdict::Allow, Verdict::Deny);
        let wild = range(BOTH, 0, 1, WILD);
        let first = range(BOTH, 2, 1, ONES);
        for (bad, errno) in [
            (wild, Errno::Efault),
            (range(4, 0, 1, 0), Errno::Efault),
            (range(4, 0, 1, ONES), Errno::Einval),
            (range(BOTH, 0, 12289, ONES), Errno::Einval),
        ] {
            let filter = RawFilter::new(DENY, &[first, bad, range(BOTH, 0x10, 1, ONES)]);
            assert_eq!(after(filter), (Err(errno), [deny, allow, deny]));
            let filter = RawFilter::new(0, &[range(BOTH, 2, 1, ZEROS), bad]);
            assert_eq!(after(filter), (Err(errno), [allow, deny, allow]));
            // Without a range the default was not asked.
            let filter = RawFilter::new(DENY, &[bad, first]);
            assert_eq!(after(filter), (Err(errno), [allow; 3]));
        }
        // What was refused before the first range changed nothing.
        assert_eq!(
            after(RawFilter::new(DENY, &[])),
            (Err(Errno::Einval), [deny, allow, allow])
        );
        let vm = vm_that_denies_one().with_profile(Profile::V5_10);
        assert_eq!(vm.set_msr_filter(WILD, layout, &Process::new()), Err(Errno::Efault));
        assert_eq!(verdict(&vm, 1, Op::Read), deny);
    }
}

#[test]
fn a_range_without_a_direction_is_einval() {
    check(RawFilter::new(0, &[range(0, 0, 1, ONES)]), Err(Errno::Einval));
}

#[test]
fn a_range_holds_at_most_12288_msrs() {
    check(RawFilter::new(0, &[range(BOTH, 0, 12288, ONES)]), Ok(()));
    check(RawFilter::new(0, &[range(BOTH, 0, 12289, ONES)]), Err(Errno::Einval));
    for nmsrs in [0xffff_ffc0, 0xffff_ffe0, 0xffff_ffe1, !0] {
        check(RawFilter::new(0, &[range(BOTH, 0, nmsrs, ONES)]), Err(Errno::Einval));
    }
}

#[test]
fn flags_and_size_come_before_the_pointer() {
    for pointer in [0, WILD] {
        check(RawFilter::new(0, &[range(BOTH, 0, 12289, pointer)]), Err(Errno::Einval));
        check(RawFilter::new(0, &[range(4, 0, 1, pointer)]), Err(Errno::Einval));
        check(RawFilter::new(0, &[range(0, 0, 1, pointer)]), Err(Errno::Einval));
    }
}

#[test]
fn an_unreadable_bitmap_is_efault_wherever_it_points() {
    for pointer in [0, WILD, 0x8000_0000_0000_0000, !0] {
        for layout in LAYOUTS {
            let vm = vm_that_denies_one();
            let filter = RawFilter::new(0, &[range(BOTH, 0, 1, pointer)]);
            let result = Process::new().set_msr_filter(&vm, layout, filter);
            assert_eq!(result, Err(Errno::Efault), "{pointer:#x} {layout:?}");
        }
    }
}

#[test]
fn the_first_slot_at_fault_decides_the_error() {
    let wild = range(BOTH, 0, 1, WILD);
    let bad_flags = range(4, 0, 1, ONES);
    check(RawFilter::new(0, &[wild, bad_flags]), Err(Errno::Efault));
    check(RawFilter::new(0, &[bad_flags, wild]), Err(Errno::Einval));
}

#[test]
fn a_good_slot_before_a_bad_one_is_not_installed() {
    check(
        RawFilter::new(DENY, &[range(BOTH, 0, 64, ONES), range(BOTH, 0, 1, WILD)]),
        Err(Errno::Efault),
    );
    let mut last = RawFilter::new(DENY, &[range(BOTH, 0, 64, ONES)]);
    last.ranges[15] = range(BOTH, 0, 12289, ONES);
    check(last, Err(Errno::Einval));
}

#[test]
fn empty_allow_replaces_a_filter_by_one_that_allows_all() {
    for layout in LAYOUTS {
        let vm = vm_that_denies_one();
        assert_eq!(Process::new().set_msr_filter(&vm, layout, RawFilter::default()), Ok(()));
        assert_eq!(verdict(&vm, 1, Op::Read), Verdict::Allow);
    }
}

// Corner cases that are accepted.

#[test]
fn deny_all_takes_one_dummy_range() {
    let vm = Vm::new();
    let filter = RawFilter::new(DENY, &[range(BOTH, 0, 1, ZEROS)]);
    assert_eq!(Process::new().set_msr_filter(&vm, Layout::NATIVE, filter), Ok(()));
    for msr in [0, 1, 0x7ff, 0x900, 0xc000_0080, !0] {
        assert_eq!(verdict(&vm, msr, Op::Read), Verdict::Deny, "{msr:#x}");
    }
}

#[test]
fn slots_are_compacted_and_keep_their_order() {
    for layout in LAYOUTS {
        let mut filter = RawFilter::new(DENY, &[]);
        filter.ranges[7] = range(READ, 0x10, 1, ONES);
        filter.ranges[11] = range(BOTH, 0x10, 1, ZEROS);
        filter.ranges[15] = range(BOTH, 0x20, 1, ONES);
        let vm = Vm::new();
        assert_eq!(Process::new().set_msr_filter(&vm, layout, filter), Ok(()));
        assert_eq!(verdict(&vm, 0x10, Op::Read), Verdict::Allow);
        assert_eq!(verdict(&vm, 0x10, Op::Write), Verdict::Deny);
        assert_eq!(verdict(&vm, 0x20, Op::Write), Verdict::Allow);
    }
}

#[test]
fn padding_is_never_read() {
    let mut filter = RawFilter::new(DENY, &[range(BOTH, 0x10, 1, ONES)]);
    filter.padding = 0xff;
    check(filter, Ok(()));
}

#[test]
fn all_sixteen_slots_may_overlap() {
    check(RawFilter::new(DENY, &[range(BOTH, 0x10, 12288, ONES); 16]), Ok(()));
}

#[test]
fn a_range_of_x2apic_is_accepted() {
    check(RawFilter::new(0, &[range(BOTH, 0x800, 0x100, ZEROS)]), Ok(()));
}

#[test]
fn a_range_may_end_or_wrap_at_the_last_index() {
    check(RawFilter::new(0, &[range(BOTH, !0, 1, ZEROS)]), Ok(()));
    check(RawFilter::new(0, &[range(BOTH, 0xffff_fff0, 0x20, ZEROS)]), Ok(()));
}

#[test]
fn a_bitmap_is_copied_in_whole_longs() {
    for (nmsrs, bytes) in [(1, 8), (64, 8), (65, 16), (128, 16), (129, 24), (12288, 1536)] {
        for layout in LAYOUTS {
            let at = 0x30_0000;
            let filter = RawFilter::new(0, &[range(BOTH, 0, nmsrs, at)]);
            let vm = Vm::new();
            let exact = Process::new().map(at, vec![0; bytes]);
            assert_eq!(exact.set_msr_filter(&vm, layout, filter), Ok(()), "{nmsrs}");
            let short = Process::new().map(at, vec![0; bytes - 1]);
            assert_eq!(short.set_msr_filter(&vm, layout, filter), Err(Errno::Efault), "{nmsrs}");
        }
    }
}

#[test]
fn a_bitmap_need_not_be_aligned() {
    check(RawFilter::new(0, &[range(BOTH, 0, 64, ONES + 3)]), Ok(()));
}

#[test]
fn a_bitmap_is_copied_once_and_at_the_call() {
    let vm = Vm::new();
    let at = 0x30_0000;
    let filter = RawFilter::new(0, &[range(BOTH, 0x10, 1, at)]).to_bytes(Layout::NATIVE);
    let process = Process::new().map(ARGP, filter).map(at, [0; 8]);
    vm.set_msr_filter(ARGP, Layout::NATIVE, &process).unwrap();
    assert_eq!(*process.reads.borrow(), [(ARGP, 392), (at, 8)]);
    let _edited = process.map(at, [0xff; 8]);
    assert_eq!(verdict(&vm, 0x10, Op::Read), Verdict::Deny);
}

#[test]
fn a_compat_pointer_is_32_bits_and_a_native_one_64() {
    let high = 0x1_0000_0000 + ZEROS;
    let filter = RawFilter::new(0, &[range(BOTH, 0x10, 1, high)]);
    let vm = Vm::new();
    assert_eq!(
        Process::new().set_msr_filter(&vm, Layout::NATIVE, filter),
        Err(Errno::Efault)
    );
    let mapped = Process::new().map(high, [0; 8]);
    assert_eq!(mapped.set_msr_filter(&vm, Layout::NATIVE, filter), Ok(()));
    // The next slot's flags lie behind a compat pointer.
    let filter = RawFilter::new(0, &[range(BOTH, 0x10, 1, ONES), range(READ, 0x11, 1, ZEROS)]);
    assert_eq!(Process::new().set_msr_filter(&vm, Layout::COMPAT, filter), Ok(()));
    assert_eq!(verdict(&vm, 0x10, Op::Read), Verdict::Allow);
    assert_eq!(verdict(&vm, 0x11, Op::Read), Verdict::Deny);
}

#[test]
fn bits_are_numbered_from_the_lowest_of_the_first_byte() {
    let at = 0x30_0000;
    let vm = Vm::new();
    let process = Process::new().map(at, [0, 0, 0x04, 0, 0, 0, 0, 0]);
    let filter = RawFilter::new(0, &[range(BOTH, 0x100, 64, at)]);
    process.set_msr_filter(&vm, Layout::NATIVE, filter).unwrap();
    for bit in 0..64 {
        let expected = if bit == 18 { Verdict::Allow } else { Verdict::Deny };
        assert_eq!(verdict(&vm, 0x100 + bit, Op::Read), expected, "{bit}");
    }
}

#[test]
fn a_layout_that_does_not_exist_is_refused_without_a_panic() {
    for layout in [
        Layout {
            filter_size: usize::MAX,
            ..Layout::NATIVE
        },
        Layout {
            range_size: 0,
            ..Layout::NATIVE
        },
        Layout {
            ranges: usize::MAX,
            ..Layout::COMPAT
        },
    ] {
        assert_eq!(
            Vm::new().set_msr_filter(ONES, layout, &Process::new()),
            Err(Errno::Efault)
        );
    }
}
