//! What the VMM's guests did: the trace, and the summary at the end.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use msrgate_core::{Event, Log, Msr, Op};
use msrgate_hook::{Board, Clock, Missing, Mode, Reader, SLATES, Tally};
use msrgate_plan::Preset;
use msrgate_policy::trace::{Header, write_event};
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::{explain, render};

/// Reads the board while the VMM runs, and tells.
pub(crate) struct Record<'a> {
    board: &'a Board,
    reader: Reader<'a>,
    clock: Clock,
    trace: Trace,
    mode: Mode,
    presets: &'a [Preset],
    json: bool,
    /// What there is from here on is told to nobody but the trace.
    background: bool,
    /// A VM that is asked for past the library is refused.
    watched: bool,
}

impl<'a> Record<'a> {
    pub(crate) fn new(board: &'a Board, trace: Trace, mode: Mode, presets: &'a [Preset], json: bool) -> Record<'a> {
        Record {
            board,
            reader: board.reader(),
            clock: Clock::start(),
            trace,
            mode,
            presets,
            json,
            background: false,
            watched: false,
        }
    }

    /// Takes what vCPUs have written down since the last time.
    pub(crate) fn drain(&mut self) {
        let (trace, clock) = (&mut self.trace, &self.clock);
        let count = self.reader.drain(&mut |event, log| {
            // The board counts ticks.
            let t = clock.nanoseconds(event.t);
            let cost = event.cost.map(|ticks| clock.rate().lasting(ticks));
            trace.take(&Event { t, cost, ..event }, log);
        });
        if count > 0 {
            trace.flush();
        }
    }

    /// A VM that is asked for past the library is refused.
    pub(crate) fn watched(&mut self) {
        self.watched = true;
    }

    /// Tells what there was so far, and that the rest is in the background.
    pub(crate) fn goes_on(&mut self) {
        self.background = true;
        self.summary();
    }

    /// Tells what there was so far.
    pub(crate) fn summary(&mut self) {
        let tallies = self.reader.tallies();
        let missing = self.reader.missing();
        let text = if self.json {
            format!("{}\n", self.json(&tallies, missing))
        } else {
            self.text(&tallies, missing)
        };
        // Where it cannot be printed the VMM's end still counts.
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    fn json(&self, tallies: &BTreeMap<(Msr, Op), Tally>, missing: Missing) -> Value {
        let rate = self.clock.rate();
        let rows = tallies.iter().map(|((msr, op), tally)| {
            json!({
                "msr": msr.to_string(),
                "name": explain::name(*msr),
                "op": op.name(),
                "count": tally.count,
                "cost_ns": rate.lasting(tally.ticks),
                "reason": tally.reason.map(|reason| reason.name()),
                "did": tally.did.name(),
                "why": tally.why.map(|why| why.name()),
                "value": format!("{:#x}", tally.value),
            })
        });
        json!({
            "vms": self.board.vms(),
            "vcpus": self.board.vcpus(),
            "refused": self.board.refusals(),
            "background": self.background,
            "cost_ns": rate.lasting(ticks(tallies)),
            "presets": self.presets.iter().map(|preset| json!({
                "msr": preset.msr.to_string(),
                "value": format!("{:#x}", preset.value),
            })).collect::<Vec<_>>(),
            "by_msr": rows.collect::<Vec<_>>(),
            "lost": {
                "events": missing.events,
                "unwritten": self.trace.unwritten(),
                "uncounted": missing.accesses,
            },
        })
    }

    fn text(&self, tallies: &BTreeMap<(Msr, Op), Tally>, missing: Missing) -> String {
        let mut table = render::table(&["MSR", "name", "op", "count", "each", "got", "last value"]);
        let rate = self.clock.rate();
        let mut accesses: u64 = 0;
        for ((msr, op), tally) in tallies {
            accesses = accesses.saturating_add(tally.count);
            let got = match (tally.why, tally.reason) {
                (Some(why), _) => format!("{}: {why}", tally.did),
                (None, Some(reason)) if reason != msrgate_core::Reason::Filter => format!("{} ({reason})", tally.did),
                (None, _) => tally.did.to_string(),
            };
            table.add_row([
                msr.to_string(),
                explain::name(*msr).unwrap_or_default().to_owned(),
                op.to_string(),
                tally.count.to_string(),
                render::duration(rate.lasting(tally.ticks) / tally.count.max(1)),
                got,
                format!("{:#x}", tally.value),
            ]);
        }
        let (vms, vcpus) = (self.board.vms(), self.board.vcpus());
        let took = render::duration(rate.lasting(ticks(tallies)));
        let refused = match self.board.refusals() {
            0 => String::new(),
            count => format!("msrgate: not made, since the policy could not be put on them: {count} VMs or vCPUs\n"),
        };
        let background = match (self.background, &self.trace.to) {
            (false, _) => "",
            (true, To::File(..)) => {
                "msrgate: what the VMM started goes on in the background, under the policy, and so does the trace\n"
            }
            (true, _) => {
                "msrgate: what the VMM started goes on in the background, under the policy; with `--trace FILE` there is a \
                 trace of it\n"
            }
        };
        if vms == 0 && self.background {
            return format!("{refused}msrgate: no VM was made so far\n{background}");
        }
        if vms == 0 {
            let why = match msrgate_kvm::open() {
                Ok(_) => String::new(),
                Err(error) => format!(" ({error})"),
            };
            return match refused.is_empty() {
                true if self.watched => format!("msrgate: no VM was made, so the policy was put on none{why}\n"),
                true => format!(
                    "msrgate: no VM was made through the C library, so the policy was put on none{why}; one that was made \
                     in another way has no policy: `setpriv --no-new-privs msrgate run …` has it refused\n"
                ),
                false => refused,
            };
        }
        let mut text = format!(
            "{refused}msrgate: {} and {}, {}\n",
            counted(vms, "VM"),
            counted(vcpus, "vCPU"),
            match (self.mode, accesses) {
                (Mode::Enforce, 0) => "no access answered".to_owned(),
                (Mode::Enforce, 1) => format!("1 access answered in {took}"),
                (Mode::Enforce, _) => format!("{accesses} accesses answered in {took}"),
                (Mode::Audit, _) => format!("{accesses} of the policy's MSRs and directions touched, nothing changed"),
                (Mode::LearnAll, _) => format!("{accesses} accesses passed on in {took}, not faithfully"),
                (Mode::Learn, _) => format!("{accesses} MSRs and directions touched, nothing changed"),
            }
        );
        if accesses > 0 {
            text.push_str(&render::text(&table));
        }
        if !self.presets.is_empty() {
            let presets: Vec<String> = self.presets.iter().map(|preset| preset.msr.to_string()).collect();
            text.push_str(&format!(
                "msrgate: the kernel holds the policy's fixed answers of {}: reads of these make no exit and are not \
                 counted\n",
                presets.join(", ")
            ));
        }
        if missing.accesses > 0 {
            text.push_str(&format!(
                "msrgate: {} accesses more are not in the table: it has room for {SLATES} vCPUs at a time, and some 1000 MSRs of \
                 each\n",
                missing.accesses
            ));
        }
        if missing.events > 0 {
            let lost = missing.events;
            text.push_str(&format!(
                "msrgate: {lost} events are lost: they came faster than they were written\n"
            ));
        }
        if let Some(unwritten) = &self.trace.unwritten {
            text.push_str(&format!(
                "msrgate: {} events are lost: {}\n",
                unwritten.events, unwritten.error
            ));
        }
        text.push_str(background);
        text
    }
}

