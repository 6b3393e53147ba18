//! `msrgate diff`: which accesses two policies, plans or raw filters treat differently, and what differs between two scans.

mod html;
mod rows;

use std::io::Write;
use std::path::{Path, PathBuf};

use msrgate_guest::scan::Difference;
use msrgate_plan::{By, Differences};

use crate::args::{DiffArgs, SortArg};
use crate::exit::{Exit, Failure};
use crate::input::Peeked;
use crate::json::{self, Printed, object};
use crate::render::{Effect, Table};
use crate::scanned::Facts;
use crate::stream::{Stream, Tone};
use crate::{cpuid, input, load, page, render, scanned, stream, words};
use rows::{fallbacks, rows};

pub(crate) fn run(args: &DiffArgs) -> Result<Exit, Failure> {
    let cpuid = cpuid::given(&args.cpuid)?;
    // A policy that comes with msrgate is no file.
    let scan = |path: &Path| match msrgate_policy::built_in(path) {
        Some(_) => Ok(None),
        None => input::peek(path).map(Some),
    };
    let (a, b) = match (scan(&args.a)?, scan(&args.b)?) {
        (Some(a), Some(b)) if scanned::is_scan(&a.head) && scanned::is_scan(&b.head) => return scans(args, a, b),
        (a, b) => (whole(&args.a, a)?, whole(&args.b, b)?),
    };
    let a = load::policy_or_filter(&args.a, a, cpuid.as_ref())?;
    let b = load::policy_or_filter(&args.b, b, cpuid.as_ref())?;
    let by = match (a.by, b.by) {
        (By::Actions, By::Actions) => By::Actions,
        _ => By::Verdicts,
    };
    let found = match by {
        By::Actions => a.map.differences(&b.map, by),
        // A filter leaves to the kernel what the kernel holds.
        By::Verdicts => {
            let [a, b] = [a, b].map(|said| said.map.with_presets(&said.presets));
            a.differences(&b, by)
        }
    };
    match &args.html.html {
        Some(html) => {
            let inputs = [&args.a, &args.b].into_iter().chain(&args.cpuid.cpuid);
            page::write(html, inputs.map(PathBuf::as_path), html::page(&found, by, args))?;
        }
        None if args.json => json::print(&printed(&found, by))?,
        None => print(&mut stream::page(), &found, by, args)?,
    }
    Ok(match found.is_empty() {
        true => Exit::Yes,
        false => Exit::No,
    })
}

/// All of an input of which the beginning was read.
fn whole(path: &Path, peeked: Option<Peeked>) -> Result<Vec<u8>, Failure> {
    let Some(peeked) = peeked else {
        return input::bytes(path);
    };
    let shown = input::shown(path);
    if scanned::is_scan(&peeked.head) {
        return Err(Failure::input(format!("{shown} is a scan, and the other input is not")));
    }
    input::whole(peeked.all()).map_err(|error| Failure::input(format!("cannot read `{shown}`: {error}")))
}

/// What differs between two scans.
fn scans(args: &DiffArgs, a: Peeked, b: Peeked) -> Result<Exit, Failure> {
    let (a_facts, a) = scanned::parsed(&args.a, a)?;
    let (b_facts, b) = scanned::parsed(&args.b, b)?;
    let found = b.since(&a);
    match &args.html.html {
        Some(html) => {
            let inputs = [&args.a, &args.b].map(PathBuf::as_path);
            page::write(html, inputs, scanned::compared_page((&a_facts, &b_facts), &found))?;
        }
        None if args.json => json::print(&scans_printed(&a_facts, &b_facts, &found))?,
        None => scanned::compared(&mut stream::page(), (&a_facts, &b_facts), &found)?,
    }
    Ok(match found.is_empty() {
        true => Exit::Yes,
        false => Exit::No,
    })
}

pub(crate) fn scans_printed(a: &Facts, b: &Facts, found: &[Difference]) -> impl Printed {
    object! {
        /// Whether they are alike.
        equal: found.is_empty(),
        /// `"scans"`.
        by: "scans",
        /// Where and under what A was made.
        a: a,
        /// Where and under what B was made.
        b: b,
        /// What differs, by MSR.
        differences: found.iter().map(scanned::difference).collect::<Vec<_>>(),
    }
}

pub(crate) fn printed(found: &Differences, by: By) -> impl Printed {
    let differences = rows(found).into_iter().map(|row| {
        object! {
            /// The first MSR.
            first: row.range.first().to_string(),
            /// The last MSR.
            last: row.range.last().to_string(),
            /// The direction.
            op: row.op.name(),
            /// What A gives, in words: the action's word and what it is given.
            a: row.a,
            /// What B gives.
            b: row.b,
            /// By which bits two fixed values of one register differ; null elsewhere.
            bits: row.bits.map(|(a, b)| words::changed_printed(row.range.first(), a, b)),
            /// The names of the known MSRs there.
            names: msrgate_msrs::within(row.range).iter().map(|entry| entry.name()).collect::<Vec<_>>(),
        }
    });
    let fallbacks = fallbacks(found).into_iter().map(|(when, op, a, b)| {
        object! {
            /// `"unknown"` or `"invalid"`.
            when: when,
            /// The direction.
            op: op.name(),
            /// What A gives.
            a: a,
            /// What B gives.
            b: b,
        }
    });
    object! {
        /// Whether A and B treat every access alike.
        equal: found.is_empty(),
        /// `"actions"`: what an access gets was compared. `"verdicts"`: whether it is left to the kernel, since A or B is a
        /// raw filter.
        by: match by {
            By::Actions => "actions",
            By::Verdicts => "verdicts",
        },
        /// By MSR, reads before writes; each as long as A and B differ in the same way.
        differences: differences.collect::<Vec<_>>(),
        /// Differences in `unknown` and `invalid`; empty with `"verdicts"`.
        fallbacks: fallbacks.collect::<Vec<_>>(),
    }
}

fn print(out: &mut Stream<impl Write>, found: &Differences, by: By, args: &DiffArgs) -> Result<(), Failure> {
    let what = match by {
        By::Actions => "what accesses get",
        By::Verdicts => "which accesses are left to the kernel, since a raw filter says no more",
    };
    if found.is_empty() {
        return Ok(out.say(Tone::Good, &format!("equal, by {what}"))?);
    }
    let rows = rows(found);
    let accesses: u64 = rows.iter().map(|row| row.range.len()).sum();
    let ranges = words::counted(rows.len() as u64, "range", "ranges");
    out.say(Tone::Odd, &format!("{ranges}, {accesses} of 2^33 accesses differ"))?;
    writeln!(
        out,
        "A is {}, B is {}; compared by {what}\n",
        input::shown(&args.a),
        input::shown(&args.b)
    )?;
    // All of them differ, so by effect they are in the order of their MSRs.
    let (rows, rest) = render::list(rows, &args.list, out.width.is_some(), |row| {
        let count = if args.list.sort == SortArg::Count {
            row.range.len()
        } else {
            0
        };
        (Effect::Other, count, (row.range.first(), row.op))
    });
    if !rows.is_empty() {
        let mut table = Table::new(&["first", "last", "op", "A", "B", "names"]);
        for row in &rows {
            table.add_row([
                row.range.first().to_string(),
                row.range.last().to_string(),
                row.op.to_string(),
                row.a.clone(),
                row.b(),
                words::names(row.range),
            ]);
        }
        table.print(out)?;
        render::rest(out, rest, ["range", "ranges"])?;
    }
    for (when, op, a, b) in fallbacks(found) {
        writeln!(out, "{op} {when} to the kernel: A {a}, B {b}")?;
    }
    Ok(())
}
