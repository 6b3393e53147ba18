//! `capture`: the filters and masks that an unmodified VMM gives KVM, without a policy.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, PipeWriter, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::SystemTime;

use msrgate_core::Reasons;
use msrgate_core::abi::{EnableCap, FILTER_DEFAULT_DENY, OneMsr, RawRange};
use msrgate_supervise::{Call, Capture, Cookies, Filter, Followed, Request};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::args::CaptureArgs;
use crate::exit::{Exit, Failure};
use crate::run::child::{self, Service, Vmm};
use crate::run::monitor::Monitor;
use crate::run::program;
use crate::run::signals::{Signals, number};
use crate::run::writer::{Lines, Output};
use crate::{input, stream, words};

pub(crate) fn capture(args: &CaptureArgs) -> Result<Exit, Failure> {
    if let Some(process) = args.pid {
        return follow(args, process);
    }
    let started = SystemTime::now();
    let Some((name, arguments)) = args.command.split_first() else {
        return Err(Failure::input("no VMM is named"));
    };
    let program = program::find(name)?;
    let file = opened(args, Some(&program))?;
    let mut monitor = Monitor::part()?;
    let cookies = Cookies::new().map_err(|error| Failure::Line(Exit::Machine, error.to_string()))?;
    let (lines, told) = Lines::new();
    let mut sheet = Sheet {
        file,
        lines: lines.clone(),
        unseen: HashSet::new(),
        full: false,
    };
    let capture = Capture::new(cookies, Box::new(move |call| sheet.write(&call)));
    let mut command = Command::new(&program);
    command.arg0(name).args(arguments);
    let vmm = Vmm {
        command,
        program: &program,
        started,
        no_new_privs: child::needs_no_new_privs(false)?,
    };
    let service = Service {
        requests: Capture::REQUESTS.to_vec(),
        tracing: capture.tracing(),
        serve: Box::new(move |listener| capture.serve(listener)),
        write: Box::new(move |done| tell(&told, done)),
        sums_up: false,
        beside: Box::new(|| Ok(None)),
        reads_again: None,
    };
    child::run(vmm, service, &cookies, &lines, &mut monitor)
}

/// Tells of the calls that a VMM makes which runs already, until a signal ends that or the VMM has ended.
fn follow(args: &CaptureArgs, process: i32) -> Result<Exit, Failure> {
    let machine = |line: String| Failure::Line(Exit::Machine, line);
    let signals = Signals::block().map_err(|error| machine(format!("signals cannot be watched: {error}")))?;
    let cookies = Cookies::new().map_err(|error| machine(error.to_string()))?;
    let (lines, told) = Lines::new();
    let mut sheet = Sheet {
        file: opened(args, None)?,
        lines,
        unseen: HashSet::new(),
        full: false,
    };
    let capture = Capture::new(cookies, Box::new(move |call| sheet.write(&call)));
    let cannot = |line: String| machine(format!("process {process} cannot be followed: {line}"));
    let mut followed = Followed::begin(capture, process).map_err(cannot)?;
    stream::tell(&format!(
        "msrgate: process {process} is traced, which makes its system calls slower; SIGINT ends that\n"
    ));
    loop {
        if !followed.look() {
            stream::tell("msrgate: the VMM has ended\n");
            return Ok(Exit::Yes);
        }
        for output in told.try_iter() {
            if let Output::Line(line) = output {
                stream::tell(&format!("msrgate: {line}\n"));
            }
        }
        let mut ready = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(machine(error.to_string())),
        }
        while let Ok(Some(signal)) = signals.read() {
            if matches!(
                number(&signal),
                Some(Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT)
            ) {
                followed.let_go();
                return Ok(Exit::Yes);
            }
        }
    }
}

/// Where the lines go, if not to standard error.
fn opened(args: &CaptureArgs, program: Option<&Path>) -> Result<Option<File>, Failure> {
    let Some(output) = &args.output else {
        return Ok(None);
    };
    input::refuse_overwrite(output, program)?;
    let cannot = |error: io::Error| Failure::input(format!("cannot write `{}`: {error}", output.display()));
    File::create(output).map(Some).map_err(cannot)
}

