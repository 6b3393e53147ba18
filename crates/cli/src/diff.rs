//! `msrgate diff`: which accesses two policies, plans or raw filters treat differently.

use std::fmt::Display;
use std::io::Write;

use msrgate_core::{MsrRange, Op};
use msrgate_plan::{By, Differences};
use serde_json::{Value, json};

use crate::args::{DiffArgs, SortArg};
use crate::exit::{Exit, Failure};
use crate::render::{Effect, Table};
use crate::stream::{Stream, Tone};
use crate::{cpuid, input, load, render, stream, words};

pub(crate) fn run(args: &DiffArgs) -> Result<Exit, Failure> {
    let cpuid = cpuid::given(&args.cpuid)?;
    let (a, b) = (input::bytes(&args.a)?, input::bytes(&args.b)?);
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
    match args.json {
        true => writeln!(stream::out(), "{:#}", json(&found, by))?,
        false => print(&mut stream::page(), &found, by, args)?,
    }
    Ok(match found.is_empty() {
        true => Exit::Yes,
        false => Exit::No,
    })
}

/// A range in a direction and what each gives, in words.
struct Row {
    range: MsrRange,
    op: Op,
    a: String,
    b: String,
}

/// The differences by MSR, reads before writes.
fn rows(found: &Differences) -> Vec<Row> {
    fn each<'a, A: Display>(op: Op, ranges: &'a [(MsrRange, A, A)]) -> impl Iterator<Item = Row> + 'a {
        ranges.iter().map(move |(range, a, b)| Row {
            range: *range,
            op,
            a: a.to_string(),
            b: b.to_string(),
        })
    }
    let mut rows: Vec<Row> = each(Op::Read, &found.reads)
        .chain(each(Op::Write, &found.writes))
        .collect();
    rows.sort_by_key(|row| (row.range.first(), row.op));
    rows
}

/// The differences in what accesses get that the kernel declines: when, direction, and what each gives.
fn fallbacks(found: &Differences) -> Vec<(&'static str, Op, String, String)> {
    let mut rows = Vec::new();
    for (when, fallback) in [("unknown", &found.unknown), ("invalid", &found.invalid)] {
        if let Some((a, b)) = &fallback.read {
            rows.push((when, Op::Read, a.to_string(), b.to_string()));
        }
        if let Some((a, b)) = &fallback.write {
            rows.push((when, Op::Write, a.to_string(), b.to_string()));
        }
    }
    rows
}

fn json(found: &Differences, by: By) -> Value {
    let differences = rows(found).into_iter().map(|row| {
        json!({
            "first": row.range.first().to_string(),
            "last": row.range.last().to_string(),
            "op": row.op.name(),
            "a": row.a,
            "b": row.b,
            "names": msrgate_msrs::within(row.range).iter().map(|entry| entry.name()).collect::<Vec<_>>(),
        })
    });
    let fallbacks = fallbacks(found)
        .into_iter()
        .map(|(when, op, a, b)| json!({ "when": when, "op": op.name(), "a": a, "b": b }));
    json!({
        "equal": found.is_empty(),
        "by": match by {
            By::Actions => "actions",
            By::Verdicts => "verdicts",
        },
        "differences": differences.collect::<Vec<_>>(),
        "fallbacks": fallbacks.collect::<Vec<_>>(),
    })
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
                row.b.clone(),
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
