//! What was run, and what was found.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::host::Host;
use crate::args::ModeArg;
use crate::exit::{Exit, Failure};
use crate::render;
use crate::stream;

/// A difference between the live kernel and the engine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Disagreement {
    /// At what.
    pub(super) what: String,
    pub(super) live: String,
    pub(super) engine: String,
    /// Which of the random calls, from 0.
    pub(super) candidate: Option<u64>,
    /// The smallest case that shows it, in the format of the case files.
    pub(super) case: Option<String>,
}

/// Rows that one kind of run adds.
#[derive(Debug)]
pub(super) struct Table {
    /// The key in JSON.
    pub(super) name: &'static str,
    pub(super) columns: &'static [&'static str],
    pub(super) rows: Vec<Vec<Value>>,
}

/// What was run, and what was found.
#[derive(Debug)]
pub(super) struct Report {
    /// Release and module.
    kernel: String,
    profile: &'static str,
    mode: &'static str,
    pub(super) seed: Option<u64>,
    /// Random calls that were made.
    pub(super) candidates: u64,
    /// Filters that were installed.
    pub(super) filters: u64,
    pub(super) accesses: u64,
    /// Calls whose acceptance was compared.
    pub(super) errnos: u64,
    /// Writes of TSC_DEADLINE that passed the filter by.
    pub(super) bypasses: u64,
    /// What could not be looked at, and why.
    pub(super) skipped: Vec<String>,
    pub(super) table: Option<Table>,
    pub(super) disagreements: Vec<Disagreement>,
}

impl Report {
    pub(super) fn new(host: &Host, mode: ModeArg) -> Report {
        Report {
            kernel: format!("{} {}", host.release, host.module),
            profile: host.profile_name,
            mode: match mode {
                ModeArg::Real => "real",
                ModeArg::Long => "long",
            },
            seed: None,
            candidates: 0,
            filters: 0,
            accesses: 0,
            errnos: 0,
            bypasses: 0,
            skipped: Vec::new(),
            table: None,
            disagreements: Vec::new(),
        }
    }

    pub(super) fn print(&self, as_json: bool) -> Result<Exit, Failure> {
        let mut out = stream::out();
        if as_json {
            writeln!(out, "{:#}", self.json())?;
        } else {
            self.text(&mut out)?;
        }
        Ok(if self.disagreements.is_empty() {
            Exit::Yes
        } else {
            Exit::No
        })
    }

    fn json(&self) -> Value {
        let disagreements = self.disagreements.iter().map(|one| {
            json!({
                "what": one.what,
                "live": one.live,
                "engine": one.engine,
                "candidate": one.candidate,
                "case": one.case,
            })
        });
        let known = (self.bypasses > 0)
            .then(|| json!({ "kind": "bypass", "msr": "0x6e0", "op": "wrmsr", "count": self.bypasses }));
        let mut object = json!({
            "backend": "kvm",
            "kernel": self.kernel,
            "profile": self.profile,
            "mode": self.mode,
            "seed": self.seed,
            "candidates": self.candidates,
            "filters": self.filters,
            "accesses": self.accesses,
            "errnos": self.errnos,
            "known": known.into_iter().collect::<Vec<_>>(),
            "skipped": self.skipped,
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

    fn text(&self, out: &mut impl Write) -> io::Result<()> {
        for one in &self.disagreements {
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
        for line in &self.skipped {
            writeln!(out, "skipped: {line}")?;
        }
        if let Some(table) = &self.table {
            let mut text = render::table(table.columns);
            for row in &table.rows {
                text.add_row(
                    row.iter()
                        .map(|cell| cell.as_str().map_or(cell.to_string(), str::to_owned)),
                );
            }
            writeln!(out, "{}", render::text(&text))?;
        }
        if self.bypasses > 0 {
            writeln!(
                out,
                "known: writes of 0x6e0 (IA32_TSC_DEADLINE) pass the filter by, {} here: this kernel completes them ahead \
                 of it",
                self.bypasses
            )?;
        }
        if let Some(seed) = self.seed {
            writeln!(out, "seed {seed}, {} random calls", self.candidates)?;
        }
        writeln!(
            out,
            "Linux {}, profile {}, {} mode: {} filters installed, {} calls and {} accesses compared, {}",
            self.kernel,
            self.profile,
            self.mode,
            self.filters,
            self.errnos,
            self.accesses,
            match self.disagreements.len() {
                0 => "no disagreement".to_owned(),
                1 => "1 disagreement".to_owned(),
                n => format!("{n} disagreements"),
            }
        )
    }
}
