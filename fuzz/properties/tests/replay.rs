//! The fuzz targets without a fuzzer: each kept input, then others that are made from them.
//!
//! `MSRGATE_FUZZ_INPUTS` says how many are made, `MSRGATE_FUZZ_SEED` which. An input that breaks a property is kept
//! with the others, so that it is tried from then on.

use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use msrgate_fuzz_properties::{FILTER, LOG, MAP, PLAN, POLICY, RAW, Random, TRACE, Target};

fn folder(target: Target) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("the workspace");
    root.join("testdata/fuzz").join(target.name)
}

/// The kept inputs, in the order of their names.
fn kept(target: Target) -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder(target))
        .expect("the folder of kept inputs")
        .map(|entry| entry.expect("an entry of the folder").path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no inputs are kept");
    let bytes = |path: &PathBuf| fs::read(path).expect("a kept input");
    paths.into_iter().map(|path| (path.clone(), bytes(&path))).collect()
}

fn holds_for_kept_inputs(target: Target) {
    for (path, bytes) in kept(target) {
        println!("{}", path.display());
        (target.check)(&bytes);
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect(name))
}

fn holds_for_made_inputs(target: Target, default: u64) {
    let seeds: Vec<Vec<u8>> = kept(target).into_iter().map(|(_, bytes)| bytes).collect();
    let seed = setting("MSRGATE_FUZZ_SEED", 1);
    let mut random = Random::new(seed);
    for number in 0..setting("MSRGATE_FUZZ_INPUTS", default) {
        let input = random.input(&seeds);
        if let Err(panic) = panic::catch_unwind(AssertUnwindSafe(|| (target.check)(&input))) {
            let path = folder(target).join(format!("found-{seed}-{number}"));
            fs::write(&path, &input).expect("the input can be kept");
            println!("kept as {}", path.display());
            panic::resume_unwind(panic);
        }
    }
}

#[test]
fn kept_filters_are_what_the_naive_reading_says() {
    holds_for_kept_inputs(FILTER);
}

#[test]
fn made_filters_are_what_the_naive_reading_says() {
    holds_for_made_inputs(FILTER, 3000);
}

#[test]
fn kept_policies_mean_the_same_in_every_form() {
    holds_for_kept_inputs(POLICY);
}

#[test]
fn made_policies_mean_the_same_in_every_form() {
    holds_for_made_inputs(POLICY, 500);
}

#[test]
fn kept_traces_read_back() {
    holds_for_kept_inputs(TRACE);
}

#[test]
fn made_traces_read_back() {
    holds_for_made_inputs(TRACE, 3000);
}

#[test]
fn kept_logs_say_the_same_with_other_text_around() {
    holds_for_kept_inputs(LOG);
}

#[test]
fn made_logs_say_the_same_with_other_text_around() {
    holds_for_made_inputs(LOG, 3000);
}

#[test]
fn kept_maps_read_back_and_compile_to_themselves() {
    holds_for_kept_inputs(MAP);
}

#[test]
fn made_maps_read_back_and_compile_to_themselves() {
    holds_for_made_inputs(MAP, 3000);
}

#[test]
fn kept_plans_are_written_as_they_were_read_and_do_what_their_maps_say() {
    holds_for_kept_inputs(PLAN);
}

#[test]
fn made_plans_are_written_as_they_were_read_and_do_what_their_maps_say() {
    holds_for_made_inputs(PLAN, 3000);
}

#[test]
fn kept_filters_in_other_forms_are_read_or_refused_as_the_engine_refuses() {
    holds_for_kept_inputs(RAW);
}

#[test]
fn made_filters_in_other_forms_are_read_or_refused_as_the_engine_refuses() {
    holds_for_made_inputs(RAW, 3000);
}
