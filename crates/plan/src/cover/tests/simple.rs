//! The planner against the obvious one, on maps that nobody chose.

use msrgate_core::abi::MAX_RANGE_MSRS;
use msrgate_core::{Filter, FilterRange, Ops, ReadAction, Verdict, WriteAction};

use super::*;
use crate::{Decision, DecisionMap, Plan, PlanError};

type Map = Intervals<(bool, bool)>;

/// The obvious planner for one default: reads and writes apart, and a range from the first MSR on that differs from the
/// default and that no range holds yet.
fn simple(map: &Map, default: bool, free: &[MsrRange], length: u64) -> Vec<(Op, MsrRange)> {
    let mut ranges = Vec::new();
    for op in Op::ALL {
        let mut next = 0;
        for (range, pair) in map.iter() {
            if allowed(*pair, op) == default {
                continue;
            }
            // No range reaches the last MSR of all: its end would wrap.
            let end = (u64::from(range.last().0) + 1).min(u64::from(u32::MAX));
            next = next.max(u64::from(range.first().0));
            while next < end {
                let nothing_to_do = free.iter().find(|free| free.contains(Msr(next as u32)));
                if let Some(free) = nothing_to_do {
                    next = u64::from(free.last().0) + 1;
                    continue;
                }
                let last = (next + length - 1).min(u64::from(u32::MAX) - 1);
                ranges.push((op, MsrRange::new(Msr(next as u32), Msr(last as u32)).unwrap()));
                next = last + 1;
            }
        }
    }
    ranges
}

fn allowed((read, write): (bool, bool), op: Op) -> bool {
    match op {
        Op::Read => read,
        Op::Write => write,
    }
}

/// What the simple planner would install; `None` where the kernel takes no such filter.
fn simple_filter(map: &Map, default: bool, ranges: &[(Op, MsrRange)]) -> Option<Filter> {
    if ranges.len() > MAX_RANGES {
        return None;
    }
    let ranges = ranges.iter().map(|(op, range)| {
        let mut bitmap = vec![0u64; range.len().div_ceil(64) as usize];
        for (part, _) in map.within(*range).filter(|(_, pair)| allowed(**pair, *op)) {
            for bit in part.iter().map(|msr| (msr.0 - range.first().0) as usize) {
                bitmap[bit / 64] |= 1 << (bit % 64);
            }
        }
        FilterRange::new(range.first().0, range.len() as u32, Ops::of(*op), bitmap).unwrap()
    });
    Filter::new(verdict(default), ranges.collect::<Vec<_>>()).ok()
}

fn verdict(allowed: bool) -> Verdict {
    if allowed { Verdict::Allow } else { Verdict::Deny }
}

/// Fails where a filter and the map differ, at every place where either may change.
fn assert_does(filter: &Filter, map: &Map) {
    let stretches = map.iter().flat_map(|(range, _)| [range.first(), range.last()]);
    let ranges = filter.ranges().iter().flat_map(|range| {
        let end = range.base() + range.nmsrs();
        [range.base().saturating_sub(1), range.base(), end - 1, end].map(Msr)
    });
    for msr in stretches.chain(ranges) {
        // No filter decides these.
        if msr == Msr::MAX || MsrRange::X2APIC.contains(msr) {
            continue;
        }
        for op in Op::ALL {
            let wanted = verdict(allowed(*map.get(msr), op));
            assert_eq!(filter.verdict(msr, op), wanted, "{op} {msr} of {map:?}");
        }
    }
}

fn decisions(map: &Map) -> DecisionMap {
    let actions = |allowed: bool| match allowed {
        true => (ReadAction::Allow, WriteAction::Allow),
        false => (ReadAction::Deny, WriteAction::Deny),
    };
    DecisionMap::new(
        map.map(|(read, _)| Decision::of(actions(*read).0)),
        map.map(|(_, write)| Decision::of(actions(*write).1)),
    )
}

