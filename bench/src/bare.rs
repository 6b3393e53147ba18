//! `bare`: a Linux boot on the hypervisor of `examples/bare`, beside one on the same emulated machine without it.
//!
//! Both are the emulator's processor time from its start to the guest's power-off, so the loading of files counts too. What the
//! engine takes of it for a decided access is among the figures of `instructions`.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::figure::Figure;
use crate::rounds::{Costs, rounds};
use crate::{Effort, Measured};

pub(crate) fn measure(effort: Effort) -> Measured {
    let boots = effort.of(10, 1);
    let mut counts = Vec::new();
    let on_it = |counts: &mut Vec<String>| {
        let (seconds, lines) = boot(&[])?;
        *counts = lines;
        Ok(seconds)
    };
    let without = |_: &mut Vec<String>| Ok(boot(&["--without"])?.0);
    let [ours, theirs]: [Costs; 2] = rounds(boots, &mut counts, [&on_it, &without])?;
    let mut figures = vec![
        Figure::new(
            format!("a Linux boot, the median of {boots}"),
            "s of a processor",
            ours.median(),
        )
        .beside("without", theirs.median()),
        Figure::new("the fastest of them", "s of a processor", ours.least()).beside("without", theirs.least()),
    ];
    // `cpu 0 exits 1085 cpuid 912 …`
    let line = counts.iter().find_map(|line| line.strip_prefix("cpu 0 exits "));
    let numbers: Vec<&str> = line
        .ok_or("the hypervisor counts no exits".to_owned())?
        .split(' ')
        .collect();
    let number = |at: usize| {
        numbers
            .get(at)
            .and_then(|word| word.parse::<f64>().ok())
            .unwrap_or_default()
    };
    let msrs = counts.iter().filter_map(|line| line.strip_prefix("cpu 0 msr "));
    let accesses = |line: &str| {
        line.split(' ')
            .skip(2)
            .step_by(2)
            .filter_map(|word| word.parse::<f64>().ok())
            .sum::<f64>()
    };
    for (what, count) in [
        ("exits of the last boot", number(0)),
        ("of them for CPUID", number(2)),
        ("of them for an MSR", msrs.map(accesses).sum()),
        ("MSR accesses that the policy answers or denies", number(6)),
    ] {
        figures.push(Figure::new(what, "exits", count));
    }
    Ok(figures)
}

/// The emulator's seconds, and what the hypervisor counted.
fn boot(arguments: &[&str]) -> Result<(f64, Vec<String>), String> {
    let mut command = Command::new("cargo");
    command
        .args(["xtask", "bare", "--json", "--command", "true"])
        .args(arguments);
    let done = command
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    let said: Value = serde_json::from_slice(&done.stdout).map_err(|error| format!("cargo xtask bare: {error}"))?;
    let seconds = said["processor_seconds"].as_f64().ok_or("it tells no time")?;
    let lines = said["hypervisor"].as_array().into_iter().flatten();
    Ok((
        seconds,
        lines.filter_map(|line| Some(line.as_str()?.to_owned())).collect(),
    ))
}
