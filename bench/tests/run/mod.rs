//! The bench as a program, for a few seconds.

use std::process::Command;

use serde_json::Value;

/// Measures `keys` and gives what was measured of each: its figures, or `skipped` and why.
pub(crate) fn quick(keys: &[&str]) -> Vec<Value> {
    let only = keys.iter().flat_map(|key| ["--only", key]);
    let mut bench = Command::new(env!("CARGO_BIN_EXE_msrgate-bench"));
    let ran = bench.args(["--quick", "--json"]).args(only).output().unwrap();
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(0), "{errors}");
    let report: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!(report["quick"], true);
    assert!(report["machine"]["kernel"].is_string());
    let measured = report["keys"].as_array().unwrap().clone();
    let names: Vec<&str> = measured.iter().map(|entry| entry["key"].as_str().unwrap()).collect();
    assert_eq!(names, keys);
    for figure in measured.iter().flat_map(|entry| entry["figures"].as_array().unwrap()) {
        assert!(figure["ours"].as_f64().is_some_and(|cost| cost > 0.0), "{figure}");
        if let Some(ratio) = figure["ratio"].as_f64() {
            let ours = ratio * figure["baseline"].as_f64().unwrap();
            assert!((ours / figure["ours"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{figure}");
        }
        assert_eq!(figure["met"].is_boolean(), !figure["aim"].is_null(), "{figure}");
    }
    measured
}

/// Why a key was not measured; `None` where it was.
pub(crate) fn skipped(entry: &Value) -> Option<&str> {
    let figures = entry["figures"].as_array().unwrap();
    assert_eq!(entry["skipped"].is_null(), !figures.is_empty(), "{entry}");
    entry["skipped"].as_str()
}
