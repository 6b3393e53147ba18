//! A scan as JSON, and back.

use std::cell::Cell;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use msrgate_core::{Access, Msr, MsrRange};
use msrgate_guest::scan::{Broken, Change, Difference, Readable, Scan};
use msrgate_msrs::number;
use msrgate_verify::Kernel;
use serde::de::Error;
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::{input, machine, words};

/// What was found, and what it is compared with.
pub(crate) struct Found {
    pub(super) scan: Scan,
    pub(super) facts: Facts,
    pub(super) against: Option<(Facts, Vec<Difference>)>,
}

/// Where and under what a scan was made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// The processor's name.
    pub(crate) host: Option<String>,
    pub(crate) microcode: Option<String>,
    /// Release and module.
    pub(crate) kernel: Option<String>,
    /// The guest's CPUID, as the command line named it.
    pub(crate) cpuid: Option<String>,
    /// Whether its local APIC was in x2APIC mode.
    pub(crate) x2apic: bool,
    pub(crate) policy: Option<Ruled>,
}

/// The policy that the guest ran under.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(expecting = "an object with `name` and `hash`")]
pub(crate) struct Ruled {
    pub(crate) name: String,
    pub(crate) hash: String,
}

impl Facts {
    pub(crate) fn of_this_machine() -> Facts {
        let (host, microcode) = machine::processor();
        Facts {
            host,
            microcode,
            kernel: Some(Kernel::running().to_string()),
            cpuid: None,
            x2apic: false,
            policy: None,
        }
    }
}

/// Prints what docs/json.md lists. Row by row, since under a policy a million MSRs may be readable.
pub(crate) fn write(out: impl Write, found: &Found) -> Result<(), Failure> {
    let mut out = BufWriter::new(out);
    serde_json::to_writer_pretty(&mut out, found).map_err(|error| Failure::Output(error.into()))?;
    writeln!(out)?;
    Ok(out.flush()?)
}

impl Serialize for Found {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (facts, scan) = (&self.facts, &self.scan);
        let mut object = serializer.serialize_map(None)?;
        object.serialize_entry("host", &facts.host)?;
        object.serialize_entry("microcode", &facts.microcode)?;
        object.serialize_entry("kernel", &facts.kernel)?;
        object.serialize_entry("cpuid", &facts.cpuid)?;
        object.serialize_entry("x2apic", &facts.x2apic)?;
        object.serialize_entry("policy", &facts.policy)?;
        object.serialize_entry("ranges", &rows(scan.ranges.iter().map(span)))?;
        object.serialize_entry("readable", &rows(scan.readable.iter().map(readable)))?;
        object.serialize_entry("written", &rows(scan.written.iter().map(span)))?;
        object.serialize_entry("writable", &rows(scan.writable.iter().map(|msr| named(*msr, []))))?;
        let unwritten = unwritten(scan).map(|(msr, why)| named(msr, [("why", why.into())]));
        object.serialize_entry("unwritten", &rows(unwritten))?;
        object.serialize_entry("broken", &rows(scan.broken.iter().map(broken)))?;
        object.serialize_entry("faults", &scan.faults)?;
        if let Some((facts, differences)) = &self.against {
            object.serialize_entry("against", facts)?;
            object.serialize_entry("differences", &rows(differences.iter().map(difference)))?;
        }
        object.end()
    }
}

/// A list that is made while it is printed.
struct Rows<I>(Cell<Option<I>>);

fn rows<I: Iterator<Item = Value>>(rows: I) -> Rows<I> {
    Rows(Cell::new(Some(rows)))
}

impl<I: Iterator<Item = Value>> Serialize for Rows<I> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.take().into_iter().flatten())
    }
}

/// An MSR, and more about it.
fn named<const N: usize>(msr: Msr, more: [(&str, Value); N]) -> Value {
    let mut object = json!({ "msr": msr.to_string(), "name": words::name(msr) });
    for (key, value) in more {
        object[key] = value;
    }
    object
}

fn hex(value: u64) -> Value {
    format!("{value:#x}").into()
}

fn span(range: &MsrRange) -> Value {
    json!({ "first": range.first().to_string(), "last": range.last().to_string() })
}

fn readable(seen: &Readable) -> Value {
    named(
        seen.msr,
        [("value", hex(seen.value)), ("volatile", seen.volatile.into())],
    )
}

/// The MSRs that could be read, and whose write is a command.
fn unwritten(scan: &Scan) -> impl Iterator<Item = (Msr, &'static str)> {
    let left = scan.readable.iter().filter(|seen| !contain(&scan.written, seen.msr));
    left.filter_map(|seen| Some((seen.msr, msrgate_msrs::command(seen.msr)?)))
}

