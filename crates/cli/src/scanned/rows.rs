//! What a scan found, a row for each MSR.

use msrgate_core::{Access, Msr, MsrRange};
use msrgate_guest::scan::{Broken, Change, Difference, Scan};

use super::contain;
use crate::words;

/// The titles of what [`registers`] gives; the last is of remarks.
pub(super) const REGISTERS: [&str; 4] = ["read", "write back", "bits", ""];
/// The titles of what [`changes`] gives.
pub(super) const CHANGES: [&str; 4] = ["read", "write back", "bits", "KVM to the VMM"];

/// What each MSR gave that gave something: to a read, to a write, and what there is to say of it.
pub(super) fn registers(scan: &Scan) -> Vec<(MsrRange, [String; 4])> {
    let reads = |msr: &Msr| scan.readable.binary_search_by_key(msr, |seen| seen.msr).is_ok();
    let write_only = scan.writable.iter().filter(|msr| !reads(msr));
    let mut all: Vec<(Msr, Option<u64>, bool)> = write_only.map(|msr| (*msr, None, false)).collect();
    all.extend(
        scan.readable
            .iter()
            .map(|seen| (seen.msr, Some(seen.value), seen.volatile)),
    );
    all.sort_unstable_by_key(|(msr, ..)| *msr);
    let rows = all.into_iter().map(|(msr, value, volatile)| {
        let write = match (contain(&scan.written, msr), scan.writable.binary_search(&msr)) {
            (true, Ok(_)) => "done",
            (true, Err(_)) => "#GP",
            (false, _) => "-",
        };
        let remark = match (volatile, msrgate_msrs::command(msr)) {
            (true, _) => "changes by itself".to_owned(),
            (false, Some(why)) if write == "-" => format!("not written: {why}"),
            _ => String::new(),
        };
        let bits = value.map(|value| words::bits(msr, value)).unwrap_or_default();
        (msr, [seen(value), write.to_owned(), bits, remark])
    });
    merged(rows)
}

/// A row for each MSR; those that follow each other, have no name and are alike share one.
fn merged<const N: usize>(rows: impl Iterator<Item = (Msr, [String; N])>) -> Vec<(MsrRange, [String; N])> {
    let nameless = |msr| words::name(msr).is_none();
    let mut merged: Vec<(MsrRange, [String; N])> = Vec::new();
    for (msr, cells) in rows {
        match merged.last_mut() {
            Some((range, before))
                if *before == cells
                    && range.last().0.checked_add(1) == Some(msr.0)
                    && nameless(range.first())
                    && nameless(msr) =>
            {
                *range = MsrRange::new(range.first(), msr).unwrap_or(*range);
            }
            _ => merged.push((MsrRange::single(msr), cells)),
        }
    }
    merged
}

/// What became of each MSR that differs.
pub(super) fn changes(differences: &[Difference]) -> Vec<(MsrRange, [String; 4])> {
    let mut rows: Vec<(Msr, [String; 4])> = Vec::new();
    for found in differences {
        if rows.last().is_none_or(|(msr, _)| *msr != found.msr) {
            rows.push((found.msr, Default::default()));
        }
        let Some((msr, [read, write, bits, kvm])) = rows.last_mut() else {
            continue;
        };
        match found.change {
            Change::Readable { value } => {
                *read = became(None, Some(value));
                *bits = words::bits(*msr, value);
            }
            Change::Unreadable { value } => {
                *read = became(Some(value), None);
                *bits = words::bits(*msr, value);
            }
            Change::Value { before, after } => {
                *read = became(Some(before), Some(after));
                *bits = words::changed(*msr, before, after);
            }
            Change::Writable => *write = "#GP → done".to_owned(),
            Change::Unwritable => *write = "done → #GP".to_owned(),
            Change::Listed => and(kvm, "listed anew".to_owned()),
            Change::Unlisted => and(kvm, "listed no more".to_owned()),
            Change::Feature { before, after } => {
                let value = |value: Option<u64>| value.map_or("none".to_owned(), |value| format!("{value:#x}"));
                and(kvm, format!("offers {} → {}", value(before), value(after)));
            }
            Change::Taken { before, after } => {
                let parts = [
                    ("takes", after.0 & !before.0, "as 1"),
                    ("takes", after.1 & !before.1, "as 0"),
                    ("refuses", before.0 & !after.0, "as 1"),
                    ("refuses", before.1 & !after.1, "as 0"),
                ];
                for (verb, bits, how) in parts.into_iter().filter(|(_, bits, _)| *bits != 0) {
                    and(kvm, format!("{verb} {} {how}", words::bit_numbers(bits)));
                }
            }
        }
    }
    merged(rows.into_iter())
}

/// One more thing of a cell.
fn and(cell: &mut String, more: String) {
    let gap = if cell.is_empty() { "" } else { ", " };
    cell.push_str(&format!("{gap}{more}"));
}

/// What a read gave.
fn seen(value: Option<u64>) -> String {
    value.map_or("#GP".to_owned(), |value| format!("{value:#x}"))
}

fn became(before: Option<u64>, after: Option<u64>) -> String {
    format!("{} → {}", seen(before), seen(after))
}

fn named(msr: Msr) -> String {
    match words::name(msr) {
        Some(name) => format!("{msr} ({name})"),
        None => msr.to_string(),
    }
}

/// What an access did to the guest.
pub(super) fn broken(broken: &Broken) -> String {
    let access = match broken.access {
        Access::Read { msr } => format!("the read of {}", named(msr)),
        Access::Write { msr, value } => format!("the write of {value:#x} to {}", named(msr)),
    };
    format!("{access} broke the guest, and a new one went on: {}", broken.how)
}
