//! Which accesses a filter denies, from the raw structure to a vCPU's exit.

use std::sync::Arc;

use msrgate_core::abi::Layout;
use msrgate_core::{Access, Msr, Op, Reason, Reasons, Verdict};
use msrgate_engine::{
    Advance, Completion, Instruction, Intercepts, Origin, Path, Profile, Step, TscDeadline, Vcpu, Vendor, Vm, Written,
};

fn instruction(msr: u32, op: Op) -> Instruction {
    match op {
        Op::Read => Instruction::Rdmsr { rcx: msr.into() },
        Op::Write => Instruction::Wrmsr {
            rcx: msr.into(),
            rax: 5,
            rdx: 0,
        },
    }
}

/// Installs the structure in both layouts, and sees what a vCPU and the VM say of each access, on each path.
#[track_caller]
fn check(filter: RawFilter, expected: &[(u32, Op, Verdict)]) {
    for layout in LAYOUTS {
        let vm = Arc::new(Vm::new());
        vm.set_reasons(Reasons::of(Reason::Filter));
        Process::new().set_msr_filter(&vm, layout, filter).unwrap();
        for &(msr, op, expected) in expected {
            for path in [
                Path::VmExit,
                Path::Fastpath(Vendor::Amd),
                Path::Emulator { next_rip: 2 },
            ] {
                let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
                let mut machine = Machine::default();
                let step = vcpu.execute(instruction(msr, op), path, &mut machine).unwrap();
                let verdict = match step {
                    Step::Exit(exit) => {
                        assert_eq!(
                            (exit.access.msr(), exit.access.op(), exit.reason),
                            (Msr(msr), op, Reason::Filter)
                        );
                        assert!(machine.reads.is_empty() && machine.writes.is_empty());
                        Verdict::Deny
                    }
                    Step::Complete(Completion::Done { .. }) => Verdict::Allow,
                    other => panic!("{op} {msr:#x}: {other:?}"),
                };
                assert_eq!(verdict, expected, "{op} {msr:#x} {layout:?} {path:?}");
            }
            assert_eq!(vm.allows(Origin::Instruction, Msr(msr), op), expected, "{op} {msr:#x}");
        }
    }
}

use Op::{Read, Write};
use Verdict::{Allow, Deny};

use crate::machine::{self, Machine};
use crate::process::*;

#[test]
fn without_a_filter_everything_is_allowed() {
    let vm = Arc::new(Vm::new());
    vm.set_reasons(Reasons::ALL);
    let mut vcpu = Vcpu::new(vm, Intercepts::all());
    for op in Op::ALL {
        let step = vcpu.execute(instruction(0x1b, op), Path::VmExit, &mut Machine::default());
        assert!(matches!(step, Ok(Step::Complete(Completion::Done { .. }))));
    }
    assert_eq!(vcpu.filter(), None);
}

#[test]
fn x2apic_is_allowed_whatever_the_filter_says_and_its_neighbours_are_not() {
    let mut expected = vec![
        (0x7ff, Read, Deny),
        (0x7ff, Write, Deny),
        (0x900, Read, Deny),
        (0x900, Write, Deny),
    ];
    for msr in 0x800..=0x8ff {
        expected.extend([(msr, Read, Allow), (msr, Write, Allow)]);
    }
    check(RawFilter::new(DENY, &[range(BOTH, 0x700, 0x300, ZEROS)]), &expected);
    check(RawFilter::new(DENY, &[range(BOTH, 0, 1, ZEROS)]), &expected);
}

#[test]
fn the_first_range_that_matches_decides() {
    let deny = range(BOTH, 0x10, 1, ZEROS);
    let allow = range(BOTH, 0x10, 1, ONES);
    for flags in [0, DENY] {
        check(
            RawFilter::new(flags, &[deny, allow]),
            &[(0x10, Read, Deny), (0x10, Write, Deny)],
        );
        check(
            RawFilter::new(flags, &[allow, deny]),
            &[(0x10, Read, Allow), (0x10, Write, Allow)],
        );
    }
}

