//! Where two decision maps differ.

use alloc::vec::Vec;

use msrgate_core::{Filter, MsrRange, Op, ReadAction, Verdict, WriteAction};

use crate::{Decision, DecisionMap, Intervals};

/// By what two maps are compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By {
    /// What an access gets, to the last bit of a value.
    Actions,
    /// Whether the filter leaves an access to the kernel, which is all that a raw filter says: any action but `allow`
    /// is a denial to it. The x2APIC's registers are equal, since no filter stops them; so are `unknown` and `invalid`,
    /// of which a filter says nothing.
    Verdicts,
}

/// All accesses that two maps treat differently. Ranges are in order, as long as they can be, and leave no MSR out.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub struct Differences {
    /// Reads, with what each map gives.
    pub reads: Vec<(MsrRange, ReadAction, ReadAction)>,
    /// Writes, with what each map gives.
    pub writes: Vec<(MsrRange, WriteAction, WriteAction)>,
    /// What accesses get that the kernel does not know.
    pub unknown: Fallback,
    /// What accesses get that the kernel refuses.
    pub invalid: Fallback,
}

/// A difference in what accesses get after the kernel has declined them; `None` where there is none.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub struct Fallback {
    /// Of reads.
    pub read: Option<(ReadAction, ReadAction)>,
    /// Of writes.
    pub write: Option<(WriteAction, WriteAction)>,
}

impl Differences {
    /// Whether the maps are equal.
    pub fn is_empty(&self) -> bool {
        *self == Differences::default()
    }
}

impl DecisionMap {
    /// What a raw filter says: reads and writes that it leaves to the kernel, and others. Its user space's answers, which
    /// it does not tell, are `deny`.
    pub fn of_filter(filter: &Filter) -> DecisionMap {
        let reads = Intervals::of_filter(filter, Op::Read).map(|verdict| match verdict {
            Verdict::Allow => Decision::of(ReadAction::Allow),
            Verdict::Deny => Decision::of(ReadAction::Deny),
        });
        let writes = Intervals::of_filter(filter, Op::Write).map(|verdict| match verdict {
            Verdict::Allow => Decision::of(WriteAction::Allow),
            Verdict::Deny => Decision::of(WriteAction::Deny),
        });
        DecisionMap::new(reads, writes)
    }

    /// All accesses that `other` treats differently, over the whole space.
    pub fn differences(&self, other: &DecisionMap, by: By) -> Differences {
        let reads = self
            .reads()
            .map(|decision| decision.action.clone())
            .zip(&other.reads().map(|decision| decision.action.clone()), |a, b| {
                (a.clone(), b.clone())
            });
        let writes = self
            .writes()
            .map(|decision| decision.action.clone())
            .zip(&other.writes().map(|decision| decision.action.clone()), |a, b| {
                (a.clone(), b.clone())
            });
        match by {
            By::Actions => Differences {
                reads: unequal(&reads),
                writes: unequal(&writes),
                unknown: fallback(self.unknown(), other.unknown()),
                invalid: fallback(self.invalid(), other.invalid()),
            },
            By::Verdicts => {
                let (ours, theirs) = (self.allowed(), other.allowed());
                let unfiltered = Intervals::first_match(false, [(MsrRange::X2APIC, true)]);
                let differ = ours.zip(&theirs, |a, b| (a.0 != b.0, a.1 != b.1));
                let differ = differ.zip(&unfiltered, |differ, unfiltered| match unfiltered {
                    true => (false, false),
                    false => *differ,
                });
                Differences {
                    reads: where_set(&reads, &differ.map(|differ| differ.0)),
                    writes: where_set(&writes, &differ.map(|differ| differ.1)),
                    ..Differences::default()
                }
            }
        }
    }
}

fn unequal<A: Clone + Eq>(both: &Intervals<(A, A)>) -> Vec<(MsrRange, A, A)> {
    where_set(both, &both.map(|(a, b)| a != b))
}

