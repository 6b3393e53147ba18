//! What a lane is asked to run, and how that is said on the command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::package;

/// A series of Debian's kernels.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Series {
    #[value(name = "6.1")]
    Linux6_1,
    #[value(name = "6.12")]
    Linux6_12,
}

impl Series {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Linux6_1 => "6.1",
            Self::Linux6_12 => "6.12",
        }
    }
}

/// What the command sees as its root.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Root {
    /// A root in memory, with busybox and what --add and --bin name
    Initramfs,
    /// This machine's files, by 9p; what the command writes is dropped
    #[value(name = "9p")]
    Host,
}

/// One run.
pub(crate) struct Job {
    pub(crate) series: Series,
    /// Text for `sh -c`.
    pub(crate) script: String,
    pub(crate) cpus: u32,
    pub(crate) mebibytes: u32,
    /// How long the script may take; booting is not counted.
    pub(crate) timeout: Duration,
    pub(crate) root: Root,
    /// Files or folders: from here, to there.
    pub(crate) add: Vec<(PathBuf, PathBuf)>,
    /// Programs to add at their own path, with their shared libraries.
    pub(crate) programs: Vec<PathBuf>,
    pub(crate) kvm_parameters: String,
    pub(crate) vendor_parameters: String,
    pub(crate) verbose: bool,
}

/// What the help of both lanes ends with.
pub(crate) const HELP: &str = "\
Standard output is CMD's output and nothing else; the lane speaks on standard error.
The exit status is CMD's, 124 where its time ran out, 125 where the lane failed (after two tries)
or cannot run here.

CMD sees MSRGATE_LANE (nested or intel), MSRGATE_LANE_KERNEL (6.1 or 6.12) and, where this
machine's files are its root, MSRGATE_LANE_BOOT: a folder with that kernel's vmlinux, vmlinuz and
modules/msr.ko, for a guest of its own.";

#[derive(Args)]
struct CommonArguments {
    /// Debian's kernel series
    #[arg(long, default_value = "6.1")]
    kernel: Series,
    /// Seconds that the command may take
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    timeout: u64,
    /// Add a file or folder; DEST is / and its name where not given
    #[arg(long, value_name = "FILE[:DEST]")]
    add: Vec<String>,
    /// Add a program at its own path, with its shared libraries
    #[arg(long, value_name = "PROGRAM")]
    bin: Vec<String>,
    /// Parameters for kvm.ko
    #[arg(long, default_value = "", value_name = "PARAMETERS")]
    kvm_params: String,
    /// Parameters for kvm-amd.ko or kvm-intel.ko
    #[arg(long, default_value = "", value_name = "PARAMETERS")]
    vendor_params: String,
    /// Show the emulator's command and the kernel's console
    #[arg(short, long)]
    verbose: bool,
    /// One word is text for a shell, more are a command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    command: Vec<String>,
}

#[derive(Args)]
pub(crate) struct NestedArguments {
    #[command(flatten)]
    common: CommonArguments,
    /// Virtual CPUs
    #[arg(long, default_value_t = 1, value_name = "N")]
    smp: u32,
    /// Memory in MiB
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    mem: u32,
    /// What the command sees as its root
    #[arg(long, default_value = "9p")]
    root: Root,
}

#[derive(Args)]
pub(crate) struct IntelArguments {
    #[command(flatten)]
    common: CommonArguments,
    /// Memory in MiB
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    mem: u32,
}

impl From<NestedArguments> for Job {
    fn from(arguments: NestedArguments) -> Self {
        let NestedArguments { common, smp, mem, root } = arguments;
        Self {
            cpus: smp,
            root,
            ..job(common, mem)
        }
    }
}

impl From<IntelArguments> for Job {
    fn from(arguments: IntelArguments) -> Self {
        job(arguments.common, arguments.mem)
    }
}

fn job(arguments: CommonArguments, mebibytes: u32) -> Job {
    let script = match arguments.command.as_slice() {
        [text] => text.clone(),
        words => words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
    };
    let programs = arguments
        .bin
        .iter()
        .map(|name| package::find(name).unwrap_or(name.into()));
    Job {
        series: arguments.kernel,
        script,
        cpus: 1,
        mebibytes,
        timeout: Duration::from_secs(arguments.timeout),
        root: Root::Initramfs,
        add: arguments.add.iter().map(|text| addition(text)).collect(),
        programs: programs.collect(),
        kvm_parameters: arguments.kvm_params,
        vendor_parameters: arguments.vendor_params,
        verbose: arguments.verbose,
    }
}

fn addition(text: &str) -> (PathBuf, PathBuf) {
    if let Some((from, to)) = text.split_once(':') {
        return (from.into(), to.into());
    }
    let from = PathBuf::from(text);
    let to = Path::new("/").join(from.file_name().unwrap_or_default());
    (from, to)
}

/// A word as a POSIX shell reads it.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_word_keeps_its_quotes() {
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
    }

    #[test]
    fn an_addition_without_a_destination_goes_to_the_root() {
        assert_eq!(addition("a/b"), ("a/b".into(), "/b".into()));
        assert_eq!(addition("a/b:/c"), ("a/b".into(), "/c".into()));
    }
}
