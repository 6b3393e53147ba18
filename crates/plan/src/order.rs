//! The order of a filter's ranges: what decides most stands first.

use alloc::vec;
use alloc::vec::Vec;

use msrgate_core::{MsrRange, Op};

use crate::{AccessCount, Direction, Intervals};

/// How many of the accesses of `profile` each range decides; `ranges` as a covering has them, one-direction ranges first.
pub(crate) fn visits(ranges: &[(Direction, MsrRange)], profile: &[AccessCount]) -> Vec<u64> {
    let mut visits = vec![0u64; ranges.len()];
    let of = |op| {
        let ranges = ranges.iter().zip(0usize..);
        let ranges = ranges.filter(move |((direction, _), _)| direction.ops().contains(op));
        Intervals::first_match(None, ranges.map(|((_, range), slot)| (*range, Some(slot))))
    };
    let (reads, writes) = (of(Op::Read), of(Op::Write));
    // What no filter decides visits no range.
    for touched in profile.iter().filter(|touched| !MsrRange::X2APIC.contains(touched.msr)) {
        let slot = match touched.op {
            Op::Read => *reads.get(touched.msr),
            Op::Write => *writes.get(touched.msr),
        };
        if let Some(visits) = slot.and_then(|slot| visits.get_mut(slot)) {
            *visits = visits.saturating_add(touched.count);
        }
    }
    visits
}

/// The ranges in the order in which the accesses of `profile` look at the fewest of them, among all orders in which each
/// access is decided by the same range: a one-direction range stays before a two-direction one that it overlaps. Ranges of
/// one kind do not overlap.
///
/// Goes through all sets of ranges that may stand first, of which 16 ranges have 65536.
pub(crate) fn by_visits(ranges: Vec<(Direction, MsrRange)>, profile: &[AccessCount]) -> Vec<(Direction, MsrRange)> {
    let visits = visits(&ranges, profile);
    let count = ranges.len();
    if visits.iter().all(|visits| *visits == 0) || count > 16 {
        return ranges;
    }
    // Which ranges have to stand before each.
    let before: Vec<usize> = (ranges.iter())
        .map(|(direction, range)| {
            let others = ranges.iter().enumerate().filter(|(_, (other, overlapping))| {
                *direction == Direction::Both && *other != Direction::Both && overlapping.intersection(*range).is_some()
            });
            others.fold(0, |set, (other, _)| set | 1 << other)
        })
        .collect();
    // For each set of ranges that stand first: what the best order of them costs, and which of them is the last.
    let mut best: Vec<Option<(u64, usize)>> = vec![None; 1 << count];
    if let Some(none) = best.first_mut() {
        *none = Some((0, 0));
    }
    for set in 0..1usize << count {
        let Some((cost, _)) = best.get(set).copied().flatten() else {
            continue;
        };
        let place = u64::from(set.count_ones()) + 1;
        for (next, (visits, before)) in visits.iter().zip(&before).enumerate() {
            if set >> next & 1 == 1 || before & !set != 0 {
                continue;
            }
            let cost = cost.saturating_add(visits.saturating_mul(place));
            if let Some(known) = best.get_mut(set | 1 << next)
                && known.is_none_or(|(known, _)| cost < known)
            {
                *known = Some((cost, next));
            }
        }
    }
    let mut order = Vec::with_capacity(count);
    let mut set = (1usize << count) - 1;
    while set != 0
        && let Some((_, last)) = best.get(set).copied().flatten()
    {
        order.extend(ranges.get(last).copied());
        set &= !(1 << last);
    }
    order.reverse();
    order
}

#[cfg(test)]
mod tests {
    use msrgate_core::Msr;

    use super::*;

    fn range(first: u32, last: u32) -> MsrRange {
        MsrRange::new(Msr(first), Msr(last)).unwrap()
    }

    /// The slot that decides an access.
    fn decider(ranges: &[(Direction, MsrRange)], touched: &AccessCount) -> Option<usize> {
        let of = |(direction, range): &(Direction, MsrRange)| {
            direction.ops().contains(touched.op) && range.contains(touched.msr)
        };
        ranges.iter().position(of)
    }

    /// How many ranges the accesses look at, by walking each.
    fn looks(ranges: &[(Direction, MsrRange)], profile: &[AccessCount]) -> u64 {
        let of = |touched: &AccessCount| decider(ranges, touched).map_or(ranges.len(), |slot| slot + 1) as u64;
        profile.iter().map(|touched| of(touched) * touched.count).sum()
    }

    fn orders(ranges: &[(Direction, MsrRange)]) -> Vec<Vec<(Direction, MsrRange)>> {
        if ranges.is_empty() {
            return vec![Vec::new()];
        }
        let mut all = Vec::new();
        for at in 0..ranges.len() {
            let mut rest = ranges.to_vec();
            let first = rest.remove(at);
            all.extend(orders(&rest).into_iter().map(|mut order| {
                order.insert(0, first);
                order
            }));
        }
        all
    }

    #[test]
    fn no_order_that_decides_alike_looks_at_fewer_ranges() {
        let mut seed = 9u64;
        let mut roll = |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        for _ in 0..60 {
            let mut ranges = Vec::new();
            for kind in [Direction::Read, Direction::Write, Direction::Both] {
                let mut from = roll(6) as u32;
                for _ in 0..roll(3) {
                    let last = from + roll(5) as u32;
                    ranges.push((kind, range(from, last)));
                    from = last + 1 + roll(4) as u32;
                }
            }
            let profile: Vec<AccessCount> = (0..roll(12))
                .map(|_| AccessCount {
                    msr: Msr(roll(20) as u32),
                    op: Op::ALL[roll(2) as usize],
                    count: 1 + roll(9),
                })
                .collect();
            let ordered = by_visits(ranges.clone(), &profile);
            let deciding = |order: &[(Direction, MsrRange)], touched: &AccessCount| {
                decider(order, touched).and_then(|slot| order.get(slot).copied())
            };
            let alike = |order: &[(Direction, MsrRange)]| {
                let every = (0..24).flat_map(|msr| {
                    Op::ALL.map(|op| AccessCount {
                        msr: Msr(msr),
                        op,
                        count: 1,
                    })
                });
                every
                    .into_iter()
                    .all(|touched| deciding(order, &touched) == deciding(&ranges, &touched))
            };
            assert!(alike(&ordered), "{ordered:?} for {ranges:?}");
            let fewest = orders(&ranges)
                .iter()
                .filter(|order| alike(order))
                .map(|order| looks(order, &profile))
                .min();
            assert_eq!(Some(looks(&ordered, &profile)), fewest, "{ordered:?} for {profile:?}");
        }
    }

    #[test]
    fn without_a_profile_the_order_stays() {
        let ranges = vec![(Direction::Write, range(4, 5)), (Direction::Both, range(0, 9))];
        assert_eq!(by_visits(ranges.clone(), &[]), ranges);
    }

    #[test]
    fn a_hot_range_stands_first_unless_another_overrides_it() {
        let (read, both, hot) = (
            (Direction::Read, range(4, 5)),
            (Direction::Both, range(0, 9)),
            (Direction::Both, range(20, 29)),
        );
        let touched = |msr, count| AccessCount {
            msr: Msr(msr),
            op: Op::Write,
            count,
        };
        assert_eq!(by_visits(vec![read, both, hot], &[touched(20, 5)]), [hot, read, both]);
        assert_eq!(by_visits(vec![read, both, hot], &[touched(4, 5)]), [read, both, hot]);
        assert_eq!(visits(&[read, both, hot], &[touched(4, 5), touched(25, 2)]), [0, 5, 2]);
    }
}
