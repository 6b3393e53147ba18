use alloc::vec;
use alloc::vec::Vec;

use msrgate_core::{Log, Msr, ReadAction, Reason, Reasons, Verdict, WriteAction};

use super::*;
use crate::CompileOptions;
use crate::{AccessCount, Decision, Note, Plan};

fn range(first: u32, last: u32) -> MsrRange {
    MsrRange::new(Msr(first), Msr(last)).unwrap()
}

/// Everything is denied but islands, each by its rule: four MSRs each, far from the next.
fn islands(count: u32) -> DecisionMap {
    fn of<A: Clone + Eq>(count: u32, allow: A, deny: A) -> Intervals<Decision<A>> {
        let rules = (0..count).map(|rule| {
            let decision = Decision {
                action: allow.clone(),
                rule: Some(rule),
                log: Log::None,
            };
            (range(rule * 0x10000, rule * 0x10000 + 3), decision)
        });
        Intervals::first_match(Decision::of(deny), rules)
    }
    DecisionMap::new(
        of(count, ReadAction::Allow, ReadAction::Deny),
        of(count, WriteAction::Allow, WriteAction::Deny),
    )
}

/// All accesses of these islands may be spilled.
fn spillable(islands: &[u32]) -> CompileOptions {
    let msrs = islands
        .iter()
        .flat_map(|island| range(island * 0x10000, island * 0x10000 + 3).iter());
    CompileOptions::default().spilling(
        msrs.flat_map(|msr| Op::ALL.map(|op| Spillable { msr, op, weight: 1 }))
            .collect(),
    )
}

fn touched(msr: u32, count: u64) -> AccessCount {
    AccessCount {
        msr: Msr(msr),
        op: Op::Write,
        count,
    }
}

/// How many accesses are noted as spilled, and how many exits that is.
fn noted(plan: &Plan) -> (u64, Option<u64>) {
    let mut notes = plan.notes().iter();
    notes
        .find_map(|note| match note {
            Note::Spilled { accesses, exits } => Some((*accesses, *exits)),
            _ => None,
        })
        .unwrap()
}

#[test]
fn a_map_that_fits_spills_nothing() {
    let plan = Plan::compile_for(&islands(16), &spillable(&[0, 1, 2])).unwrap();
    assert_eq!((plan.spilled().count(), plan.reasons()), (0, Reasons::NONE));
}

#[test]
fn what_does_not_fit_is_passed_on_where_the_map_asks_for_it_and_names_it() {
    let refused = islands(17);
    assert!(matches!(Plan::compile(&refused), Err(PlanError::TooManyRanges { .. })));
    let plan = Plan::compile_for(&refused, &spillable(&[5])).unwrap();
    let island = range(0x50000, 0x50003);
    let spilled: Vec<_> = plan.spilled().collect();
    assert_eq!(spilled, [(island, Op::Read), (island, Op::Write)]);
    assert_eq!(plan.filter().ranges().len(), 16);
    assert!(plan.reasons().contains(Reason::Filter));
    for msr in island.iter() {
        for op in Op::ALL {
            assert_eq!(plan.filter().verdict(msr, op), Verdict::Deny);
            assert!(plan.table().passes(msr, op));
        }
    }
    assert!(!plan.table().passes(Msr(0x60000), Op::Read));
    let entry = plan.table().reads().iter().find(|entry| entry.range == island);
    assert_eq!(entry.unwrap().rule, Some(5), "what is done is told with its rule");
    assert_eq!(plan.hash(), Some(islands(17).hash()), "it means the same");
    assert_eq!(noted(&plan), (8, None));
}

#[test]
fn what_is_touched_least_is_spilled() {
    let profile = [(0x20001, 9), (0x70000, 3), (0x70003, 4), (0x90000, 8), (0x50000, 1)];
    let profile = profile.map(|(msr, count)| touched(msr, count)).to_vec();
    let plan = Plan::compile_for(&islands(17), &spillable(&[2, 7, 9]).with_profile(profile)).unwrap();
    let (spilled, _) = plan.spilled().next().unwrap();
    assert_eq!(spilled, range(0x70000, 0x70003));
    assert_eq!(noted(&plan), (8, Some(7)));
}

#[test]
fn what_is_not_faithful_is_refused_by_name() {
    let mut spill = spillable(&[5]).spillable().unwrap().to_vec();
    spill.retain(|spillable| spillable.msr != Msr(0x50002) || spillable.op == Op::Read);
    let options = CompileOptions::default().spilling(spill);
    let refused = Err(PlanError::Spill {
        needed: 17,
        why: SpillError::NotFaithful(vec![(range(0x50002, 0x50002), Op::Write)]),
    });
    assert_eq!(Plan::compile_for(&islands(17), &options), refused);
}

#[test]
fn two_answers_for_what_the_kernel_refuses_cannot_be_told_apart_and_are_refused() {
    let ignore = (ReadAction::Value(0), WriteAction::Ignore);
    let options = spillable(&[5]);
    let map = islands(17).with_unknown(ignore.clone());
    let refused = Err(PlanError::Spill {
        needed: 17,
        why: SpillError::Fallbacks,
    });
    assert_eq!(Plan::compile_for(&map, &options), refused);
    let map = map.with_invalid(ignore);
    assert!(Plan::compile_for(&map, &options).is_ok());
}

#[test]
fn what_is_denied_is_not_opened_by_spilling() {
    // Islands of denial in what is allowed: only all between them could make room.
    let map = islands(17);
    let turned = map
        .clone()
        .with_reads(map.reads().map(|decision| Decision {
            action: match decision.action {
                ReadAction::Allow => ReadAction::Deny,
                _ => ReadAction::Allow,
            },
            ..decision.clone()
        }))
        .with_writes(Intervals::uniform(Decision::of(WriteAction::Allow)));
    assert!(Plan::compile_for(&turned, &spillable(&[0, 1, 2, 3])).is_err());
}