/// Prints for people what is told.
fn tell(told: &Receiver<Output>, mut done: PipeWriter) {
    for output in told {
        match output {
            Output::Line(line) => stream::tell(&format!("msrgate: {line}\n")),
            Output::Summary | Output::State(_) | Output::Policy { .. } | Output::Besides(_) => {}
            Output::Background => {
                let _ = done.write_all(&[0]);
            }
            Output::End(killed) => {
                if let Some(killed) = killed {
                    stream::tell(&format!("msrgate: {}\n", killed.line));
                }
                let _ = done.write_all(&[0]);
                return;
            }
        }
    }
}

/// Where calls are written.
struct Sheet {
    /// Standard error where there is none.
    file: Option<File>,
    lines: Lines,
    /// Why results were not seen, as far as it is told.
    unseen: HashSet<String>,
    /// It could not be written.
    full: bool,
}

impl Sheet {
    fn write(&mut self, call: &Call) {
        if let Err(why) = &call.result
            && self.unseen.insert(why.clone())
        {
            let line = format!("of thread {} what the kernel gives is not seen: {why}", call.thread);
            self.lines.say(line);
        }
        if self.full {
            return;
        }
        // All at once, since others write to standard error too.
        let line = format!("{}\n", json(call));
        let written = match &mut self.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
        if let Err(error) = written {
            self.full = true;
            self.lines.say(format!(
                "the calls from here on are missing, since they cannot be written: {error}"
            ));
        }
    }
}

fn json(call: &Call) -> Value {
    let (name, of_call) = match &call.request {
        Request::CreateVm => ("KVM_CREATE_VM", json!({})),
        Request::CreateVcpu(id) => ("KVM_CREATE_VCPU", json!({ "vcpu": id })),
        Request::Mask(cap) => ("KVM_ENABLE_CAP", cap.as_ref().map_or_else(|| json!({}), mask)),
        Request::Filter(given) => (
            "KVM_X86_SET_MSR_FILTER",
            given.as_ref().map_or_else(|| json!({}), filter),
        ),
        // The kernel fills entries in up to the first that it refuses, and says how many.
        Request::GetMsrs(given) => {
            let filled = call.result.as_ref().map_or(0, |result| result.unwrap_or(0));
            ("KVM_GET_MSRS", msrs(call, given.as_deref(), filled))
        }
        Request::SetMsrs(given) => ("KVM_SET_MSRS", msrs(call, given.as_deref(), u64::MAX)),
    };
    let (result, errno) = match &call.result {
        Ok(Ok(result)) => (Some(result.cast_signed()), None),
        Ok(Err(errno)) => (Some(-1), Some(format!("{errno:?}"))),
        Err(_) => (None, None),
    };
    let mut object = json!({
        "call": name,
        "pid": call.process,
        "tid": call.thread,
        "vm": call.vm,
        "result": result,
        "errno": errno,
    });
    if let (Value::Object(object), Value::Object(of_call)) = (&mut object, of_call) {
        object.extend(of_call);
    }
    object
}

fn mask(cap: &EnableCap) -> Value {
    let reasons = Reasons::from_bits(cap.arg);
    let names = reasons.map(|reasons| reasons.iter().map(|reason| reason.name()).collect::<Vec<_>>());
    json!({
        "cap": "KVM_CAP_X86_USER_SPACE_MSR",
        "flags": cap.flags,
        "mask": cap.arg,
        "reasons": names,
    })
}

/// The entries, of which so many have a value.
fn msrs(call: &Call, given: Option<&[OneMsr]>, filled: u64) -> Value {
    let row = |(place, entry): (u64, &OneMsr)| {
        let value = (place < filled).then(|| format!("{:#x}", entry.value));
        json!({ "msr": entry.msr.to_string(), "name": words::name(entry.msr), "value": value })
    };
    json!({
        "vcpu": call.vcpu,
        "msrs": given.map(|given| (0..).zip(given).map(row).collect::<Vec<_>>()),
    })
}

/// The keys that a filter in JSON has (`msrgate_policy::raw`).
fn filter(given: &Filter) -> Value {
    let ranges: Vec<Value> = given.ranges.iter().map(range).collect();
    match given.flags {
        0 => json!({ "default": "allow", "ranges": ranges }),
        FILTER_DEFAULT_DENY => json!({ "default": "deny", "ranges": ranges }),
        flags => json!({ "flags": flags, "ranges": ranges }),
    }
}

fn range((range, bitmap): &(RawRange, Option<Box<[u64]>>)) -> Value {
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    json!({
        "base": format!("{:#x}", range.base),
        "nmsrs": range.nmsrs,
        "flags": range.flags,
        "bitmap": bitmap.as_deref().map(|words| words::hex(&bytes(words))),
    })
}
