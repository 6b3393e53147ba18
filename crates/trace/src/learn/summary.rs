//! What guests did, counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, BufRead, Read, Write};

use msrgate_core::abi::{MAX_RANGE_MSRS, MAX_RANGES};
use msrgate_core::{Disposition, Msr, Op};
use msrgate_msrs::number;
use msrgate_policy::print;
use serde::Deserialize;

use crate::TraceError;

/// The version of the format that is read and written here.
const VERSION: u64 = 1;

/// The longest line that is read.
pub(super) const LONGEST: u64 = 1 << 20;

/// How many names of traces are kept beside a count of them.
const NAMES: usize = 4;

/// The longest name of a trace, in bytes: longer than a file's can be, whatever was put in place of what is no UTF-8.
const LONGEST_NAME: usize = 1024;

/// How many different values are kept beside an access.
const VALUES: usize = 16;

/// How many MSRs and directions that only faulted are kept by name: those with the smallest indices.
const FAULTED: usize = 4096;

/// How many MSRs and directions can have been served: what a filter can allow over a default of deny.
const MOST: usize = 2 * MAX_RANGES * MAX_RANGE_MSRS as usize;

/// The smallest of what was put in, at most `N`.
///
/// Merging is the union, cut to its `N` smallest, so that order and grouping do not matter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Least<T, const N: usize> {
    kept: BTreeSet<T>,
    more: bool,
}

impl<T: Ord, const N: usize> Default for Least<T, N> {
    fn default() -> Self {
        Least {
            kept: BTreeSet::new(),
            more: false,
        }
    }
}

impl<T: Ord, const N: usize> Least<T, N> {
    /// What was kept, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.kept.iter()
    }

    /// Whether there was more than is kept.
    pub fn more(&self) -> bool {
        self.more
    }

    /// The one thing that was put in, where it was one.
    pub fn only(&self) -> Option<&T> {
        self.kept.first().filter(|_| self.kept.len() == 1 && !self.more)
    }

    pub(super) fn insert(&mut self, item: T) {
        self.kept.insert(item);
        if self.kept.len() > N {
            self.kept.pop_last();
            self.more = true;
        }
    }

    fn merge(&mut self, other: &Self)
    where
        T: Clone,
    {
        other.kept.iter().for_each(|item| self.insert(item.clone()));
        self.more |= other.more;
    }
}

/// How an MSR was used in one direction, where it did not fault.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Usage {
    /// How often, by what was done; never [`Disposition::Deny`] or [`Disposition::Fault`].
    pub did: BTreeMap<Disposition, u64>,
    /// Values that say what was done: of `value` and `only`, and of `shadow` what was read before anything was written.
    pub values: Least<u64, VALUES>,
    /// In how many traces.
    pub traces: u64,
    /// In which: some of their names.
    pub names: Least<String, NAMES>,
    /// When first, in nanoseconds since the first access of its trace.
    pub first: u64,
    /// When last.
    pub last: u64,
}

impl Usage {
    /// How often.
    pub fn count(&self) -> u64 {
        self.did.values().fold(0, |sum, count| sum.saturating_add(*count))
    }

    fn merge(&mut self, other: &Usage) {
        for (did, count) in &other.did {
            add(self.did.entry(*did).or_default(), *count);
        }
        self.values.merge(&other.values);
        add(&mut self.traces, other.traces);
        self.names.merge(&other.names);
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
    }
}

/// Sums that stop at the largest number come to the same in any order.
fn add(sum: &mut u64, more: u64) {
    *sum = sum.saturating_add(more);
}

/// What guests did in any number of traces.
///
/// Merging is associative and commutative, and [`Summary::default`] changes nothing: the same traces give the same
/// summary however they are grouped. Each counts as often as it is given.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Summary {
    /// How many traces.
    pub traces: u64,
    /// Some of their names.
    pub names: Least<String, NAMES>,
    /// How many accesses there are in them.
    pub events: u64,
    /// How many of them faulted.
    pub faults: u64,
    /// How many were of the x2APIC's registers, which no filter stops.
    pub unfiltered: u64,
    /// How many accesses are missing from the traces, as far as they tell. If any are, what is learned may deny what the
    /// guests did.
    pub lost: u64,
    /// How many of the traces lack some of what guests were served with ([`crate::Header::is_partial`]). If any do, likewise.
    pub partial: u64,
    /// How many of the traces are from a host with `kvm.ignore_msrs`, where what KVM does not know looks served.
    pub ignoring: u64,
    /// The MSRs and directions that were served.
    pub seen: BTreeMap<(Msr, Op), Usage>,
    /// How often an MSR and direction faulted; the smallest 4096 of them.
    pub faulted: BTreeMap<(Msr, Op), u64>,
}

impl Summary {
    /// Whether nothing is known to be missing from the traces.
    pub fn is_complete(&self) -> bool {
        self.lost == 0 && self.partial == 0
    }

