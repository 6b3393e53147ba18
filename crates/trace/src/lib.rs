//! The text of traces: JSON Lines, a header and then one record a line: an event, or a gap where events are missing.
//!
//! ```
//! use msrgate_trace::{Lines, Record};
//!
//! let text = "{\"msrgate_trace\":1,\"guest\":\"Linux\"}\n\
//!             {\"t\":5,\"vm\":0,\"vcpu\":0,\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"0x1\",\"did\":\"value\"}\n";
//! let mut lines = Lines::new(text.as_bytes())?;
//! assert_eq!(lines.header().guest.as_deref(), Some("Linux"));
//! match lines.next().expect("a record")? {
//!     Record::Event(event) => assert_eq!((event.msr.0, event.value), (0x8b, 1)),
//!     Record::Gap(gap) => panic!("{} events are missing", gap.events),
//! }
//! # Ok::<(), msrgate_trace::TraceError>(())
//! ```
//!
//! The text of the kernel's tracepoint `kvm:kvm_msr`, as perf, trace-cmd and ftrace print it, and the kernel's log are read as
//! traces too.
//! [`Lines`] holds one line at a time, whatever the trace's length.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod learn;
pub mod report;
mod canonical;
mod unrecognised;
mod tracepoint;
mod kernel_log;

use std::borrow::Cow;
use std::fmt;
use std::io::{self, BufRead, Write};

use msrgate_core::{Disposition, Event, FaultCause, Gap, Msr, Nanos, Op, Reason, Within};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_msrs::number;
use serde::{Deserialize, Serialize};

use self::kernel_log::Log;
use self::tracepoint::Threads;

pub use canonical::{write_event, write_gap};

/// The version of the format that is read and written here.
pub const VERSION: u64 = 1;

/// The longest line that is read: an event takes some 200 bytes, a header with a CPUID some 10,000.
const LONGEST: u64 = 1 << 20;

/// What is said of a last line that is not all there.
const BREAKS_OFF: &str = "the line breaks off: the trace was cut short";

/// Which of the guest's accesses a trace has, where none is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Coverage {
    /// Every access that the filter can stop.
    All,
    /// The first access of each VM to an MSR in a direction, and each that faulted.
    First,
    /// What a policy decided, and each access that faulted: not what the policy left to the kernel.
    Decided,
    /// What the kernel's log says of MSRs: not what the kernel knew, and of what it says often not all.
    Logged,
}

/// What a trace says of itself in its first line. All but the version may be missing.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(expecting = "a trace's header")]
pub struct Header {
    /// [`VERSION`].
    pub msrgate_trace: u64,
    /// Kernel and CPU that the guest ran on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The host's kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// What the guest was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    /// What ran the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<String>,
    /// How the accesses were seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Which accesses the trace has; all where it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coverage: Option<Coverage>,
    /// Which part of a trace this is, from 1; `None` where it is not cut into parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<u64>,
    /// When the trace was begun: date and time in UTC, as RFC 3339 spells them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<String>,
    /// What the VMM calls the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The process that was the VMM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Whether the host's KVM answered for MSRs that it does not know (`kvm.ignore_msrs`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ignore_msrs: Option<bool>,
    /// The guest's CPU model, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// The guest's CPUID as `cpuid -r -1` prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpuid: Option<String>,
    /// The hash of the policy that the guest ran under.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
}

impl Header {
    /// The guest's CPUID, where the header carries one.
    pub fn parse_cpuid(&self) -> Option<Result<Cpuid, TraceError>> {
        let text = self.cpuid.as_deref()?;
        Some(Cpuid::parse_raw(text).map_err(|error| TraceError::at(1, format!("its CPUID is malformed: {error}"))))
    }

    /// Whether accesses with which the guest was served are not in the trace.
    pub fn is_partial(&self) -> bool {
        matches!(self.coverage, Some(Coverage::Decided | Coverage::Logged)) || self.part.is_some()
    }

    /// Writes the first line of a trace.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *to, self)?;
        to.write_all(b"\n")
    }
}

/// What a line of a trace says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record {
    /// An access.
    Event(Event),
    /// Accesses are missing here, never 0: the trace is not all that the guest did.
    Gap(Gap),
}

