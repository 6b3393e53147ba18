//! What was measured, for people, for programs and for keeping.

use std::fs;
use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::figure::{Aim, Figure};
use crate::machine::Machine;

#[derive(Serialize)]
pub(crate) struct Report {
    machine: Machine,
    /// Whether it was measured for too short a time to be relied on.
    quick: bool,
    keys: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    key: String,
    /// Why there are no figures.
    skipped: Option<String>,
    figures: Vec<Figure>,
}

impl Report {
    pub(crate) fn new(machine: Machine, quick: bool) -> Report {
        Report {
            machine,
            quick,
            keys: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, key: String, figures: Vec<Figure>) {
        let skipped = None;
        self.keys.push(Entry { key, skipped, figures });
    }

    pub(crate) fn skip(&mut self, key: String, why: String) {
        self.keys.push(Entry {
            key,
            skipped: Some(why),
            figures: Vec::new(),
        });
    }

    pub(crate) fn all_met(&self) -> bool {
        let mut figures = self.keys.iter().flat_map(|entry| &entry.figures);
        figures.all(|figure| figure.met != Some(false))
    }

    pub(crate) fn print(&self) {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_header(["", "ours", "", "baseline", "", "ratio", "aim", ""]);
        for column in [1, 3, 5] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for entry in &self.keys {
            table.add_row([entry.key.clone()]);
            for figure in &entry.figures {
                table.add_row([
                    format!("  {}", figure.what),
                    rounded(figure.ours),
                    figure.unit.to_owned(),
                    figure.baseline.map(rounded).unwrap_or_default(),
                    figure.baseline_is.unwrap_or_default().to_owned(),
                    figure.ratio.map(rounded).unwrap_or_default(),
                    match figure.aim {
                        Some(Aim::Ratio(most)) => format!("ratio ≤ {}", rounded(most)),
                        Some(Aim::Ours(most)) => format!("≤ {} {}", rounded(most), figure.unit),
                        None => String::new(),
                    },
                    match figure.met {
                        Some(true) => "met",
                        Some(false) => "MISSED",
                        None => "",
                    }
                    .to_owned(),
                ]);
            }
            if entry.skipped.is_some() {
                table.add_row(["  skipped"]);
            }
        }
        for line in table.to_string().lines() {
            println!("{}", line.trim_end());
        }
        println!();
        for entry in &self.keys {
            if let Some(why) = &entry.skipped {
                println!("{} is skipped: {why}", entry.key);
            }
        }
        let Machine {
            cpu,
            cpus,
            kernel,
            kvm,
            load,
            ..
        } = &self.machine;
        let kvm = kvm.as_deref().unwrap_or("no KVM");
        println!("{cpus} CPUs, {cpu}; {kernel}, {kvm}; load {load} before");
        if self.quick {
            println!("measured for seconds: no figure to rely on");
        }
    }

    pub(crate) fn print_json(&self) -> Result<(), String> {
        println!("{}", self.json()?);
        Ok(())
    }

    fn json(&self) -> Result<String, String> {
        serde_json::to_string_pretty(self).map_err(|error| error.to_string())
    }

    /// Keeps it in `bench/record/`, by its date and what was measured where that is not everything.
    pub(crate) fn record(&self, only: &[String]) -> Result<(), String> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("record");
        let date = self.machine.date.get(..10).unwrap_or("undated");
        let kvm = self.machine.kvm.as_deref().unwrap_or("no-kvm");
        let name = [&[date.to_owned(), kvm.to_owned()], only].concat().join("-");
        let path = folder.join(format!("{name}.json"));
        fs::create_dir_all(&folder).map_err(|error| format!("cannot make `{}`: {error}", folder.display()))?;
        fs::write(&path, self.json()? + "\n").map_err(|error| format!("cannot write `{}`: {error}", path.display()))?;
        eprintln!("kept in {}", path.display());
        Ok(())
    }
}

/// Three digits that count.
fn rounded(value: f64) -> String {
    let digits = match value.abs() {
        value if value >= 100.0 => 0,
        value if value >= 10.0 => 1,
        value if value >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}
