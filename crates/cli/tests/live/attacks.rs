//! What was tried against `run`, and VMMs of other makes than most: each with a VMM in C on this machine's KVM. Skipped
//! where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1, and where there is no C compiler.
//!
//! MSRGATE_VMMS names a directory of VMMs that were compiled before.

mod vmm;

mod attached;
mod calls;
mod captures;
mod descriptors;
mod helpers;
mod kicks;
mod many;
mod output;
mod reloads;
mod runs;
mod watched;
mod sandboxes;
mod users;
mod ways;

use std::path::Path;
use std::process::Command;

use self::vmm::{Way, vmm};
use serde_json::Value;

use crate::command::{Folder, Ran, count, list, text, wait_until};
use crate::policies::{summary, with_policy};

/// One rule of each kind that user space answers, and one that the kernel denies.
const ANSWERS: &str = r#"default = "allow"
[[rule]]
msr = "0x8b"
read = { value = "0x5" }
write = "ignore"
[[rule]]
msr = "0x10a"
read = "deny"
write = "deny"
[[rule]]
msr = "0x174"
read = { shadow = "0x11" }
write = "shadow"
[[rule]]
msr = "0x175"
write = { once = true }
[[rule]]
msr = "0x176"
read = { mask = { keep = "0xff", set = "0x100" } }
write = { only = ["0x33"] }
"#;

/// What a guest reads of 0x8b without answers of user space: the kernel holds it.
const HELD: &str = "default = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = { value = \"0x5\" }\nwrite = \"ignore\"\n";

/// A command that runs a VMM under a policy.
fn under(folder: &Folder, options: &[&str], vmm: &Path, arguments: &[&str]) -> Command {
    let mut command = folder.command(&["run"]);
    command.args(options).arg("--").arg(vmm).args(arguments);
    command
}

/// The VMM by itself.
fn bare(folder: &Folder, vmm: &Path, arguments: &[&str]) -> Ran {
    Ran::of(Command::new(vmm).args(arguments).current_dir(folder.path()))
}

/// The lines of a trace behind its header.
fn traced(folder: &Folder) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.path().join("trace.jsonl")).unwrap();
    let lines = text.lines().skip(1);
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// How many events a trace has, and how many it says are missing.
fn whole(trace: &[Value]) -> (u64, u64) {
    let missing = trace.iter().filter_map(|line| line.get("lost")?.as_u64());
    let events = trace.iter().filter(|line| line.get("op").is_some()).count();
    (events as u64, missing.sum())
}
