use super::*;

fn range(first: u32, last: u32) -> MsrRange {
    MsrRange::new(Msr(first), Msr(last)).unwrap()
}

type Rule = (MsrRange, Option<ReadAction>, Option<WriteAction>);

fn map(default: Verdict, rules: &[Rule]) -> DecisionMap {
    let (read, write) = match default {
        Verdict::Allow => (ReadAction::Allow, WriteAction::Allow),
        Verdict::Deny => (ReadAction::Deny, WriteAction::Deny),
    };
    let reads = rules.iter().zip(0..).filter_map(|((range, action, _), rule)| {
        Some((
            *range,
            Decision {
                action: action.clone()?,
                rule: Some(rule),
                log: Log::None,
            },
        ))
    });
    let writes = rules.iter().zip(0..).filter_map(|((range, _, action), rule)| {
        Some((
            *range,
            Decision {
                action: action.clone()?,
                rule: Some(rule),
                log: Log::None,
            },
        ))
    });
    DecisionMap::new(
        Intervals::first_match(Decision::of(read), reads),
        Intervals::first_match(Decision::of(write), writes),
    )
}

fn allow(first: u32, last: u32) -> Rule {
    (range(first, last), Some(ReadAction::Allow), Some(WriteAction::Allow))
}

fn deny(first: u32, last: u32) -> Rule {
    (range(first, last), Some(ReadAction::Deny), Some(WriteAction::Deny))
}

#[test]
fn allowing_everything_takes_no_range_and_no_exit() {
    let plan = Plan::compile(&DecisionMap::allow_all()).unwrap();
    assert_eq!(*plan.filter(), Filter::allow_all());
    assert_eq!(plan.reasons(), Reasons::NONE);
}

#[test]
fn denying_everything_takes_the_range_that_the_kernel_insists_on() {
    let plan = Plan::compile(&map(Verdict::Deny, &[])).unwrap();
    assert_eq!(plan.filter().ranges().len(), 1);
    assert_eq!(plan.filter().verdict(Msr(0), Op::Read), Verdict::Deny);
    assert_eq!((plan.reasons(), plan.minimum().ranges), (Reasons::NONE, 0));
}

#[test]
fn pure_allow_and_deny_never_leave_the_kernel_unless_a_denial_is_logged() {
    let map = map(Verdict::Allow, &[deny(0x10, 0x10)]);
    assert_eq!(Plan::compile(&map).unwrap().reasons(), Reasons::NONE);
    let logged = map.reads().map(|decision| Decision {
        log: Log::All,
        ..decision.clone()
    });
    let map = map.with_reads(logged);
    assert_eq!(Plan::compile(&map).unwrap().reasons(), Reasons::of(Reason::Filter));
}

#[test]
fn only_what_needs_user_space_is_deflected() {
    let value = (range(0x8b, 0x8b), Some(ReadAction::Value(1)), None);
    assert_eq!(
        Plan::compile(&map(Verdict::Allow, &[value])).unwrap().reasons(),
        Reasons::of(Reason::Filter)
    );
    let unknown = DecisionMap::allow_all().with_unknown((ReadAction::Value(0), WriteAction::Ignore));
    assert_eq!(Plan::compile(&unknown).unwrap().reasons(), Reasons::of(Reason::Unknown));
    let invalid = DecisionMap::allow_all().with_invalid((ReadAction::Value(0), WriteAction::Deny));
    assert_eq!(Plan::compile(&invalid).unwrap().reasons(), Reasons::of(Reason::Invalid));
}

#[test]
fn a_range_over_12288_msrs_is_split() {
    let plan = Plan::compile(&map(Verdict::Deny, &[allow(0, 12288)])).unwrap();
    assert_eq!(
        plan.filter()
            .ranges()
            .iter()
            .map(FilterRange::nmsrs)
            .collect::<Vec<_>>(),
        // What lies between is x2APIC's, which no filter decides, and takes no bytes.
        [2048, 9985]
    );
}

#[test]
fn nearby_rules_share_a_range() {
    let plan = Plan::compile(&map(Verdict::Deny, &[allow(0x10, 0x10), allow(0x2000, 0x2fff)])).unwrap();
    assert_eq!(plan.filter().ranges().len(), 1);
    assert_eq!(plan.filter().ranges()[0].base(), 0x10);
}

#[test]
fn seventeen_far_apart_msrs_are_refused_with_the_groups() {
    let rules: Vec<Rule> = (0..17).map(|i| deny(i * 0x10000, i * 0x10000)).collect();
    let Err(PlanError::TooManyRanges {
        needed,
        exact,
        groups,
        separate,
        witness,
    }) = Plan::compile(&map(Verdict::Allow, &rules))
    else {
        panic!("17 ranges fit");
    };
    assert_eq!((needed, exact, groups.len(), separate), (17, true, 17, 34));
    let far: Vec<(Msr, Op)> = (0..17).map(|i| (Msr(i * 0x10000), Op::Read)).collect();
    assert_eq!(witness, Some(far));
    assert_eq!(
        (groups[3].range, &groups[3].rules[..], groups[3].accesses),
        (range(0x30000, 0x30000), &[3][..], 2)
    );
    assert!(Plan::compile(&map(Verdict::Allow, &rules[..16])).is_ok());
}

#[test]
fn what_no_filter_can_decide_is_named() {
    let notes = |map: &DecisionMap| Plan::compile(map).unwrap().notes().to_vec();
    assert_eq!(notes(&DecisionMap::allow_all()), []);
    assert_eq!(notes(&map(Verdict::Deny, &[])), [Note::X2apic]);
    assert_eq!(notes(&map(Verdict::Allow, &[deny(0x830, 0x830)])), [Note::X2apic]);
    assert_eq!(
        notes(&map(Verdict::Allow, &[deny(u32::MAX, u32::MAX)])),
        [Note::LastMsr]
    );
    let mask = (range(0x8b, 0x8b), Some(ReadAction::Mask { keep: 1, set: 0 }), None);
    assert_eq!(notes(&map(Verdict::Allow, &[mask])), [Note::HostView]);
    let once = (range(0x8b, 0x8b), None, Some(WriteAction::Once));
    assert_eq!(notes(&map(Verdict::Allow, &[once])), [Note::HostView]);
}

