//! Bochs, built from Debian's source: Debian's own program is a debugger, which takes several times as long for the same.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;

use crate::package::{self, Need};
use crate::process;

/// The release of Debian whose source it is, on every machine, so that every machine has the same emulator.
const RELEASE: &str = "trixie";

const BUILDS: &[Need] = &[
    ("apt-get", "apt"),
    package::KEYS,
    ("g++", "g++"),
    ("make", "make"),
    ("xz", "xz-utils"),
];

/// Debian's program.
const DEBUGGER: &[Need] = &[("bochs-bin", "bochs")];

/// What the lane's machine has, and nothing else. Bochs 3.0 does not compile with AVX and without EVEX.
const OPTIONS: [&str; 12] = [
    "--enable-cpu-level=6",
    "--enable-x86-64",
    "--enable-vmx=2",
    "--enable-smp",
    "--enable-avx",
    "--enable-evex",
    "--enable-memtype",
    "--enable-all-optimizations",
    "--disable-plugins",
    "--disable-docbook",
    "--without-x",
    "--with-nogui",
];

/// `$BOCHS`, or else one that is built on first use, or else Debian's.
///
/// # Errors
/// That there is none.
pub(crate) fn program() -> Result<OsString, String> {
    static PROGRAM: OnceLock<Result<OsString, String>> = OnceLock::new();
    let find = || {
        if let Some(given) = env::var_os("BOCHS") {
            return Ok(given);
        }
        built(&crate::lanes()).map(OsString::from).or_else(|why| {
            package::require(DEBUGGER)?;
            eprintln!("xtask: with Debian's bochs-bin, several times slower than one that is built: {why}");
            Ok("bochs-bin".into())
        })
    };
    PROGRAM.get_or_init(find).clone()
}

fn built(cache: &Path) -> Result<PathBuf, String> {
    let failed = |error| format!("cannot write {}: {error}", cache.display());
    fs::create_dir_all(cache).map_err(failed)?;
    let lock = File::create(cache.join("bochs.lock")).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let program = cache.join("bochs");
    if program.is_file() {
        return Ok(program);
    }
    package::require(BUILDS)?;
    let fresh = cache.join("bochs.new");
    let _ = fs::remove_dir_all(&fresh);
    package::source("bochs", RELEASE, &fresh)?;
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    eprintln!("xtask: building Bochs");
    process::output(step("./configure", &fresh).args(OPTIONS))?;
    process::output(step("make", &fresh).args(["-j", &jobs.to_string(), "bochs"]))?;
    fs::rename(fresh.join("bochs"), &program).map_err(failed)?;
    fs::remove_dir_all(&fresh).map_err(failed)?;
    Ok(program)
}

/// A step of the build, in the time that others on this machine leave.
fn step(program: &str, folder: &Path) -> Command {
    let mut command = process::bound("nice");
    command.arg(program).current_dir(folder);
    for flags in ["CFLAGS", "CXXFLAGS"] {
        command.env(flags, "-O2");
    }
    command
}