fn where_set<A: Clone + Eq>(both: &Intervals<(A, A)>, set: &Intervals<bool>) -> Vec<(MsrRange, A, A)> {
    both.zip(set, |pair, set| set.then(|| pair.clone()))
        .iter()
        .filter_map(|(range, pair)| pair.clone().map(|(a, b)| (range, a, b)))
        .collect()
}

fn fallback(a: &(ReadAction, WriteAction), b: &(ReadAction, WriteAction)) -> Fallback {
    Fallback {
        read: (a.0 != b.0).then(|| (a.0.clone(), b.0.clone())),
        write: (a.1 != b.1).then(|| (a.1.clone(), b.1.clone())),
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use msrgate_core::{FilterRange, Msr, Ops};

    use super::*;
    use crate::Preset;

    fn range(first: u32, last: u32) -> MsrRange {
        MsrRange::new(Msr(first), Msr(last)).unwrap()
    }

    fn reads(ranges: &[(MsrRange, ReadAction)]) -> DecisionMap {
        let ranges = ranges
            .iter()
            .map(|(range, action)| (*range, Decision::of(action.clone())));
        DecisionMap::allow_all().with_reads(Intervals::first_match(Decision::of(ReadAction::Allow), ranges))
    }

    #[test]
    fn what_differs_is_told_as_the_longest_ranges_whatever_rule_says_it() {
        let a = reads(&[
            (range(0x10, 0x1f), ReadAction::Deny),
            (range(0x30, 0x30), ReadAction::Value(1)),
        ]);
        let b = reads(&[
            (range(0x18, 0x2f), ReadAction::Deny),
            (range(0x30, 0x30), ReadAction::Value(2)),
        ]);
        let writes = Intervals::first_match(
            Decision {
                rule: Some(7),
                ..Decision::of(WriteAction::Allow)
            },
            [(range(0, 3), Decision::of(WriteAction::Allow))],
        );
        let a = a
            .with_writes(writes)
            .with_unknown((ReadAction::Value(0), WriteAction::Deny));
        let found = a.differences(&b, By::Actions);
        let wanted = [
            (range(0x10, 0x17), ReadAction::Deny, ReadAction::Allow),
            (range(0x20, 0x2f), ReadAction::Allow, ReadAction::Deny),
            (range(0x30, 0x30), ReadAction::Value(1), ReadAction::Value(2)),
        ];
        assert_eq!(found.reads, wanted);
        assert!(found.writes.is_empty() && !found.is_empty());
        assert_eq!(found.unknown.read, Some((ReadAction::Value(0), ReadAction::Deny)));
        assert_eq!((found.unknown.write, found.invalid), (None, Fallback::default()));
        assert!(a.differences(&a, By::Actions).is_empty());
    }

    #[test]
    fn to_a_filter_every_answer_of_user_space_is_a_denial_and_x2apic_is_open() {
        let filter = Filter::new(
            Verdict::Allow,
            vec![FilterRange::new(0x8b, 1, Ops::READ, vec![0]).unwrap()],
        )
        .unwrap();
        let raw = DecisionMap::of_filter(&filter);
        let policy = reads(&[
            (range(0x8b, 0x8b), ReadAction::Value(1)),
            (MsrRange::X2APIC, ReadAction::Deny),
        ]);
        let policy = policy.with_invalid((ReadAction::Deny, WriteAction::Ignore));
        assert!(policy.differences(&raw, By::Verdicts).is_empty());
        assert!(raw.differences(&policy, By::Verdicts).is_empty());
        assert!(!policy.differences(&raw, By::Actions).is_empty());
        let found = reads(&[]).differences(&raw, By::Verdicts);
        assert_eq!(found.reads, [(range(0x8b, 0x8b), ReadAction::Allow, ReadAction::Deny)]);
        // What the kernel holds it is left to answer.
        let held = policy.with_presets(&[Preset {
            msr: Msr(0x8b),
            value: 1,
        }]);
        assert_eq!(
            held.differences(&raw, By::Verdicts).reads,
            [(range(0x8b, 0x8b), ReadAction::Allow, ReadAction::Deny)]
        );
    }
}
