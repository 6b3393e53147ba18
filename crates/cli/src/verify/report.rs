//! The report of `verify`, as text and in JSON.

use std::io::{self, Write};

use msrgate_verify::{Kernel, Report};
use serde_json::{Value, json};

use crate::args::{ModeArg, VerifyArgs};
use crate::exit::{Exit, Failure};
use crate::stream::{self, Stream};
use crate::{render, words};

/// A report, and what it is a report of.
struct Printed<'a> {
    report: &'a Report,
    kernel: &'a Kernel,
    mode: &'static str,
    seed: Option<u64>,
    table: Option<Table>,
}

/// Rows that one kind of run adds.
struct Table {
    /// The key in JSON.
    name: &'static str,
    columns: &'static [&'static str],
    rows: Vec<Vec<Value>>,
}

/// Prints a report, and says how the command ends.
pub(super) fn print(report: &Report, kernel: &Kernel, args: &VerifyArgs, seed: Option<u64>) -> Result<Exit, Failure> {
    let mode = match args.mode {
        ModeArg::Real => "real",
        ModeArg::Long => "long",
    };
    let printed = Printed {
        report,
        kernel,
        mode,
        seed,
        table: table(report),
    };
    match args.json {
        true => writeln!(stream::out(), "{:#}", printed.json())?,
        false => printed.text(&mut stream::page())?,
    }
    Ok(if !report.disagreements.is_empty() {
        Exit::No
    } else if !report.skipped.is_empty() {
        Exit::Machine
    } else {
        Exit::Yes
    })
}

fn table(report: &Report) -> Option<Table> {
    if !report.interception.is_empty() {
        let word = |intercepted: bool| if intercepted { "intercepted" } else { "passed" };
        let rows = report.interception.iter().map(|row| {
            let [before, under, after] = row.exits;
            vec![
                row.msr.to_string().into(),
                row.name.into(),
                row.op.name().into(),
                before.into(),
                under.into(),
                after.into(),
                row.asked.into(),
                row.intercepted.map(word).join(", ").into(),
            ]
        });
        return Some(Table {
            name: "interception",
            columns: &["msr", "name", "op", "before", "under", "after", "user", "bitmap"],
            rows: rows.collect(),
        });
    }
    let word = |denied: bool| if denied { "deny" } else { "allow" };
    let rows = report.swapped.iter().map(|row| {
        vec![
            row.msr.to_string().into(),
            row.denied_by.map(word).join(", ").into(),
            row.denied.into(),
            row.allowed.into(),
            row.neither.into(),
        ]
    });
    (!report.swapped.is_empty()).then(|| Table {
        name: "swapped",
        columns: &["msr", "filters", "denied", "allowed", "neither"],
        rows: rows.collect(),
    })
}

impl Printed<'_> {
    fn json(&self) -> Value {
        let disagreements = self.report.disagreements.iter().map(|one| {
            json!({
                "what": one.what,
                "live": one.live,
                "engine": one.engine,
                "candidate": one.candidate,
                "case": one.case,
            })
        });
        let known = (self.report.bypasses > 0)
            .then(|| json!({ "kind": "bypass", "msr": "0x6e0", "op": "wrmsr", "count": self.report.bypasses }));
        let mut object = json!({
            "backend": "kvm",
            "kernel": self.kernel.to_string(),
            "profile": self.kernel.profile_name(),
            "mode": self.mode,
            "seed": self.seed,
            "candidates": self.report.candidates,
            "filters": self.report.filters,
            "accesses": self.report.accesses,
            "errnos": self.report.calls,
            "known": known.into_iter().collect::<Vec<_>>(),
            "skipped": self.report.skipped,
            "disagreements": disagreements.collect::<Vec<_>>(),
        });
        if let Some(table) = &self.table {
            let row = |row: &Vec<Value>| {
                table
                    .columns
                    .iter()
                    .map(|name| (*name).to_owned())
                    .zip(row.clone())
                    .collect()
            };
            object[table.name] = table.rows.iter().map(row).map(Value::Object).collect();
        }
        object
    }

    fn text(&self, out: &mut Stream<impl Write>) -> io::Result<()> {
        for one in &self.report.disagreements {
            let at = one
                .candidate
                .map(|candidate| format!(", candidate {candidate}"))
                .unwrap_or_default();
            writeln!(out, "disagreement at {}{at}", one.what)?;
            writeln!(out, "  kernel   {}", one.live)?;
            writeln!(out, "  engine   {}", one.engine)?;
            if let Some(case) = &one.case {
                writeln!(out, "{case}")?;
            }
        }
        for line in &self.report.skipped {
            writeln!(out, "skipped: {line}")?;
        }
        if let Some(table) = &self.table {
            let mut text = render::Table::new(table.columns);
            for row in &table.rows {
                text.add_row(
                    row.iter()
                        .map(|cell| cell.as_str().map_or(cell.to_string(), str::to_owned)),
                );
            }
            text.print(out)?;
            writeln!(out)?;
        }
        if self.report.bypasses > 0 {
            writeln!(
                out,
                "known: writes of 0x6e0 (IA32_TSC_DEADLINE) pass the filter by, {} here: this kernel completes them ahead \
                 of it",
                self.report.bypasses
            )?;
        }
        if let Some(seed) = self.seed {
            writeln!(
                out,
                "seed {seed}, {}",
                words::counted(self.report.candidates, "random call", "random calls")
            )?;
        }
        writeln!(
            out,
            "Linux {}, profile {}, {} mode: {} installed, {} and {} compared, {}",
            self.kernel,
            self.kernel.profile_name(),
            self.mode,
            words::counted(self.report.filters, "filter", "filters"),
            words::counted(self.report.calls, "call", "calls"),
            words::counted(self.report.accesses, "access", "accesses"),
            match self.report.disagreements.len() {
                0 if self.report.calls + self.report.accesses == 0 => "nothing compared".to_owned(),
                0 => "no disagreement".to_owned(),
                n => words::counted(n as u64, "disagreement", "disagreements"),
            }
        )
    }
}
