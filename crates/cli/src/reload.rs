//! `msrgate reload`: another policy for VMs that run.

use std::io::Write;
use std::time::Duration;

use msrgate_plan::CompileOptions;
use serde_json::Value;

use crate::args::ReloadArgs;
use crate::control::{Request, Running};
use crate::exit::{Exit, Failure};
use crate::words::{self, counted};
use crate::{load, stream};

/// A supervisor may have much to do: other policies, and VMs by the hundred.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn run(args: &ReloadArgs) -> Result<Exit, Failure> {
    let policy = load::unresolved(&args.policy)?;
    // What is wrong with it is told here, with its place.
    if !policy.asks_cpuid() {
        let map = load::map(&policy, None)?;
        load::plan(&policy, &map, &CompileOptions::default(), None)?;
    }
    let running = Running::find(args.process)?;
    let request = Request::Reload {
        policy: policy.to_string(),
    };
    let done = running
        .ask(&request, PATIENCE)
        .map_err(|error| match Failure::from(error) {
            Failure::Line(exit @ Exit::No, line) => {
                Failure::Line(exit, format!("the policy that was in force stays: {line}"))
            }
            failure => failure,
        })?;
    if args.json {
        writeln!(stream::out(), "{done:#}")?;
        return Ok(Exit::Yes);
    }
    let count = |key: &str| done.get(key).and_then(Value::as_u64).unwrap_or(0);
    let mut out = stream::page();
    let differ = match done.get("equal") == Some(&Value::Bool(true)) {
        true => "it means the same as the one before".to_owned(),
        false => format!(
            "{}, {} of 2^33 accesses differ from the one before",
            counted(count("ranges"), "range", "ranges"),
            count("accesses")
        ),
    };
    out.say(
        stream::Tone::Good,
        &format!("{} is in force on {}", policy.name, counted(count("vms"), "VM", "VMs")),
    )?;
    writeln!(out, "{differ}")?;
    writeln!(out, "{}", words::stood_still(count("longest_stop_ns")))?;
    Ok(Exit::Yes)
}
