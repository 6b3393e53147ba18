//! The machine that figures are of.

use std::fs;
use std::process::Command;

use serde::Serialize;

#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) date: String,
    pub(crate) commit: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) kernel: String,
    /// KVM's module for the processor, where it is loaded.
    pub(crate) kvm: Option<String>,
    /// How many others wanted a CPU in the minute before.
    pub(crate) load: f64,
    pub(crate) rustc: String,
}

impl Machine {
    pub(crate) fn look() -> Machine {
        let modules = fs::read_dir("/sys/module").into_iter().flatten();
        let mut modules = modules.filter_map(|module| module.ok()?.file_name().into_string().ok());
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Machine {
            date: said("date", &["-u", "+%Y-%m-%dT%H:%MZ"]),
            commit: said("git", &["describe", "--always", "--dirty", "--exclude=*"]),
            cpu: cpu(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: said("uname", &["-sr"]),
            kvm: modules.find(|name| name.starts_with("kvm_")),
            load: load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
            rustc: said("rustc", &["--version"]),
        }
    }
}

/// The processor's name, and its numbers where that tells little.
fn cpu() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'))
    };
    let [name, family, model] = ["model name", "cpu family", "model\t"].map(|name| field(name).unwrap_or("?").trim());
    format!("{name}, family {family}, model {model}")
}

fn said(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output();
    done.map_or_else(
        |_| "?".to_owned(),
        |done| String::from_utf8_lossy(&done.stdout).trim().to_owned(),
    )
}
