//! A scan as JSON, and back.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use msrgate_core::{Access, Msr, MsrRange};
use msrgate_guest::scan::{Change, Difference, MOST, Readable, Scan, hazard};
use msrgate_policy::number;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Found;
use crate::exit::Failure;
use crate::{explain, machine};

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
    pub(crate) policy: Option<Ruled>,
}

/// The policy that the guest ran under.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
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
            kernel: Some(format!("{} {}", machine::release(), machine::module())),
            cpuid: None,
            policy: None,
        }
    }
}

/// Its keys are in docs/json.md.
pub(crate) fn json(found: &Found) -> Value {
    let scan = &found.scan;
    let mut object = json!(found.facts);
    object["ranges"] = scan.ranges.iter().map(|range| span(*range)).collect();
    let readable = scan.readable.iter().map(|seen| {
        json!({
            "msr": seen.msr.to_string(),
            "name": explain::name(seen.msr),
            "value": format!("{:#x}", seen.value),
            "volatile": seen.volatile,
        })
    });
    object["readable"] = readable.collect();
    object["written"] = scan.written.iter().map(|range| span(*range)).collect();
    let writable = scan.writable.iter();
    object["writable"] = writable
        .map(|msr| json!({ "msr": msr.to_string(), "name": explain::name(*msr) }))
        .collect();
    object["unwritten"] = unwritten(scan)
        .map(|(msr, why)| json!({ "msr": msr.to_string(), "name": explain::name(msr), "why": why }))
        .collect();
    let broken = scan.broken.iter().map(|broken| {
        let msr = broken.access.msr();
        json!({
            "msr": msr.to_string(),
            "name": explain::name(msr),
            "op": broken.access.op().name(),
            "value": match broken.access {
                Access::Read { .. } => None,
                Access::Write { value, .. } => Some(format!("{value:#x}")),
            },
            "how": broken.how.to_string(),
        })
    });
    object["broken"] = broken.collect();
    object["faults"] = scan.faults.into();
    if let Some((facts, differences)) = &found.against {
        object["against"] = json!(facts);
        object["differences"] = differences.iter().map(difference).collect();
    }
    object
}

/// The MSRs that could be read, and whose write is a command.
pub(super) fn unwritten(scan: &Scan) -> impl Iterator<Item = (Msr, &'static str)> {
    let left = scan.readable.iter().filter(|seen| !contain(&scan.written, seen.msr));
    left.filter_map(|seen| Some((seen.msr, hazard(seen.msr)?)))
}

/// Whether ranges in order have the MSR.
pub(super) fn contain(ranges: &[MsrRange], msr: Msr) -> bool {
    let after = ranges.partition_point(|range| range.last() < msr);
    ranges.get(after).is_some_and(|range| range.contains(msr))
}

fn span(range: MsrRange) -> Value {
    json!({ "first": range.first().to_string(), "last": range.last().to_string() })
}

fn difference(found: &Difference) -> Value {
    let hex = |value: u64| Some(format!("{value:#x}"));
    let (what, before, after) = match found.change {
        Change::Readable { value } => ("readable", None, hex(value)),
        Change::Unreadable { value } => ("unreadable", hex(value), None),
        Change::Value { before, after } => ("value", hex(before), hex(after)),
        Change::Writable => ("writable", None, None),
        Change::Unwritable => ("unwritable", None, None),
    };
    json!({
        "msr": found.msr.to_string(),
        "name": explain::name(found.msr),
        "what": what,
        "before": before,
        "after": after,
    })
}

/// An earlier scan.
pub(crate) fn read(path: &Path) -> Result<(Facts, Scan), Failure> {
    /// What the largest scan takes, and some more.
    const MOST_BYTES: u64 = 512 << 20;
    let name = path.display();
    let file = File::open(path).map_err(|error| Failure::input(format!("cannot read `{name}`: {error}")))?;
    let text = BufReader::with_capacity(1 << 16, file.take(MOST_BYTES));
    let no_scan = |why: &dyn std::fmt::Display| {
        Failure::input(format!("{name} is no scan, as `msrgate scan --json` prints it: {why}"))
    };
    let record: Record = serde_json::from_reader(text).map_err(|error| no_scan(&error))?;
    let facts = record.facts.clone();
    Ok((facts, record.scan().map_err(|why| no_scan(&why))?))
}

/// What a comparison needs of the file.
#[derive(Deserialize)]
struct Record {
    #[serde(flatten)]
    facts: Facts,
    ranges: Vec<Span>,
    readable: Vec<Row>,
    written: Vec<Span>,
    writable: Vec<One>,
    faults: u64,
}

#[derive(Deserialize)]
struct Span {
    first: String,
    last: String,
}

#[derive(Deserialize)]
struct Row {
    msr: String,
    value: String,
    volatile: bool,
}

#[derive(Deserialize)]
struct One {
    msr: String,
}

impl Record {
    fn scan(self) -> Result<Scan, String> {
        if self.readable.len() as u64 > MOST || self.writable.len() as u64 > MOST {
            return Err(format!("it has more than {MOST} MSRs"));
        }
        let readable = self.readable.iter().map(|row| {
            Ok(Readable {
                msr: msr(&row.msr)?,
                value: value(&row.value)?,
                volatile: row.volatile,
            })
        });
        Ok(Scan {
            ranges: spans(&self.ranges)?,
            readable: readable.collect::<Result<_, String>>()?,
            written: spans(&self.written)?,
            writable: self
                .writable
                .iter()
                .map(|one| msr(&one.msr))
                .collect::<Result<_, _>>()?,
            broken: Vec::new(),
            faults: self.faults,
        })
    }
}

fn value(text: &str) -> Result<u64, String> {
    number::parse(text).map_err(|_| format!("`{text}` is no number of 64 bits"))
}

fn msr(text: &str) -> Result<Msr, String> {
    let index = u32::try_from(value(text)?);
    index.map(Msr).map_err(|_| format!("`{text}` is no MSR"))
}

fn spans(spans: &[Span]) -> Result<Vec<MsrRange>, String> {
    let range = |span: &Span| {
        MsrRange::new(msr(&span.first)?, msr(&span.last)?)
            .ok_or_else(|| format!("a range ends at {} before it begins at {}", span.last, span.first))
    };
    spans.iter().map(range).collect()
}
