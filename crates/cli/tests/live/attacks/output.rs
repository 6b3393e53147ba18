//! Whoever reads what msrgate writes, and pauses: nothing waits for it, and what is missing is told where it is missing.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::fs::{CWD, FileType, Mode, OFlags};

use super::*;

/// Accesses that a pipe and a ring have no room for.
const FLOOD: u64 = 30_000;

/// A FIFO in the folder, and its end for reading, from which nothing is read yet.
fn fifo(folder: &Folder) -> File {
    let path = folder.path().join("trace.jsonl");
    rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // Without a writer it opens at once only so.
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nonblocking)
        .open(path)
        .unwrap();
    rustix::io::ioctl_fionbio(&file, false).unwrap();
    file
}

fn lines_of(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap)
}

#[test]
fn a_trace_whose_reader_pauses_says_at_their_place_how_many_events_are_missing() {
    let Some(program) = vmm("pauses", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    let mut reader = fifo(&folder);
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl", "--json"];
    let mut command = under(&folder, &options, &program, &["0x174", &FLOOD.to_string()]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = lines_of(&mut child);
    assert_eq!(lines.next().as_deref(), Some("first wrmsr 0x174 done"));
    assert_eq!(lines.next().as_deref(), Some("second wrmsr 0x174 done"));
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let mut told = String::new();
    child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    child.wait().unwrap();

    // The first VM's guest counts up.
    let (mut next, mut missing) = (0, 0);
    for line in text.lines().skip(1) {
        let line: Value = serde_json::from_str(line).unwrap();
        if let Some(lost) = line.get("lost") {
            missing += lost.as_u64().unwrap();
            if count(&line, "vm") == 0 {
                next += lost.as_u64().unwrap();
            }
        } else if count(&line, "vm") == 0 {
            assert_eq!(super::text(&line, "value"), format!("{next:#x}"), "{line}");
            next += 1;
        }
    }
    assert_eq!(next, FLOOD);
    assert!(missing > 0);
    let summary: Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    assert_eq!(count(&summary["lost"], "events"), missing, "{summary:#}");
}

/// Has a VMM flood what nobody reads, make another VM all the same, and end by SIGTERM.
fn nothing_waits(mut command: Command) -> Child {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = lines_of(&mut child);
    assert_eq!(lines.next().as_deref(), Some("first wrmsr 0x174 done"));
    assert_eq!(lines.next().as_deref(), Some("second wrmsr 0x174 done"));
    let process = lines.next().unwrap();
    let process = process.strip_prefix("process ").unwrap();
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    wait_until(|| !Path::new(&format!("/proc/{process}")).exists());
    child
}

#[test]
fn a_reader_of_the_trace_that_pauses_keeps_no_vm_and_no_signal_waiting() {
    let Some(program) = vmm("pauses", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    let mut reader = fifo(&folder);
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl"];
    let mut command = under(&folder, &options, &program, &["0x174", &FLOOD.to_string()]);
    command.stderr(Stdio::null());
    let mut child = nothing_waits(command);
    reader.read_to_end(&mut Vec::new()).unwrap();
    child.wait().unwrap();
}

#[test]
fn a_reader_of_standard_error_that_pauses_keeps_no_vm_and_no_signal_waiting() {
    let Some(program) = vmm("pauses", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(&ANSWERS.replace("write = \"shadow\"", "write = \"shadow\"\nlog = \"all\""));
    let mut command = under(
        &folder,
        &["-p", "policy.toml"],
        &program,
        &["0x174", &FLOOD.to_string()],
    );
    command.stderr(Stdio::piped());
    let mut child = nothing_waits(command);
    let mut told = String::new();
    child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    child.wait().unwrap();
    assert!(told.contains("events are missing here"), "{}", &told[..1000]);
}