/// Whether ranges in order have the MSR.
pub(super) fn contain(ranges: &[MsrRange], msr: Msr) -> bool {
    let after = ranges.partition_point(|range| range.last() < msr);
    ranges.get(after).is_some_and(|range| range.contains(msr))
}

fn broken(broken: &Broken) -> Value {
    let value = match broken.access {
        Access::Read { .. } => Value::Null,
        Access::Write { value, .. } => hex(value),
    };
    let op = broken.access.op().name().into();
    let how = broken.how.to_string().into();
    named(broken.access.msr(), [("op", op), ("value", value), ("how", how)])
}

fn difference(found: &Difference) -> Value {
    let (what, before, after) = match found.change {
        Change::Readable { value } => ("readable", Value::Null, hex(value)),
        Change::Unreadable { value } => ("unreadable", hex(value), Value::Null),
        Change::Value { before, after } => ("value", hex(before), hex(after)),
        Change::Writable => ("writable", Value::Null, Value::Null),
        Change::Unwritable => ("unwritable", Value::Null, Value::Null),
    };
    named(found.msr, [("what", what.into()), ("before", before), ("after", after)])
}

/// An earlier scan.
pub(crate) fn read(path: &Path) -> Result<(Facts, Scan), Failure> {
    /// More than the largest scan takes.
    const MOST_BYTES: u64 = 512 << 20;
    let name = input::shown(path);
    let file = input::open(path).map_err(|error| Failure::input(format!("cannot read `{name}`: {error}")))?;
    let mut text = BufReader::with_capacity(1 << 16, file.take(MOST_BYTES));
    let record: Result<Record, _> = serde_json::from_reader(&mut text);
    let record = record.map_err(|error| {
        let why = match text.get_ref().limit() {
            0 => format!("it has more than {} MiB", MOST_BYTES >> 20),
            _ => error.to_string(),
        };
        Failure::input(format!("{name} is no scan, as `msrgate scan --json` prints it: {why}"))
    })?;
    let facts = Facts {
        host: record.host,
        microcode: record.microcode,
        kernel: record.kernel,
        cpuid: record.cpuid,
        x2apic: record.x2apic,
        policy: record.policy,
    };
    let scan = Scan {
        ranges: record.ranges.into_iter().map(|Span(range)| range).collect(),
        readable: record.readable.into_iter().map(|Row(seen)| seen).collect(),
        written: record.written.into_iter().map(|Span(range)| range).collect(),
        writable: record.writable.into_iter().map(|one| one.msr).collect(),
        broken: Vec::new(),
        faults: record.faults,
    };
    Ok((facts, scan))
}

/// What a comparison needs of the file.
#[derive(Deserialize)]
#[serde(expecting = "a scan")]
struct Record {
    host: Option<String>,
    microcode: Option<String>,
    kernel: Option<String>,
    cpuid: Option<String>,
    x2apic: bool,
    policy: Option<Ruled>,
    ranges: Vec<Span>,
    readable: Vec<Row>,
    written: Vec<Span>,
    writable: Vec<One>,
    faults: u64,
}

#[derive(Deserialize)]
#[serde(expecting = "an object with `msr`")]
struct One {
    #[serde(deserialize_with = "msr")]
    msr: Msr,
}

struct Span(MsrRange);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        #[derive(Deserialize)]
        #[serde(expecting = "an object with `first` and `last`")]
        struct Ends {
            #[serde(deserialize_with = "msr")]
            first: Msr,
            #[serde(deserialize_with = "msr")]
            last: Msr,
        }
        let Ends { first, last } = Ends::deserialize(deserializer)?;
        let range = MsrRange::new(first, last);
        let reversed = || D::Error::custom(format_args!("a range ends at {last} before it begins at {first}"));
        range.map(Span).ok_or_else(reversed)
    }
}

struct Row(Readable);

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Row, D::Error> {
        #[derive(Deserialize)]
        #[serde(expecting = "an object with `msr`, `value` and `volatile`")]
        struct Seen {
            #[serde(deserialize_with = "msr")]
            msr: Msr,
            #[serde(deserialize_with = "value")]
            value: u64,
            volatile: bool,
        }
        let Seen { msr, value, volatile } = Seen::deserialize(deserializer)?;
        Ok(Row(Readable { msr, value, volatile }))
    }
}

fn value<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    number::parse(&text).map_err(|_| D::Error::custom(format_args!("`{text}` is no number of 64 bits")))
}

fn msr<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Msr, D::Error> {
    let index = value(deserializer)?;
    let none = |_| D::Error::custom(format_args!("{index:#x} is no MSR"));
    u32::try_from(index).map(Msr).map_err(none)
}