/// A number that stands as a text (`"0x8b"`) or as itself.
#[derive(Deserialize)]
#[serde(untagged, expecting = "neither a number of 64 bits nor a text")]
enum Number<'a> {
    #[serde(borrow)]
    Text(Cow<'a, str>),
    Number(u64),
}

impl Number<'_> {
    fn get(&self, key: &str) -> Result<u64, String> {
        match self {
            Number::Number(number) => Ok(*number),
            Number::Text(text) => number::parse(text).map_err(|_| format!("`{key}` is not a 64-bit number: `{text}`")),
        }
    }
}

/// An event or a gap as its line spells it.
#[derive(Deserialize)]
#[serde(expecting = "an event or a gap")]
struct Line<'a> {
    #[serde(default)]
    t: u64,
    #[serde(default)]
    vm: u32,
    #[serde(default)]
    vcpu: u32,
    #[serde(borrow, default)]
    op: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    msr: Option<Number<'a>>,
    #[serde(borrow, default)]
    value: Option<Number<'a>>,
    #[serde(borrow, default)]
    reason: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    did: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    why: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    would: Option<Cow<'a, str>>,
    #[serde(default)]
    rule: Option<u32>,
    #[serde(borrow, default)]
    rip: Option<Number<'a>>,
    #[serde(borrow, default, rename = "in")]
    within: Option<Cow<'a, str>>,
    #[serde(default)]
    cost: Option<u64>,
    #[serde(default)]
    lost: Option<u64>,
}

impl Line<'_> {
    fn record(&self) -> Result<Record, String> {
        match (&self.op, self.lost) {
            (Some(op), None) => self.event(op).map(Record::Event),
            (None, Some(0)) => Err("`lost` is 0, and a gap has lost events".to_owned()),
            (None, Some(events)) => Ok(Record::Gap(Gap {
                t: Nanos(self.t),
                vm: self.vm,
                vcpu: self.vcpu,
                events,
            })),
            (Some(_), Some(_)) => Err("`op` and `lost` are on one line: is it an event or a gap?".to_owned()),
            (None, None) => Err("this is no event: it has neither `op` nor, as a gap has, `lost`".to_owned()),
        }
    }

    fn event(&self, op: &str) -> Result<Event, String> {
        let op = match op {
            "rdmsr" => Op::Read,
            "wrmsr" => Op::Write,
            other => return Err(format!("`op` is `{other}`, neither `rdmsr` nor `wrmsr`")),
        };
        let Some(msr) = &self.msr else {
            return Err("an event has no `msr`".to_owned());
        };
        let index = msr.get("msr")?;
        let msr = u32::try_from(index).map_err(|_| format!("`msr` is {index:#x}, and an index has 32 bits"))?;
        let value = match (&self.value, op) {
            (Some(value), _) => value.get("value")?,
            (None, Op::Read) => 0,
            (None, Op::Write) => return Err("a `wrmsr` has no `value`".to_owned()),
        };
        let word = |text: &Option<Cow<'_, str>>, key: &str| match text {
            Some(text) => Err(format!("`{key}` is `{text}`, which is not known here")),
            None => Ok(()),
        };
        let reason = match &self.reason {
            Some(text) => Reason::ALL.into_iter().find(|reason| reason.name() == text.as_ref()),
            None => None,
        };
        if reason.is_none() {
            word(&self.reason, "reason")?;
        }
        let did = self.did.as_ref().and_then(|did| Disposition::from_name(did));
        if did.is_none() {
            word(&self.did, "did")?;
        }
        let why = self.why.as_ref().and_then(|why| FaultCause::from_name(why));
        if why.is_none() {
            word(&self.why, "why")?;
        }
        let would = self.would.as_ref().and_then(|would| Disposition::from_name(would));
        if would.is_none() {
            word(&self.would, "would")?;
        }
        let known = |text: &Cow<'_, str>| Within::ALL.into_iter().find(|within| within.name() == text.as_ref());
        let within = self.within.as_ref().and_then(known);
        if within.is_none() {
            word(&self.within, "in")?;
        }
        let rip = self.rip.as_ref().map(|rip| rip.get("rip")).transpose()?;
        Ok(Event {
            t: Nanos(self.t),
            vm: self.vm,
            vcpu: self.vcpu,
            op,
            msr: Msr(msr),
            value,
            reason,
            did: did.unwrap_or(Disposition::Allow),
            why,
            would,
            rule: self.rule,
            rip,
            within,
            cost: self.cost.map(Nanos),
        })
    }
}

