//! `msrgate decompile`: from a raw filter or a plan back to a policy.

use std::io::Write;

use msrgate_core::{ReadAction, WriteAction};
use msrgate_plan::{By, DecisionMap};
use msrgate_policy::raw::{RawFormat, RawInput};
use msrgate_policy::{Decompiled, Policy, decompile};

use crate::args::DecompileArgs;
use crate::exit::{Exit, Failure};
use crate::json::{self, Printed, object};
use crate::{input, load, stream};

pub(crate) fn run(args: &DecompileArgs) -> Result<Exit, Failure> {
    let bytes = input::bytes(&args.filter)?;
    if RawFormat::of(&bytes) == RawFormat::Policy {
        return Err(Failure::input(format!(
            "`{}` is neither a plan nor a filter in any known form; if it is a policy, it is already what `decompile` writes",
            input::shown(&args.filter)
        )));
    }
    let given = load::filter(&args.filter, &bytes)?;
    let decompiled = decompile(&given);
    let text = decompiled.to_string();
    verify(&text, &given)?;
    let mut out = stream::out();
    match args.json {
        true => json::print(&printed(&decompiled, &text, &given))?,
        false => write!(out, "{text}")?,
    }
    Ok(Exit::Yes)
}

/// Nothing is printed that does not say what the filter says.
fn verify(text: &str, given: &RawInput) -> Result<(), Failure> {
    let bug = |what: String| {
        Failure::input(format!(
            "the decompiled policy is not what the filter says: {what}; please report it with the filter"
        ))
    };
    let policy = Policy::parse("decompiled.toml", text)
        .map_err(|rejected| bug(format!("{:?}", rejected.diagnostics.first())))?;
    let map = policy.decision_map(None).map_err(|needed| bug(needed.to_string()))?;
    let found = match &given.plan {
        Some(plan) => map.differences(plan, By::Actions),
        None => map.differences(&DecisionMap::of_filter(&given.filter), By::Verdicts),
    };
    match found.is_empty() {
        true => Ok(()),
        false => Err(bug(format!("{found:?}"))),
    }
}

pub(crate) fn printed(decompiled: &Decompiled, text: &str, given: &RawInput) -> impl Printed {
    let rules = decompiled.rules.iter().map(|rule| {
        object! {
            /// The MSRs, as the policy spells them.
            msrs: &rule.msrs,
            /// The action's word for reads; null if the rule does not decide reads.
            read: rule.read.as_ref().map(ReadAction::name),
            /// The action's word for writes; null if the rule does not decide writes.
            write: rule.write.as_ref().map(WriteAction::name),
        }
    });
    object! {
        /// The policy's default: `"allow"` or `"deny"`.
        default: decompiled.default.name(),
        /// The policy's rules; the first that names an access decides it.
        rules: rules.collect::<Vec<_>>(),
        /// What the kernel takes for something else than it looks like, in sentences.
        remarks: &given.remarks,
        /// The policy's text.
        policy: text,
    }
}
