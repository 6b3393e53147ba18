//! The crates as their packages have them: unpacked where nothing else of the repository is, and their tests built and run there.

use std::fs;

use serde_json::Value;

use crate::binary::{self, Count, Kind, POLICY_UNOPTIMISED};
use crate::process;
use crate::test::{self, Ending, cargo, watched};
use crate::toolchain;

/// What its tests print is read by the suite, which is not published.
const READ_BY_THE_SUITE: &str = "msrgate-verify";

/// Packs each published crate, builds the tests of the packages and runs those for any machine.
///
/// # Errors
/// What could not be packed or written.
pub(crate) fn check() -> Result<Ending, String> {
    let root = crate::root();
    let names = published()?;
    let mut pack = cargo(&["package", "--no-verify", "--allow-dirty"]);
    let (packed, _) = watched(pack.args(names.iter().map(|name| format!("--package={name}"))))?;
    if !packed {
        return Ok(test::one(false, "cargo package".to_owned()));
    }
    let place = toolchain::target("packages");
    let failed = |error: std::io::Error| format!("{}: {error}", place.display());
    let _ = fs::remove_dir_all(&place);
    fs::create_dir_all(&place).map_err(failed)?;
    let mut patches = String::new();
    for name in &names {
        let package = format!("{name}-{}", env!("CARGO_PKG_VERSION"));
        let file = toolchain::target("package").join(format!("{package}.crate"));
        process::output(process::bound("tar").arg("-xzf").arg(file).arg("-C").arg(&place))?;
        patches.push_str(&format!("{name} = {{ path = \"{package}\" }}\n"));
    }
    // The packages name each other by version, and no registry has that.
    let manifest = fs::read_to_string(root.join("Cargo.toml")).map_err(failed)?;
    let profiles = manifest
        .find("[profile")
        .and_then(|at| manifest.get(at..))
        .unwrap_or_default();
    let workspace =
        format!("[workspace]\nresolver = \"3\"\nmembers = [\"*\"]\n\n[patch.crates-io]\n{patches}\n{profiles}");
    fs::write(place.join("Cargo.toml"), workspace).map_err(failed)?;
    fs::copy(root.join("Cargo.lock"), place.join("Cargo.lock")).map_err(failed)?;
    let manifest = place.join("Cargo.toml").display().to_string();
    // Crates of others that are built already need not be built again.
    let target = toolchain::target("").display().to_string();
    let scope = [
        "--workspace",
        "--exclude",
        READ_BY_THE_SUITE,
        "--lib",
        "--bins",
        "--tests",
    ];
    let place = ["--manifest-path", &manifest, "--target-dir", &target];
    let tests = binary::built(&[&["test", "--no-run"], &scope[..], &POLICY_UNOPTIMISED, &place].concat())?;
    let mut count = Count::default();
    // Those of the lanes only have to build: they run there, one at a time. Those that compute for seconds read no file of the package.
    for binary in tests.iter().filter(|binary| binary.kind == Kind::Test) {
        count += test::on_this_machine(binary, &["--skip", "effort::", "--skip", "properties::"], &[])?;
    }
    Ok(Ending::Ran {
        count,
        note: format!("the tests in {} packages", names.len() - 1),
    })
}

/// The names of the crates that are published.
fn published() -> Result<Vec<String>, String> {
    let text = process::output(&mut cargo(&["metadata", "--format-version=1", "--no-deps"]))?;
    let metadata: Value = serde_json::from_str(&text).map_err(|error| format!("cargo metadata: {error}"))?;
    let packages = metadata["packages"].as_array().cloned().unwrap_or_default();
    let published = packages.iter().filter(|package| package["publish"].is_null());
    Ok(published
        .filter_map(|package| package["name"].as_str().map(str::to_owned))
        .collect())
}
