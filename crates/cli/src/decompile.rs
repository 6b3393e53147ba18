//! `msrgate decompile`: from a raw filter or a plan back to a policy.

use std::io::Write;

use msrgate_core::{ReadAction, WriteAction};
use msrgate_plan::{By, DecisionMap};
use msrgate_policy::raw::{RawFormat, RawInput};
use msrgate_policy::{Decompiled, Policy, decompile};
use serde_json::{Value, json};

use crate::args::DecompileArgs;
use crate::exit::{Exit, Failure};
use crate::{input, load, stream};

pub(crate) fn run(args: &DecompileArgs) -> Result<Exit, Failure> {
    let bytes = input::bytes(&args.filter)?;
    if RawFormat::of(&bytes) == RawFormat::Policy {
        return Err(Failure::input(format!(
            "`{}` is no filter in any form that is known here, and no plan; if it is a policy, it is what `decompile` writes",
            input::shown(&args.filter)
        )));
    }
    let given = load::filter(&args.filter, &bytes)?;
    let decompiled = decompile(&given);
    let text = decompiled.to_string();
    verify(&text, &given)?;
    let mut out = stream::out();
    match args.json {
        true => writeln!(out, "{:#}", json(&decompiled, &text, &given))?,
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

fn json(decompiled: &Decompiled, text: &str, given: &RawInput) -> Value {
    let rules = decompiled.rules.iter().map(|rule| {
        json!({
            "msrs": rule.msrs,
            "read": rule.read.as_ref().map(ReadAction::name),
            "write": rule.write.as_ref().map(WriteAction::name),
        })
    });
    json!({
        "default": decompiled.default.name(),
        "rules": rules.collect::<Vec<_>>(),
        "remarks": given.remarks,
        "policy": text,
    })
}