/// What all accesses took together.
fn ticks(tallies: &BTreeMap<(Msr, Op), Tally>) -> u64 {
    tallies.values().fold(0, |sum, tally| sum.saturating_add(tally.ticks))
}

fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Where events go.
pub(crate) struct Trace {
    to: To,
    unwritten: Option<Unwritten>,
    seen: HashSet<(Msr, Op)>,
    /// By MSR and direction: the second, and how many there were in it.
    seconds: HashMap<(Msr, Op), (u64, u32)>,
}

enum To {
    /// A file, in JSON Lines.
    File(PathBuf, BufWriter<File>),
    /// Standard error, for people: all of them.
    People,
    /// Standard error: those whose rule says so.
    Logged,
}

struct Unwritten {
    events: u64,
    error: String,
}

impl Trace {
    /// `path` is `-` for people.
    pub(crate) fn new(path: Option<&Path>, header: &Header) -> Result<Trace, Failure> {
        let to = match path {
            None => To::Logged,
            Some(path) if path == Path::new("-") => To::People,
            Some(path) => {
                let failed = |error: io::Error| Failure::input(format!("cannot write `{}`: {error}", path.display()));
                let mut file = BufWriter::new(File::create(path).map_err(failed)?);
                header.write(&mut file).and_then(|()| file.flush()).map_err(failed)?;
                To::File(path.to_path_buf(), file)
            }
        };
        Ok(Trace {
            to,
            unwritten: None,
            seen: HashSet::new(),
            seconds: HashMap::new(),
        })
    }

    fn unwritten(&self) -> u64 {
        self.unwritten.as_ref().map_or(0, |unwritten| unwritten.events)
    }

    fn take(&mut self, event: &Event, log: Log) {
        let written = match &mut self.to {
            // A line that is cut short would make the rest unreadable.
            To::File(..) if self.unwritten.is_some() => Ok(false),
            To::File(_, file) => write_event(event, file).map(|()| true),
            To::Logged if !is_due(event, log, &mut self.seen, &mut self.seconds) => return,
            To::People | To::Logged => line(event, &mut io::stderr().lock()).map(|()| true),
        };
        match written {
            Ok(true) => {}
            Ok(false) => self.lose(1, None),
            Err(error) => self.lose(1, Some(error)),
        }
    }