#[test]
fn a_range_is_transparent_in_the_direction_that_it_lacks() {
    check(
        RawFilter::new(0, &[range(READ, 0x10, 1, ONES), range(BOTH, 0x10, 2, ZEROS)]),
        &[
            (0x10, Read, Allow),
            (0x10, Write, Deny),
            (0x11, Read, Deny),
            (0x11, Write, Deny),
        ],
    );
    check(
        RawFilter::new(DENY, &[range(WRITE, 0x10, 1, ONES)]),
        &[(0x10, Read, Deny), (0x10, Write, Allow)],
    );
    check(
        RawFilter::new(0, &[range(WRITE, 0x10, 1, ZEROS)]),
        &[(0x10, Read, Allow), (0x10, Write, Deny)],
    );
}

#[test]
fn two_ranges_with_one_base_have_a_bitmap_for_each_direction() {
    check(
        RawFilter::new(DENY, &[range(READ, 0x10, 64, ONES), range(WRITE, 0x10, 64, ZEROS)]),
        &[
            (0x10, Read, Allow),
            (0x10, Write, Deny),
            (0x4f, Read, Allow),
            (0x4f, Write, Deny),
        ],
    );
}

#[test]
fn a_bit_decides_against_either_default() {
    for (flags, default) in [(0, Allow), (DENY, Deny)] {
        check(
            RawFilter::new(flags, &[range(BOTH, 0x10, 1, ONES), range(BOTH, 0x11, 1, ZEROS)]),
            &[
                (0x10, Read, Allow),
                (0x11, Read, Deny),
                (0x0f, Read, default),
                (0x12, Read, default),
            ],
        );
    }
}

#[test]
fn the_first_and_the_last_msr_belong_to_a_range_and_bits_behind_it_do_not_count() {
    for nmsrs in [1, 63, 64, 65, 12287, 12288] {
        let last = 0x4000_0000 + nmsrs - 1;
        check(
            RawFilter::new(DENY, &[range(BOTH, 0x4000_0000, nmsrs, ONES)]),
            &[
                (0x3fff_ffff, Read, Deny),
                (0x4000_0000, Read, Allow),
                (last, Write, Allow),
                (last + 1, Write, Deny),
            ],
        );
    }
}

#[test]
fn a_range_whose_end_wraps_matches_nothing() {
    check(
        RawFilter::new(0, &[range(BOTH, !0, 1, ZEROS)]),
        &[(!0, Read, Allow), (!0, Write, Allow), (0, Read, Allow)],
    );
    check(
        RawFilter::new(0, &[range(BOTH, 0xffff_fff0, 0x20, ZEROS)]),
        &[
            (0xffff_fff0, Read, Allow),
            (0xffff_ffff, Read, Allow),
            (0, Read, Allow),
            (0xf, Read, Allow),
        ],
    );
    check(
        RawFilter::new(0, &[range(BOTH, 0xffff_ffc0, 0x3f, ZEROS)]),
        &[(0xffff_ffc0, Read, Deny), (0xffff_fffe, Write, Deny), (!0, Read, Allow)],
    );
}

#[test]
fn a_denied_msr_that_is_unknown_is_denied() {
    let filter = RawFilter::new(0, &[range(BOTH, machine::UNKNOWN, 1, ZEROS)]);
    check(
        filter,
        &[(machine::UNKNOWN, Read, Deny), (machine::UNKNOWN, Write, Deny)],
    );
}

#[test]
fn only_the_lower_half_of_rcx_counts() {
    let vm = Arc::new(Vm::new());
    vm.set_reasons(Reasons::ALL);
    let filter = RawFilter::new(0, &[range(BOTH, 0x10, 1, ZEROS)]);
    Process::new().set_msr_filter(&vm, Layout::NATIVE, filter).unwrap();
    let mut vcpu = Vcpu::new(vm, Intercepts::all());
    let read = Instruction::Rdmsr {
        rcx: 0xffff_ffff_0000_0010,
    };
    let step = vcpu.execute(read, Path::VmExit, &mut Machine::default());
    assert!(matches!(step, Ok(Step::Exit(exit)) if exit.access == Access::Read { msr: Msr(0x10) }));
}

#[test]
fn every_vcpu_of_a_vm_has_the_same_filter() {
    let vm = Arc::new(Vm::new());
    let mut vcpus = [0; 3].map(|_| Vcpu::new(vm.clone(), Intercepts::all()));
    let filter = RawFilter::new(0, &[range(BOTH, 0x10, 1, ZEROS)]);
    Process::new().set_msr_filter(&vm, Layout::NATIVE, filter).unwrap();
    for vcpu in &mut vcpus {
        assert_eq!(vcpu.verdict(Msr(0x10), Op::Read), Deny);
    }
}

