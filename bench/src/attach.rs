//! `attach`: how long a thread of a VMM stands still where a policy is put on it and taken off again, beside a debugger that attaches and
//! detaches.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::figure::{Aim, Figure};
use crate::run_exit::program;
use crate::{Effort, Measured, Missing};

/// What is aimed at, in milliseconds.
const MEDIAN: f64 = 1.0;
const WORST: f64 = 20.0;

pub(crate) fn measure(effort: Effort) -> Measured {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Err(Missing::Skipped(format!("/dev/kvm does not open: {error}")));
    }
    let (msrgate, vmm) = (program("MSRGATE_BIN")?, program("MSRGATE_SMALL_VMM")?);
    let directory = env::temp_dir().join(format!("msrgate-bench-{}", std::process::id()));
    fs::create_dir_all(&directory).map_err(|error| format!("cannot make `{}`: {error}", directory.display()))?;
    // Its guest reads for longer than all of this takes.
    let vmm = Command::new(&vmm)
        .arg("t:0x8b=4000000000")
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot run `{}`: {error}", vmm.display()))?;
    let mut vmm = Vmm(vmm);
    let figures = figures(effort, &msrgate, &mut vmm, &directory);
    let _ = fs::remove_dir_all(&directory);
    figures
}

/// Ends with this program.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn figures(effort: Effort, msrgate: &Path, vmm: &mut Vmm, directory: &Path) -> Measured {
    let process = vmm.0.id();
    let runs = || {
        let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten();
        tasks.flatten().count() > 1
    };
    while !runs() {
        if let Ok(Some(status)) = vmm.0.try_wait() {
            return Err(Missing::Failed(format!("the VMM ends at once: {status}")));
        }
        sleep(Duration::from_millis(1));
    }
    let gdb = debugger(process, effort.of(20, 1))?;
    let mut figures = Vec::new();
    for (what, rule) in [
        ("by denials", "read = \"deny\""),
        ("by answers", "read = { value = \"0x5\" }"),
    ] {
        let policy = directory.join("policy.toml");
        let text = format!("version = 1\nname = \"bench\"\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x175\"\n{rule}\n");
        fs::write(&policy, text).map_err(|error| format!("cannot write `{}`: {error}", policy.display()))?;
        let stops: Result<Vec<f64>, String> = (0..effort.of(200, 2))
            .map(|_| stop(msrgate, &policy, process))
            .collect();
        let (median, worst) = median_and_worst(stops?);
        let of = |which: &str| format!("{which} stop of a VMM's thread, {what}");
        let beside = |figure: Figure, baseline: Option<f64>| match baseline {
            Some(baseline) => figure.beside("gdb attaches and detaches", baseline),
            None => figure,
        };
        let figure = Figure::new(of("median"), "ms", median).aim(Aim::Ours(MEDIAN));
        figures.push(beside(figure, gdb.map(|(median, _)| median)));
        let figure = Figure::new(of("longest"), "ms", worst).aim(Aim::Ours(WORST));
        figures.push(beside(figure, gdb.map(|(_, worst)| worst)));
    }
    Ok(figures)
}

fn median_and_worst(mut all: Vec<f64>) -> (f64, f64) {
    all.sort_by(f64::total_cmp);
    let median = all.get(all.len() / 2).copied().unwrap_or_default();
    (median, all.last().copied().unwrap_or_default())
}

/// Milliseconds that a thread stood still at most, from a policy's beginning to its end.
fn stop(msrgate: &Path, policy: &Path, process: u32) -> Result<f64, String> {
    let mut command = Command::new(msrgate);
    command
        .args(["attach", "--json", "--vmm-filter", "none", "-p"])
        .arg(policy)
        .arg(process.to_string());
    let child = command.stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let mut said = Vec::new();
    let stderr = child
        .stderr
        .take()
        .into_iter()
        .flat_map(|stderr| BufReader::new(stderr).lines());
    for line in stderr.map_while(Result::ok) {
        if line.contains("takes the policy off again") {
            let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT);
        }
        said.push(line);
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    let told = said.last().and_then(|line| serde_json::from_str::<Value>(line).ok());
    let longest = told.and_then(|told| told.get("longest_stop_ns")?.as_f64());
    longest
        .map(|longest| longest / 1e6)
        .ok_or_else(|| format!("{command:?}: {status}\n{}", said.join("\n")))
}

/// The median and the longest time in milliseconds that gdb has the VMM stand still; `None` where there is no gdb.
fn debugger(process: u32, times: usize) -> Result<Option<(f64, f64)>, String> {
    let mut stops = Vec::new();
    for _ in 0..times {
        let gdb = Command::new("gdb")
            .args(["-nx", "-batch", "-p", &process.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut gdb) = gdb else { return Ok(None) };
        let (mut since, mut stopped) = (None, Duration::ZERO);
        while gdb.try_wait().map_err(|error| error.to_string())?.is_none() {
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            match (stat.contains(") t "), since) {
                (true, None) => since = Some(Instant::now()),
                (false, Some(begin)) => {
                    stopped += begin.elapsed();
                    since = None;
                }
                _ => {}
            }
            sleep(Duration::from_micros(200));
        }
        stopped += since.map_or(Duration::ZERO, |begin: Instant| begin.elapsed());
        stops.push(stopped.as_secs_f64() * 1e3);
    }
    Ok(Some(median_and_worst(stops)))
}