    fn flush(&mut self) {
        if let To::File(_, file) = &mut self.to
            && self.unwritten.is_none()
            && let Err(error) = file.flush()
        {
            self.lose(0, Some(error));
        }
    }

    fn lose(&mut self, events: u64, error: Option<io::Error>) {
        let to = &self.to;
        let unwritten = self.unwritten.get_or_insert_with(|| Unwritten {
            events: 0,
            error: match (to, error) {
                (To::File(path, _), Some(error)) => format!("`{}` cannot be written: {error}", path.display()),
                (_, Some(error)) => format!("standard error cannot be written: {error}"),
                (_, None) => String::new(),
            },
        });
        unwritten.events += events;
    }
}

/// Whether a rule's `log` wants this one told.
fn is_due(
    event: &Event,
    log: Log,
    seen: &mut HashSet<(Msr, Op)>,
    seconds: &mut HashMap<(Msr, Op), (u64, u32)>,
) -> bool {
    let key = (event.msr, event.op);
    match log {
        Log::None => false,
        Log::All => true,
        Log::First => seen.insert(key),
        Log::PerSecond(most) => {
            let this = event.t / 1_000_000_000;
            let (second, count) = seconds.entry(key).or_insert((this, 0));
            if *second != this {
                (*second, *count) = (this, 0);
            }
            *count = count.saturating_add(1);
            *count <= most
        }
    }
}

/// As strace prints a call and, with `-T`, what it took.
fn line(event: &Event, to: &mut impl Write) -> io::Result<()> {
    let Event {
        t,
        vm,
        vcpu,
        op,
        msr,
        value,
        ..
    } = event;
    let seconds = *t as f64 / 1e9;
    write!(to, "{seconds:.6} vm {vm} vcpu {vcpu} {op}({msr}")?;
    if let Some(name) = explain::name(*msr) {
        write!(to, " {name}")?;
    }
    match (op, event.did.is_fault()) {
        (Op::Read, true) => write!(to, ") = #GP")?,
        (Op::Read, false) => write!(to, ") = {value:#x}")?,
        (Op::Write, true) => write!(to, ", {value:#x}) = #GP")?,
        (Op::Write, false) => write!(to, ", {value:#x}) = done")?,
    }
    write!(to, " {}", event.did)?;
    if let Some(why) = event.why {
        write!(to, " {why}")?;
    }
    if let Some(rule) = event.rule {
        write!(to, " rule {rule}")?;
    }
    if let Some(rip) = event.rip {
        write!(to, " rip {rip:#x}")?;
    }
    if let Some(cost) = event.cost {
        write!(to, " <{}>", render::duration(cost))?;
    }
    writeln!(to)
}

#[cfg(test)]
mod tests {
    use msrgate_core::Did;

    use super::*;

    fn event(t: u64, msr: u32) -> Event {
        Event {
            t,
            vm: 0,
            vcpu: 1,
            op: Op::Read,
            msr: Msr(msr),
            value: 5,
            reason: None,
            did: Did::Value,
            why: None,
            rule: Some(2),
            rip: None,
            cost: None,
        }
    }

    #[test]
    fn what_a_rule_wants_told_is_told_and_no_more() {
        let (mut seen, mut seconds) = (HashSet::new(), HashMap::new());
        let mut due = |event: &Event, log| is_due(event, log, &mut seen, &mut seconds);
        assert!(!due(&event(0, 1), Log::None));
        assert!(due(&event(0, 1), Log::All) && due(&event(0, 1), Log::All));
        assert!(due(&event(0, 1), Log::First) && !due(&event(0, 1), Log::First) && due(&event(0, 2), Log::First));
        let two = Log::PerSecond(2);
        let second = 1_000_000_000;
        let told: Vec<bool> = [0, 1, 2, second, second + 1, second + 2]
            .map(|t| due(&event(t, 3), two))
            .into();
        assert_eq!(told, [true, true, false, true, true, false]);
    }

    #[test]
    fn a_line_for_people_says_what_the_access_got() {
        let mut text = Vec::new();
        line(&event(1_500_000_000, 0x8b), &mut text).unwrap();
        let fault = Event {
            op: Op::Write,
            did: Did::Deny,
            rule: None,
            rip: Some(0x1000),
            cost: Some(1200),
            ..event(0, 0xdead)
        };
        line(&fault, &mut text).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "1.500000 vm 0 vcpu 1 rdmsr(0x8b IA32_BIOS_SIGN_ID) = 0x5 value rule 2\n\
             0.000000 vm 0 vcpu 1 wrmsr(0xdead, 0x5) = #GP deny rip 0x1000 <1.2 µs>\n"
        );
    }
}
