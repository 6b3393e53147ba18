use alloc::vec;

use msrgate_core::{Op, Reason, Reasons};

use super::*;
use crate::CompileOptions;
use crate::Plan;

fn range(first: u32, last: u32) -> MsrRange {
    MsrRange::new(Msr(first), Msr(last)).unwrap()
}

fn decision<A>(action: A) -> Decision<A> {
    Decision {
        action,
        rule: Some(0),
        log: Log::None,
    }
}

/// Reads of 0x8b get a value, its writes `write`, all else is allowed.
fn microcode(write: WriteAction, log: Log) -> DecisionMap {
    let msr = MsrRange::single(Msr(0x8b));
    let read = Decision {
        log,
        ..decision(ReadAction::Value(7))
    };
    DecisionMap::new(
        Intervals::first_match(Decision::of(ReadAction::Allow), [(msr, read)]),
        Intervals::first_match(Decision::of(WriteAction::Allow), [(msr, decision(write))]),
    )
}

fn preset(msr: u32, value: u64) -> Preset {
    Preset { msr: Msr(msr), value }
}

fn with_presets(held: Vec<Preset>) -> CompileOptions {
    CompileOptions::default().with_presets(held)
}

#[test]
fn a_fixed_answer_that_the_kernel_holds_makes_no_exit() {
    let map = microcode(WriteAction::Deny, Log::None);
    let plan = Plan::compile_for(&map, &with_presets(vec![preset(0x8b, 7)])).unwrap();
    assert_eq!(plan.presets(), [preset(0x8b, 7)]);
    assert_eq!(plan.reasons(), Reasons::NONE);
    assert_eq!(plan.filter().verdict(Msr(0x8b), Op::Read), Verdict::Allow);
    assert_eq!(plan.filter().verdict(Msr(0x8b), Op::Write), Verdict::Deny);
    assert!(!plan.table().decides(Msr(0x8b), Op::Read));
    assert!(!plan.reaches(Msr(0x8b), Op::Read) && plan.reaches(Msr(0x8c), Op::Read));
    assert_eq!(plan.hash(), Some(microcode(WriteAction::Deny, Log::None).hash()));
}

#[test]
fn an_ignored_write_still_exits_and_the_read_does_not() {
    let map = microcode(WriteAction::Ignore, Log::None);
    let plan = Plan::compile_for(&map, &with_presets(vec![preset(0x8b, 7)])).unwrap();
    assert_eq!(plan.presets(), [preset(0x8b, 7)]);
    assert_eq!(plan.reasons(), Reasons::of(Reason::Filter));
    assert!(plan.table().decides(Msr(0x8b), Op::Write));
}

#[test]
fn nothing_is_preset_that_a_guest_could_change_or_that_is_logged_or_held_otherwise() {
    let held = vec![preset(0x8b, 7)];
    let no = |map: DecisionMap, held| {
        let plan = Plan::compile_for(&map, &with_presets(held)).unwrap();
        assert_eq!(plan.presets(), []);
    };
    for write in [
        WriteAction::Allow,
        WriteAction::Once,
        WriteAction::Only([1].into()),
        WriteAction::Handler("h".into()),
    ] {
        no(microcode(write, Log::None), held.clone());
    }
    no(microcode(WriteAction::Deny, Log::First), held);
    no(
        microcode(WriteAction::Deny, Log::None),
        vec![preset(0x8b, 8), preset(0x17, 7)],
    );
    no(microcode(WriteAction::Deny, Log::None), vec![]);
}

#[test]
fn a_map_that_fits_without_presets_fits_with_as_many_as_there_is_room_for() {
    // 15 registers far apart are allowed, and three far from these get a value: two of them need a range too much.
    let far = |i: u32| MsrRange::single(Msr(i * 0x4000));
    let allowed = (1..=15).map(|i| (far(i), decision(ReadAction::Allow)));
    let fixed = (16..=18).map(|i| (far(i), decision(ReadAction::Value(7))));
    let map = DecisionMap::new(
        Intervals::first_match(Decision::of(ReadAction::Deny), allowed.chain(fixed)),
        Intervals::uniform(Decision::of(WriteAction::Deny)),
    );
    let held = (16..=18).map(|i| preset(i * 0x4000, 7)).collect();
    let plan = Plan::compile_for(&map, &with_presets(held)).unwrap();
    assert_eq!(plan.presets(), [preset(16 * 0x4000, 7)]);
    assert_eq!(plan.filter().ranges().len(), 16);
    assert_eq!(Plan::compile(&map).unwrap().filter().ranges().len(), 15);
}

