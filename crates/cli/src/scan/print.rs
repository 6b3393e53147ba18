//! What a scan found, for people.

use std::io::{self, Write};

use msrgate_core::{Access, Msr, MsrRange};
use msrgate_guest::scan::{Change, Difference, Scan};

use super::record::{Facts, Found, contain};
use crate::render::Table;
use crate::stream::{Stream, Tone};
use crate::words;

pub(crate) fn text(out: &mut Stream<impl Write>, found: &Found) -> io::Result<()> {
    match &found.against {
        None => registers(out, &found.scan)?,
        Some((before, differences)) => {
            let mut msrs: Vec<Msr> = differences.iter().map(|found| found.msr).collect();
            msrs.dedup();
            match msrs.len() {
                0 => out.say(Tone::Good, "a guest sees what it saw before")?,
                1 => out.say(Tone::Odd, "1 MSR differs")?,
                count => out.say(Tone::Odd, &format!("{count} MSRs differ"))?,
            }
            facts(out, before, &found.facts)?;
            writeln!(out)?;
            compared(out, differences)?;
        }
    }
    for broken in &found.scan.broken {
        let access = match broken.access {
            Access::Read { msr } => format!("the read of {}", named(msr)),
            Access::Write { msr, value } => format!("the write of {value:#x} to {}", named(msr)),
        };
        writeln!(out, "{access} broke the guest, and a new one went on: {}", broken.how)?;
    }
    let tried: u64 = found.scan.ranges.iter().map(|range| range.len()).sum();
    let written: u64 = found.scan.written.iter().map(|range| range.len()).sum();
    let host = [&found.facts.host, &found.facts.kernel]
        .into_iter()
        .flatten()
        .cloned()
        .collect::<Vec<_>>();
    writeln!(out, "{}", host.join(", "))?;
    writeln!(
        out,
        "{} read by a real guest{}: {} gave a value, {} #GP; {written} written, {} of them done",
        words::counted(tried, "MSR", "MSRs"),
        match &found.facts.policy {
            Some(policy) => format!(" under the policy {}", policy.name),
            None => String::new(),
        },
        found.scan.readable.len(),
        found.scan.faults,
        found.scan.writable.len(),
    )
}

fn registers(out: &mut Stream<impl Write>, scan: &Scan) -> io::Result<()> {
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
        (msr, [seen(value), write.to_owned(), remark])
    });
    table(out, ["read", "write back", ""], rows)
}

/// A row for each MSR; those that follow each other, have no name and are alike share one.
fn table<const N: usize>(
    out: &mut Stream<impl Write>,
    header: [&'static str; N],
    rows: impl Iterator<Item = (Msr, [String; N])>,
) -> io::Result<()> {
    let mut table = Table::new(&[&["MSR", "name"], header.as_slice()].concat());
    let mut add = |range: MsrRange, cells: [String; N]| {
        let name = words::name(range.first()).unwrap_or_default().to_owned();
        table.add_row([range.to_string(), name].into_iter().chain(cells));
    };
    let mut last: Option<(MsrRange, [String; N])> = None;
    for (msr, cells) in rows {
        let nameless = |msr| words::name(msr).is_none();
        last = Some(match last {
            Some((range, before))
                if before == cells
                    && range.last().0.checked_add(1) == Some(msr.0)
                    && nameless(range.first())
                    && nameless(msr) =>
            {
                (MsrRange::new(range.first(), msr).unwrap_or(range), before)
            }
            before => {
                if let Some((range, cells)) = before {
                    add(range, cells);
                }
                (MsrRange::single(msr), cells)
            }
        });
    }
    if let Some((range, cells)) = last {
        add(range, cells);
    }
    table.print(out)?;
    writeln!(out)
}

/// What is another host, kernel or policy.
fn facts(out: &mut Stream<impl Write>, before: &Facts, after: &Facts) -> io::Result<()> {
    let policy = |facts: &Facts| {
        let policy = facts.policy.as_ref();
        policy.map(|policy| format!("{} ({})", policy.name, policy.hash.get(..12).unwrap_or(&policy.hash)))
    };
    let apic = |facts: &Facts| Some(if facts.x2apic { "x2APIC" } else { "xAPIC" }.to_owned());
    for (what, before, after) in [
        ("host", before.host.clone(), after.host.clone()),
        ("microcode", before.microcode.clone(), after.microcode.clone()),
        ("kernel", before.kernel.clone(), after.kernel.clone()),
        ("cpuid", before.cpuid.clone(), after.cpuid.clone()),
        ("APIC", apic(before), apic(after)),
        ("policy", policy(before), policy(after)),
    ] {
        let none = || "none".to_owned();
        if before != after {
            let (before, after) = (before.unwrap_or_else(none), after.unwrap_or_else(none));
            writeln!(out, "{what:9}  {before} → {after}")?;
        }
    }
    Ok(())
}

fn compared(out: &mut Stream<impl Write>, differences: &[Difference]) -> io::Result<()> {
    if differences.is_empty() {
        return Ok(());
    }
    let mut rows: Vec<(Msr, [String; 2])> = Vec::new();
    for found in differences {
        if rows.last().is_none_or(|(msr, _)| *msr != found.msr) {
            rows.push((found.msr, Default::default()));
        }
        let Some((_, [read, write])) = rows.last_mut() else {
            continue;
        };
        match found.change {
            Change::Readable { value } => *read = became(None, Some(value)),
            Change::Unreadable { value } => *read = became(Some(value), None),
            Change::Value { before, after } => *read = became(Some(before), Some(after)),
            Change::Writable => *write = "#GP → done".to_owned(),
            Change::Unwritable => *write = "done → #GP".to_owned(),
        }
    }
    table(out, ["read", "write back"], rows.into_iter())
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
