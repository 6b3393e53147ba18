//! `attach`: a policy on a VMM that runs already.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use msrgate_core::{Filter, Reasons};
use msrgate_kvm::Handlers;
use msrgate_plan::{CompileOptions, DecisionMap, Plan};
use msrgate_policy::Provider;
use msrgate_supervise::{Answers, AttachError, Cookies, Ledger, Mode, Reload, Running, Setup};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Map, Value, json};

use crate::args::{AttachArgs, VmArg};
use crate::control::{Answer, Request, Server};
use crate::exit::{Exit, Failure};
use crate::run::child::{is_end, no_control, wait_for_summary};
use crate::run::handlers;
use crate::run::own_filter::{FilterAndMask, FilterInForce};
use crate::run::policies::{Change, parsed};
use crate::run::resolve::Resolved;
use crate::run::signals::{Signals, number};
use crate::run::summary::Besides;
use crate::run::trace::{self, Trace};
use crate::run::writer::{Lines, Output, Writer};
use crate::words::counted;
use crate::{cpuid, hint, load, words};

const BY_CPUID: &str = "the policy depends on the guest's CPUID, which its VMM has set already: give `--cpuid host`, or \
                        `--cpuid FILE` with what `cpuid -r -1` printed in the guest";

pub(crate) fn attach(args: &AttachArgs) -> Result<Exit, Failure> {
    let machine = |line: String| Failure::Line(Exit::Machine, line);
    let resolved = Resolved::new(args.policy.as_deref(), &args.cpuid, &args.profile, args.ignore_unknown)?;
    if resolved.resolve.is_some() {
        return Err(Failure::input(BY_CPUID));
    }
    let plan = resolved.plan()?;
    let mode = super::mode(args.audit, args.learn);
    let cookies = Cookies::new().map_err(|error| machine(error.to_string()))?;
    let hindered = |hindrance: AttachError| failure(args.process, &hindrance);
    let mut running = Running::find(args.process, cookies).map_err(hindered)?;
    let vms = chosen(&running, args)?;
    let own = FilterInForce::of(args)?;
    let (trace, about) = opened(args, &resolved, &plan)?;
    let way = way(&running, &vms, args, &plan, &resolved, &own)?;
    let answering = match mode {
        Mode::Enforce => handlers::start(&resolved.providers)?,
        _ => handlers::Started::default(),
    };

    let ledger = Arc::new(Ledger::default());
    let place = trace.place();
    let tells = args.trace.file.is_some() || resolved.logs;
    let (writer, lines) = Writer::new(Arc::clone(&ledger), trace, mode, &[], args.json);
    let writer = writer.every(tells).about(about);
    let map = plan.map().clone();
    // Before anything is changed: whoever wants an end gets one in which all is put back.
    let signals = Signals::block().map_err(|error| machine(error.to_string()))?;
    let (summed_up, done) = io::pipe().map_err(|error| machine(error.to_string()))?;
    if let Some(place) = place {
        let moved = place.claim(args.process.cast_unsigned()).map_err(machine)?;
        moved.into_iter().for_each(|line| lines.say(line));
    }
    let in_kernel = way.clone();
    let known = own.known.clone().unwrap_or(FilterAndMask::NONE);
    let before = known.filter.clone().unwrap_or_else(Filter::allow_all);
    running.take_over(known.mask, &before).map_err(hindered)?;
    match way {
        Some(filter) => {
            // A mask that is known is none, and stays.
            let mask = own.known.is_none().then_some(Reasons::NONE);
            running.put(&vms, mask, &filter).map_err(hindered)?;
            if let Err(error) = running.name_vms() {
                lines.say(format!("a VM that the VMM makes from here on is not told of: {error}"));
            }
            running.count(&vms, &ledger);
        }
        None => {
            let handlers = answering.handlers(&lines);
            let answers = answered_by(args, plan, resolved.options.clone(), handlers, known, &lines);
            running.answer(answers, &ledger).map_err(hindered)?;
        }
    }
    let cannot = |error: io::Error| machine(error.to_string());
    let written = thread::Builder::new()
        .name("writer".to_owned())
        .spawn(move || writer.write(done));
    let written = written.map_err(cannot)?;
    match mode {
        Mode::Enforce => resolved.gaps().into_iter().for_each(|gap| lines.say(gap)),
        Mode::LearnAll => lines.say(super::not_faithful()),
        _ => {}
    }
    let (asks, asked) = channel();
    let (woken, wake) = io::pipe().map_err(cannot)?;
    let offered = match Server::new() {
        Ok(server) => Some(server.start(answers(asks, wake, lines.clone())).map_err(cannot)?),
        Err(error) => {
            lines.say(no_control(&error));
            None
        }
    };
    let mut attached = Attached {
        args,
        running,
        vms,
        own,
        map,
        in_kernel,
        is_back: false,
        looks: true,
        ledger,
        providers: resolved.providers,
        since: Instant::now(),
        lines,
    };
    attached.lines.say(attached.on(mode));
    let why = attached.stay(&signals, &asked, &woken).map_err(|error| {
        let line = format!("process {} cannot be waited for: {error}", args.process);
        machine(line)
    })?;
    let end = match &why {
        Why::VmmEnded => Ok(End::VmmEnded),
        Why::Wanted(_) => match attached.take_off() {
            Ok(()) => Ok(End::Detached),
            Err(AttachError::Gone) => Ok(End::VmmEnded),
            Err(hindrance) => Err(hindrance),
        },
    };
    if let Why::Wanted(Some(reply)) = why {
        // Who asked may have gone.
        let _ = reply.send(match &end {
            Ok(End::Detached) => Ok(attached.json(End::Detached).into()),
            Ok(_) => Err("the VMM has ended".to_owned()),
            Err(hindrance) => Err(hindrance.to_string()),
        });
    }
    // Whoever asks now is told that it ends.
    drop(asked);
    drop(offered);
    attached.tell(*end.as_ref().unwrap_or(&End::Stays));
    attached.lines.tell(Output::End(None));
    if wait_for_summary(&summed_up, &signals).map_err(cannot)? {
        // It has ended, or is about to.
        let _ = written.join();
    }
    end.map(|_| Exit::Yes).map_err(hindered)
}

