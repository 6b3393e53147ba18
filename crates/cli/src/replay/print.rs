//! What a replay found, for people and programs.

use std::io::{self, Write};

use msrgate_trace::TraceError;
use serde_json::{Value, json};

use super::compare::{Comparison, Row};
use super::machine::Backend;
use crate::args::{ListArgs, SortArg};
use crate::render::{Effect, Table};
use crate::stream::{Stream, Tone};
use crate::{render, words};

pub(crate) fn json(seen: &Comparison, fallback: Option<&str>, broken: Option<&TraceError>) -> Value {
    let rows = seen.rows().map(|(msr, op, row)| {
        json!({
            "msr": msr.to_string(),
            "name": words::name(msr),
            "op": op.name(),
            "count": row.count,
            "action": row.action,
            "sees": row.sees.text(),
            "without": row.without.text(),
            "recorded": row.recorded.text(),
            "changed": row.changed,
            "host_differs": row.host_differs,
        })
    });
    let mut object = json!({
        "backend": seen.backend.name(),
        "accesses": seen.accesses(),
        "changed": seen.changed(),
        "faults": seen.faults(),
        "lost": seen.lost(),
        "partial": seen.partial,
        "presets": words::presets(seen.presets()),
        "by_msr": rows.collect::<Vec<_>>(),
    });
    if let Some(why) = fallback {
        object["backend_reason"] = why.into();
    }
    if let Some(error) = broken {
        object["error"] = json!({ "line": error.line, "message": error.to_string() });
    }
    object
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
