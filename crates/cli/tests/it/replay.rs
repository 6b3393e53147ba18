//! `replay` on the engine, which every machine has.

use serde_json::Value;

use crate::command::{Folder, Ran, count, hex, list, text};

const MICROVM: &str = "traces/linux-6.1-microvm.jsonl";
const PC: &str = "traces/linux-6.1-pc-smp2.jsonl";

fn replay(folder: &Folder, policy: &str, trace: &str) -> Ran {
    folder.run(&["replay", "--json", "--backend", "engine", "-p", policy, trace])
}

fn row<'a>(report: &'a Value, msr: u64, op: &str) -> &'a Value {
    let found = list(report, "by_msr")
        .iter()
        .find(|row| hex(row, "msr") == msr && text(row, "op") == op);
    found.unwrap_or_else(|| panic!("no row of {op} {msr:#x}"))
}

#[test]
fn a_recorded_boot_is_not_changed_by_the_policy_made_for_it() {
    let folder = Folder::furnished();
    for (policy, trace, accesses) in [
        ("policies/linux-microvm.toml", MICROVM, "564 accesses"),
        ("policies/linux-pc.toml", PC, "386 accesses"),
    ] {
        let ran = folder
            .run(&["replay", "--backend", "engine", "-p", policy, trace])
            .code(0);
        ran.shows(&[
            accesses,
            "the policy changed nothing for the guest",
            "IA32_EFER",
            "guest saw",
            "in the trace",
        ]);
    }
}

#[test]
fn several_traces_are_reported_together() {
    let folder = Folder::furnished();
    let both = [
        "replay",
        "--json",
        "--backend",
        "engine",
        "-p",
        "policies/linux-pc.toml",
        MICROVM,
        PC,
    ];
    assert_eq!(count(&folder.run(&both).code(0).json(), "accesses"), 564 + 386);
}

#[test]
fn a_guest_that_would_break_is_exit_1_and_each_change_is_counted() {
    let folder = Folder::furnished();
    let report = replay(&folder, "policies/deny-all.toml", MICROVM).code(1).json();
    let faulted: u64 = list(&report, "by_msr")
        .iter()
        .filter(|row| row["sees"] == "#GP")
        .map(|row| count(row, "count"))
        .sum();
    assert_eq!((count(&report, "faults"), faulted), (564, 564));
    // One access faulted without the policy too.
    assert_eq!(count(&report, "changed"), 563);
    assert_eq!(row(&report, 0xc001_1028, "rdmsr")["recorded"], "#GP");
    assert_eq!(count(row(&report, 0xc001_1028, "rdmsr"), "changed"), 0);
    let people = folder
        .run(&["replay", "--backend", "engine", "-p", "policies/deny-all.toml", MICROVM])
        .code(1);
    people.shows(&["the policy changed 563 of 564 accesses", "564 faulted"]);
}

#[test]
fn accesses_that_are_missing_from_a_trace_are_told_and_not_made() {
    let folder = Folder::furnished();
    let event = "{\"op\":\"rdmsr\",\"msr\":\"0x10\",\"value\":\"0x5\"}\n";
    let gap = "{\"lost\":7,\"t\":9,\"vm\":0,\"vcpu\":0}\n";
    folder.write(
        "gap.jsonl",
        format!("{{\"msrgate_trace\":1}}\n{event}{gap}{event}{gap}"),
    );
    let report = replay(&folder, "policies/qemu.toml", "gap.jsonl").code(0).json();
    assert_eq!((count(&report, "accesses"), count(&report, "lost")), (2, 14));
    folder
        .run(&["replay", "--backend", "engine", "-p", "policies/qemu.toml", "gap.jsonl"])
        .code(0)
        .shows(&["2 accesses by", "note: 14 accesses are missing from the traces"]);
    let report = replay(&folder, "policies/qemu.toml", MICROVM).code(0).json();
    assert_eq!(count(&report, "lost"), 0);
}

