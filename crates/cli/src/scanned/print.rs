//! What a scan found, for people.

use std::io::{self, Write};

use msrgate_core::{Msr, MsrRange};
use msrgate_guest::scan::{Difference, Scan};
use msrgate_msrs::Host;

use super::rows::{CHANGES, REGISTERS, broken, changes, registers};
use super::{Facts, Found};
use crate::render::Table;
use crate::stream::{Stream, Tone};
use crate::words;

pub(crate) fn print(out: &mut Stream<impl Write>, found: &Found, leaks: bool) -> io::Result<()> {
    match &found.against {
        None if leaks => telling(out, &found.scan)?,
        None => table(out, REGISTERS, registers(&found.scan))?,
        Some((before, differences)) => compared(out, (before, &found.facts), differences)?,
    }
    for access in &found.scan.broken {
        writeln!(out, "{}", broken(access))?;
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

/// What differs between two scans, the verdict first.
pub(crate) fn compared(
    out: &mut Stream<impl Write>,
    (before, after): (&Facts, &Facts),
    differences: &[Difference],
) -> io::Result<()> {
    let mut msrs: Vec<Msr> = differences.iter().map(|found| found.msr).collect();
    msrs.dedup();
    match msrs.len() {
        0 => out.say(Tone::Good, "a guest sees what it saw before")?,
        1 => out.say(Tone::Odd, "1 MSR differs")?,
        count => out.say(Tone::Odd, &format!("{count} MSRs differ"))?,
    }
    facts(out, before, after)?;
    writeln!(out)?;
    match differences {
        [] => Ok(()),
        _ => table(out, CHANGES, changes(differences)),
    }
}

/// The registers that a guest read and that tell of the host, by the hardware's value.
fn telling(out: &mut Stream<impl Write>, scan: &Scan) -> io::Result<()> {
    let mut rows = Table::new(&["MSR", "name", "read", "tells of the host", "", "source"]);
    for read in &scan.readable {
        let known = msrgate_msrs::by_msr(read.msr).filter(|entry| entry.host != Host::Nothing);
        if let Some(entry) = known {
            let remark = match read.volatile {
                true => "changes by itself",
                false if read.value == 0 => "says nothing as long as it is 0",
                false => "",
            };
            let tone = match read.volatile && entry.is_secret() {
                true => Tone::Bad,
                false => Tone::Plain,
            };
            rows.add(
                tone,
                [
                    read.msr.to_string(),
                    entry.name().to_owned(),
                    format!("{:#x}", read.value),
                    entry.host.to_string(),
                    remark.to_owned(),
                    entry.source().to_owned(),
                ],
            );
        }
    }
    match rows.is_empty() {
        true => out.say(Tone::Good, "no MSR that a guest reads is known to tell of the host")?,
        false => {
            rows.print(out)?;
            writeln!(
                out,
                "KVM keeps a value of its own of most of these; `msrgate msr --leaks` says of which it may not"
            )?;
        }
    }
    writeln!(out)
}

fn table<const N: usize>(
    out: &mut Stream<impl Write>,
    header: [&'static str; N],
    rows: Vec<(MsrRange, [String; N])>,
) -> io::Result<()> {
    let mut table = Table::new(&[&["MSR", "name"], header.as_slice()].concat());
    for (range, cells) in rows {
        let name = words::name(range.first()).unwrap_or_default().to_owned();
        table.add_row([range.to_string(), name].into_iter().chain(cells));
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