// Accesses that are no RDMSR or WRMSR.

#[test]
fn the_profile_says_which_origins_are_filtered() {
    let filter = RawFilter::new(DENY, &[range(BOTH, 0, 1, ZEROS)]);
    let profiles = [
        Profile::V5_10,
        Profile::V5_12,
        Profile::V5_13,
        Profile::V5_18,
        Profile::V5_19,
        Profile::V6_1,
        Profile::V6_12,
        Profile::V6_18,
        Profile::NEWEST,
    ];
    for (origin, denied) in [
        (Origin::Instruction, [true; 9]),
        (
            Origin::NestedList,
            [true, true, true, false, false, false, true, true, true],
        ),
        (
            Origin::SideEffect,
            [true, true, true, false, false, false, false, false, false],
        ),
        (Origin::Architectural, [false; 9]),
        (Origin::Host, [false; 9]),
    ] {
        for (profile, denied) in profiles.into_iter().zip(denied) {
            let vm = Vm::new().with_profile(profile);
            Process::new().set_msr_filter(&vm, Layout::NATIVE, filter).unwrap();
            let expected = if denied { Deny } else { Allow };
            assert_eq!(
                vm.allows(origin, Msr(0x10), Op::Read),
                expected,
                "{origin:?} {profile:?}"
            );
        }
    }
}

#[test]
fn a_write_of_tsc_deadline_passes_the_filter_by_only_where_the_profile_says_so() {
    const BOTH_VENDORS: [Vendor; 2] = [Vendor::Intel, Vendor::Amd];
    for (tsc_deadline, bypassed) in [
        (Profile::NEWEST.tsc_deadline, [false, false]),
        (Profile::V6_12.tsc_deadline, [true, false]),
        (Profile::V6_18.tsc_deadline, [true, true]),
    ] {
        for (vendor, bypassed) in BOTH_VENDORS.into_iter().zip(bypassed) {
            let vm = Arc::new(Vm::new().with_profile(Profile {
                tsc_deadline,
                ..Profile::NEWEST
            }));
            let filter = RawFilter::new(DENY, &[range(BOTH, 0, 1, ZEROS)]);
            Process::new().set_msr_filter(&vm, Layout::NATIVE, filter).unwrap();
            let run = |instruction, path| {
                let mut machine = Machine::default();
                let step = Vcpu::new(vm.clone(), Intercepts::all()).execute(instruction, path, &mut machine);
                (step.unwrap(), machine.writes)
            };
            let fault = (Step::Complete(Completion::Fault), vec![]);
            let done = Completion::Done {
                written: Written::Nothing,
                advance: Advance::Skip,
            };
            let passed = (Step::Complete(done), vec![(0x6e0, 5)]);
            let fastpath = Path::Fastpath(vendor);
            let expected = if bypassed { &passed } else { &fault };
            assert_eq!(run(instruction(0x6e0, Write), fastpath), *expected);
            assert_eq!(run(instruction(0x6e0, Read), fastpath), fault, "reads are filtered");
            assert_eq!(
                run(instruction(0x6e1, Write), fastpath),
                fault,
                "other MSRs are filtered"
            );
            assert_eq!(
                run(instruction(0x6e0, Write), Path::VmExit),
                fault,
                "the normal path filters"
            );
            assert_eq!(run(instruction(0x6e0, Write), Path::Emulator { next_rip: 2 }), fault);
        }
    }
}

#[test]
fn a_write_on_the_fast_path_counts_as_done_even_if_it_is_dropped() {
    struct NoTimer;
    impl msrgate_engine::Msrs for NoTimer {
        fn read(&mut self, _: Msr) -> Result<u64, msrgate_engine::Refusal> {
            unreachable!()
        }
        fn write(&mut self, _: Msr, _: u64) -> Result<(), msrgate_engine::Refusal> {
            Err(msrgate_engine::Refusal::Invalid)
        }
    }
    let profile = Profile {
        tsc_deadline: TscDeadline::Bypassed,
        ..Profile::NEWEST
    };
    let vm = Arc::new(Vm::new().with_profile(profile));
    vm.set_reasons(Reasons::ALL);
    let mut vcpu = Vcpu::new(vm, Intercepts::all());
    let step = vcpu.execute(instruction(0x6e0, Write), Path::Fastpath(Vendor::Intel), &mut NoTimer);
    assert!(matches!(step, Ok(Step::Complete(Completion::Done { .. }))));
}