#[test]
fn rules_with_log_speak_on_stderr_as_it_happens_and_not_to_programs() {
    let folder = Folder::furnished();
    let guard = ["replay", "--backend", "engine", "-p", "policies/hvmi-guard.toml", PC];
    let ran = folder.run(&guard).code(0);
    let logged: Vec<&str> = ran.err.lines().filter(|line| line.starts_with("log: ")).collect();
    // Five registers on two vCPUs, each written once.
    assert_eq!(logged.len(), 10, "{}", ran.err);
    assert!(
        logged
            .iter()
            .any(|line| line.contains("vcpu 1 wrmsr 0xc0000082 IA32_LSTAR")),
        "{}",
        ran.err
    );
    assert!(replay(&folder, "policies/hvmi-guard.toml", PC).code(0).err.is_empty());
}

#[test]
fn handlers_that_nobody_answers_for_are_named_and_fault() {
    let folder = Folder::furnished();
    folder.write(
        "energy.jsonl",
        "{\"msrgate_trace\":1}\n{\"op\":\"rdmsr\",\"msr\":\"0x611\",\"value\":\"0x5\"}\n",
    );
    let ran = replay(&folder, "policies/qemu-rapl.toml", "energy.jsonl").code(1);
    assert_eq!(row(&ran.json(), 0x611, "rdmsr")["sees"], "#GP");
    ran.says(&["package-energy", "faults"]);
}

#[test]
fn the_guests_cpuid_comes_with_the_trace_or_the_command_line() {
    let folder = Folder::new();
    folder.write(
        "when.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"IA32_TSC\"\nread = \"deny\"\nwhen = { vendor = \"amd\" }\n",
    );
    let leaf = |registers: &str| format!("CPU:\\n   0x00000000 0x00: eax=0x00000001 {registers}\\n");
    let amd = leaf("ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65");
    let intel = leaf("ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69");
    let event = "{\"op\":\"rdmsr\",\"msr\":\"0x10\",\"value\":\"0x5\"}";
    folder.write(
        "amd.jsonl",
        format!("{{\"msrgate_trace\":1,\"cpuid\":\"{amd}\"}}\n{event}\n"),
    );
    folder.write(
        "intel.jsonl",
        format!("{{\"msrgate_trace\":1,\"cpuid\":\"{intel}\"}}\n{event}\n"),
    );
    folder.write("none.jsonl", format!("{{\"msrgate_trace\":1}}\n{event}\n"));
    folder.write("intel.txt", intel.replace("\\n", "\n"));
    replay(&folder, "when.toml", "amd.jsonl").code(1);
    replay(&folder, "when.toml", "intel.jsonl").code(0);
    replay(&folder, "when.toml", "none.jsonl").code(2).says(&["E018"]);
    // What the command line gives goes before what the trace says.
    let given = [
        "replay",
        "--backend",
        "engine",
        "--cpuid",
        "intel.txt",
        "-p",
        "when.toml",
        "amd.jsonl",
    ];
    folder.run(&given).code(0);
    folder.write("odd.jsonl", "{\"msrgate_trace\":1,\"cpuid\":\"no leaves\"}\n");
    replay(&folder, "when.toml", "odd.jsonl")
        .code(2)
        .says(&["odd.jsonl", "line 1", "CPUID"]);
}

#[test]
fn a_long_trace_shows_no_bar_in_a_pipe() {
    let folder = Folder::furnished();
    let event = "{\"t\":1,\"vm\":0,\"vcpu\":0,\"op\":\"rdmsr\",\"msr\":\"0x10\",\"value\":\"0x5\",\"did\":\"allow\"}\n";
    folder.write(
        "long.jsonl",
        format!("{{\"msrgate_trace\":1}}\n{}", event.repeat(70_000)),
    );
    let ran = replay(&folder, "policies/qemu.toml", "long.jsonl").code(0);
    assert_eq!(count(&ran.json(), "accesses"), 70_000);
    assert!(ran.err.is_empty(), "{}", ran.err);
}
