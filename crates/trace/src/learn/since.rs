//! What a learned policy does otherwise than an older one, and what says so.

use std::fmt;

use msrgate_core::{Disposition, Msr, MsrRange, Op};
use msrgate_msrs::spell;
use msrgate_plan::{By, DecisionMap};
use msrgate_policy::Policy;

use super::rule::{Facts, Learned};
use super::summary::Summary;
use super::text;

/// What a learned policy is held against.
#[derive(Clone, Copy, Debug)]
pub enum Baseline<'a> {
    /// A policy, whoever wrote it, and its decision map.
    Policy(&'a Policy, &'a DecisionMap),
    /// What an earlier policy was learned from, and that policy's decision map.
    Summary(&'a Summary, &'a DecisionMap),
}

/// How accesses are treated otherwise.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// They are served, and were denied: the policy is looser.
    Added,
    /// They are served otherwise.
    Changed,
    /// They are denied, and were served: nothing was served with them again, and the policy is tighter.
    Dropped,
}

impl Kind {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Added => "added",
            Kind::Changed => "changed",
            Kind::Dropped => "dropped",
        }
    }
}

/// Accesses that the learned policy treats otherwise.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// How.
    pub kind: Kind,
    /// The registers.
    pub range: MsrRange,
    /// The direction.
    pub op: Op,
    /// What they got.
    pub before: String,
    /// What they get.
    pub after: String,
    /// What says so.
    pub why: String,
}

/// As a line, without the end of a sentence.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change {
            kind,
            range,
            op,
            before,
            after,
            why,
        } = self;
        write!(
            f,
            "{} {op} {}: {after}, was {before}: {why}",
            kind.name(),
            text::span(*range)
        )
    }
}

impl Learned {
    /// All accesses that this policy, whose decision map is `map`, treats otherwise than an older one; in order. An older
    /// policy that does what was done in every trace is no change, though it says more than traces tell, as `mask` does.
    pub fn since(&self, map: &DecisionMap, older: Baseline<'_>) -> Vec<Change> {
        let (Baseline::Policy(_, before) | Baseline::Summary(_, before)) = older;
        let found = before.differences(map, By::Actions);
        let mut changes = Vec::new();
        for (range, a, b) in &found.reads {
            let words = [(a.name(), a.to_string()), (b.name(), b.to_string())];
            self.compare(*range, Op::Read, &words, older, &mut changes);
        }
        for (range, a, b) in &found.writes {
            let words = [(a.name(), a.to_string()), (b.name(), b.to_string())];
            self.compare(*range, Op::Write, &words, older, &mut changes);
        }
        changes.sort_by_key(|change| (change.range.first(), change.op));
        changes
    }

    /// Adds what is to be said of a range that gets one thing before and another after.
    fn compare(
        &self,
        range: MsrRange,
        op: Op,
        [(was, before), (is, after)]: &[(&'static str, String); 2],
        older: Baseline<'_>,
        changes: &mut Vec<Change>,
    ) {
        let kind = match (*was, *is) {
            ("deny", _) => Kind::Added,
            (_, "deny") => Kind::Dropped,
            _ => Kind::Changed,
        };
        let mut push = |range: MsrRange| {
            changes.push(Change {
                kind,
                range,
                op,
                before: before.clone(),
                after: after.clone(),
                why: match kind {
                    Kind::Dropped => self.dropped(range, op, older),
                    Kind::Added | Kind::Changed => seen(&self.summary, range, op, "not seen, allowed by widening"),
                },
            });
        };
        if kind == Kind::Dropped {
            // No filter stops the x2APIC's registers, so nothing is learned of them.
            for part in without_x2apic(range) {
                push(part);
            }
            return;
        }
        // What is served is what was seen, or between: these ranges are short.
        let still = |msr: &Msr| {
            let seen = self.summary.seen.get(&(*msr, op));
            seen.is_some_and(|seen| seen.did.keys().all(|did| Some(*did) == Disposition::from_name(was)))
        };
        let news: Vec<Msr> = range.iter().filter(|msr| !still(msr)).collect();
        for part in spell::runs(&news) {
            push(part);
        }
    }

    /// Why what was served is not served any more.
    fn dropped(&self, range: MsrRange, op: Op, older: Baseline<'_>) -> String {
        let then = match older {
            Baseline::Summary(summary, _) => seen(summary, range, op, "allowed by widening"),
            Baseline::Policy(policy, map) => rules(policy, map, range, op),
        };
        let faults = self
            .summary
            .faulted
            .range((range.first(), Op::Read)..=(range.last(), Op::Write));
        let faults: u64 = faults
            .filter(|((_, other), _)| *other == op)
            .fold(0, |sum, (_, count)| sum.saturating_add(*count));
        let traces = text::counted(self.summary.traces, "trace");
        let names = text::names(self.summary.names.iter(), self.summary.traces);
        let missing = match self.summary.is_complete() {
            true => "",
            false => ", from which accesses are missing",
        };
        match faults {
            0 => format!("{then}; not touched in {traces} since{names}{missing}"),
            faults => format!(
                "{then}; only faulted, {}, in {traces} since{names}{missing}",
                text::counted(faults, "time")
            ),
        }
    }
}

/// What was seen of a range, or that nothing was.
fn seen(summary: &Summary, range: MsrRange, op: Op, otherwise: &str) -> String {
    let mut facts = Facts::default();
    let rows = summary
        .seen
        .range((range.first(), Op::Read)..=(range.last(), Op::Write));
    for ((_, other), seen) in rows {
        if *other == op {
            facts.add(op, seen);
        }
    }
    match facts.most {
        0 => otherwise.to_owned(),
        _ => facts.text(summary.traces),
    }
}

/// Which rules of a policy decide a range.
fn rules(policy: &Policy, map: &DecisionMap, range: MsrRange, op: Op) -> String {
    let mut numbers: Vec<Option<u32>> = match op {
        Op::Read => map.reads().within(range).map(|(_, decision)| decision.rule).collect(),
        Op::Write => map.writes().within(range).map(|(_, decision)| decision.rule).collect(),
    };
    numbers.sort_unstable();
    numbers.dedup();
    let words = numbers.into_iter().map(|number| match number {
        None => "by default".to_owned(),
        Some(number) => {
            let rule = usize::try_from(number).ok().and_then(|number| policy.rules.get(number));
            match rule.and_then(|rule| rule.why.as_deref()) {
                Some(why) => format!("rule {number} ({why})"),
                None => format!("rule {number}"),
            }
        }
    });
    words.collect::<Vec<_>>().join(" and ")
}

/// A range without the registers that no filter stops.
fn without_x2apic(range: MsrRange) -> impl Iterator<Item = MsrRange> {
    let before = MsrRange::new(Msr::MIN, Msr(MsrRange::X2APIC.first().0 - 1));
    let after = MsrRange::new(Msr(MsrRange::X2APIC.last().0 + 1), Msr::MAX);
    [before, after]
        .into_iter()
        .flatten()
        .filter_map(move |part| part.intersection(range))
}