/// How often it is looked whether the VMM has made a VM, where nothing in its process tells.
const LOOKS: u16 = 500;

/// What is answered in the VMM's process, or asked from there.
fn answered_by(
    args: &AttachArgs,
    plan: Plan,
    options: CompileOptions,
    handlers: Handlers,
    known: FilterAndMask,
    lines: &Lines,
) -> Answers {
    let told = lines.clone();
    Answers {
        setup: Setup {
            plan,
            options,
            mode: super::mode(args.audit, args.learn),
            events: args.trace.file.is_some(),
            rip: args.trace.rip,
            resolve: None,
            handlers,
            claim: None,
        },
        filter: known.filter,
        mask: known.mask,
        say: Box::new(move |remark| told.say(hint::remark(&remark))),
    }
}

/// How the command ends where nothing can be put in force.
fn failure(process: i32, hindrance: &AttachError) -> Failure {
    let exit = match hindrance {
        AttachError::Refused(_) => Exit::Machine,
        _ => Exit::Guest,
    };
    let line = match hindrance {
        AttachError::Gone => {
            format!("there is no process {process} any more: `pgrep -a qemu`, for example, shows which VMMs run")
        }
        _ => format!("process {process}: {hindrance}"),
    };
    Failure::Line(exit, line)
}

/// The descriptors of the VMs that are meant.
fn chosen(running: &Running, args: &AttachArgs) -> Result<Vec<i32>, Failure> {
    let all: Vec<i32> = running.vms().iter().map(|vm| vm.descriptor).collect();
    let list: Vec<String> = all.iter().map(i32::to_string).collect();
    match args.vm {
        Some(VmArg::One(one)) if all.contains(&one) => Ok(vec![one]),
        Some(VmArg::One(one)) => Err(Failure::input(format!(
            "process {} has no VM of descriptor {one}; it has {}",
            args.process,
            list.join(", ")
        ))),
        None if all.len() > 1 => Err(Failure::input(format!(
            "process {} has {} VMs, of descriptors {}: say `--vm N` for one of them, or `--vm all`",
            args.process,
            all.len(),
            list.join(", ")
        ))),
        _ => Ok(all),
    }
}

