//! `run`: an unmodified VMM under a policy.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::SystemTime;

use msrgate_core::Msr;
use msrgate_supervise::{Claim, Cookies, Ledger, Mode, Setup, Supervisor};
use msrgate_trace::Header;
use serde_json::{Map, Value, json};

use crate::args::{LearnArg, LogArg, RunArgs};
use crate::control::{Answer, PATIENCE, Request, Server};
use crate::exit::{Exit, Failure};
use crate::journal::{self, Journal};
use crate::metrics::{self, Metrics, Place};
use crate::run::child::Service;
use crate::run::monitor::Monitor;
use crate::run::policies::Policies;
use crate::run::resolve::Resolved;
use crate::run::trace::Trace;
use crate::run::writer::{Lines, Output, Writer};
use crate::{hint, input, load, words};

mod attach;
mod capture;
mod own_filter;
mod child;
mod end;
mod handlers;
mod monitor;
mod killed;
mod place;
pub(crate) mod policies;
mod program;
mod resolve;
mod signals;
pub(crate) mod summary;
mod trace;
mod writer;

pub(crate) use attach::attach;
pub(crate) use capture::capture;

/// MSR_PLATFORM_INFO.
const PLATFORM_INFO: Msr = Msr(0xce);

pub(crate) fn run(args: &RunArgs) -> Result<Exit, Failure> {
    let started = SystemTime::now();
    let mut resolved = Resolved::new(args.policy.as_deref(), &args.cpuid, &args.profile, args.ignore_unknown)?;
    let Some((name, arguments)) = args.command.split_first() else {
        return Err(Failure::input("no VMM is named"));
    };
    let program = program::find(name)?;
    let mode = mode(args.audit, args.learn);
    // What they start is the front's, which waits for the monitor alone: a monitor waits for all that is its own.
    let answering = match mode {
        Mode::Enforce => handlers::start(&resolved.providers)?,
        _ => handlers::Started::default(),
    };
    // Before a VM is tried: its kernel thread is a thread of this process.
    let mut monitor = Monitor::part()?;
    // What makes no exit makes no event. A vCPU has no CPUID yet where it is given its presets. Where there is no KVM the
    // VMM may not need it.
    if mode == Mode::Enforce
        && args.trace.file.is_none()
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
    let header = trace::header(&program, arguments, mode, known.clone(), resolved.is_whole(&plan));
    let about = about(&header, mode, known);
    let trace = Trace::open(
        args.trace.file.as_deref(),
        journal(args)?,
        args.trace.size,
        &inputs,
        header,
        resolved.rules,
    )?;

    let machine = |line: String| Failure::Line(Exit::Machine, line);
    let cookies = Cookies::new().map_err(|error| machine(error.to_string()))?;
    let ledger = Arc::new(Ledger::default());
    let events = args.trace.file.is_some();
    let tells = events || resolved.logs;
    let place = trace.place();
    let (writer, lines) = Writer::new(Arc::clone(&ledger), trace, mode, plan.presets(), args.json);
    if mode == Mode::LearnAll {
        lines.say(not_faithful());
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
    let presets = plan.presets().to_vec();
    let setup = Setup {
        plan,
        options: resolved.options,
        mode,
        events,
        rip: args.trace.rip,
        resolve: resolved.resolve,
        handlers: answering.handlers(&lines),
        claim,
    };
    let told = lines.clone();
    let mut supervisor = Supervisor::new(
        setup,
        cookies,
        ledger,
        Box::new(move |remark| told.say(hint::remark(&remark))),
    );
    let control = supervisor.control().map_err(|error| machine(error.to_string()))?;
    let policies = Arc::new(Policies::new(args, resolved.providers, presets, control, lines.clone()));
    let control = match Server::new() {
        Ok(server) => Some((server, answers(&policies, &lines))),
        Err(error) => {
            lines.say(child::no_control(&error));
            None
        }
    };
    let mut command = Command::new(&program);
    command.arg0(name).args(arguments);
    let vmm = child::Vmm {
        command,
        program: &program,
        started,
        no_new_privs: child::needs_no_new_privs(args.allow_new_privs)?,
    };
    let metrics = match &args.metrics {
        Some(Place::Address(address)) => Some(listen(*address, &lines)?),
        _ => None,
    };
    let file = match &args.metrics {
        Some(Place::File(file)) => {
            input::refuse_overwrite(file, inputs.iter().flatten().copied())?;
            // The VMM may go into the background, where the current directory is another one.
            Some(std::path::absolute(file).map_err(|error| Failure::input(error.to_string()))?)
        }
        _ => None,
    };
    let writer = writer.every(tells).about(about).metrics(file);
    let asking = lines.clone();
    let beside = move || {
        let mut metrics_of = Metrics::default();
        let serve = |listener| metrics::serve(listener, move || Some(metrics_of.text(&state(&asking).ok()?)));
        metrics.map(serve).transpose()?;
        control.map(|(server, answer)| server.start(answer)).transpose()
    };
    let service = Service {
        requests: supervisor.requests(),
        tracing: supervisor.tracing(),
        serve: Box::new(move |listener| supervisor.serve(listener)),
        write: Box::new(move |done| writer.write(done)),
        sums_up: true,
        beside: Box::new(beside),
        reads_again: policies
            .can_read_again()
            .then(|| -> Arc<dyn Fn() + Send + Sync> { Arc::new(move || policies.read_again()) }),
    };
    child::run(vmm, service, &cookies, &lines, &mut monitor)
}

/// What becomes of what the policy decides.
fn mode(audit: bool, learn: Option<LearnArg>) -> Mode {
    match (audit, learn) {
        (true, _) => Mode::Audit,
        (_, Some(LearnArg::First)) => Mode::Learn,
        (_, Some(LearnArg::All)) => Mode::LearnAll,
        (false, None) => Mode::Enforce,
    }
}

/// What guests do where every access is passed on.
fn not_faithful() -> String {
    format!("not faithful: {}", trace::PASSED_ON)
}

/// What others get who ask.
fn answers(policies: &Arc<Policies>, lines: &Lines) -> Answer {
    let (policies, lines) = (Arc::clone(policies), lines.clone());
    Arc::new(move |request| match request {
        Request::State => state(&lines),
        Request::Reload { policy } => policies.take(&policy),
        Request::Detach => policies.release(),
    })
}

/// What there is to say of the run.
fn state(lines: &Lines) -> Result<Value, String> {
    let (asked, state) = channel();
    lines.tell(Output::State(asked));
    let state = state.recv_timeout(PATIENCE);
    state.map_err(|_| "it cannot write what it has to say, and so cannot say more".to_owned())
}

/// What is known of a run from the start on, for who asks.
fn about(header: &Header, mode: Mode, policy: Option<String>) -> Map<String, Value> {
    let mode = match mode {
        Mode::Enforce => "enforce",
        Mode::Audit => "audit",
        Mode::Learn => "learn",
        Mode::LearnAll => "learn-all",
    };
    let about = [
        ("process", json!(std::process::id())),
        ("attached", Value::Null),
        ("vmm", json!(header.vmm)),
        ("name", json!(header.name)),
        ("mode", json!(mode)),
        ("policy", json!(policy)),
    ];
    about.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The journal, where what is logged goes there.
fn journal(args: &RunArgs) -> Result<Option<Journal>, Failure> {
    let wanted = match args.log {
        Some(LogArg::Stderr) => return Ok(None),
        Some(LogArg::Journald) => true,
        None => false,
    };
    if wanted && args.trace.file.is_some() {
        return Err(Failure::input(
            "with `--trace` all accesses go to the trace, and none to the journal: leave one of the two out",
        ));
    }
    if !wanted && !journal::is_standard_error() {
        return Ok(None);
    }
    match Journal::open() {
        Ok(journal) => Ok(Some(journal)),
        Err(error) if wanted => {
            let line = format!("cannot write to the journal: {error}");
            Err(Failure::Line(Exit::Machine, line))
        }
        // Standard error will do.
        Err(_) => Ok(None),
    }
}

/// Where metrics are asked for.
fn listen(address: SocketAddr, lines: &Lines) -> Result<TcpListener, Failure> {
    let listener = TcpListener::bind(address);
    let listener = listener.and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (address, listener) = listener.map_err(|error| {
        let line = format!("cannot offer metrics at {address}: {error}");
        Failure::Line(Exit::Machine, line)
    })?;
    let who = match address.ip().is_loopback() {
        true => "",
        false => ", for all who reach this address: they are not encrypted, and nobody has to authenticate",
    };
    lines.say(format!("metrics are at http://{address}/metrics{who}"));
    Ok(listener)
}
