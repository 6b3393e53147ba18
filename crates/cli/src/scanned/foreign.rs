//! What Firecracker's tools wrote of a guest's MSRs, as a scan: a table of what a guest read, and a fingerprint or a template of
//! `cpu-template-helper`, which has what KVM_GET_MSRS gave.

use msrgate_core::{Msr, MsrRange};
use msrgate_guest::scan::{Lists, Offer, Readable, Scan, Taken};
use msrgate_msrs::number;
use msrgate_policy::foreign::registers;
use serde_json::Value;

use super::facts::Facts;

/// The first line of a table.
const HEADER: &str = "MSR_ADDR,VALUE";

pub(super) fn is_table(head: &[u8]) -> bool {
    head.trim_ascii_start().starts_with(HEADER.as_bytes())
}

pub(super) fn is_fingerprint(head: &[u8]) -> bool {
    let has = |word: &str| head.windows(word.len()).any(|part| part == word.as_bytes());
    has("\"guest_cpu_config\"") || has("\"firecracker_version\"") || has("\"msr_modifiers\"")
}

/// The scan, as far as the text has one. The error is for people.
pub(super) fn read(text: &str) -> Result<(Facts, Scan), String> {
    match is_table(text.as_bytes()) {
        true => table(text),
        false => fingerprint(text),
    }
}

fn table(text: &str) -> Result<(Facts, Scan), String> {
    let mut values = Vec::new();
    let lines = text.trim_start().lines().enumerate().skip(1);
    for (number, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = || format!("line {}: `{line}` is not `{HEADER}` in numbers", number + 1);
        let (msr, value) = line.split_once(',').ok_or_else(wrong)?;
        let parse = |text: &str| number::parse(text.trim()).map_err(|_| wrong());
        let (index, value) = (parse(msr)?, parse(value)?);
        // Firecracker's own tables have an index of 33 bits, which no MSR has.
        values.extend(u32::try_from(index).ok().map(|index| (Msr(index), value)));
    }
    let facts = Facts {
        host: Some("a guest's MSRs in a table".to_owned()),
        ..Facts::none()
    };
    Ok((facts, seen(values, None)))
}

fn fingerprint(text: &str) -> Result<(Facts, Scan), String> {
    let whole: Value = serde_json::from_str(text).map_err(|error| format!("it is not JSON: {error}"))?;
    let template = whole.get("guest_cpu_config").unwrap_or(&whole);
    let registers = registers(&template.to_string()).map_err(|error| error.to_string())?;
    let fact = |key: &str| whole.get(key).and_then(Value::as_str).map(str::to_owned);
    let facts = Facts {
        host: Some("a CPU template or fingerprint of Firecracker".to_owned()),
        microcode: fact("microcode_version"),
        kernel: fact("kernel_version"),
        ..Facts::none()
    };
    // Bits that a template leaves as they are have no value.
    let values = registers.into_iter().filter(|(_, keep, _)| *keep == 0);
    let values: Vec<(Msr, u64)> = values.map(|(msr, _, value)| (msr, value)).collect();
    // KVM_GET_MSRS of a vCPU gives what its guest would read.
    let offers = values.iter().map(|(msr, value)| Offer {
        msr: *msr,
        value: Some(*value),
        taken: Taken::Untried,
    });
    let mut listed: Vec<Offer> = offers.collect();
    listed.sort_by_key(|offer| offer.msr);
    let lists = Lists {
        listed,
        unlisted: Vec::new(),
        features: Vec::new(),
        partial: true,
    };
    Ok((facts, seen(values, Some(lists))))
}

fn seen(mut values: Vec<(Msr, u64)>, lists: Option<Lists>) -> Scan {
    values.sort_unstable();
    values.dedup_by_key(|(msr, _)| *msr);
    Scan {
        ranges: values.iter().map(|(msr, _)| MsrRange::single(*msr)).collect(),
        readable: values
            .into_iter()
            .map(|(msr, value)| Readable {
                msr,
                value,
                volatile: msrgate_msrs::by_msr(msr).is_some_and(|entry| entry.host == msrgate_msrs::Host::Activity),
            })
            .collect(),
        written: Vec::new(),
        writable: Vec::new(),
        broken: Vec::new(),
        faults: 0,
        lists,
    }
}