#[test]
fn a_default_of_deny_with_a_wide_allowance_is_planned_from_the_other_side() {
    let plan = Plan::compile(&map(Verdict::Deny, &[deny(0x10, 0x10), allow(0, u32::MAX)])).unwrap();
    assert_eq!(plan.filter().default_verdict(), Verdict::Allow);
    assert_eq!(plan.filter().ranges().len(), 1);
}

#[test]
fn random_maps_are_planned_exactly_or_refused_with_the_numbers() {
    let mut seed = 3u64;
    let mut roll = |n: u64| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % n
    };
    let mut planned = 0;
    for _ in 0..300 {
        let rules: Vec<Rule> = (0..roll(40))
            .map(|_| {
                let window = [0, 0x800, 0x4000_0000, 0xc000_0000, 0xc001_0000, 0xffff_f000][roll(6) as usize];
                let first = window + roll(0x1000) as u32;
                let last = first.saturating_add(roll(0x400) as u32);
                let read = [
                    None,
                    Some(ReadAction::Allow),
                    Some(ReadAction::Deny),
                    Some(ReadAction::Value(1)),
                ];
                let write = [
                    None,
                    Some(WriteAction::Allow),
                    Some(WriteAction::Deny),
                    Some(WriteAction::Ignore),
                ];
                (
                    range(first, last),
                    read[roll(4) as usize].clone(),
                    write[roll(4) as usize].clone(),
                )
            })
            .collect();
        let default = if roll(2) == 0 { Verdict::Allow } else { Verdict::Deny };
        let map = map(default, &rules);
        match Plan::compile(&map) {
            Ok(plan) => {
                planned += 1;
                // The proof walked intervals; walk MSRs around every rule here.
                for (range, ..) in &rules {
                    for msr in [
                        range.first().0.wrapping_sub(1),
                        range.first().0,
                        range.last().0,
                        range.last().0.wrapping_add(1),
                    ] {
                        for op in Op::ALL {
                            if !MsrRange::X2APIC.contains(Msr(msr)) && msr != u32::MAX {
                                let allowed = plan.filter().verdict(Msr(msr), op) == Verdict::Allow;
                                assert_eq!(allowed, map.allows(Msr(msr), op), "{op} {msr:#x}");
                            }
                        }
                    }
                }
            }
            Err(PlanError::TooManyRanges { needed, .. }) => assert!(needed > 16),
            Err(error) => panic!("{error}"),
        }
    }
    assert!(planned > 100, "{planned}");
}

#[test]
fn an_access_reaches_the_kernels_register_where_it_is_allowed_or_passed_on_in_part() {
    let mask = WriteAction::Mask {
        may_change: 1,
        otherwise: msrgate_core::OnLockedBits::Deny,
    };
    let rules = [
        allow(0x10, 0x10),
        (
            range(0x20, 0x20),
            Some(ReadAction::Mask { keep: 1, set: 0 }),
            Some(WriteAction::Ignore),
        ),
        (
            range(0x21, 0x21),
            Some(ReadAction::Shadow(0)),
            Some(WriteAction::Shadow),
        ),
        (range(0x22, 0x22), Some(ReadAction::Host), Some(WriteAction::Once)),
        (range(0x23, 0x23), Some(ReadAction::Value(7)), Some(mask)),
        (range(0x24, 0x24), None, Some(WriteAction::Only(vec![1].into()))),
    ];
    let denying = map(Verdict::Deny, &rules);
    let plan = Plan::compile(&denying).unwrap();
    for (msr, expected) in [
        (0x10, (true, true)),
        (0x11, (false, false)),
        (0x20, (true, false)),
        (0x21, (false, false)),
        (0x22, (false, true)),
        (0x23, (false, true)),
        (0x24, (false, true)),
        // No filter stops these.
        (0x800, (true, true)),
    ] {
        let reaches = |op| plan.reaches(Msr(msr), op);
        assert_eq!((reaches(Op::Read), reaches(Op::Write)), expected, "{msr:#x}");
    }
}

#[test]
fn a_map_without_a_filter_is_answered_and_has_a_bitmap_though_it_needs_more_ranges_than_kvm_has() {
    let denied = |msr| (range(msr, msr), Some(ReadAction::Value(u64::from(msr))), None);
    let rules: Vec<Rule> = (0..20).map(|index| denied(index << 20 | 0x10)).collect();
    let map = map(Verdict::Allow, &rules);
    assert!(matches!(Plan::compile(&map), Err(PlanError::TooManyRanges { .. })));

    let table = map.table().unwrap();
    let answered = table.reads().iter().map(|entry| entry.range.first().0);
    assert_eq!(
        answered.collect::<Vec<_>>(),
        (0..20).map(|index| index << 20 | 0x10).collect::<Vec<_>>()
    );
    let mut bitmap = msrgate_core::VmxBitmap::intercept_all();
    let all = [msrgate_core::PassthroughMsr::new(MsrRange::ALL, Ops::BOTH)];
    bitmap.recompute_by(|msr, op| map.allows(msr, op), &all);
    let exits = |msr| Op::ALL.map(|op| bitmap.intercepts(Msr(msr), op));
    assert_eq!(
        (exits(0x10), exits(0x11), exits(0x10_0010)),
        ([true, false], [false, false], [true, true])
    );
}