/// Whether a file that begins with these bytes, and may be a policy too, is a trace or a summary of some.
pub fn is_trace(head: &[u8]) -> bool {
    let head = String::from_utf8_lossy(head);
    // Both may begin with comments.
    let mut lines = head.trim_start_matches('\u{feff}').lines();
    match lines.find(|line| !line.starts_with('#')) {
        Some(line) => {
            let line = line.get(quoted(line.as_bytes())..).unwrap_or_default();
            line.starts_with('{')
                || !line.starts_with("version") && (kernel_log::begins(line) || tracepoint::begins(line))
        }
        None => head.starts_with("# tracer:"),
    }
}

/// How many bytes of a line are marks of a mail that quotes it: `> > `.
fn quoted(line: &[u8]) -> usize {
    let marks = line.iter().take_while(|byte| matches!(byte, b'>' | b' ')).count();
    let last = line.iter().take(marks).rposition(|byte| *byte == b'>');
    last.map_or(0, |last| last + 1 + usize::from(marks > last + 1))
}

/// What the lines of a trace are.
#[derive(Debug)]
enum Format {
    /// JSON.
    Own,
    /// The tracepoint's text.
    Tracepoint(Threads),
    /// The kernel's log.
    Log(Log),
}

/// The records of a trace, one line at a time. After the first error there are no more.
#[derive(Debug)]
pub struct Lines<R> {
    from: R,
    header: Header,
    line: Vec<u8>,
    number: u64,
    bytes: u64,
    ended: bool,
    format: Format,
    /// Whether the first line, which is read already, may be an event.
    first: bool,
}

