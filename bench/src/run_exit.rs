//! `run_exit`: an access that `msrgate run` answers, beside the same VMM that answers it itself.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::figure::Figure;
use crate::rounds::rounds;
use crate::{Effort, Measured, Missing};

/// What the small VMM answers by itself where it has a filter of its own.
const ANSWER: &str = "0x20004";

pub(crate) fn measure(effort: Effort) -> Measured {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Err(Missing::Skipped(format!("/dev/kvm does not open: {error}")));
    }
    let (msrgate, vmm) = (program("MSRGATE_BIN")?, program("MSRGATE_SMALL_VMM")?);
    let policy = env::temp_dir().join(format!("msrgate-bench-{}.toml", std::process::id()));
    let text = format!(
        "version = 1\nname = \"bench\"\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x35\"\nread = {{ value = \"{ANSWER}\" }}\n"
    );
    fs::write(&policy, text).map_err(|error| format!("cannot write `{}`: {error}", policy.display()))?;
    let reads = format!("t:0x35={}", effort.of(20_000, 200));
    let under = |_: &mut ()| {
        let mut command = Command::new(&msrgate);
        command.args(["run", "-p"]).arg(&policy).arg("--").arg(&vmm).arg(&reads);
        timed(&mut command)
    };
    let bare = |_: &mut ()| timed(Command::new(&vmm).args(["--filter", &reads]));
    let measured = rounds(effort.of(25, 1), &mut (), [&under, &bare]);
    let _ = fs::remove_file(&policy);
    let [under, bare] = measured?;
    let figure = Figure::new("a read that exits, under `msrgate run`", "ns", under.least());
    Ok(vec![figure.beside("a VMM that answers it itself", bare.least())])
}

/// A program that `cargo xtask bench` has built.
pub(crate) fn program(variable: &str) -> Result<PathBuf, Missing> {
    match env::var_os(variable) {
        Some(path) => Ok(path.into()),
        None => Err(Missing::Skipped(format!(
            "{variable} names no program: `cargo xtask bench` builds it"
        ))),
    }
}

/// Nanoseconds of one read, as the VMM tells on standard error.
fn timed(command: &mut Command) -> Result<f64, String> {
    let done = command
        .output()
        .map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let (said, told) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    if !done.status.success() || !said.contains(ANSWER) {
        return Err(format!("{command:?}: {}\n{said}{told}", done.status));
    }
    let time = told
        .lines()
        .find_map(|line| line.strip_suffix(" ns")?.rsplit(' ').next()?.parse().ok());
    time.ok_or_else(|| format!("{command:?} tells no time: {told}"))
}