/// A map of stretches that lie near each other, near a range's length from each other, or where the MSRs are.
fn random_map(dice: &mut Dice) -> Map {
    let pair = |dice: &mut Dice| [(false, false), (true, true), (true, false), (false, true)][dice.roll(4) as usize];
    let homes = [
        0,
        0x700,
        0x4000_0000,
        0x8000_0000,
        0xc000_0000,
        0xc001_0000,
        0xffff_c000,
        0xffff_fff0,
    ];
    let mut from = 0;
    let rules: Vec<(MsrRange, (bool, bool))> = (0..1 + dice.roll(24))
        .map(|_| {
            from = match dice.roll(6) {
                0 => homes[dice.roll(homes.len() as u64) as usize] + dice.roll(16),
                1 => from + 12288 - 2 + dice.roll(5),
                2 => from + dice.roll(0x1_0000),
                _ => from + dice.roll(200),
            };
            from = from.min(u64::from(u32::MAX));
            let more = [
                0,
                1 + dice.roll(8),
                dice.roll(300),
                12288 - 3 + dice.roll(5),
                dice.roll(30000),
            ];
            let last = (from + more[dice.roll(5) as usize]).min(u64::from(u32::MAX));
            let range = MsrRange::new(Msr(from as u32), Msr(last as u32)).unwrap();
            (range, pair(dice))
        })
        .collect();
    let rest = dice.roll(2) == 0;
    Intervals::first_match((rest, rest), rules)
}

#[test]
fn a_plan_takes_no_more_ranges_than_the_obvious_one_under_the_real_limit() {
    let mut dice = Dice(11);
    let (mut fewer, mut fits_alone, mut ends_last) = (0, 0, 0);
    for _ in 0..300 {
        let map = random_map(&mut dice);
        let length = u64::from(MAX_RANGE_MSRS);
        let mut fewest = usize::MAX;
        for default in [false, true] {
            let ranges = simple(&map, default, &[MsrRange::X2APIC], length);
            if let Some(filter) = simple_filter(&map, default, &ranges) {
                assert_does(&filter, &map);
            }
            let (needed, separate) = match cover(&map, default, &[MsrRange::X2APIC], length) {
                Ok(covering) => (covering.ranges.len() as u64, covering.separate),
                Err(TooMany { at_least, separate }) => (at_least, separate),
            };
            assert!(needed <= ranges.len() as u64, "{map:?}");
            assert_eq!(separate, ranges.len() as u64, "{map:?}");
            fewest = fewest.min(ranges.len());
        }
        let (_, covering) = smallest(&map).unwrap();
        assert!(covering.ranges.len() <= fewest, "{map:?}");
        fewer += usize::from(covering.ranges.len() < fewest);
        let top = Msr(u32::MAX - 1);
        ends_last += usize::from(covering.ranges.iter().any(|(_, range)| range.last() == top));
        match Plan::compile(&decisions(&map)) {
            Ok(plan) => {
                assert_does(plan.filter(), &map);
                fits_alone += usize::from(fewest > 16);
            }
            Err(PlanError::TooManyRanges { needed, .. }) => {
                assert!(needed as usize <= fewest && needed > 16, "{map:?}")
            }
            Err(error) => panic!("{error}: {map:?}"),
        }
    }
    // Else the maps would tell the two apart nowhere.
    assert!(
        fewer > 40 && fits_alone > 4 && ends_last > 4,
        "{fewer}, {fits_alone}, {ends_last}"
    );
}

#[test]
fn no_default_takes_more_ranges_than_the_obvious_planner_under_any_limit() {
    let mut dice = Dice(13);
    let mut fewer = 0;
    for _ in 0..500 {
        let cells: Vec<(bool, bool)> = (0..60).map(|_| (dice.roll(3) == 0, dice.roll(3) == 0)).collect();
        let length = 1 + dice.roll(24);
        // At the start of the space, and at its end, where the last MSR needs nothing.
        let at = [0, u32::MAX - 59][dice.roll(2) as usize];
        for default in [false, true] {
            let map = map_at(at, &cells, default);
            let covering = cover(&map, default, &[], length).unwrap();
            let obvious = simple(&map, default, &[], length);
            assert!(covering.ranges.len() <= obvious.len(), "limit {length}, {cells:?}");
            fewer += usize::from(covering.ranges.len() < obvious.len());
        }
    }
    assert!(fewer > 400, "{fewer}");
}