impl<R: BufRead> Lines<R> {
    /// Reads the header.
    pub fn new(from: R) -> Result<Lines<R>, TraceError> {
        let mut lines = Lines {
            from,
            header: Header::default(),
            line: Vec::new(),
            number: 0,
            bytes: 0,
            ended: false,
            format: Format::Own,
            first: false,
        };
        if !lines.advance()? {
            return Err(TraceError::at(
                1,
                "the trace is empty; its first line should be a header: `{\"msrgate_trace\":1}`",
            ));
        }
        if lines.line.starts_with(b"\xef\xbb\xbf") {
            lines.line.drain(..3); // the mark that some editors put before UTF-8
        }
        let text = String::from_utf8_lossy(&lines.line);
        let read = match () {
            () if text.starts_with('{') => None,
            () if kernel_log::begins(&text) => {
                Some((Format::Log(Log::default()), "the kernel's log", Some(Coverage::Logged)))
            }
            () if tracepoint::begins(&text) => {
                let format = Format::Tracepoint(Threads::default());
                Some((format, "the tracepoint kvm:kvm_msr", None))
            }
            () => None,
        };
        if let Some((format, mode, coverage)) = read {
            lines.header = Header {
                msrgate_trace: VERSION,
                mode: Some(mode.to_owned()),
                coverage,
                ..Header::default()
            };
            lines.format = format;
            lines.first = true;
            return Ok(lines);
        }
        let no_trace = |error: &serde_json::Error| TraceError::at(1, unrecognised::message(&lines.line, &plain(error)));
        // A list would do for a structure.
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&lines.line).map_err(|error| no_trace(&error))?;
        let Some(version) = object.get("msrgate_trace") else {
            return Err(TraceError::at(
                1,
                unrecognised::message(&lines.line, "`msrgate_trace` is missing"),
            ));
        };
        if version.as_u64() != Some(VERSION) {
            let message = format!("version {version} of the format is not known here; {VERSION} is");
            return Err(TraceError::at(1, message));
        }
        lines.header = serde_json::from_slice(&lines.line)
            .map_err(|error| TraceError::at(1, format!("the header is malformed: {}", plain(&error))))?;
        Ok(lines)
    }

    /// What the trace says of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How many bytes have been read, for showing progress.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads the next line that is not blank; false at the end.
    fn advance(&mut self) -> Result<bool, TraceError> {
        loop {
            self.line.clear();
            self.number += 1;
            let mut limited = io::Read::take(&mut self.from, LONGEST);
            let read = limited.read_until(b'\n', &mut self.line).map_err(|error| TraceError {
                line: self.number,
                message: format!("cannot be read: {error}"),
                source: Some(error),
            })?;
            if read == 0 {
                return Ok(false);
            }
            self.bytes += read as u64;
            self.line.drain(..quoted(&self.line));
            if read as u64 == LONGEST {
                return Err(TraceError::at(
                    self.number,
                    format!("the line is longer than {LONGEST} bytes"),
                ));
            }
            if !self.line.trim_ascii().is_empty() {
                return Ok(true);
            }
        }
    }

    /// The record of the line; `None` if it is of something else.
    fn record(&mut self) -> Result<Option<Record>, TraceError> {
        let line = String::from_utf8_lossy(&self.line);
        let (record, breaks_off) = match &mut self.format {
            Format::Own => return self.own_record().map(Some),
            Format::Tracepoint(threads) => {
                let event = threads.event(line.trim_end());
                (
                    event.map(|event| event.map(Record::Event)),
                    tracepoint::breaks_off(&line),
                )
            }
            Format::Log(log) => {
                let record = log.line(line.trim_end()).map(|line| {
                    line.map(|line| match line {
                        kernel_log::Line::Access(event) => Record::Event(event),
                        kernel_log::Line::Missing(gap) => Record::Gap(gap),
                    })
                });
                (record, false)
            }
        };
        if !line.ends_with('\n') && (record.is_err() || breaks_off) {
            return Err(TraceError::at(self.number, BREAKS_OFF));
        }
        record.map_err(|message| TraceError::at(self.number, message))
    }

    /// What is wrong with a text that ended without an access: it is of something else.
    fn nothing(&self) -> Option<TraceError> {
        let message = match &self.format {
            Format::Tracepoint(threads) if threads.is_empty() => {
                "no event of kvm:kvm_msr, msr:read_msr or msr:write_msr is in it: record on the host with `perf record -e \
                 kvm:kvm_msr`, or in the guest with `perf record -e 'msr:*'`"
            }
            Format::Log(log) if log.is_empty() => {
                "no line of this log is about an MSR: KVM logs those that it does not know where `kvm.ignore_msrs` is set, \
                 and a guest's kernel what faulted unexpectedly"
            }
            _ => return None,
        };
        Some(TraceError::at(self.number, message))
    }

    fn own_record(&self) -> Result<Record, TraceError> {
        match canonical::read(&self.line) {
            Some(event) => Ok(Record::Event(event)),
            None => self.any_record(),
        }
    }

    /// A record as JSON may spell it.
    fn any_record(&self) -> Result<Record, TraceError> {
        if self.line.starts_with(b"{\"msrgate_trace\"") {
            return Err(TraceError::at(
                self.number,
                "another trace begins here, and each has a file of its own: `csplit -z FILE '/^{\"msrgate_trace\"/' '{*}'` \
                 cuts them apart",
            ));
        }
        let parsed: Result<Line<'_>, _> = serde_json::from_slice(&self.line);
        match parsed {
            Ok(line) => line.record().map_err(|message| TraceError::at(self.number, message)),
            Err(error) if error.is_eof() && !self.line.ends_with(b"\n") => Err(TraceError::at(self.number, BREAKS_OFF)),
            Err(error) => Err(TraceError::at(
                self.number,
                format!("this is no event: {}", plain(&error)),
            )),
        }
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<Record, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = loop {
            let there = match std::mem::take(&mut self.first) {
                true => Ok(true),
                false => self.advance(),
            };
            match there {
                Ok(true) => match self.record().transpose() {
                    Some(record) => break Some(record),
                    None => continue,
                },
                Ok(false) => break self.nothing().map(Err),
                Err(error) => break Some(Err(error)),
            }
        };
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

/// A JSON error's text without its own line number, which would be 1 for every line.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line ") {
        Some((what, _)) => format!("{what} (column {})", error.column()),
        None => text,
    }
}

/// A trace that cannot be read on.
#[derive(Debug)]
pub struct TraceError {
    /// The line, from 1.
    pub line: u64,
    message: String,
    source: Option<io::Error>,
}

impl TraceError {
    fn at(line: u64, message: impl Into<String>) -> TraceError {
        TraceError {
            line,
            message: message.into(),
            source: None,
        }
    }
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for TraceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|error| error as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "{\"msrgate_trace\":1}\n";

