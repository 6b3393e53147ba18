//! A scan as a file: JSON, and what other tools wrote of a guest's MSRs; and a scan for people.

mod facts;
mod foreign;
mod html;
mod print;
mod rows;

use std::borrow::Cow;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use msrgate_core::{Access, Msr, MsrRange};
use msrgate_guest::scan::{Change, Difference, Lists, Offer, Readable, Scan, Taken};
use msrgate_msrs::number;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::exit::Failure;
use crate::input::{self, Peeked};
use crate::json::{self, Printed, object};
use crate::words;

pub(crate) use self::facts::{Facts, ScanPolicy};
pub(crate) use self::html::{compared_page, page};
pub(crate) use self::print::{compared, print};

/// The version of the format that `scan --json` writes. Files without a version are older and have no lists of KVM's.
const VERSION: u64 = 1;

/// What was found, and what it is compared with.
pub(crate) struct Found {
    pub(crate) scan: Scan,
    pub(crate) facts: Facts,
    pub(crate) against: Option<(Facts, Vec<Difference>)>,
}

/// Prints it for programs. Row by row, since under a policy a million MSRs may be readable.
pub(crate) fn write(out: impl Write, found: &Found) -> Result<(), Failure> {
    let mut out = BufWriter::new(out);
    serde_json::to_writer_pretty(&mut out, &printed(found)).map_err(|error| Failure::Output(error.into()))?;
    writeln!(out)?;
    Ok(out.flush()?)
}

/// A scan for programs.
pub(crate) fn printed(found: &Found) -> impl Printed {
    let Found { scan, facts, against } = found;
    let lists = scan.lists.as_ref();
    object! {
        /// The version of the format: 1. Older files have none, and neither `listed` nor `features`; they can still be read.
        msrgate_scan: VERSION,
        /// Where and under what it was made.
        #[serde(flatten)]
        facts: facts,
        /// The MSRs that were read.
        ranges: rows(scan.ranges.iter().map(span)),
        /// Those whose read gave a value.
        readable: rows(scan.readable.iter().map(|seen| object! {
            /// Which.
            #[serde(flatten)]
            register: register(seen.msr),
            /// What the first read gave.
            value: hex(seen.value),
            /// What its bits mean: the fields that are not zero; empty where they are not known.
            bits: words::bits_printed(seen.msr, seen.value),
            /// Whether the second read gave something else: a clock, a counter.
            volatile: seen.volatile,
        })),
        /// The MSRs that were written.
        written: rows(scan.written.iter().map(span)),
        /// Those whose write was done.
        writable: rows(scan.writable.iter().map(|msr| register(*msr))),
        /// Those that could be read and were not written.
        unwritten: rows(unwritten(scan).map(|(msr, why)| object! {
            /// Which.
            #[serde(flatten)]
            register: register(msr),
            /// What a write would do.
            why: why,
        })),
        /// Accesses that broke the guest; a new one went on.
        broken: rows(scan.broken.iter().map(|broken| object! {
            /// Which.
            #[serde(flatten)]
            register: register(broken.access.msr()),
            /// The direction.
            op: broken.access.op().name(),
            /// What was written; null for a read.
            value: match broken.access {
                Access::Read { .. } => None,
                Access::Write { value, .. } => Some(hex(value)),
            },
            /// What happened.
            how: broken.how.to_string(),
        })),
        /// How many of the first reads were #GP.
        faults: scan.faults,
        /// What KVM_GET_MSR_INDEX_LIST names, by MSR: what a VMM saves and sets when a guest moves.
        #[serde(skip_serializing_if = "json::is_null")]
        listed: lists.map(|lists| rows(lists.listed.iter().map(offer))),
        /// What that list names on other kernels or of other vendors, and KVM_GET_MSRS gives here all the same.
        #[serde(skip_serializing_if = "json::is_null")]
        unlisted: lists.map(|lists| rows(lists.unlisted.iter().map(offer))),
        /// What KVM_GET_MSR_FEATURE_INDEX_LIST names, by MSR: what the host can give a guest.
        #[serde(skip_serializing_if = "json::is_null")]
        features: lists.map(|lists| rows(lists.features.iter().map(offer))),
        /// Only with `--against`: where and under what the earlier scan was made.
        #[serde(skip_serializing_if = "json::is_null")]
        against: against.as_ref().map(|(facts, _)| facts),
        /// Only with `--against`: what differs, by MSR.
        #[serde(skip_serializing_if = "json::is_null")]
        differences: against.as_ref().map(|(_, found)| found.iter().map(difference).collect::<Vec<_>>()),
    }
}

/// A list that is made while it is printed.
struct Rows<I>(I);

fn rows<I: Iterator<Item: Printed> + Clone>(rows: I) -> Rows<I> {
    Rows(rows)
}

impl<I: Iterator<Item: Serialize> + Clone> Serialize for Rows<I> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.clone())
    }
}

