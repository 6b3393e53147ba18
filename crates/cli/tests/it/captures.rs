//! `capture` of programs that use no KVM, and what it writes as an input.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{Folder, Ran};

const NONE: &str = r#"{"call":"KVM_CREATE_VM","pid":7,"tid":7,"vm":1,"result":11,"errno":null}"#;
const FIRST: &str = r#"{"call":"KVM_X86_SET_MSR_FILTER","pid":7,"tid":7,"vm":1,"result":0,"errno":null,"default":"allow","ranges":[{"base":"0x174","nmsrs":3,"flags":2,"bitmap":"0000000000000000"}]}"#;
const SECOND: &str = r#"{"call":"KVM_X86_SET_MSR_FILTER","pid":7,"tid":9,"vm":2,"result":0,"errno":null,"default":"allow","ranges":[{"base":"0x8b","nmsrs":1,"flags":1,"bitmap":"0000000000000000"}]}"#;
const UNSEEN: &str = r#"{"call":"KVM_X86_SET_MSR_FILTER","pid":7,"tid":9,"vm":null,"result":null,"errno":null,"default":"allow","ranges":[{"base":"0x8b","nmsrs":1,"flags":1,"bitmap":"0000000000000000"}]}"#;
const REFUSED: &str =
    r#"{"call":"KVM_X86_SET_MSR_FILTER","pid":7,"tid":9,"vm":2,"result":-1,"errno":"EINVAL","flags":2,"ranges":[]}"#;
const UNREAD: &str = r#"{"call":"KVM_X86_SET_MSR_FILTER","pid":7,"tid":9,"vm":2,"result":-1,"errno":"EFAULT"}"#;
const NOWHERE: &str = r#"{"call":"KVM_X86_SET_MSR_FILTER","pid":7,"tid":9,"vm":2,"result":-1,"errno":"EFAULT","default":"allow","ranges":[{"base":"0x8b","nmsrs":1,"flags":1,"bitmap":null}]}"#;

fn decompiled(lines: &[&str]) -> Ran {
    let folder = Folder::new();
    folder.write("c.jsonl", lines.join("\n"));
    folder.run(&["decompile", "c.jsonl"])
}

const SYSENTER: &str = "msr   = \"@sysenter\"\nwrite = \"deny\"";
const MICROCODE: &str = "msr   = \"IA32_BIOS_SIGN_ID\"\nread  = \"deny\"";

#[test]
fn the_last_filter_that_the_kernel_took_is_the_input() {
    decompiled(&[NONE, FIRST, REFUSED, UNREAD]).code(0).shows(&[SYSENTER]);
    decompiled(&[NONE, FIRST, SECOND]).code(0).shows(&[MICROCODE]);
    decompiled(&[NONE, FIRST, UNSEEN]).code(0).shows(&[MICROCODE]);
    // Each line by itself, and however a tool for JSON lays it out.
    decompiled(&[FIRST]).code(0).shows(&[SYSENTER]);
    decompiled(&[&FIRST.replace(',', ",\n  ")]).code(0).shows(&[SYSENTER]);
    // As long as the VMM goes on, the last line may not be whole.
    decompiled(&[NONE, FIRST, &SECOND[..40]]).code(0).shows(&[SYSENTER]);
}

#[test]
fn other_filters_of_a_capture_are_told_and_equal_ones_are_not() {
    let ran = decompiled(&[NONE, FIRST, FIRST, NONE, SECOND]).code(0);
    let told = "this is the last one of the capture, of line 5 (VM 2); others that the kernel took are in line 2 (VM 1), line 3 (VM 1)";
    ran.says(&[told]);
    let ran = decompiled(&[NONE, FIRST, REFUSED, &FIRST.replace("\"vm\":1", "\"vm\":2")]).code(0);
    assert_eq!(ran.err, "");
    let many: Vec<&str> = [FIRST; 30].into_iter().chain([SECOND]).collect();
    decompiled(&many).code(0).says(&["line 8 (VM 1) and 22 more"]);
}

/// In time for its length.
#[test]
fn a_long_capture_is_read() {
    let mut lines = vec![NONE; 100_000];
    lines.extend([FIRST, SECOND]);
    decompiled(&lines)
        .code(0)
        .says(&["of line 100002 (VM 2)", "line 100001 (VM 1)"]);
}

