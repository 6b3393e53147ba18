//! `cargo xtask fuzz`: libFuzzer over the targets of `fuzz/`.
//!
//! cargo-fuzz is not needed: its flags for the compiler stand here. What a target finds is written to the folder of kept
//! inputs, which the ordinary tests replay.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use crate::binary::Count;
use crate::test::{Ending, watched};
use crate::{process, toolchain};

/// The targets, each a program of `fuzz/` and a folder of `testdata/fuzz/`.
const TARGETS: [&str; 7] = ["filter", "policy", "trace", "log", "map", "plan", "raw"];

/// What the help ends with.
pub(crate) const HELP: &str = "\
Needs a nightly compiler and a C++ compiler. An input that breaks a target is kept in
testdata/fuzz/TARGET, where the ordinary tests try it from then on; commit it with the repair.
What else is new goes to fuzz/corpus/TARGET, from which the next run starts.";

#[derive(Args)]
pub(crate) struct Arguments {
    /// Run only these targets: filter, policy, trace, log, map, plan, raw
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(TARGETS))]
    targets: Vec<String>,
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
}

/// Runs targets for as long as the arguments say, each from the corpus that it has gathered.
pub(crate) fn run(arguments: &Arguments) -> Result<Ending, String> {
    let named = |target: &&str| arguments.targets.is_empty() || arguments.targets.iter().any(|name| name == target);
    let corpora = crate::root().join("fuzz/corpus");
    fuzz(TARGETS.into_iter().filter(named), arguments.seconds, &corpora)
}

/// Runs every target for a few seconds, from the kept inputs alone.
pub(crate) fn short() -> Result<Ending, String> {
    let scratch = toolchain::target("fuzz").join("scratch");
    match fs::remove_dir_all(&scratch) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(format!("cannot empty {}: {error}", scratch.display()));
        }
        _ => {}
    }
    fuzz(TARGETS.into_iter(), 3, &scratch)
}

fn fuzz(targets: impl Iterator<Item = &'static str>, seconds: u32, corpora: &Path) -> Result<Ending, String> {
    if let Err(why) = ready() {
        return Ok(Ending::Skipped(why));
    }
    let (built, _) = watched(&mut build())?;
    if !built {
        return Err("the fuzz targets do not build".into());
    }
    let mut count = Count::default();
    let mut notes = Vec::new();
    for target in targets {
        let (passed, said) = watched(&mut libfuzzer(target, seconds, corpora)?)?;
        let runs = if passed { runs(&said) } else { None };
        count += Count {
            passed: runs.is_some().into(),
            failed: runs.is_none().into(),
            ..Count::default()
        };
        notes.push(format!("{target} {}", runs.unwrap_or("FAILED")));
    }
    let note = format!("libFuzzer, inputs in {seconds} s: {}", notes.join(", "));
    Ok(Ending::Ran { count, note })
}

/// Whether everything is there that is not in this tree, else what is missing.
fn ready() -> Result<(), String> {
    toolchain::nightly()?;
    process::output(process::bound("c++").arg("--version")).map_err(|why| format!("libFuzzer needs C++: {why}"))?;
    let mut fetch = toolchain::nightly_cargo(&["fetch", "--quiet", "--manifest-path", "fuzz/Cargo.toml"]);
    process::output(&mut fetch)
        .map(drop)
        .map_err(|why| format!("libfuzzer-sys is not to be had: {why}"))
}

fn build() -> Command {
    // Counters at each edge and the operands of comparisons, for libFuzzer to steer by; AddressSanitizer beside it.
    const FLAGS: &str = "--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module \
        -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
        -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";
    let mut command = toolchain::nightly_cargo(&["build", "--release", "--manifest-path", "fuzz/Cargo.toml"]);
    // The target is named so that build scripts and macros stay without instrumentation.
    command.args(["--target", toolchain::HOST, "--target-dir"]);
    command.arg(toolchain::target("fuzz")).env("RUSTFLAGS", FLAGS);
    command
}

fn libfuzzer(target: &str, seconds: u32, corpora: &Path) -> Result<Command, String> {
    let program: PathBuf = [
        toolchain::target("fuzz").as_path(),
        toolchain::HOST.as_ref(),
        "release".as_ref(),
    ]
    .iter()
    .collect();
    let corpus = corpora.join(target);
    fs::create_dir_all(&corpus).map_err(|error| format!("cannot make {}: {error}", corpus.display()))?;
    let kept = crate::root().join("testdata/fuzz").join(target);
    let mut command = process::bound(program.join(target));
    command.arg(format!("-artifact_prefix={}/", kept.display()));
    command.arg(format!("-max_total_time={seconds}"));
    command.args(["-timeout=60", "-verbosity=0", "-print_funcs=0", "-print_final_stats=1"]);
    let words = crate::root().join("fuzz").join(format!("{target}.dict"));
    if words.is_file() {
        command.arg(format!("-dict={}", words.display()));
    }
    command.args([corpus, kept]);
    Ok(command)
}

/// How many inputs libFuzzer tried: `stat::number_of_executed_units: 5000`.
fn runs(said: &str) -> Option<&str> {
    let stat = |line| str::strip_prefix(line, "stat::number_of_executed_units:");
    said.lines().rev().find_map(stat).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_target_has_a_program_and_kept_inputs() {
        for target in TARGETS {
            let program = crate::root().join(format!("fuzz/fuzz_targets/{target}.rs"));
            assert!(program.is_file(), "{}", program.display());
            let kept = crate::root().join("testdata/fuzz").join(target);
            assert!(
                fs::read_dir(&kept).is_ok_and(|mut inputs| inputs.next().is_some()),
                "{}",
                kept.display()
            );
        }
    }

    #[test]
    fn the_number_of_inputs_is_read_from_the_last_words() {
        let said = "stat::number_of_executed_units: 5210\nstat::average_exec_per_sec:     868\n";
        assert_eq!(runs(said), Some("5210"));
        assert_eq!(runs("SUMMARY: libFuzzer: deadly signal\n"), None);
    }
}