/// The filter that carries out the policy and the VMM's own together; `None` where it takes answers in the VMM's process.
fn way(
    running: &Running,
    vms: &[i32],
    args: &AttachArgs,
    plan: &Plan,
    resolved: &Resolved,
    own: &FilterInForce,
) -> Result<Option<Filter>, Failure> {
    let known = own.known.clone().unwrap_or(FilterAndMask::NONE);
    let together =
        match &known.filter {
            None => None,
            Some(filter) => {
                let plan = Plan::compile_for(&resolved.map.restricted_by(filter), &resolved.options);
                Some(plan.map_err(|error| {
                    Failure::Line(Exit::No, format!("together with the VMM's own MSR filter {error}"))
                })?)
            }
        };
    let together = together.as_ref().unwrap_or(plan);
    let enforces = super::mode(args.audit, args.learn) == Mode::Enforce;
    if enforces && together.reasons() == Reasons::NONE && known.mask == Reasons::NONE && args.trace.file.is_none() {
        return Ok(Some(together.filter().clone()));
    }
    // Which vCPU is which VM's the kernel does not tell.
    if vms.len() != running.vms().len() {
        return Err(Failure::input(
            "one of several VMs can be given denials alone, since the kernel does not tell whose a vCPU is that is to get answers: \
             say `--vm all`",
        ));
    }
    Ok(None)
}

/// Where events go.
fn opened(args: &AttachArgs, resolved: &Resolved, plan: &Plan) -> Result<(Trace, Map<String, Value>), Failure> {
    let words = std::fs::read(format!("/proc/{}/cmdline", args.process)).unwrap_or_default();
    let words = words.split(|byte| *byte == 0).skip(1);
    let arguments: Vec<OsString> = words.map(|word| OsString::from_vec(word.to_vec())).collect();
    let program = std::fs::read_link(format!("/proc/{}/exe", args.process)).unwrap_or_else(|_| PathBuf::from("VMM"));
    let known = words::hex(&plan.map().hash());
    let inputs = [
        args.policy.as_deref(),
        args.cpuid.cpuid.as_deref(),
        args.profile.profile.as_deref(),
        args.vmm_filter.as_deref(),
    ];
    let whole = resolved.is_whole(plan);
    let mode = super::mode(args.audit, args.learn);
    let header = trace::header(&program, &arguments, mode, Some(known.clone()), whole);
    let mut about = super::about(&header, mode, Some(known));
    about.insert("attached".to_owned(), json!(args.process));
    let file = args.trace.file.as_deref();
    let trace = Trace::open(file, None, args.trace.size, &inputs, header, resolved.rules)?;
    Ok((trace, about))
}

/// What is asked of the thread that stays, and who waits for the answer.
struct Asked {
    request: Request,
    reply: Sender<Result<Value, String>>,
}

/// What others get who ask.
fn answers(asks: Sender<Asked>, wake: PipeWriter, lines: Lines) -> Answer {
    Arc::new(move |request| match request {
        Request::State => super::state(&lines),
        request => {
            let (reply, answer) = channel();
            let ended = "msrgate is about to end";
            let asked = asks.send(Asked { request, reply }).is_ok() && (&wake).write_all(&[0]).is_ok();
            let answer = asked.then(|| answer.recv().ok()).flatten();
            answer.unwrap_or_else(|| Err(ended.to_owned()))
        }
    })
}

/// Why it does not stay.
enum Why {
    VmmEnded,
    /// Somebody wants it so, and may wait for an answer.
    Wanted(Option<Sender<Result<Value, String>>>),
}

/// How it ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// It does not yet.
    NotYet,
    Detached,
    VmmEnded,
    /// The policy could not be taken off.
    Stays,
}

