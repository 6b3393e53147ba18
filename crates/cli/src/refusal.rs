//! A policy that needs more ranges than a filter has, and what programs read of it.

use msrgate_core::{Msr, Op};
use msrgate_plan::{Change, PlanError};
use msrgate_policy::{FitAdvice, Policy};
use serde_json::{Value, json};

/// A policy that needs too many ranges.
#[derive(Debug)]
pub(crate) struct TooMany {
    pub(crate) policy: Policy,
    pub(crate) error: PlanError,
    pub(crate) fit: FitAdvice,
}

/// The numbers of a refusal, its witness, and what would fit.
pub(crate) fn json(too_many: &TooMany) -> Value {
    let TooMany { policy, error, fit } = too_many;
    let PlanError::TooManyRanges {
        needed,
        exact,
        separate,
        witness,
        groups,
    } = error
    else {
        return Value::Null;
    };
    let groups = groups.iter().map(|group| {
        json!({
            "first": group.range.first().to_string(),
            "last": group.range.last().to_string(),
            "read": group.direction.ops().contains(Op::Read),
            "write": group.direction.ops().contains(Op::Write),
            "accesses": group.accesses,
            "rules": group.rules,
        })
    });
    json!({
        "needed": needed,
        "exact": exact,
        "separate": separate,
        "witness": witness.as_deref().map(accesses),
        "ranges": groups.collect::<Vec<_>>(),
        "change": fit.change.as_ref().map(|found| change(policy, found)),
        "without": fit.without.as_ref().map(|without| json!({
            "rules": without.rules,
            "accesses": without.accesses,
        })),
    })
}

/// Single accesses, as a witness has them.
pub(crate) fn accesses(accesses: &[(Msr, Op)]) -> Vec<Value> {
    let access = |(msr, op): &(Msr, Op)| json!({ "msr": msr.to_string(), "op": op.name() });
    accesses.iter().map(access).collect()
}

fn change(policy: &Policy, change: &Change) -> Value {
    let parts = change.parts.iter().map(|part| {
        json!({
            "first": part.range.first().to_string(),
            "last": part.range.last().to_string(),
            "op": part.op.name(),
            "to": part.to.name(),
            "rule": part.rule,
            "place": part.rule.and_then(|rule| policy.rule_place(rule)),
        })
    });
    json!({
        "accesses": change.accesses,
        "proved": change.proved,
        "parts": parts.collect::<Vec<_>>(),
    })
}
