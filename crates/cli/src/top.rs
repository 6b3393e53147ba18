//! `msrgate top`: what guests under msrgate do now.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::{Value, json};

use crate::args::TopArgs;
use crate::control::{ASKS, Request, Running};
use crate::exit::{Exit, Failure};
use crate::render::Table;
use crate::stream::{self, Stream, Tone};
use crate::words;

/// How long one msrgate may take to answer where others are to be shown anew meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);
/// How many rows there are where no terminal says how many it has.
const ROWS: usize = 40;
/// Lines that are not rows of MSRs.
const HEAD: usize = 5;

pub(crate) fn run(args: &TopArgs) -> Result<Exit, Failure> {
    if args.json {
        let all: Vec<Value> = states(ASKS).into_values().collect();
        writeln!(stream::out(), "{:#}", json!({ "vmms": all }))?;
        return Ok(Exit::Yes);
    }
    let interval = Duration::from_secs_f64(args.interval);
    let is_once = args.once || !io::stdout().is_terminal();
    let patience = if is_once { ASKS } else { PATIENCE };
    let mut before = states(patience);
    if is_once {
        std::thread::sleep(interval);
        show(&mut stream::page(), &before, &states(patience), usize::MAX)?;
        return Ok(Exit::Yes);
    }
    let keys = Keys::new().map_err(|error| Failure::Line(Exit::Machine, format!("the terminal: {error}")))?;
    loop {
        let left = keys.wait(interval)?;
        let now = states(patience);
        let mut out = stream::page();
        // To the upper left, and what was there is gone.
        out.coloured("\x1b[H\x1b[2J")?;
        let size = tcgetwinsize(io::stdout()).map(|size| usize::from(size.ws_row));
        let rows = size.ok().filter(|rows| *rows > 0).unwrap_or(ROWS);
        show(&mut out, &before, &now, rows.saturating_sub(HEAD))?;
        out.flush()?;
        if left {
            return Ok(Exit::Yes);
        }
        before = now;
    }
}

/// What each msrgate says of itself that answers.
fn states(patience: Duration) -> HashMap<i32, Value> {
    let all = Running::all().into_iter();
    let answers = all.filter_map(|running| {
        let state = running.ask(&Request::State, patience).ok()?;
        Some((running.process, state))
    });
    answers.collect()
}