/// A policy that is in force.
struct Attached<'a> {
    args: &'a AttachArgs,
    running: Running,
    vms: Vec<i32>,
    own: FilterInForce,
    /// What the policy decides.
    map: DecisionMap,
    /// The filter that is in force, where nothing is answered in the VMM's process.
    in_kernel: Option<Filter>,
    /// The policy was taken off, and the VMM has a filter of its own.
    is_back: bool,
    /// No VM that the VMM has made since was told of.
    looks: bool,
    ledger: Arc<Ledger>,
    /// Who answers for the handlers that the first policy names.
    providers: BTreeMap<String, Provider>,
    since: Instant,
    lines: Lines,
}

impl Attached<'_> {
    /// Waits until the VMM has ended, or somebody wants an end.
    fn stay(&mut self, signals: &Signals, asked: &Receiver<Asked>, mut woken: &PipeReader) -> io::Result<Why> {
        let pid = Pid::from_raw(self.args.process).ok_or(io::ErrorKind::NotFound)?;
        let Ok(vmm) = pidfd_open(pid, PidfdFlags::empty()) else {
            return Ok(Why::VmmEnded);
        };
        loop {
            let mut ready = [
                PollFd::new(vmm.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(woken.as_fd(), PollFlags::POLLIN),
            ];
            let looks = self.looks && self.in_kernel.is_some();
            let timeout = if looks { LOOKS.into() } else { PollTimeout::NONE };
            match poll(&mut ready, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            if ready[0].any() == Some(true) {
                return Ok(Why::VmmEnded);
            }
            if looks && let Some(remark) = self.running.new_vm() {
                self.lines.say(hint::remark(&remark));
                self.looks = false;
            }
            if ready[2].any() == Some(true) {
                woken.read_exact(&mut [0])?;
                match asked.try_recv() {
                    Ok(Asked {
                        request: Request::Reload { policy },
                        reply,
                    }) => {
                        // Who asked may have gone.
                        let _ = reply.send(self.reload(&policy));
                    }
                    Ok(Asked { reply, .. }) => return Ok(Why::Wanted(Some(reply))),
                    Err(_) => {}
                }
            }
            while let Some(signal) = signals.read()? {
                match number(&signal) {
                    Some(Signal::SIGUSR1) => {
                        self.tell(End::NotYet);
                        self.lines.tell(Output::Summary);
                    }
                    Some(Signal::SIGHUP) if self.args.policy.is_some() => self.read_again(),
                    signal if is_end(signal) => return Ok(Why::Wanted(None)),
                    _ => {}
                }
            }
        }
    }

    /// Puts in force what the policy's file says now.
    fn read_again(&mut self) {
        let Some(file) = self.args.policy.as_deref() else {
            return;
        };
        let policy = load::unresolved(file).map_err(|failure| failure.to_string());
        if let Err(line) = policy.and_then(|policy| self.reload(&policy.to_string())) {
            self.lines.say(format!("the policy that was in force stays: {line}"));
        }
    }

    /// Puts another policy in force, or leaves the one that is.
    fn reload(&mut self, text: &str) -> Result<Value, String> {
        let line = |failure: Failure| failure.to_string();
        let policy = parsed(text)?;
        let name = policy.name.clone();
        let cpuid = cpuid::given(&self.args.cpuid).map_err(line)?;
        let profile = crate::trace::profile(&self.args.profile).map_err(line)?;
        let resolved = Resolved::of(policy, cpuid, profile, self.args.ignore_unknown).map_err(line)?;
        if resolved.resolve.is_some() {
            return Err(BY_CPUID.to_owned());
        }
        handlers::are_started(&resolved.providers, &self.providers)?;
        let plan = resolved.plan().map_err(line)?;
        let map = plan.map().clone();
        let stood = match (self.running.control(), self.in_kernel.clone()) {
            (Some(control), _) => {
                let (options, resolve) = (resolved.options.clone(), None);
                control.reload(Reload { plan, options, resolve })?.longest
            }
            (None, now) => {
                let way = way(&self.running, &self.vms, self.args, &plan, &resolved, &self.own).map_err(line)?;
                self.put(way, now, plan, &resolved)?;
                self.running.stops().0
            }
        };
        let before = std::mem::replace(&mut self.map, map);
        let change = Change {
            name: &name,
            before: &before,
            after: &self.map,
            vms: self.vms.len(),
            longest: stood,
        };
        Ok(change.told(&self.lines, resolved.rules, resolved.logs))
    }

    /// Puts a policy in force in the place of one that the kernel alone carries out, by `now`.
    fn put(&mut self, way: Option<Filter>, now: Option<Filter>, plan: Plan, resolved: &Resolved) -> Result<(), String> {
        let put = match &way {
            Some(filter) => self.running.put(&self.vms, None, filter),
            None => {
                let known = self.own.known.clone().unwrap_or(FilterAndMask::NONE);
                let options = resolved.options.clone();
                let answers = answered_by(self.args, plan, options, Handlers::new(), known, &self.lines);
                self.running.answer(answers, &self.ledger)
            }
        };
        let Err(hindrance) = put else {
            self.in_kernel = way;
            return Ok(());
        };
        // Some VMs may have it already.
        let back = now.map(|now| self.running.put(&self.vms, None, &now));
        let back = back.and_then(Result::err);
        let back = back.map(|error| format!(", and the one before cannot be put back on all: {error}"));
        Err(format!("{hindrance}{}", back.unwrap_or_default()))
    }

    /// Puts back what was in force, or what the VMM has asked for since.
    fn take_off(&mut self) -> Result<(), AttachError> {
        let known = self.own.known.clone().unwrap_or(FilterAndMask::NONE);
        let before = known.filter.unwrap_or_else(Filter::allow_all);
        self.is_back = self.running.take_off(&self.vms, &before)?;
        Ok(())
    }

    fn on(&self, mode: Mode) -> String {
        let vcpus = counted(self.running.vcpus() as u64, "vCPU", "vCPUs");
        let vms = counted(self.vms.len() as u64, "VM", "VMs");
        match mode {
            Mode::Enforce => format!("the policy is on {vms}, {vcpus}; SIGINT takes the policy off again"),
            _ => format!("what guests touch on {vms}, {vcpus} is written down; SIGINT ends that"),
        }
    }

    /// What there is to say that the counts do not.
    fn json(&self, end: End) -> Map<String, Value> {
        let (longest, stops) = self.running.stops();
        let longest = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
        let json = json!({
            "vm_descriptors": self.vms,
            "policy": words::hex(&self.map.hash()),
            "answers": if self.in_kernel.is_none() { "process" } else { "kernel" },
            "vmm_filter": match &self.own.known {
                None => "replaced",
                Some(known) if known.filter.is_none() && !self.is_back => "none",
                Some(_) => "kept",
            },
            "vmm_filter_known": self.own.how,
            "seconds": self.since.elapsed().as_secs_f64(),
            "longest_stop_ns": longest,
            "stops": stops,
            "detached": end == End::Detached,
            "ended": end == End::VmmEnded,
        });
        match json {
            Value::Object(json) => json,
            _ => Map::new(),
        }
    }

    /// Has the summary say it too.
    fn tell(&self, end: End) {
        let (text, json) = (self.text(end), self.json(end));
        self.lines.tell(Output::Besides(Besides { text, json }));
    }

    fn text(&self, end: End) -> String {
        let longest = u64::try_from(self.running.stops().0.as_nanos()).unwrap_or(u64::MAX);
        let mut text = String::new();
        if self.in_kernel.is_some() {
            text.push_str("msrgate: the kernel denies by itself, and does not count\n");
        }
        text.push_str(&format!("msrgate: {}\n", words::stood_still(longest)));
        text.push_str(match (end, &self.own.known) {
            (End::NotYet, _) => "",
            (End::VmmEnded, _) => "msrgate: the VMM has ended\n",
            (End::Stays, _) => "msrgate: the policy is still in force, since it could not be taken off\n",
            (End::Detached, _) if self.is_back => "msrgate: detached: the VMM's own filter is back\n",
            (End::Detached, None) => {
                "msrgate: detached: no MSR is denied any more; what the VMM had asked the kernel for is lost\n"
            }
            (End::Detached, Some(_)) => "msrgate: detached: no MSR is denied any more\n",
        });
        text
    }
}