    fn read(text: &str) -> (Vec<Record>, Option<TraceError>) {
        let mut lines = match Lines::new(text.as_bytes()) {
            Ok(lines) => lines,
            Err(error) => return (Vec::new(), Some(error)),
        };
        let mut records = Vec::new();
        for record in &mut lines {
            match record {
                Ok(record) => records.push(record),
                Err(error) => return (records, Some(error)),
            }
        }
        (records, None)
    }

    fn event() -> Event {
        Event {
            t: Nanos(7),
            vm: 1,
            vcpu: 2,
            op: Op::Write,
            msr: Msr(0xc000_0082),
            value: u64::MAX,
            reason: Some(Reason::Filter),
            did: Disposition::Fault,
            why: Some(FaultCause::AlreadyWritten),
            would: None,
            rule: Some(3),
            rip: Some(0xffff_ffff_8100_0000),
            within: Some(Within::L2),
            cost: Some(Nanos(1200)),
        }
    }

    #[test]
    fn events_and_gaps_read_back_as_they_were_written() {
        let bare = Event {
            reason: None,
            why: None,
            would: None,
            rule: None,
            rip: None,
            within: None,
            cost: None,
            did: Disposition::Allow,
            ..event()
        };
        let mut text = HEADER.as_bytes().to_vec();
        let gap = Gap {
            t: Nanos(u64::MAX),
            vm: 3,
            vcpu: u32::MAX,
            events: u64::MAX,
        };
        write_event(&event(), &mut text).unwrap();
        write_gap(&gap, &mut text).unwrap();
        write_event(&bare, &mut text).unwrap();
        let (records, error) = read(std::str::from_utf8(&text).unwrap());
        assert!(error.is_none());
        assert_eq!(records, [Record::Event(event()), Record::Gap(gap), Record::Event(bare)]);
    }

    #[test]
    fn a_gap_is_a_line_that_says_how_many_events_are_missing() {
        let mut line = Vec::new();
        let gap = Gap {
            t: Nanos(5),
            vm: 0,
            vcpu: 1,
            events: 15_369,
        };
        write_gap(&gap, &mut line).unwrap();
        assert_eq!(line, b"{\"lost\":15369,\"t\":5,\"vm\":0,\"vcpu\":1}\n");
        // As events, in any order, and 0 for what is left out.
        let (records, error) = read(&format!("{HEADER}{{\"vcpu\": 1, \"lost\": 2, \"cause\": \"room\"}}\n"));
        let short = Gap {
            t: Nanos(0),
            events: 2,
            ..gap
        };
        assert!(error.is_none(), "{error:?}");
        assert_eq!(records, [Record::Gap(short)]);
    }

