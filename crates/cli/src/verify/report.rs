//! The report of `verify`, as text and in JSON.

use std::io::{self, Write};

use msrgate_verify::{Kernel, Report};
use serde_json::Value;

use crate::args::{ModeArg, VerifyArgs};
use crate::exit::{Exit, Failure};
use crate::json::{self, Printed, object};
use crate::stream::{self, Stream};
use crate::{render, words};

/// A report, and what it is a report of.
pub(crate) struct VerifyReport<'a> {
    report: &'a Report,
    kernel: &'a Kernel,
    mode: &'static str,
    seed: Option<u64>,
}

/// Prints a report, and says how the command ends.
pub(super) fn print(report: &Report, kernel: &Kernel, args: &VerifyArgs, seed: Option<u64>) -> Result<Exit, Failure> {
    let mode = match args.mode {
        ModeArg::Real => "real",
        ModeArg::Long => "long",
    };
    let told = VerifyReport {
        report,
        kernel,
        mode,
        seed,
    };
    match args.json {
        true => json::print(&told.printed())?,
        false => told.text(&mut stream::page())?,
    }
    Ok(if !report.disagreements.is_empty() {
        Exit::No
    } else if !report.skipped.is_empty() {
        Exit::Machine
    } else {
        Exit::Yes
    })
}

/// How often accesses left the guest, without a filter, under it and when it was gone.
fn interception(report: &Report) -> Vec<impl Printed> {
    let word = |intercepted: bool| if intercepted { "intercepted" } else { "passed" };
    let rows = report.interception.iter().map(|row| {
        let [before, under, after] = row.exits;
        object! {
            /// The MSR.
            msr: row.msr.to_string(),
            /// The MSR's name.
            name: row.name,
            /// The direction.
            op: row.op.name(),
            /// How many exits 200 accesses made without a filter; about none if they pass through.
            before: before,
            /// How many under a filter that denies them.
            under: under,
            /// How many when it was gone.
            after: after,
            /// How many exits user space got under the filter.
            user: row.asked,
            /// What the engine's bitmap says each time: `passed` or `intercepted`.
            bitmap: row.intercepted.map(word).join(", "),
        }
    });
    rows.collect()
}

/// What reads got while two filters took turns.
fn swapped(report: &Report) -> Vec<impl Printed> {
    let word = |denied: bool| if denied { "deny" } else { "allow" };
    let rows = report.swapped.iter().map(|row| {
        object! {
            /// The MSR.
            msr: row.msr.to_string(),
            /// Which of the two filters allow it.
            filters: row.denied_by.map(word).join(", "),
            /// How many reads were denied.
            denied: row.denied,
            /// How many were allowed.
            allowed: row.allowed,
            /// How many were answered as neither filter says.
            neither: row.neither,
        }
    });
    rows.collect()
}

/// The rows as a table for people; `None` if there are no rows.
fn table(titles: &[&'static str], rows: &[impl Printed]) -> Option<render::Table> {
    let mut table = render::Table::new(titles);
    for row in rows {
        let row = json::value(row);
        let cell = |cell: &Value| cell.as_str().map_or(cell.to_string(), str::to_owned);
        table.add_row(row.as_object().into_iter().flat_map(|row| row.values().map(cell)));
    }
    (!rows.is_empty()).then_some(table)
}

impl VerifyReport<'_> {
    pub(crate) fn printed(&self) -> impl Printed {
        let disagreements = self.report.disagreements.iter().map(|one| {
            object! {
                /// At what.
                what: &one.what,
                /// What the kernel did.
                live: &one.live,
                /// What the engine did.
                engine: &one.engine,
                /// Which of the random calls, from 0; null without `--random`.
                candidate: one.candidate,
                /// The smallest case that shows it, in the format of `testdata/cases/`; null if there is none.
                case: &one.case,
            }
        });
        let known = (self.report.bypasses > 0).then(|| {
            object! {
                /// Which: `"bypass"`.
                kind: "bypass",
                /// The MSR.
                msr: "0x6e0",
                /// The direction.
                op: "wrmsr",
                /// How often.
                count: self.report.bypasses,
            }
        });
        object! {
            /// `"kvm"`.
            backend: "kvm",
            /// Release and module.
            kernel: self.kernel.to_string(),
            /// The kernel that the engine took after.
            profile: self.kernel.profile_name(),
            /// `"real"` or `"long"`.
            mode: self.mode,
            /// What the random calls followed from; null without `--random`.
            seed: self.seed,
            /// How many random calls were made up; 0 without `--random`.
            candidates: self.report.candidates,
            /// How many filters were put in force.
            filters: self.report.filters,
            /// How many accesses were compared.
            accesses: self.report.accesses,
            /// How many calls were compared by whether they are accepted, and with which error.
            errnos: self.report.calls,
            /// Known gaps of the kernel that were seen.
            known: known.into_iter().collect::<Vec<_>>(),
            /// What could not be compared, and why; the exit code is then 3.
            skipped: &self.report.skipped,
            /// Where kernel and engine differ.
            disagreements: disagreements.collect::<Vec<_>>(),
            /// With `--interception`: a row for each MSR and direction.
            #[serde(skip_serializing_if = "json::is_null")]
            interception: Some(interception(self.report)).filter(|rows| !rows.is_empty()),
            /// With `--swap`: a row for each MSR.
            #[serde(skip_serializing_if = "json::is_null")]
            swapped: Some(swapped(self.report)).filter(|rows| !rows.is_empty()),
        }
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
        let interception = table(
            &["msr", "name", "op", "before", "under", "after", "user", "bitmap"],
            &interception(self.report),
        );
        let swapped = table(
            &["msr", "filters", "denied", "allowed", "neither"],
            &swapped(self.report),
        );
        for table in [interception, swapped].into_iter().flatten() {
            table.print(out)?;
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
