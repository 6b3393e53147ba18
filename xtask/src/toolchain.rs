//! Builds that need other flags or another compiler than the workspace's own, each in a folder of its own so that it
//! does not undo theirs.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use crate::process;

/// What the checkers and the fuzzer are built for.
pub(crate) const HOST: &str = "x86_64-unknown-linux-gnu";

/// Where such a build lies.
pub(crate) fn target(name: &str) -> PathBuf {
    let shared = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    crate::root().join(shared).join(name)
}

/// Whether there is a nightly compiler; it is not fetched.
///
/// # Errors
/// Why there is none.
pub(crate) fn nightly() -> Result<(), String> {
    let list = process::output(process::bound("rustup").args(["toolchain", "list"]))?;
    if list.lines().any(|line| line.starts_with("nightly")) {
        return Ok(());
    }
    Err("there is no nightly compiler: rustup toolchain install nightly --profile minimal".into())
}

/// The nightly compiler's cargo, in the workspace's root.
pub(crate) fn nightly_cargo(arguments: &[&str]) -> Command {
    let mut command = process::bound("rustup");
    command
        .args(["run", "nightly", "cargo"])
        .args(arguments)
        .current_dir(crate::root());
    command
}
