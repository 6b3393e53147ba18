//! The smallest change to a map that needs too many ranges.

use alloc::vec::Vec;

use msrgate_core::abi::{MAX_RANGE_MSRS, MAX_RANGES};
use msrgate_core::{Log, MsrRange, Op, ReadAction, Verdict, WriteAction};

use crate::shortfall::{Shortfall, shortfall};
use crate::{Decision, DecisionMap, Intervals, Plan};

/// What is to be given another verdict so that a map fits into a filter.
///
/// [`DecisionMap::smallest_change`] compiles the changed map before it gives one of these.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Change {
    /// In order of MSR, reads before writes; each decided by one rule.
    pub parts: Vec<ChangedPart>,
    /// How many accesses it changes.
    pub accesses: u64,
    /// Whether the search left no smaller change out.
    pub proved: bool,
}

/// Accesses that are to be given another verdict.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct ChangedPart {
    /// The MSRs.
    pub range: MsrRange,
    /// The direction.
    pub op: Op,
    /// What they would get.
    pub to: Verdict,
    /// The rule that says otherwise, counted from 0; `None` for the default.
    pub rule: Option<u32>,
}

impl DecisionMap {
    /// The fewest accesses that have to be given another verdict, `allow` for what is not left to the kernel or `deny`
    /// for what is, so that the map fits into 16 ranges.
    ///
    /// Opening and closing count alike: which of them is harmless, the policy's author knows. `None` where no change was
    /// found that compiles.
    pub fn smallest_change(&self) -> Option<Change> {
        let allowed = self.allowed();
        let price = Intervals::uniform((1, 1));
        let limits = (u64::from(MAX_RANGE_MSRS), MAX_RANGES as u64);
        let found = shortfall(&allowed, &price, &[MsrRange::X2APIC], limits);
        let best = found.best?;
        let change = Change {
            accesses: best.cost,
            parts: self.parts(&best),
            proved: found.proved,
        };
        Plan::compile(&self.changed(&change)).ok().map(|_| change)
    }

    /// The map with the accesses of `change` given their other verdict.
    #[must_use]
    pub fn changed(&self, change: &Change) -> DecisionMap {
        let of = |op| {
            let parts = change.parts.iter().filter(move |part| part.op == op);
            Intervals::first_match(None, parts.map(|part| (part.range, Some(part.to))))
        };
        fn decided<A: Clone>(decision: &Decision<A>, to: Option<Verdict>, allow: A, deny: A) -> Decision<A> {
            let action = match to {
                None => return decision.clone(),
                Some(Verdict::Allow) => allow,
                Some(Verdict::Deny) => deny,
            };
            Decision {
                action,
                rule: None,
                log: Log::None,
            }
        }
        self.clone()
            .with_reads(self.reads().zip(&of(Op::Read), |decision, to| {
                decided(decision, *to, ReadAction::Allow, ReadAction::Deny)
            }))
            .with_writes(self.writes().zip(&of(Op::Write), |decision, to| {
                decided(decision, *to, WriteAction::Allow, WriteAction::Deny)
            }))
    }

    fn parts(&self, found: &Shortfall) -> Vec<ChangedPart> {
        let mut parts: Vec<ChangedPart> = Vec::new();
        let mut add = |range, op, allowed: bool, rule| {
            let to = if allowed { Verdict::Deny } else { Verdict::Allow };
            let part = ChangedPart { range, op, to, rule };
            let joined = parts.last_mut().and_then(|last| {
                let next = last.range.last().0.checked_add(1)? == range.first().0;
                let alike = (last.op, last.to, last.rule) == (op, to, rule);
                let whole = MsrRange::new(last.range.first(), range.last())?;
                (next && alike).then(|| last.range = whole)
            });
            if joined.is_none() {
                parts.push(part);
            }
        };
        for (range, op) in &found.wrong {
            match op {
                Op::Read => {
                    for (part, decision) in self.reads().within(*range) {
                        add(part, *op, decision.action == ReadAction::Allow, decision.rule);
                    }
                }
                Op::Write => {
                    for (part, decision) in self.writes().within(*range) {
                        add(part, *op, decision.action == WriteAction::Allow, decision.rule);
                    }
                }
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use msrgate_core::Msr;

    use super::*;

    fn range(first: u32, last: u32) -> MsrRange {
        MsrRange::new(Msr(first), Msr(last)).unwrap()
    }

    /// Reads of these ranges are denied, each by its rule.
    fn denying(ranges: &[MsrRange]) -> DecisionMap {
        let decisions = ranges.iter().zip(0..).map(|(range, rule)| {
            let decision = Decision {
                action: ReadAction::Deny,
                rule: Some(rule),
                log: Log::None,
            };
            (*range, decision)
        });
        DecisionMap::allow_all().with_reads(Intervals::first_match(Decision::of(ReadAction::Allow), decisions))
    }

    #[test]
    fn the_smallest_island_is_what_has_to_go() {
        let mut ranges: Vec<MsrRange> = (0..17).map(|i| range(i * 0x10000, i * 0x10000 + 7)).collect();
        ranges[5] = range(0x50000, 0x50002);
        let map = denying(&ranges);
        assert!(Plan::compile(&map).is_err());
        let change = map.smallest_change().unwrap();
        let part = ChangedPart {
            range: range(0x50000, 0x50002),
            op: Op::Read,
            to: Verdict::Allow,
            rule: Some(5),
        };
        assert_eq!(
            change,
            Change {
                parts: vec![part],
                accesses: 3,
                proved: true
            }
        );
        let plan = Plan::compile(&map.changed(&change)).unwrap();
        assert_eq!(plan.filter().ranges().len(), 16);
    }

    #[test]
    fn reads_and_writes_that_differ_are_made_alike_where_that_changes_less() {
        // Nine islands of reads, of whose writes fewer are allowed: two ranges each, which is two too many.
        let islands = |fewer: u32| {
            (0..9).map(move |i| {
                let last = i * 0x10000 + 0x100 - fewer * (i + 1);
                (range(i * 0x10000, last), i)
            })
        };
        let by_rule = |(range, rule): (MsrRange, u32)| (range, Some(rule));
        let reads = Intervals::first_match(None, islands(0).map(by_rule));
        let writes = Intervals::first_match(None, islands(1).map(by_rule));
        let map = DecisionMap::new(
            reads.map(|rule| Decision {
                action: rule.map_or(ReadAction::Deny, |_| ReadAction::Allow),
                rule: *rule,
                log: Log::None,
            }),
            writes.map(|rule| Decision {
                action: rule.map_or(WriteAction::Deny, |_| WriteAction::Allow),
                rule: *rule,
                log: Log::None,
            }),
        );
        assert!(Plan::compile(&map).is_err());
        let change = map.smallest_change().unwrap();
        assert_eq!((change.accesses, change.proved), (3, true));
        // Closing the reads changes as much as opening the writes, and less can go wrong.
        let closed = |first, last, rule| ChangedPart {
            range: range(first, last),
            op: Op::Read,
            to: Verdict::Deny,
            rule: Some(rule),
        };
        assert_eq!(change.parts, [closed(0x100, 0x100, 0), closed(0x100ff, 0x10100, 1)]);
    }
}
