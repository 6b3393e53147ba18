//! One filter for two owners: a policy, and a VMM that has a filter of its own.
//!
//! The kernel holds one filter, and the last call wins. So both are kept as sets, and what goes to the kernel allows
//! what both allow; it is planned anew, never one filter's ranges after the other's.

use alloc::vec::Vec;

use msrgate_core::{Filter, Log, MsrRange, Op, ReadAction, Verdict, WriteAction};

use crate::{Decision, DecisionMap, Intervals};

impl Intervals<Verdict> {
    /// The verdicts of a filter in one direction, over all MSRs.
    pub fn of_filter(filter: &Filter, op: Op) -> Intervals<Verdict> {
        let mut parts: Vec<(MsrRange, Verdict)> = Vec::from([(MsrRange::X2APIC, Verdict::Allow)]);
        for range in filter.ranges().iter().filter(|range| range.ops().contains(op)) {
            let Some(span) = range.span() else {
                continue;
            };
            let bits = range
                .bitmap()
                .iter()
                .flat_map(|word| (0..64).map(move |bit| word >> bit & 1 == 1));
            let mut run: Option<(MsrRange, Verdict)> = None;
            for (msr, bit) in span.iter().zip(bits) {
                let verdict = if bit { Verdict::Allow } else { Verdict::Deny };
                run = match run {
                    Some((range, last)) if last == verdict => {
                        MsrRange::new(range.first(), msr).map(|range| (range, last))
                    }
                    ended => {
                        parts.extend(ended);
                        Some((MsrRange::single(msr), verdict))
                    }
                };
            }
            parts.extend(run);
        }
        Intervals::first_match(filter.default_verdict(), parts)
    }
}

impl DecisionMap {
    /// The map with a denial wherever it leaves to the kernel what `other` denies.
    ///
    /// The plan of that map holds for both. The map tells whose an exit is: what the map decides by its own is its own, the rest
    /// is `other`'s.
    #[must_use]
    pub fn restricted_by(&self, other: &Filter) -> DecisionMap {
        let deny = |verdict: &Verdict, allows: bool| *verdict == Verdict::Deny && allows;
        self.clone()
            .with_reads(
                self.reads()
                    .zip(&Intervals::of_filter(other, Op::Read), |ours, theirs| {
                        match deny(theirs, ours.action == ReadAction::Allow) {
                            true => Decision {
                                action: ReadAction::Deny,
                                rule: None,
                                log: Log::None,
                            },
                            false => ours.clone(),
                        }
                    }),
            )
            .with_writes(
                self.writes()
                    .zip(&Intervals::of_filter(other, Op::Write), |ours, theirs| {
                        match deny(theirs, ours.action == WriteAction::Allow) {
                            true => Decision {
                                action: WriteAction::Deny,
                                rule: None,
                                log: Log::None,
                            },
                            false => ours.clone(),
                        }
                    }),
            )
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use msrgate_core::{FilterRange, Msr, Ops};

    use super::*;
    use crate::Plan;

    fn vmm() -> Filter {
        // As QEMU's: everything but reads of 0x35; and a range that wraps, one of x2APIC and an overlap for good measure.
        Filter::new(
            Verdict::Allow,
            vec![
                FilterRange::new(0x35, 1, Ops::READ, vec![0]).unwrap(),
                FilterRange::new(0x30, 16, Ops::BOTH, vec![0xff0f]).unwrap(),
                FilterRange::new(0xffff_fff0, 0x20, Ops::BOTH, vec![0]).unwrap(),
                FilterRange::new(0x7f0, 0x20, Ops::WRITE, vec![0]).unwrap(),
            ],
        )
        .unwrap()
    }

    #[test]
    fn a_filters_verdicts_as_intervals_are_its_verdicts() {
        let filter = vmm();
        for op in Op::ALL {
            let intervals = Intervals::of_filter(&filter, op);
            for msr in (0..0x1000).chain(0xffff_ff00..=u32::MAX).map(Msr) {
                assert_eq!(*intervals.get(msr), filter.verdict(msr, op), "{op} {msr}");
            }
        }
    }

    #[test]
    fn what_both_allow_is_allowed_and_nothing_else() {
        let value = Decision {
            action: ReadAction::Value(1),
            rule: Some(0),
            log: Log::None,
        };
        let range = |first, last| MsrRange::new(Msr(first), Msr(last)).unwrap();
        let policy = DecisionMap::new(
            Intervals::first_match(Decision::of(ReadAction::Allow), [(range(0x34, 0x3a), value)]),
            Intervals::first_match(
                Decision::of(WriteAction::Allow),
                [(range(0x20, 0x33), Decision::of(WriteAction::Deny))],
            ),
        );
        let composed = policy.restricted_by(&vmm());
        let plan = Plan::compile(&composed).unwrap();
        for op in Op::ALL {
            for msr in (0..0x1000).map(Msr) {
                let both = policy.allows(msr, op) && vmm().verdict(msr, op) == Verdict::Allow;
                assert_eq!(
                    plan.filter().verdict(msr, op) == Verdict::Allow,
                    both || MsrRange::X2APIC.contains(msr),
                    "{op} {msr}"
                );
            }
        }
        // What the policy decides keeps its action under the VMM's denial.
        assert_eq!(composed.reads().get(Msr(0x35)).action, ReadAction::Value(1));
    }
}
