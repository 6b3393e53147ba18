//! `run`: an unmodified VMM under a policy.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::time::SystemTime;

use msrgate_core::Msr;
use msrgate_supervise::{Claim, Ledger, Marks, Mode, Setup, Supervisor};

use crate::args::{LearnArg, RunArgs};
use crate::exit::{Exit, Failure};
use crate::run::child::Service;
use crate::run::monitor::Monitor;
use crate::run::resolve::Resolved;
use crate::run::trace::Trace;
use crate::run::writer::Writer;
use crate::{hint, load, words};

mod capture;
mod child;
mod end;
mod monitor;
mod killed;
mod place;
mod program;
mod resolve;
mod signals;
mod summary;
mod trace;
mod writer;

pub(crate) use capture::capture;

/// MSR_PLATFORM_INFO.
const PLATFORM_INFO: Msr = Msr(0xce);

pub(crate) fn run(args: &RunArgs) -> Result<Exit, Failure> {
    let started = SystemTime::now();
    let mut resolved = Resolved::new(args)?;
    let Some((name, arguments)) = args.command.split_first() else {
        return Err(Failure::input("no VMM is named"));
    };
    let program = program::find(name)?;
    let mode = match (args.audit, args.learn) {
        (true, _) => Mode::Audit,
        (_, Some(LearnArg::First)) => Mode::Learn,
        (_, Some(LearnArg::All)) => Mode::LearnAll,
        (false, None) => Mode::Enforce,
    };
    // Before a VM is tried: its kernel thread is a thread of this process.
    let mut monitor = Monitor::part()?;
    // What makes no exit makes no event. A vCPU has no CPUID yet where it is given its presets. Where there is no KVM the
    // VMM may not need it.
    if mode == Mode::Enforce
        && args.trace.is_none()
        && let Ok(held) = load::held(&resolved.map, None)
    {
        // A VMM may take it from its guests (KVM_CAP_MSR_PLATFORM_INFO), whatever the register holds.
        let held = held.into_iter().filter(|preset| preset.msr != PLATFORM_INFO);
        resolved.options = resolved.options.with_presets(held.collect());
    }
    let plan = resolved.plan()?;
    let known = resolved.resolve.is_none().then(|| words::hex(&plan.map().hash()));
    let inputs = [
        args.policy.as_deref(),
        args.cpuid.cpuid.as_deref(),
        args.profile.profile.as_deref(),
    ];
    let trace = Trace::open(
        args.trace.as_deref(),
        args.trace_size,
        &inputs,
        trace::header(&program, arguments, mode, known, resolved.is_whole(&plan)),
        resolved.rules,
    )?;

    let machine = |line: String| Failure::Line(Exit::Machine, line);
    let marks = Marks::new().map_err(|error| machine(error.to_string()))?;
    let ledger = Arc::new(Ledger::default());
    let events = args.trace.is_some();
    let tells = events || resolved.logs;
    let place = trace.place();
    let (writer, lines) = Writer::new(Arc::clone(&ledger), trace, mode, plan.presets(), args.json);
    if mode == Mode::LearnAll {
        lines.say(format!("not faithful: {}", trace::PASSED_ON));
    }
    if mode == Mode::Enforce {
        resolved.gaps().into_iter().for_each(|gap| lines.say(gap));
    }
    let told = lines.clone();
    let claim = place.map(|place| -> Claim {
        Box::new(move |process| {
            let moved = place.claim(process.cast_unsigned())?;
            moved.into_iter().for_each(|line| told.say(line));
            Ok(())
        })
    });
    let setup = Setup {
        plan,
        options: resolved.options,
        mode,
        events,
        rip: args.rip,
        resolve: resolved.resolve,
        claim,
    };
    let told = lines.clone();
    let supervisor = Supervisor::new(
        setup,
        marks,
        ledger,
        Box::new(move |remark| told.say(hint::remark(&remark))),
    );
    let mut command = Command::new(&program);
    command.arg0(name).args(arguments);
    let vmm = child::Vmm {
        command,
        program: &program,
        started,
        no_new_privs: child::needs_no_new_privs(args.allow_new_privs)?,
    };
    let writer = writer.every(tells);
    let service = Service {
        requests: supervisor.requests(),
        tracing: supervisor.tracing(),
        serve: Box::new(move |listener| supervisor.serve(listener)),
        write: Box::new(move |done| writer.write(done)),
        sums_up: true,
    };
    child::run(vmm, service, &marks, &lines, &mut monitor)
}