fn count(value: &Value, key: &str) -> u64 {
    value.get(key).and_then(Value::as_u64).unwrap_or(0)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn by_msr(state: &Value) -> impl Iterator<Item = &Value> {
    state.get("by_msr").and_then(Value::as_array).into_iter().flatten()
}

/// Counts of a row or of a sum.
#[derive(Clone, Copy, Default)]
struct Counts {
    accesses: u64,
    faults: u64,
    cost: u64,
}

impl Counts {
    fn of(row: &Value) -> Counts {
        Counts {
            accesses: count(row, "count"),
            faults: count(row, "faulted"),
            cost: count(row, "cost_ns"),
        }
    }

    fn and(self, other: Counts) -> Counts {
        Counts {
            accesses: self.accesses.saturating_add(other.accesses),
            faults: self.faults.saturating_add(other.faults),
            cost: self.cost.saturating_add(other.cost),
        }
    }

    /// What was added since.
    fn since(self, before: Counts) -> Counts {
        Counts {
            accesses: self.accesses.saturating_sub(before.accesses),
            faults: self.faults.saturating_sub(before.faults),
            cost: self.cost.saturating_sub(before.cost),
        }
    }
}

/// So many in so much time, a second.
fn rate(count: u64, nanoseconds: u64) -> String {
    let rate = count as f64 * 1e9 / nanoseconds.max(1) as f64;
    match rate {
        0.0..10.0 => format!("{rate:.1}"),
        _ => format!("{rate:.0}"),
    }
}

fn show(
    out: &mut Stream<impl Write>,
    before: &HashMap<i32, Value>,
    now: &HashMap<i32, Value>,
    room: usize,
) -> Result<(), Failure> {
    if now.is_empty() {
        return Ok(out.say(Tone::Plain, "no VMM runs under msrgate here, or it is another user's")?);
    }
    let nothing = Value::Null;
    let mut vmms: Vec<(u64, Vec<String>, bool)> = Vec::new();
    let mut msrs: Vec<(u64, u64, Vec<String>, bool)> = Vec::new();
    for (process, state) in now {
        let old = before.get(process).unwrap_or(&nothing);
        // One that was not there before has its own begin.
        let span = count(state, "t").saturating_sub(count(old, "t"));
        let known: HashMap<(&str, &str), Counts> = by_msr(old)
            .map(|row| ((text(row, "msr"), text(row, "op")), Counts::of(row)))
            .collect();
        let (mut all, mut since) = (Counts::default(), Counts::default());
        for row in by_msr(state) {
            let (msr, op) = (text(row, "msr"), text(row, "op"));
            let total = Counts::of(row);
            let new = total.since(known.get(&(msr, op)).copied().unwrap_or_default());
            (all, since) = (all.and(total), since.and(new));
            let cells = [
                process.to_string(),
                msr.to_owned(),
                op.to_owned(),
                rate(new.accesses, span),
                total.accesses.to_string(),
                text(row, "did").to_owned(),
                words::duration(total.cost / total.accesses.max(1)),
                rate(new.faults, span),
                text(row, "name").to_owned(),
            ];
            msrs.push((new.accesses, total.accesses, cells.to_vec(), new.faults > 0));
        }
        let cells = [
            process.to_string(),
            name(state),
            count(state, "vms").to_string(),
            count(state, "vcpus").to_string(),
            rate(since.accesses, span),
            rate(since.faults, span),
            format!("{:.1} %", since.cost as f64 * 100.0 / span.max(1) as f64),
            all.accesses.to_string(),
        ];
        vmms.push((since.accesses, cells.to_vec(), since.faults > 0));
    }
    let tone = |faults: bool| if faults { Tone::Bad } else { Tone::Plain };
    vmms.sort_by(|one, other| other.0.cmp(&one.0).then_with(|| one.1.cmp(&other.1)));
    msrs.sort_by(|one, other| {
        (other.0, other.1)
            .cmp(&(one.0, one.1))
            .then_with(|| one.2.cmp(&other.2))
    });
    let mut table = Table::new(&["PID", "VMM", "VMs", "vCPUs", "exits/s", "faults/s", "CPU", "exits"]);
    let used = vmms.len();
    for (_, cells, faults) in vmms {
        table.add(tone(faults), cells);
    }
    table.print(out)?;
    if msrs.is_empty() {
        return Ok(());
    }
    writeln!(out)?;
    let mut table = Table::new(&[
        "PID", "MSR", "op", "exits/s", "exits", "got", "each", "faults/s", "name",
    ]);
    let room = room.saturating_sub(used).max(1);
    for (.., cells, faults) in msrs.into_iter().take(room) {
        table.add(tone(faults), cells);
    }
    table.print(out)?;
    Ok(())
}

/// What people know a VMM by.
fn name(state: &Value) -> String {
    match (text(state, "name"), text(state, "vmm").rsplit('/').next()) {
        ("", program) => program.unwrap_or_default().to_owned(),
        (name, Some(program)) => format!("{name} ({program})"),
        (name, None) => name.to_owned(),
    }
}

/// The terminal's keys, one by one; it is as it was afterwards.
struct Keys {
    terminal: Option<Termios>,
    signals: SignalFd,
}

impl Keys {
    fn new() -> io::Result<Keys> {
        let mut ends = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
            ends.add(signal);
        }
        ends.thread_block()?;
        let signals = SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        // Without a terminal to read from there are no keys.
        let terminal = match io::stdin().is_terminal() {
            true => Some(tcgetattr(io::stdin())?),
            false => None,
        };
        if let Some(terminal) = &terminal {
            let mut one_by_one = terminal.clone();
            one_by_one.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
            tcsetattr(io::stdin(), OptionalActions::Now, &one_by_one)?;
        }
        Ok(Keys { terminal, signals })
    }

    /// Waits for so long, or for an end; tells which.
    fn wait(&self, time: Duration) -> io::Result<bool> {
        let stdin = io::stdin();
        let mut ready = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        if self.terminal.is_some() {
            ready.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
        match poll(&mut ready, time) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_ready = |at: usize| ready.get(at).and_then(PollFd::any) == Some(true);
        if is_ready(0) {
            return Ok(true);
        }
        if is_ready(1) {
            let mut key = [0];
            // The end of the terminal is one too.
            return Ok(stdin.lock().read(&mut key)? == 0 || matches!(key, [b'q' | b'Q' | 4]));
        }
        Ok(false)
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        if let Some(terminal) = &self.terminal {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, terminal);
        }
    }
}
