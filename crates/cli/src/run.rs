//! `run`: an unmodified VMM under a policy.

use std::ffi::OsString;
use std::process::Command;

use msrgate_core::{ReadAction, WriteAction};
use msrgate_hook::{Handover, VARIABLE};
use msrgate_plan::{DecisionMap, Plan};

use crate::args::RunArgs;
use crate::exit::{Exit, Failure};
use crate::load;

mod child;
mod library;
mod program;

const LD_PRELOAD: &str = "LD_PRELOAD";

pub(crate) fn run(args: &RunArgs) -> Result<Exit, Failure> {
    let map = policy(args)?;
    let Some((name, arguments)) = args.command.split_first() else {
        return Err(Failure::input("no VMM is named"));
    };
    let program = program::find(name)?;
    program::check(&program)?;
    let library = library::find()?;
    machine(&map)?;

    let machine =
        |error: std::io::Error| Failure::Line(Exit::Machine, format!("the policy cannot be handed over: {error}"));
    let handover = Handover::new(&map).map_err(machine)?;
    let mut command = Command::new(&program);
    child::named(&mut command, name);
    command
        .args(arguments)
        .env(VARIABLE, handover.variable().map_err(machine)?)
        .env(LD_PRELOAD, preloaded(library.into_os_string()));
    child::run(command, &program)
}

/// What each access of a guest gets.
fn policy(args: &RunArgs) -> Result<DecisionMap, Failure> {
    let mut map = match &args.policy {
        None => DecisionMap::allow_all(),
        Some(path) => {
            let cpuid = load::cpuid(&args.cpuid)?;
            load::policy_or_report(path, cpuid.as_ref())?.map
        }
    };
    if args.ignore_unknown {
        map.unknown = (ReadAction::Value(0), WriteAction::Ignore);
    }
    Ok(map)
}

/// What can be known to fail before the VMM starts. A machine without KVM is none of it: the VMM may not need it.
fn machine(map: &DecisionMap) -> Result<(), Failure> {
    let plan = Plan::compile(map).map_err(|error| Failure::Line(Exit::No, error.to_string()))?;
    if let Some(name) = plan.table().handlers().next() {
        return Err(Failure::input(format!(
            "the policy names the handler `{name}`, which is code of a VMM: a VMM that links msrgate can have it, `run` \
             cannot; give the rule another action"
        )));
    }
    Ok(())
}

/// Ahead of what is preloaded already.
fn preloaded(library: OsString) -> OsString {
    let mut value = library;
    if let Some(others) = std::env::var_os(LD_PRELOAD).filter(|others| !others.is_empty()) {
        value.push(":");
        value.push(others);
    }
    value
}
