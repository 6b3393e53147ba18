//! What a replay found, for people and programs.

use std::io::{self, Write};

use msrgate_trace::TraceError;

use super::compare::{Comparison, Row};
use super::machine::Backend;
use crate::args::{ListArgs, SortArg};
use crate::json::{self, Printed, object};
use crate::render::{Effect, Table};
use crate::stream::{Stream, Tone};
use crate::{render, words};

pub(crate) fn printed(seen: &Comparison, fallback: Option<&str>, broken: Option<&TraceError>) -> impl Printed {
    let rows = seen.rows().map(|(msr, op, row)| {
        object! {
            /// The MSR.
            msr: msr.to_string(),
            /// The MSR's name; null if it is not known.
            name: words::name(msr),
            /// The direction.
            op: op.name(),
            /// How many.
            count: row.count,
            /// The action's word.
            action: row.action,
            /// What the guest got: up to four different values, `#GP` or `done`, with commas, and `…` if there were more.
            sees: row.sees.text(),
            /// What the guest got without the policy, likewise.
            without: row.without.text(),
            /// What the trace's guest got, likewise.
            recorded: row.recorded.text(),
            /// How many the policy changed.
            changed: row.changed,
            /// How many the policy left alone and this machine answered otherwise than the trace.
            host_differs: row.host_differs,
        }
    });
    object! {
        /// `"kvm"` or `"engine"`.
        backend: seen.backend.name(),
        /// How many were made.
        accesses: seen.accesses(),
        /// How many of them the policy changed: not left to the kernel, and the guest got something else than without the
        /// policy on the same backend.
        changed: seen.changed(),
        /// How many were #GP.
        faults: seen.faults(),
        /// How many are missing from the traces, as far as they tell, and so were not made.
        lost: seen.lost(),
        /// How many of the traces lack [some of what the guest was served with](trace.md#the-header): it was not made.
        partial: seen.partial,
        /// As of `plan --host`; empty on the engine.
        presets: words::presets(seen.presets()),
        /// What was found, by MSR, reads before writes.
        by_msr: rows.collect::<Vec<_>>(),
        /// Only if KVM would have been taken and could not be: why.
        #[serde(skip_serializing_if = "json::is_null")]
        backend_reason: fallback,
        /// Only if a trace could not be read to its end; what came before it is in the other keys.
        #[serde(skip_serializing_if = "json::is_null")]
        error: broken.map(|error| object! {
            /// The line of the trace, from 1; 0 where the whole trace is meant.
            line: error.line,
            /// What is wrong.
            message: error.to_string(),
        }),
    }
}

pub(crate) fn text(out: &mut Stream<impl Write>, seen: &Comparison, list: &ListArgs) -> io::Result<()> {
    match seen.changed() {
        0 => out.say(Tone::Good, "the policy changed nothing for the guest")?,
        n => out.say(
            Tone::Bad,
            &format!(
                "the policy changed {n} of {}",
                words::counted(seen.accesses(), "access", "accesses")
            ),
        )?,
    }
    let backend = match seen.backend {
        Backend::Kvm => "a real guest on this machine's KVM",
        Backend::Engine => "a guest on the engine, whose MSRs answer as the trace says",
    };
    writeln!(
        out,
        "{} by {backend}; {} faulted",
        words::counted(seen.accesses(), "access", "accesses"),
        seen.faults()
    )?;
    // On a terminal what is as it was is shown to whoever asks for rows.
    let terminal = out.width.is_some();
    let asked = !terminal || list.all || list.top.is_some() || list.sort != SortArg::Effect;
    let rows: Vec<_> = seen.rows().collect();
    let (rows, same): (Vec<_>, Vec<_>) = rows
        .into_iter()
        .partition(|(_, _, row)| asked || effect(row) != Effect::None);
    let (rows, rest) = render::list(rows, list, terminal, |(msr, op, row)| {
        (effect(row), row.count, (*msr, *op))
    });
    let mut table = Table::new(&[
        "MSR",
        "name",
        "op",
        "count",
        "policy",
        "guest saw",
        "without it",
        "in the trace",
        "",
    ]);
    for (msr, op, row) in rows {
        table.add(
            effect(row).tone(),
            [
                msr.to_string(),
                words::name(msr).unwrap_or_default().to_owned(),
                op.to_string(),
                row.count.to_string(),
                row.action.to_owned(),
                row.sees.text(),
                row.without.text(),
                row.recorded.text(),
                remark(row),
            ],
        );
    }
    writeln!(out)?;
    if !table.is_empty() {
        table.print(out)?;
    }
    render::rest(out, rest, ["row", "rows"])?;
    render::rest(
        out,
        same.len(),
        ["row, where nothing changed", "rows, where nothing changed"],
    )?;
    writeln!(out)?;
    let host: u64 = seen.rows().map(|(_, _, row)| row.host_differs).sum();
    let presets: Vec<String> = seen.presets().map(|preset| preset.msr.to_string()).collect();
    if !presets.is_empty() {
        let presets = presets.join(", ");
        writeln!(
            out,
            "the kernel held the policy's fixed answers of {presets}: reads of these made no exit"
        )?;
    }
    if host > 0 {
        writeln!(
            out,
            "{host} got another answer from this host than in the trace, which is not the policy's doing"
        )?;
    }
    if seen.lost() > 0 {
        writeln!(
            out,
            "note: {} missing from the traces, and were not made: what the policy gives them is not known here",
            words::counted(seen.lost(), "access is", "accesses are")
        )?;
    }
    if seen.partial > 0 {
        writeln!(
            out,
            "note: {} some of what the guest was served with: it was not made, and what this policy gives it is not known \
             here",
            words::counted(seen.partial, "trace lacks", "traces lack")
        )?;
    }
    Ok(())
}

/// What is otherwise than without the policy, or here than in the trace.
fn effect(row: &Row) -> Effect {
    match (row.changed, row.host_differs) {
        (0, 0) => Effect::None,
        (0, _) => Effect::Other,
        _ => Effect::Broken,
    }
}

fn remark(row: &Row) -> String {
    match (row.changed, row.host_differs) {
        (0, 0) => String::new(),
        (0, _) => "host differs".to_owned(),
        (n, _) if n == row.count => "changed".to_owned(),
        (n, _) => format!("{n} changed"),
    }
}
