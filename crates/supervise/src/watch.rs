//! A filter that hands over what was not touched before, and lets through more and more.

use msrgate_core::{DecidedBy, Filter, FilterRange, Msr, MsrRange, Op, Ops, Verdict, abi};

/// By how many MSRs a range grows.
const STEP: u32 = 1024;

/// The filter with one more access allowed and every other one as before; `None` where that takes a new plan.
///
/// Takes time for the MSRs that a range grows by, and not for all that were opened before.
pub(crate) fn opened(filter: &Filter, msr: Msr, op: Op) -> Option<Filter> {
    let only = Ops::of(op);
    let mut ranges = filter.ranges().to_vec();
    if let (_, DecidedBy::Range { slot, bit }) = filter.decide(msr, op) {
        let range = ranges.get_mut(usize::from(slot))?;
        // A bit that stands for both directions cannot open one.
        if range.ops() != only {
            return None;
        }
        let mut words = range.bitmap().to_vec();
        *words.get_mut(bit as usize / 64)? |= 1 << (bit % 64);
        *range = FilterRange::new(range.base(), range.nmsrs(), only, words).ok()?;
        return Filter::new(filter.default_verdict(), ranges).ok();
    }
    let first = msr.0 - msr.0 % STEP;
    let block = MsrRange::new(Msr(first), Msr(first.checked_add(STEP - 1)?.min(u32::MAX - 1)))?;
    let grown = |range: &FilterRange| {
        let span = range.span().filter(|_| range.ops() == only)?;
        let both = MsrRange::new(span.first().min(block.first()), span.last().max(block.last()))?;
        (both.len() <= u64::from(abi::MAX_RANGE_MSRS)).then_some(both)
    };
    match ranges.iter().position(|range| grown(range).is_some()) {
        Some(at) => {
            let range = ranges.get_mut(at)?;
            *range = with(filter, grown(range)?, msr, op)?;
        }
        None if ranges.len() < abi::MAX_RANGES => ranges.push(with(filter, block, msr, op)?),
        None => return None,
    }
    Filter::new(filter.default_verdict(), ranges).ok()
}

/// The filter with an access denied again that [`opened`] has allowed; `None` where that takes a new plan.
pub(crate) fn closed(filter: &Filter, msr: Msr, op: Op) -> Option<Filter> {
    let (Verdict::Allow, DecidedBy::Range { slot, bit }) = filter.decide(msr, op) else {
        return None;
    };
    let mut ranges = filter.ranges().to_vec();
    let range = ranges
        .get_mut(usize::from(slot))
        .filter(|range| range.ops() == Ops::of(op))?;
    let mut words = range.bitmap().to_vec();
    *words.get_mut(bit as usize / 64)? &= !(1 << (bit % 64));
    *range = FilterRange::new(range.base(), range.nmsrs(), range.ops(), words).ok()?;
    Filter::new(filter.default_verdict(), ranges).ok()
}

/// A range that says of each MSR what the filter says, and allows `msr`.
fn with(filter: &Filter, span: MsrRange, msr: Msr, op: Op) -> Option<FilterRange> {
    let count = u32::try_from(span.len()).ok()?;
    let mut words = vec![0_u64; count.div_ceil(64) as usize];
    for (at, each) in span.iter().enumerate() {
        if each == msr || filter.verdict(each, op) == Verdict::Allow {
            *words.get_mut(at / 64)? |= 1 << (at % 64);
        }
    }
    FilterRange::new(span.first().0, count, Ops::of(op), words).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn filter() -> Filter {
        let range = |base, nmsrs, ops, words: Vec<u64>| FilterRange::new(base, nmsrs, ops, words).unwrap();
        let ranges = [
            range(0x10, 64, Ops::READ, vec![0b101]),
            range(0x0, 128, Ops::BOTH, vec![0, 1]),
            range(0x3000, 64, Ops::WRITE, vec![0]),
        ];
        Filter::new(Verdict::Deny, ranges.to_vec()).unwrap()
    }

    proptest! {
        // Each compares thousands of MSRs at each of its touches.
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn what_is_opened_is_allowed_and_nothing_else_changes(
            touches in prop::collection::vec((prop_oneof![0_u32..0x200, 0x2f00_u32..0x6000, any::<u32>()], any::<bool>()), 1..30),
        ) {
            let mut filter = filter();
            for (msr, write) in touches {
                let (msr, op) = (Msr(msr), if write { Op::Write } else { Op::Read });
                let Some(next) = opened(&filter, msr, op) else { continue };
                prop_assert_eq!(next.verdict(msr, op), Verdict::Allow);
                let again = closed(&next, msr, op).unwrap();
                prop_assert_eq!(again.verdict(msr, op), Verdict::Deny);
                prop_assert_eq!(opened(&again, msr, op), Some(next.clone()));
                let near = (msr.0.saturating_sub(2500)..=msr.0.saturating_add(2500)).chain(0..0x300).chain(0x2e00..0x3400);
                for other in near.map(Msr) {
                    for each in Op::ALL {
                        if (other, each) != (msr, op) {
                            prop_assert_eq!(next.verdict(other, each), filter.verdict(other, each), "{} {}", each, other);
                        }
                    }
                }
                filter = next;
            }
        }
    }

    #[test]
    fn thousands_of_msrs_far_apart_find_room() {
        let mut filter = Filter::new(Verdict::Deny, vec![FilterRange::new(0, 1, Ops::BOTH, vec![0]).unwrap()]).unwrap();
        for msr in (0x4000_0000..).step_by(3).take(8000) {
            filter = opened(&filter, Msr(msr), Op::Read).unwrap();
        }
        assert!(filter.ranges().len() <= 4, "{}", filter.ranges().len());
        assert_eq!(filter.verdict(Msr(0x4000_0001), Op::Read), Verdict::Deny);
    }
}