#[test]
fn a_capture_without_a_filter_says_why() {
    decompiled(&[NONE]).code(2).says(&["gave the kernel no filter"]);
    let flags = "line 2: the filter's flags 0x2 have a bit that the kernel does not know";
    decompiled(&[NONE, REFUSED]).code(2).says(&[flags, "EINVAL"]);
    decompiled(&[NONE, UNREAD])
        .code(2)
        .says(&["line 2: the kernel took no filter of this VMM, and refused this one with EFAULT"]);
    decompiled(&[NONE, NOWHERE]).code(2).says(&["line 2: ", "EFAULT"]);
    let unread = UNREAD.replace("-1,\"errno\":\"EFAULT\"", "0,\"errno\":null");
    decompiled(&[NONE, &unread])
        .code(2)
        .says(&["line 2: msrgate could not read this filter"]);
    decompiled(&[NONE, FIRST, "Booting", SECOND])
        .code(2)
        .says(&["line 3: ", "`-o FILE` keeps apart"]);
    decompiled(&[NONE, FIRST, "[]"]).code(2).says(&["line 3: "]);
}

#[test]
fn diff_and_explain_take_a_capture() {
    let folder = Folder::new();
    folder.write("c.jsonl", [NONE, FIRST].join("\n"));
    folder.write("later.jsonl", [NONE, FIRST, SECOND].join("\n"));
    let policy = folder.run(&["decompile", "c.jsonl"]).code(0).out;
    folder.write("policy.toml", policy);
    folder
        .run(&["diff", "c.jsonl", "policy.toml"])
        .code(0)
        .shows(&["equal"]);
    folder
        .run(&["diff", "c.jsonl", "later.jsonl"])
        .code(1)
        .shows(&["0x8b", "IA32_SYSENTER_CS"])
        .says(&["later.jsonl: this is the last one of the capture, of line 3"]);
    folder
        .run(&["explain", "c.jsonl", "IA32_SYSENTER_ESP", "write"])
        .code(0)
        .shows(&["msrgate decompile c.jsonl:", "deny"]);
    folder
        .run_with(&["explain", "-", "0x174", "read"], FIRST)
        .code(0)
        .shows(&["the kernel's own answer"]);
    // What wants a policy says what is to be done.
    folder
        .run(&["check", "c.jsonl"])
        .code(2)
        .says(&["`msrgate decompile` makes a policy"]);
}

#[test]
fn a_program_without_kvm_runs_unchanged_and_leaves_an_empty_capture() {
    let folder = Folder::new();
    let script = "cat; echo $0 $1; echo to you >&2; exit 7";
    let ran = folder.run_with(&["capture", "-o", "c.jsonl", "sh", "-c", script, "a", "b c"], "input\n");
    assert_eq!(ran.out, "input\na b c\n");
    // To others than root it is said what they lose.
    let mut err = ran.err.lines().filter(|line| !line.contains("no_new_privs"));
    assert_eq!((err.next(), err.next()), (Some("to you"), None));
    ran.code(7);
    assert_eq!(std::fs::read(folder.path().join("c.jsonl")).unwrap(), b"");
}

#[test]
fn signals_are_the_programs_sigusr1_too() {
    let folder = Folder::new();
    let script = "trap 'echo got it; exit 5' USR1; echo ready; while :; do sleep 0.02; done";
    let mut command = folder.command(&["capture", "--", "sh", "-c", script]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().as_deref(), Some("ready"));
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGUSR1).unwrap();
    assert_eq!(lines.next().as_deref(), Some("got it"));
    assert_eq!(child.wait().unwrap().code(), Some(5));

    let ended = folder
        .command(&["capture", "--", "sh", "-c", "kill -SEGV $$"])
        .output()
        .unwrap();
    assert_eq!(ended.status.signal(), Some(Signal::SIGSEGV as i32));
}

#[test]
fn what_cannot_be_started_or_written_is_exit_2() {
    let folder = Folder::new();
    folder
        .run(&["capture", "--", "no-such-program"])
        .code(2)
        .says(&["PATH"]);
    folder
        .run(&["capture", "--", "./none"])
        .code(2)
        .says(&["`./none` cannot be started"]);
    folder.run(&["capture"]).code(2).says(&["VMM"]);
    folder
        .run(&["capture", "-o", "none/c.jsonl", "--", "true"])
        .code(2)
        .says(&["cannot write `none/c.jsonl`"]);
    let program = folder.path().join("program");
    std::fs::copy(crate::command::find("true").unwrap(), &program).unwrap();
    folder
        .run(&["capture", "-o", "program", "--", "./program"])
        .code(2)
        .says(&["would be overwritten"]);
}