    /// Adds what another summary counted.
    pub fn merge(&mut self, other: &Summary) -> Result<(), LearnError> {
        add(&mut self.traces, other.traces);
        self.names.merge(&other.names);
        add(&mut self.events, other.events);
        add(&mut self.faults, other.faults);
        add(&mut self.unfiltered, other.unfiltered);
        add(&mut self.lost, other.lost);
        add(&mut self.partial, other.partial);
        add(&mut self.ignoring, other.ignoring);
        for (key, seen) in &other.seen {
            match self.seen.get_mut(key) {
                Some(ours) => ours.merge(seen),
                None => _ = self.seen.insert(*key, seen.clone()),
            }
        }
        for (key, count) in &other.faulted {
            self.fault(*key, *count);
        }
        check_size(self.seen.len())
    }

    pub(super) fn fault(&mut self, key: (Msr, Op), count: u64) {
        let full = self.faulted.len() >= FAULTED;
        if full && self.faulted.last_key_value().is_some_and(|(last, _)| *last < key) {
            return;
        }
        add(self.faulted.entry(key).or_default(), count);
        if self.faulted.len() > FAULTED {
            self.faulted.pop_last();
        }
    }

    /// Writes it as JSON Lines: a header, and then a line for each MSR and direction. The same traces give the same
    /// bytes.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let rows = self.seen.len() + self.faulted.len();
        write!(to, "{{\"msrgate_summary\":{VERSION},\"traces\":{}", self.traces)?;
        write_names(&self.names, to)?;
        write!(
            to,
            ",\"events\":{},\"faults\":{},\"unfiltered\":{}",
            self.events, self.faults, self.unfiltered
        )?;
        if self.lost > 0 {
            write!(to, ",\"lost\":{}", self.lost)?;
        }
        if self.partial > 0 {
            write!(to, ",\"partial\":{}", self.partial)?;
        }
        if self.ignoring > 0 {
            write!(to, ",\"ignoring\":{}", self.ignoring)?;
        }
        writeln!(to, ",\"rows\":{rows}}}")?;
        for ((msr, op), seen) in &self.seen {
            write!(to, "{{\"msr\":\"{msr}\",\"op\":\"{op}\",\"did\":{{")?;
            for (i, (did, count)) in seen.did.iter().enumerate() {
                let comma = if i == 0 { "" } else { "," };
                write!(to, "{comma}\"{did}\":{count}")?;
            }
            write!(to, "}}")?;
            if seen.values.iter().next().is_some() {
                write!(to, ",\"values\":[")?;
                for (i, value) in seen.values.iter().enumerate() {
                    let comma = if i == 0 { "" } else { "," };
                    write!(to, "{comma}\"{value:#x}\"")?;
                }
                write!(to, "]")?;
            }
            if seen.values.more() {
                write!(to, ",\"more_values\":true")?;
            }
            write!(to, ",\"traces\":{}", seen.traces)?;
            write_names(&seen.names, to)?;
            writeln!(to, ",\"first\":{},\"last\":{}}}", seen.first, seen.last)?;
        }
        for ((msr, op), count) in &self.faulted {
            writeln!(to, "{{\"msr\":\"{msr}\",\"op\":\"{op}\",\"faults\":{count}}}")?;
        }
        Ok(())
    }

    pub(super) fn read_rows(mut from: impl BufRead) -> Result<Summary, LearnError> {
        let mut line = Vec::new();
        let mut number = 0;
        let mut header: Option<Header> = None;
        let mut summary = Summary::default();
        loop {
            line.clear();
            number += 1;
            let read = Read::take(&mut from, LONGEST)
                .read_until(b'\n', &mut line)
                .map_err(LearnError::io)?;
            if read == 0 {
                break;
            }
            if read as u64 == LONGEST {
                return Err(LearnError::at(
                    number,
                    format!("the line is longer than {LONGEST} bytes"),
                ));
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let malformed =
                |error: serde_json::Error| LearnError::at(number, format!("this is not a summary: {error}"));
            if header.is_some() {
                let row: Row = serde_json::from_slice(&line).map_err(malformed)?;
                row.enter(&mut summary).map_err(|what| LearnError::at(number, what))?;
                check_size(summary.seen.len())?;
                continue;
            }
            let first: Header = serde_json::from_slice(&line).map_err(malformed)?;
            if first.msrgate_summary != VERSION {
                let version = first.msrgate_summary;
                let message = format!("version {version} of summaries is not known here; {VERSION} is");
                return Err(LearnError::at(number, message));
            }
            summary.traces = first.traces;
            check_names(&first.names).map_err(|what| LearnError::at(number, what))?;
            first.names.iter().for_each(|name| summary.names.insert(name.clone()));
            summary.events = first.events;
            summary.faults = first.faults;
            summary.unfiltered = first.unfiltered;
            summary.lost = first.lost;
            summary.partial = first.partial;
            summary.ignoring = first.ignoring;
            header = Some(first);
        }
        let rows = (summary.seen.len() + summary.faulted.len()) as u64;
        match header {
            Some(header) if header.rows == rows => Ok(summary),
            header => Err(LearnError::at(
                number,
                format!(
                    "the summary was cut short: it has {} of {}",
                    print::counted(rows, "row", "rows"),
                    header.map_or(0, |header| header.rows)
                ),
            )),
        }
    }
}

