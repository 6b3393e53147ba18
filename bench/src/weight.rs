//! `weight`: how much an empty VMM grows by with each part of the library.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::figure::{Aim, Figure};
use crate::{Measured, Missing};

/// What is added, by its feature of `bench/weight`, and how many bytes it may take.
const PARTS: [(&str, &str, f64); 3] = [
    ("plan", "a plan that was compiled before", 150_000.0),
    ("planner", "the planner", 450_000.0),
    ("language", "the policy language", 1_000_000.0),
];

pub(crate) fn measure() -> Measured {
    let alone = size("")?;
    let figures = PARTS.map(|(feature, what, most)| {
        let figure = Figure::new(
            format!("an empty VMM grows by, with {what}"),
            "B",
            size(feature)? - alone,
        );
        Ok(figure.beside("the VMM on kvm-ioctls alone", alone).aim(Aim::Ours(most)))
    });
    figures.into_iter().collect()
}

/// The bytes of the VMM with a feature.
fn size(feature: &str) -> Result<f64, Missing> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--manifest-path", "bench/weight/Cargo.toml"]);
    cargo.args(["--message-format=json-render-diagnostics", "--features", feature]);
    let done = cargo.stderr(Stdio::inherit()).output();
    let done = done.map_err(|error| format!("cannot run cargo: {error}"))?;
    let messages = String::from_utf8_lossy(&done.stdout);
    let mut messages = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = messages.find_map(|message| message["executable"].as_str().map(str::to_owned));
    let program = program.ok_or_else(|| format!("bench/weight does not build with the feature `{feature}`"))?;
    let size = fs::metadata(&program)
        .map_err(|error| format!("{program}: {error}"))?
        .len();
    Ok(size as f64)
}
