//! What is asked of `run` itself: by runs in runs, files that are in use, and processes that are killed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use msrgate_core::Within;
use msrgate_trace::{Lines, Record};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;

#[test]
fn processes_that_are_killed_while_they_ask_lock_nobody_out_and_are_no_refusals() {
    let Some(program) = vmm("asking", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(crate::policies::BY_VENDOR);
    let ran = Ran::of(&mut under(
        &folder,
        &["-p", "policy.toml", "--json"],
        &program,
        &["200"],
    ))
    .code(0);
    assert_eq!(ran.out, "killed 200\nlast rdmsr 0x8b 0x22\n", "{}", ran.err);
    assert_eq!(count(&summary(&ran), "refused"), 0, "{}", ran.err);
    // Beside the summary only what this kernel lets a guest do past the policy.
    let gap = |line: &&str| line.starts_with("msrgate: on Linux ") && line.contains("a guest with VMX");
    let others = ran.err.lines().filter(|line| !gap(line));
    assert_eq!(others.count(), 1, "{}", ran.err);
}

#[test]
fn a_run_in_a_run_is_refused_with_the_reason() {
    let Some(program) = vmm("accesses", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    folder.write("inner.toml", "version = 1\nname = \"inner\"\ndefault = \"allow\"\n");
    let inner = ["run", "-p", "inner.toml", "--", program.to_str().unwrap(), "r:0x8b"];
    let ran = Ran::of(&mut under(
        &folder,
        &["-p", "policy.toml"],
        &crate::command::program(),
        &inner,
    ));
    assert_ne!(ran.code, Some(0));
    assert_eq!(ran.out, "");
    ran.says(&["an outer `msrgate run`"]);
}

#[test]
fn a_trace_is_its_owners_and_overwrites_neither_a_policy_nor_another_runs() {
    let Some(program) = vmm("accesses", Way::Dynamic) else {
        return;
    };
    let Some(pauses) = vmm("pauses", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    let path = |name: &str| folder.path().join(name);
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl"];
    let run = |options: &[&str], arguments: &[&str]| Ran::of(&mut under(&folder, options, &program, arguments));
    run(&options, &["r:0x8b"]).code(0);
    let mode = fs::metadata(path("trace.jsonl")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let before = fs::read(path("policy.toml")).unwrap();
    run(&["-p", "policy.toml", "--trace", "policy.toml"], &["r:0x8b"])
        .code(2)
        .says(&["policy.toml"]);
    assert_eq!(fs::read(path("policy.toml")).unwrap(), before);

    // A run that makes no VM.
    let before = fs::read(path("trace.jsonl")).unwrap();
    let none = Ran::of(&mut under(
        &folder,
        &options,
        Path::new("/proc/self/exe"),
        &["--version"],
    ))
    .code(0);
    none.says(&["no VM was made"]);
    assert_eq!(fs::read(path("trace.jsonl")).unwrap(), before);

    let mut first = under(&folder, &options, &pauses, &["0x174", "1"]);
    let mut first = first.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(first.stdout.take().unwrap()).lines();
    assert_eq!(lines.nth(1).unwrap().unwrap(), "second wrmsr 0x174 done");
    // That one goes on, and a run that makes no VM, as libvirt makes some, is none of its affair.
    let version = Ran::of(&mut under(
        &folder,
        &options,
        Path::new("/proc/self/exe"),
        &["--version"],
    ));
    version.code(0).says(&["no VM was made"]);
    let second = run(&options, &["r:0x8b"]);
    assert_eq!(
        (second.code == Some(0), second.out.as_str()),
        (false, ""),
        "{}",
        second.err
    );
    second.says(&[
        "vCPU 0 is not made: another `msrgate run` writes to `trace.jsonl`: name the trace otherwise, by `%p`",
    ]);
    let length = || fs::metadata(path("trace.jsonl")).unwrap().len();
    let before = length();
    wait_until(|| length() > before);
    let options = ["-p", "policy.toml", "--trace", "%p.jsonl"];
    run(&options, &["r:0x8b"]).code(0);
    kill(Pid::from_raw(first.id().cast_signed()), Signal::SIGTERM).unwrap();
    first.wait().unwrap();
}

#[test]
fn refusals_of_a_kind_are_told_a_few_times_and_counted() {
    let Some(program) = vmm("sequence", Way::Dynamic) else {
        return;
    };
    if fs::metadata("/dev/cpu/0/msr").is_ok() {
        println!("skipped: this machine has /dev/cpu/0/msr");
        return;
    }
    let folder = with_policy("default = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = \"host\"\n");
    let mut command = under(&folder, &["-p", "policy.toml"], &program, &["fork", "100", "r:0x8b"]);
    let ran = Ran::of(&mut command).code(0);
    assert_eq!(ran.out, "ended 0\n");
    // Such a line may begin within one of the VMM's, which the C library writes in parts.
    let told = ran.err.matches("msrgate: no VM is made").count();
    assert_eq!(told, 10, "{}", ran.err);
    ran.says(&[
        "msrgate: 90 times more: no VM is made",
        "the policy could not be put on them: 100 VMs or vCPUs",
    ]);
}

#[test]
fn a_vmm_ends_with_the_process_that_keeps_its_policy() {
    let Some(program) = vmm("pauses", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    let mut command = under(&folder, &["-p", "policy.toml"], &program, &["0x174", "1"]);
    let mut front = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(front.stdout.take().unwrap()).lines();
    let process = lines.nth(2).unwrap().unwrap();
    let process = process.strip_prefix("process ").unwrap();
    let id = front.id();
    let keeper = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    kill(Pid::from_raw(keeper.trim().parse().unwrap()), Signal::SIGKILL).unwrap();
    front.wait().unwrap();
    wait_until(|| {
        fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| stat.contains(") Z "))
            || !Path::new(&format!("/proc/{process}")).exists()
    });
}

#[test]
fn an_access_in_system_management_mode_is_told_as_one() {
    let Some(program) = vmm("smm", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    for options in [&["-p", "policy.toml"][..], &["--learn=all"]] {
        let options = [options, &["--trace", "trace.jsonl"]].concat();
        let ran = Ran::of(&mut under(&folder, &options, &program, &["0x8b"])).code(0);
        if ran.out == "no SMM\n" {
            println!("skipped: this KVM has no system management mode");
            return;
        }
        let trace = fs::read_to_string(folder.path().join("trace.jsonl")).unwrap();
        let within: Vec<Option<Within>> = Lines::new(trace.as_bytes())
            .unwrap()
            .map(|record| match record.unwrap() {
                Record::Event(event) => event.within,
                gap => panic!("{gap:?}"),
            })
            .collect();
        assert_eq!(within, [Some(Within::Smm), None], "{trace}");
        let report = folder.run(&["report", "trace.jsonl"]).code(0);
        report.shows(&[" in smm"]);
    }
}
