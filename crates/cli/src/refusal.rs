//! A policy that needs more ranges than a filter has, and what programs read of it.

use msrgate_core::{Msr, Op};
use msrgate_plan::{Change, PlanError};
use msrgate_policy::{FitAdvice, Policy};

use crate::json::{Printed, object};

/// A policy that needs too many ranges.
#[derive(Debug)]
pub(crate) struct TooMany {
    pub(crate) policy: Policy,
    pub(crate) error: PlanError,
    pub(crate) fit: FitAdvice,
}

/// The numbers of a refusal, its witness, and what would fit.
pub(crate) fn printed(too_many: &TooMany) -> Option<impl Printed> {
    let TooMany { policy, error, fit } = too_many;
    let PlanError::TooManyRanges {
        needed,
        exact,
        separate,
        witness,
        groups,
    } = error
    else {
        return None;
    };
    let groups = groups.iter().map(|group| {
        object! {
            /// The first MSR.
            first: group.range.first().to_string(),
            /// The last MSR.
            last: group.range.last().to_string(),
            /// Whether it holds for reads.
            read: group.direction.ops().contains(Op::Read),
            /// Whether it holds for writes.
            write: group.direction.ops().contains(Op::Write),
            /// How many accesses it gives another verdict than the default.
            accesses: group.accesses,
            /// The numbers of the rules that ask for it.
            rules: &group.rules,
        }
    });
    Some(object! {
        /// How many ranges it needs.
        needed: needed,
        /// Whether that is the number or at least so many.
        exact: exact,
        /// As `minimum.separate` of `plan`.
        separate: separate,
        /// As many accesses as ranges, as `minimum.witness` of `plan`; null likewise, and where the ranges are too many to
        /// search.
        witness: witness.as_deref().map(accesses),
        /// The ranges that it would take; empty where they are too many to search.
        ranges: groups.collect::<Vec<_>>(),
        /// The fewest accesses that have to get another verdict; the policy so changed was compiled. Null if none was found.
        change: fit.change.as_ref().map(|found| change(policy, found)),
        /// Rules without which it fits, compiled too; null if there are none among those of `refused.change`.
        without: fit.without.as_ref().map(|without| object! {
            /// The numbers of the rules; none of them can stay.
            rules: &without.rules,
            /// How many accesses that changes.
            accesses: without.accesses,
        }),
    })
}

/// Single accesses, as a witness has them.
pub(crate) fn accesses(accesses: &[(Msr, Op)]) -> Vec<impl Printed> {
    let access = |(msr, op): &(Msr, Op)| {
        object! {
            /// The MSR.
            msr: msr.to_string(),
            /// The direction.
            op: op.name(),
        }
    };
    accesses.iter().map(access).collect()
}

fn change(policy: &Policy, change: &Change) -> impl Printed {
    let parts = change.parts.iter().map(|part| {
        object! {
            /// The first MSR.
            first: part.range.first().to_string(),
            /// The last MSR.
            last: part.range.last().to_string(),
            /// The direction.
            op: part.op.name(),
            /// What they have to get: `"allow"` or `"deny"`.
            to: part.to.name(),
            /// The rule that says otherwise; null for the default.
            rule: part.rule,
            /// The rule's file and line; null for the default.
            place: part.rule.and_then(|rule| policy.rule_place(rule)),
        }
    });
    object! {
        /// How many.
        accesses: change.accesses,
        /// Whether the search left no smaller change out.
        proved: change.proved,
        /// Which, by MSR.
        parts: parts.collect::<Vec<_>>(),
    }
}
