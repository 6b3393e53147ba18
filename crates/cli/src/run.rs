//! `run`: an unmodified VMM under a policy.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::{fs, io};

use msrgate_hook::{Handover, Mode, VARIABLE, Wanted};
use msrgate_plan::Plan;
use msrgate_policy::trace::{self, Header};

use crate::args::{LearnArg, RunArgs};
use crate::exit::{Exit, Failure};
use crate::load;
use crate::run::keeper::Keeper;
use crate::run::record::{Record, Trace};
use crate::run::resolve::Resolved;

mod child;
mod keeper;
mod library;
mod program;
mod record;
mod resolve;
mod stranger;

const LD_PRELOAD: &str = "LD_PRELOAD";

/// How often events are taken from the vCPUs' rings: a ring holds what a vCPU can do in some 40 ms.
const DRAIN: Duration = Duration::from_millis(10);

pub(crate) fn run(args: &RunArgs) -> Result<Exit, Failure> {
    let mut resolved = Resolved::new(args)?;
    let Some((name, arguments)) = args.command.split_first() else {
        return Err(Failure::input("no VMM is named"));
    };
    if std::env::var_os(VARIABLE).is_some() {
        return Err(Failure::input(
            "this runs under `msrgate run` already, and a VM gets one policy: put both into one by `extends`",
        ));
    }
    let program = program::find(name)?;
    program::check(&program)?;
    let library = library::find()?;

    let machine = |error: io::Error| {
        let line = format!("the policy cannot be handed over: {error}");
        Failure::Line(Exit::Machine, line)
    };
    let mode = match (args.audit, args.learn) {
        (true, _) => Mode::Audit,
        (_, Some(LearnArg::First)) => Mode::Learn,
        (_, Some(LearnArg::All)) => Mode::LearnAll,
        (false, None) => Mode::Enforce,
    };
    if mode == Mode::LearnAll {
        // Where it cannot be printed the trace still says it.
        let _ = writeln!(io::stderr(), "msrgate: not faithful: {PASSED_ON}");
    }
    let wanted = Wanted {
        mode,
        events: args.trace.is_some(),
        rip: args.rip,
        by_cpuid: resolved.by_cpuid.is_some(),
    };
    // What makes no exit makes no event. A vCPU has no CPUID yet where it is given its presets. Where there is no KVM the
    // VMM may not need it.
    if mode == Mode::Enforce
        && !wanted.events
        && let Ok(held) = load::held(resolved.map.clone(), None)
    {
        resolved.map = held;
    }
    let plan = resolve::plan(&resolved.map)?;
    let mut keeper = Keeper::part()?;
    let handover = Handover::new(&resolved.map, wanted).map_err(machine)?;
    let known = resolved.by_cpuid.is_none().then_some(&plan);
    let trace = Trace::new(args.trace.as_deref(), &header(&program, mode, known))?;
    let mut record = Record::new(handover.board(), trace, mode, plan.presets(), args.json);
    let mut command = Command::new(&program);
    command
        .arg0(name)
        .args(arguments)
        .env(VARIABLE, handover.variable().map_err(machine)?)
        .env(LD_PRELOAD, preloaded(library.into_os_string()));
    let every = (wanted.events || resolved.logs()).then_some(DRAIN);
    resolved.serve(handover.board()).map_err(machine)?;
    let status = child::run(command, &program, every, handover.board(), &mut record, &mut keeper)?;
    record.drain();
    match status {
        Some(status) => {
            record.summary();
            child::end(status)
        }
        // The front has ended long ago.
        None => Ok(Exit::Yes),
    }
}

/// What `--learn=all` does, for its reader and its trace.
const PASSED_ON: &str = "every access is denied to the guest and passed on with KVM_GET_MSRS and KVM_SET_MSRS, which is \
                         not always what the guest's own instruction would have got";

/// What a trace says of itself.
fn header(vmm: &Path, mode: Mode, plan: Option<&Plan>) -> Header {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
    let kernel = read("/proc/sys/kernel/osrelease");
    Header {
        msrgate_trace: trace::VERSION,
        kernel: kernel.map(|release| format!("Linux {release}")),
        vmm: Some(vmm.display().to_string()),
        mode: Some(
            match mode {
                Mode::Enforce => "what the policy decides; what it leaves to the kernel makes no event",
                Mode::Audit => {
                    "the first touch of each MSR and direction that the policy does not leave to the kernel, with what \
                     the policy would do; the guest gets the kernel's own answer, and values read are the host's view"
                }
                Mode::Learn => {
                    "the first touch of each MSR and direction; the guest gets the kernel's own answer, and values read \
                     are the host's view"
                }
                Mode::LearnAll => PASSED_ON,
            }
            .to_owned(),
        ),
        policy: plan
            .filter(|_| matches!(mode, Mode::Enforce | Mode::Audit))
            .map(|plan| load::hex(&plan.hash())),
        ..Header::default()
    }
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