    #[test]
    fn the_usual_spelling_is_read_as_the_reader_of_json_reads_it() {
        let mut seed = 1u64;
        let mut roll = |n: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize % n
        };
        const BYTES: &[u8] = b"0123456789abcdefxX{}[]\",:-+._ \n\\e";
        let (mut usual, mut others) = (0, 0);
        for _ in 0..20_000 {
            let some = |event: Event, number: usize| Event {
                t: Nanos(u64::MAX >> (1 + number % 63)),
                op: Op::ALL[number % 2],
                msr: Msr(u32::MAX >> (number % 32)),
                value: u64::MAX >> (number / 7 % 64),
                reason: Some(Reason::ALL[number % 3]).filter(|_| number & 3 > 0),
                did: Disposition::ALL[number % Disposition::ALL.len()],
                why: Some(FaultCause::ALL[number % FaultCause::ALL.len()]).filter(|_| number % 11 > 5),
                would: None,
                rule: event.rule.filter(|_| number & 4 > 0),
                rip: event.rip.filter(|_| number & 8 > 0),
                within: Some(Within::ALL[number % 3]).filter(|_| number % 7 > 4),
                cost: event.cost.filter(|_| number % 9 > 4),
                ..event
            };
            let event = some(event(), roll(1 << 20));
            let mut line = Vec::new();
            write_event(&event, &mut line).unwrap();
            assert_eq!(canonical::read(&line), Some(event));
            // And with a byte changed, left out or put in.
            let at = roll(line.len());
            let byte = BYTES[roll(BYTES.len())];
            match roll(3) {
                0 => line[at] = byte,
                1 => line.insert(at, byte),
                _ => _ = line.remove(at),
            }
            let mut lines = Lines::new(HEADER.as_bytes()).unwrap();
            lines.line = line;
            match canonical::read(&lines.line) {
                Some(event) => {
                    usual += 1;
                    let any = lines.any_record().ok();
                    assert_eq!(any, Some(Record::Event(event)), "{}", lines.line.escape_ascii());
                }
                None => others += 1,
            }
        }
        assert!(usual > 1000 && others > 1000, "{usual} {others}");
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_what_came_before_is_kept() {
        let good = "{\"op\":\"rdmsr\",\"msr\":\"0x10\"}\n";
        for (bad, what) in [
            ("{\"op\":\"rdmsr\",\"msr\":\"0x1", "breaks off"),
            ("{\"op\":\"rdmsr\",\"msr\":\"0x1\n", "no event"),
            ("garbage\n", "no event"),
            ("\u{0}\u{1}\n", "no event"),
            ("[]\n", "no event"),
            ("{\"op\":\"rdtsc\",\"msr\":\"0x10\"}\n", "neither"),
            ("{\"op\":\"rdmsr\",\"msr\":\"0x1_0000_0000\"}\n", "32 bits"),
            ("{\"op\":\"rdmsr\",\"msr\":\"TSC\"}\n", "not a 64-bit number"),
            ("{\"op\":\"wrmsr\",\"msr\":\"0x10\"}\n", "no `value`"),
            ("{\"op\":\"rdmsr\",\"msr\":16,\"did\":\"slept\"}\n", "not known"),
            ("{\"op\":\"rdmsr\",\"msr\":16,\"reason\":\"mood\"}\n", "not known"),
            ("{\"op\":\"rdmsr\"}\n", "no `msr`"),
            ("{\"t\":5}\n", "neither `op` nor"),
            ("{\"lost\":0}\n", "`lost` is 0"),
            ("{\"lost\":-1}\n", "no event"),
            ("{\"lost\":\"many\"}\n", "no event"),
            ("{\"lost\":18446744073709551616}\n", "no event"),
            ("{\"lost\":5,\"vcpu\":4294967296}\n", "no event"),
            ("{\"lost\":5,\"op\":\"rdmsr\",\"msr\":16}\n", "`op` and `lost`"),
            ("{\"lost\":5,\"t\":1", "breaks off"),
        ] {
            let after = if bad.ends_with('\n') { good } else { "" };
            let (events, error) = read(&format!("{HEADER}{good}\n{good}{bad}{after}"));
            let error = error.unwrap_or_else(|| panic!("{bad:?} was read"));
            assert!(error.to_string().contains(what), "{bad:?}: {error}");
            assert_eq!((error.line, events.len()), (5, 2), "{bad:?}");
        }
    }

    #[test]
    fn a_trace_begins_with_a_header_of_a_known_version() {
        for (text, what) in [
            ("", "empty"),
            ("garbage\n", "no trace's header"),
            ("{\"hello\":1}\n", "no trace's header"),
            ("{\"op\":\"rdmsr\",\"msr\":\"0x10\"}\n", "put the line"),
            ("{\n", "a whole object on each line"),
            ("[{\"msrgate_trace\":1}]\n", "jq -c '.[]'"),
            ("{\"msrgate_summary\":1}\n", "`learn` alone"),
            ("\u{1f}\u{8b}", "no trace's header"),
            ("PERFILE2 and bytes", "perf script -i"),
            ("[package]\n", "no trace's header"),
            ("{\"msrgate_trace\":2}\n", "version 2"),
            ("{\"msrgate_trace\":\"new\"}\n", "version \"new\""),
            ("{\"msrgate_trace\":1,\"guest\":5}\n", "malformed"),
        ] {
            let error = read(text).1.unwrap();
            assert_eq!(error.line, 1);
            assert!(error.to_string().contains(what), "{text:?}: {error}");
        }
    }