impl<I: Iterator<Item: JsonSchema>> JsonSchema for Rows<I> {
    fn schema_name() -> Cow<'static, str> {
        Vec::<I::Item>::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Vec::<I::Item>::json_schema(generator)
    }
}

fn register(msr: Msr) -> impl Printed {
    object! {
        /// The MSR.
        msr: msr.to_string(),
        /// The MSR's name; null if it is not known.
        name: words::name(msr),
    }
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

fn span(range: &MsrRange) -> impl Printed + use<> {
    object! {
        /// The first MSR.
        first: range.first().to_string(),
        /// The last MSR.
        last: range.last().to_string(),
    }
}

fn offer(offer: &Offer) -> impl Printed + use<> {
    let (writes, set, clear) = match offer.taken {
        Taken::Untried => ("untried", None, None),
        Taken::Refused => ("refused", None, None),
        Taken::Bits { set, clear } => ("taken", Some(set), Some(clear)),
    };
    object! {
        /// Which.
        #[serde(flatten)]
        register: register(offer.msr),
        /// What KVM_GET_MSRS gives of a new vCPU, and of features on `/dev/kvm`; null if nothing.
        value: offer.value.map(hex),
        /// What KVM_SET_MSRS of that value gives on a vCPU of its own: `"taken"`, `"refused"`, or `"untried"` where there is no
        /// value.
        writes: writes,
        /// The bits that are 0 in the value, and that KVM_SET_MSRS takes as 1; null if the value itself is not taken.
        may_set: set.map(hex),
        /// The bits that are 1 in the value, and that it takes as 0; null likewise.
        may_clear: clear.map(hex),
    }
}

/// The MSRs that could be read, and whose write is a command.
fn unwritten(scan: &Scan) -> impl Iterator<Item = (Msr, &'static str)> + Clone {
    let left = scan.readable.iter().filter(|seen| !contain(&scan.written, seen.msr));
    left.filter_map(|seen| Some((seen.msr, msrgate_msrs::command(seen.msr)?)))
}

/// Whether ranges in order have the MSR.
fn contain(ranges: &[MsrRange], msr: Msr) -> bool {
    let after = ranges.partition_point(|range| range.last() < msr);
    ranges.get(after).is_some_and(|range| range.contains(msr))
}

/// A difference between two scans, for programs.
pub(crate) fn difference(found: &Difference) -> impl Printed + use<> {
    let value = |value: u64| Before::Value(hex(value));
    let bits = |(ones, zeros)| Before::Bits {
        ones: hex(ones),
        zeros: hex(zeros),
    };
    let (what, before, after) = match found.change {
        Change::Readable { value: after } => ("readable", None, Some(value(after))),
        Change::Unreadable { value: before } => ("unreadable", Some(value(before)), None),
        Change::Value { before, after } => ("value", Some(value(before)), Some(value(after))),
        Change::Writable => ("writable", None, None),
        Change::Unwritable => ("unwritable", None, None),
        Change::Listed => ("listed", None, None),
        Change::Unlisted => ("unlisted", None, None),
        Change::Feature { before, after } => ("feature", before.map(value), after.map(value)),
        Change::Taken { before, after } => ("taken", Some(bits(before)), Some(bits(after))),
    };
    object! {
        /// Which.
        #[serde(flatten)]
        register: register(found.msr),
        /// `"readable"`: it was #GP, and can be read. `"unreadable"`: the reverse. `"value"`: it gives another value.
        /// `"writable"`: writing it back was #GP, and is done. `"unwritable"`: the reverse. `"listed"`, `"unlisted"`:
        /// KVM_GET_MSR_INDEX_LIST names it now, or no more. `"feature"`: KVM offers another value. `"taken"`: KVM_SET_MSRS takes
        /// other values.
        what: what,
        /// The earlier value; null where there is none.
        before: before,
        /// The later value; null where there is none.
        after: after,
        /// By which bits the two values differ; empty where that is not known.
        bits: match found.change {
            Change::Value { before, after } => words::changed_printed(found.msr, before, after),
            _ => Vec::new(),
        },
    }
}

/// What is before or after a change.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
enum Before {
    Value(String),
    Bits {
        /// Of `"taken"`: the bits that can be 1, as a mask.
        ones: String,
        /// Of `"taken"`: the bits that can be 0, as a mask.
        zeros: String,
    },
}

/// Whether a file that begins so is a scan, or what another tool wrote of a guest's MSRs.
pub(crate) fn is_scan(head: &[u8]) -> bool {
    let has = |word: &str| head.windows(word.len()).any(|part| part == word.as_bytes());
    let object = head.trim_ascii_start().starts_with(b"{");
    let older = has("\"microcode\"") && has("\"x2apic\"");
    foreign::is_table(head) || (object && (has("\"msrgate_scan\"") || older || foreign::is_fingerprint(head)))
}

/// A scan, or what Firecracker's tools wrote.
pub(crate) fn read(path: &Path) -> Result<(Facts, Scan), Failure> {
    parsed(path, input::peek(path)?)
}

/// Reads a scan from a file that is open.
pub(crate) fn parsed(path: &Path, opened: Peeked) -> Result<(Facts, Scan), Failure> {
    /// More than the largest scan takes.
    const MOST_BYTES: u64 = 512 << 20;
    let name = input::shown(path);
    let foreign = foreign::is_table(&opened.head) || foreign::is_fingerprint(&opened.head);
    if foreign {
        let text = input::whole(opened.all()).and_then(msrgate_policy::text_of);
        let read = text.and_then(|text| foreign::read(&text));
        return read.map_err(|error| Failure::input(format!("{name}: {error}")));
    }
    if let Some((what, readers)) = input::recorded(&opened.head) {
        return Err(Failure::input(format!("{name}: it is {what} and no scan: {readers}")));
    }
    let mut text = BufReader::with_capacity(1 << 16, opened.all().take(MOST_BYTES));
    let record: Result<Record, _> = serde_json::from_reader(&mut text);
    let record = record.map_err(|error| {
        let why = match text.get_ref().limit() {
            0 => format!("it has more than {} MiB", MOST_BYTES >> 20),
            _ => error.to_string(),
        };
        Failure::input(format!(
            "{name} is not a scan, as `msrgate scan --json` prints it: {why}"
        ))
    })?;
    if record.msrgate_scan.is_some_and(|version| version > VERSION) {
        return Err(Failure::input(format!(
            "{name} comes from a newer msrgate: this one reads scans up to version {VERSION}"
        )));
    }
    let facts = Facts {
        host: record.host,
        microcode: record.microcode,
        kernel: record.kernel,
        cpuid: record.cpuid,
        x2apic: record.x2apic,
        policy: record.policy,
    };
    let offers = |rows: Vec<OfferRow>| -> Vec<Offer> {
        let mut offers: Vec<Offer> = rows.into_iter().map(|OfferRow(offer)| offer).collect();
        offers.sort_by_key(|offer| offer.msr);
        offers
    };
    let lists = (record.listed.zip(record.features)).map(|(listed, features)| Lists {
        listed: offers(listed),
        unlisted: offers(record.unlisted),
        features: offers(features),
        partial: false,
    });
    let scan = Scan {
        ranges: record.ranges.into_iter().map(|Span(range)| range).collect(),
        readable: record.readable.into_iter().map(|Row(seen)| seen).collect(),
        written: record.written.into_iter().map(|Span(range)| range).collect(),
        writable: record.writable.into_iter().map(|one| one.msr).collect(),
        broken: Vec::new(),
        faults: record.faults,
        lists,
    };
    Ok((facts, scan))
}

/// What a comparison needs of the file.
#[derive(Deserialize)]
#[serde(expecting = "a scan")]
struct Record {
    msrgate_scan: Option<u64>,
    host: Option<String>,
    microcode: Option<String>,
    kernel: Option<String>,
    cpuid: Option<String>,
    x2apic: bool,
    policy: Option<ScanPolicy>,
    ranges: Vec<Span>,
    readable: Vec<Row>,
    written: Vec<Span>,
    writable: Vec<One>,
    faults: u64,
    listed: Option<Vec<OfferRow>>,
    #[serde(default)]
    unlisted: Vec<OfferRow>,
    features: Option<Vec<OfferRow>>,
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

struct OfferRow(Offer);

impl<'de> Deserialize<'de> for OfferRow {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OfferRow, D::Error> {
        #[derive(Deserialize)]
        #[serde(expecting = "an object with `msr`, `value`, `writes`, `may_set` and `may_clear`")]
        struct Found {
            #[serde(deserialize_with = "msr")]
            msr: Msr,
            #[serde(deserialize_with = "optional")]
            value: Option<u64>,
            writes: Writes,
            #[serde(deserialize_with = "optional")]
            may_set: Option<u64>,
            #[serde(deserialize_with = "optional")]
            may_clear: Option<u64>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Writes {
            Untried,
            Refused,
            Taken,
        }
        let found = Found::deserialize(deserializer)?;
        let taken = match found.writes {
            Writes::Untried => Taken::Untried,
            Writes::Refused => Taken::Refused,
            Writes::Taken => Taken::Bits {
                set: found.may_set.unwrap_or(0),
                clear: found.may_clear.unwrap_or(0),
            },
        };
        let (msr, value) = (found.msr, found.value);
        Ok(OfferRow(Offer { msr, value, taken }))
    }
}

fn optional<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    let parse = |text: String| {
        number::parse(&text).map_err(|_| D::Error::custom(format_args!("`{text}` is not a number of 64 bits")))
    };
    text.map(parse).transpose()
}

fn value<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    number::parse(&text).map_err(|_| D::Error::custom(format_args!("`{text}` is not a number of 64 bits")))
}

fn msr<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Msr, D::Error> {
    let index = value(deserializer)?;
    let none = |_| D::Error::custom(format_args!("{index:#x} is not an MSR"));
    u32::try_from(index).map(Msr).map_err(none)
}