#[test]
fn presets_can_make_a_map_fit_that_does_not_without() {
    // Nine pairs far apart: writes of both are denied, and reads of the second get a value, which takes a range for
    // reads beside the one for writes.
    let pair = |i: u32| range(i * 0x4000, i * 0x4000 + 1);
    let map = DecisionMap::new(
        Intervals::first_match(
            Decision::of(ReadAction::Allow),
            (1..=9).map(|i| (MsrRange::single(pair(i).last()), decision(ReadAction::Value(0)))),
        ),
        Intervals::first_match(
            Decision::of(WriteAction::Allow),
            (1..=9).map(|i| (pair(i), decision(WriteAction::Deny))),
        ),
    );
    assert!(Plan::compile(&map).is_err());
    let held = (1..=9).map(|i| preset(pair(i).last().0, 0)).collect();
    let plan = Plan::compile_for(&map, &with_presets(held)).unwrap();
    assert_eq!((plan.presets().len(), plan.filter().ranges().len()), (9, 9));
}

/// Every map of a few MSRs with few actions, with each set of presets: the plan is right by a loop over all accesses.
#[test]
fn with_presets_each_access_of_every_small_map_gets_what_the_map_says() {
    let reads = [ReadAction::Allow, ReadAction::Deny, ReadAction::Value(0)];
    let writes = [WriteAction::Allow, WriteAction::Deny, WriteAction::Ignore];
    // Three MSRs: two that a range covers together, one far away.
    let msrs = [0x10u32, 0x11, 0x9000];
    for code in 0..9u32.pow(3) {
        for default in [Verdict::Allow, Verdict::Deny] {
            let digit = |i: u32| code / 9u32.pow(i) % 9;
            let ruled = |i: u32| {
                (
                    reads[(digit(i) % 3) as usize].clone(),
                    writes[(digit(i) / 3) as usize].clone(),
                )
            };
            let single = |i: u32| MsrRange::single(Msr(msrs[i as usize]));
            let (read, write) = match default {
                Verdict::Allow => (ReadAction::Allow, WriteAction::Allow),
                Verdict::Deny => (ReadAction::Deny, WriteAction::Deny),
            };
            let map = DecisionMap::new(
                Intervals::first_match(Decision::of(read), (0..3).map(|i| (single(i), decision(ruled(i).0)))),
                Intervals::first_match(Decision::of(write), (0..3).map(|i| (single(i), decision(ruled(i).1)))),
            );
            for held in 1..8 {
                let held = (0..3).filter(|i| held >> i & 1 == 1).map(|i| preset(msrs[i], 0));
                let held: Vec<Preset> = held.collect();
                let plan = Plan::compile_for(&map, &with_presets(held.clone())).unwrap();
                assert_eq!(
                    plan.presets().len(),
                    held.iter().filter(|held| map.preset(held.msr) == Some(**held)).count()
                );
                for msr in [0, 0x10, 0x11, 0x12, 0x8fff, 0x9000, 0x9001].map(Msr) {
                    let preset = plan.presets().iter().find(|preset| preset.msr == msr);
                    assert!(preset.is_none_or(|preset| held.contains(preset)));
                    // What the guest reads: the kernel's value, which a preset makes known, or the table's answer.
                    let entry = plan.table().reads().iter().find(|entry| entry.range.contains(msr));
                    let got = match (plan.filter().verdict(msr, Op::Read), preset, entry) {
                        (Verdict::Allow, Some(preset), None) => ReadAction::Value(preset.value),
                        (Verdict::Allow, None, None) => ReadAction::Allow,
                        (Verdict::Deny, None, Some(entry)) => entry.action.clone(),
                        odd => panic!("{odd:?}"),
                    };
                    assert_eq!(got, map.reads().get(msr).action, "{msr} of {map:?}");
                    let written = plan.filter().verdict(msr, Op::Write) == Verdict::Allow;
                    assert_eq!(written, map.writes().get(msr).action == WriteAction::Allow);
                    assert!(!(written && preset.is_some()));
                }
            }
        }
    }
}