    #[test]
    fn other_files_are_told_by_what_they_begin_with() {
        for (bytes, what) in [
            (b"\x1f\x8b\x08\0".as_slice(), "gzip -dc"),
            (b"\x17\x08\x44tracing6\0", "trace-cmd report -i"),
            (b"\xff\xfe{\0\"\0", "iconv"),
            (
                b"*[Time:  12 ms]  MSR: 0x0000001b  Value: 0x00000000fee00900  Mode: READ   Result: OK\n",
                "bpftrace",
            ),
            (b"{\"MESSAGE\":\"kvm [1]: ignored rdmsr: 0x35\"}\n", "journalctl -k"),
        ] {
            let error = Lines::new(bytes).expect_err("no trace").to_string();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn a_trace_is_told_from_a_policy() {
        for (head, trace) in [
            (HEADER, true),
            ("{\"msrgate_summary\":1,", true),
            ("# tracer: nop\n#\n", true),
            (" CPU 0/KVM 18 [015] 4831258.258053: kvm:kvm_msr: msr_write 6e0", true),
            ("# what a guest needs\nversion = 1\n", false),
            ("version = 1\n", false),
            ("# of a log\n[   44.000001] kvm [1]: x\n", true),
            ("> > {\"msrgate_trace\":1}\n", true),
            ("", false),
        ] {
            assert_eq!(is_trace(head.as_bytes()), trace, "{head}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_passed_over() {
        let (events, error) = read(&format!("\u{feff}{HEADER}{{\"op\":\"rdmsr\",\"msr\":\"0x10\"}}\n"));
        assert!(error.is_none() && events.len() == 1, "{error:?}");
        let (events, error) = read("\u{feff} x-1 [0] 1.0: kvm_msr: msr_read 10 = 0x0\n");
        assert!(error.is_none() && events.len() == 1, "{error:?}");
    }

    #[test]
    fn what_a_mail_quotes_is_read() {
        for text in [
            format!("> > {HEADER}> > {{\"op\":\"rdmsr\",\"msr\":\"0x10\"}}\n>\n"),
            "> > # tracer: nop\n> >\n> >  x-1 [0] 1.0: kvm_msr: msr_read 10 = 0x0\n".to_owned(),
            ">> [    0.000000] Linux\n>>\n>> [    0.000001] kvm [1]: vcpu0 ignored rdmsr: 0x10 data 0x0\n".to_owned(),
        ] {
            let (records, error) = read(&text);
            assert!(error.is_none(), "{text}: {error:?}");
            assert!(
                matches!(records.as_slice(), [Record::Event(event)] if event.msr.0 == 0x10),
                "{text}: {records:?}"
            );
        }
    }

    #[test]
    fn a_kernels_log_is_a_trace_that_lacks_what_was_served() {
        let line = "[   44.000001] kvm [100]: vcpu0, guest rIP: 0x5 ignored rdmsr: 0x641 data 0x0\n";
        let lines = Lines::new(line.as_bytes()).unwrap();
        assert!(lines.header().is_partial());
        assert_eq!(read(&format!("[    0.000000] Linux\n\n{line}")).0.len(), 1);
        let (_, error) = read("[    0.000000] Linux\n");
        assert!(error.is_some_and(|error| error.to_string().contains("about an MSR")));
        let (_, error) = read("[    0.000000] kvm [1]: ignored wrmsr: 0x641 da");
        assert!(error.is_some_and(|error| error.to_string().contains("breaks off")));
    }

    #[test]
    fn a_second_trace_behind_the_first_is_told() {
        let (_, error) = read(&format!("{HEADER}{HEADER}"));
        assert!(error.is_some_and(|error| error.line == 2 && error.to_string().contains("csplit")));
    }

    #[test]
    fn a_cut_line_of_the_tracepoint_is_told() {
        let whole = " x-1 [0] 1.0: kvm_msr: msr_read 10 = 0x0 (#GP)";
        assert!(read(whole).1.is_none());
        for length in [whole.len() - 1, whole.len() - 9, 20, 8] {
            let (events, error) = read(&format!("{whole}\n{}", &whole[..length]));
            let error = error.unwrap_or_else(|| panic!("{length} bytes were read"));
            assert!(error.to_string().contains("breaks off"), "{length}: {error}");
            assert_eq!(events.len(), 1);
        }
    }

    #[test]
    fn an_endless_line_is_an_error_and_not_a_full_memory() {
        let text = format!("{HEADER}{}", "x".repeat(LONGEST as usize + 1));
        assert!(read(&text).1.unwrap().to_string().contains("longer than"));
    }
}