fn check_names(names: &[String]) -> Result<(), String> {
    match names.iter().any(|name| name.len() > LONGEST_NAME) {
        true => Err(format!("a name is longer than {LONGEST_NAME} bytes")),
        false => Ok(()),
    }
}

pub(super) fn check_size(served: usize) -> Result<(), LearnError> {
    if served > MOST {
        return Err(LearnError::whole(format!(
            "more than {MOST} MSRs and directions were served, and no filter can allow so many over a default of deny"
        )));
    }
    Ok(())
}

fn write_names(names: &Least<String, NAMES>, to: &mut impl Write) -> io::Result<()> {
    let kept: Vec<&String> = names.iter().collect();
    write!(to, ",\"names\":")?;
    Ok(serde_json::to_writer(to, &kept)?)
}

/// The first line of a summary.
#[derive(Deserialize)]
#[serde(expecting = "the first line of a summary")]
struct Header {
    msrgate_summary: u64,
    traces: u64,
    #[serde(default)]
    names: Vec<String>,
    events: u64,
    faults: u64,
    unfiltered: u64,
    #[serde(default)]
    lost: u64,
    #[serde(default)]
    partial: u64,
    #[serde(default)]
    ignoring: u64,
    rows: u64,
}

/// Each other line: an MSR and direction that was served, or one that faulted.
#[derive(Deserialize)]
#[serde(expecting = "a line of a summary")]
struct Row {
    msr: String,
    op: String,
    faults: Option<u64>,
    #[serde(default)]
    did: BTreeMap<String, u64>,
    #[serde(default)]
    values: Vec<String>,
    #[serde(default)]
    more_values: bool,
    #[serde(default)]
    traces: u64,
    #[serde(default)]
    names: Vec<String>,
    #[serde(default)]
    first: u64,
    #[serde(default)]
    last: u64,
}

impl Row {
    fn enter(self, summary: &mut Summary) -> Result<(), String> {
        let parse = |text: &str| number::parse(text).map_err(|_| format!("`{text}` is not a number"));
        let index = parse(&self.msr)?;
        let msr = u32::try_from(index).map_err(|_| format!("`msr` is {index:#x}, and an index has 32 bits"))?;
        let op = Op::ALL.into_iter().find(|op| op.name() == self.op);
        let op = op.ok_or_else(|| format!("`op` is `{}`, neither `rdmsr` nor `wrmsr`", self.op))?;
        let key = (Msr(msr), op);
        let twice = match self.faults {
            Some(count) => {
                let twice = summary.faulted.contains_key(&key);
                summary.fault(key, count);
                twice
            }
            None => {
                let mut seen = Usage {
                    traces: self.traces,
                    first: self.first,
                    last: self.last,
                    ..Usage::default()
                };
                for (did, count) in self.did {
                    let known = Disposition::from_name(&did).filter(|did| !did.is_fault());
                    let known = known.ok_or_else(|| format!("`did` has `{did}`, which is not known here"))?;
                    seen.did.insert(known, count);
                }
                for value in &self.values {
                    seen.values.insert(parse(value)?);
                }
                seen.values.more |= self.more_values;
                if seen.did.is_empty() {
                    return Err("it has neither `did` nor `faults`".to_owned());
                }
                if seen.count() == 0 || !(1..=summary.traces).contains(&seen.traces) || seen.first > seen.last {
                    return Err(format!(
                        "it contradicts itself: {} in {} of {}, from {} to {}",
                        print::counted(seen.count(), "access", "accesses"),
                        seen.traces,
                        print::counted(summary.traces, "trace", "traces"),
                        seen.first,
                        seen.last
                    ));
                }
                check_names(&self.names)?;
                self.names.into_iter().for_each(|name| seen.names.insert(name));
                summary.seen.insert(key, seen).is_some()
            }
        };
        match twice {
            true => Err(format!("{op} {} stands twice in the summary", key.0)),
            false => Ok(()),
        }
    }
}

/// Why nothing can be learned from an input.
#[derive(Debug)]
pub struct LearnError {
    /// The line, from 1, where it is about one.
    pub line: Option<u64>,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl LearnError {
    fn at(line: u64, message: String) -> LearnError {
        LearnError {
            line: Some(line),
            message: format!("line {line}: {message}"),
            source: None,
        }
    }

    pub(super) fn whole(message: String) -> LearnError {
        LearnError {
            line: None,
            message,
            source: None,
        }
    }

    pub(super) fn io(error: io::Error) -> LearnError {
        LearnError {
            line: None,
            message: format!("cannot be read: {error}"),
            source: Some(Box::new(error)),
        }
    }
}

impl From<TraceError> for LearnError {
    fn from(error: TraceError) -> LearnError {
        LearnError {
            line: Some(error.line).filter(|line| *line > 0),
            message: error.to_string(),
            source: Some(Box::new(error)),
        }
    }
}

impl fmt::Display for LearnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for LearnError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as _)
    }
}
