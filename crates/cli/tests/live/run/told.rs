//! What the summary, a trace and a log tell.

use std::collections::BTreeSet;
use std::time::Instant;

use super::*;
use crate::command::{Terminal, fits_any_terminal};

#[test]
fn the_summary_says_what_each_msr_cost_and_all_together() {
    if !kvm_opens() {
        return;
    }
    let accesses = "--vcpus 2 r:0x174 r:0x174 w:0x174=1 r:0x8b";
    let folder = with_policy("default = \"allow\"\n[[rule]]\nmsr = \"0x174\"\nread = \"zero\"\nwrite = \"ignore\"\n");
    let begin = Instant::now();
    let ran = under(&folder, &["-p", "policy.toml", "--json"], accesses).code(0);
    let all = begin.elapsed().as_nanos() as u64;
    let summary = summary(&ran);
    let costs: Vec<u64> = list(&summary, "by_msr")
        .iter()
        .map(|row| count(row, "cost_ns"))
        .collect();
    assert!(
        costs.len() == 2 && costs.iter().all(|cost| (1..all).contains(cost)),
        "{all}: {summary:#}"
    );
    // Each row is rounded down to whole nanoseconds.
    assert!(
        count(&summary, "cost_ns").abs_diff(costs.iter().sum()) < 2,
        "{summary:#}"
    );
    let ran = under(&folder, &["-p", "policy.toml"], accesses).code(0);
    ran.says(&["1 VM and 2 vCPUs, 6 accesses answered in ", " each "]);
}

#[test]
fn the_summary_fits_any_terminal() {
    if !kvm_opens() {
        return;
    }
    let folder = with_policy(
        "default = \"allow\"\n[[rule]]\nmsr = [\"IA32_SYSENTER_CS\", \"IA32_TSC_DEADLINE\", \"0x8b\"]\nread = \"deny\"\nwrite = \"ignore\"\n",
    );
    let accesses = "--vcpus 2 r:0x174 w:0x174=0x1234567812345678 r:0x8b r:0x6e0";
    let run = || command_under(&folder, &["-p", "policy.toml"], accesses);
    fits_any_terminal(run, Terminal::Error);
}

#[test]
fn a_trace_has_each_access_that_the_policy_decides() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let options = ["-p", "policies/fixed-microcode.toml", "--trace", "trace.jsonl", "--rip"];
    under(&folder, &options, "--vcpus 2 r:0x8b w:0x8b=7 r:0x174").code(0);
    let (header, events) = traced(&folder);
    assert!(header.policy.is_some());
    for vcpu in 0..2 {
        let mut events = events.iter().filter(|event| event.vcpu == vcpu);
        let (read, write) = (events.next().unwrap(), events.next().unwrap());
        assert_eq!((read.msr.0, read.value, read.did.name()), (0x8b, 1 << 56, "value"));
        assert_eq!((write.msr.0, write.value, write.did.name()), (0x8b, 7, "ignore"));
        assert!(
            read.t <= write.t && read.rip < write.rip && read.rip.is_some(),
            "{read:?} {write:?}"
        );
        assert!(
            read.cost > Some(Nanos(0)) && write.cost > Some(Nanos(0)),
            "{read:?} {write:?}"
        );
        assert!(events.next().is_none());
    }
}

#[test]
fn a_trace_says_whose_it_is_and_has_the_cpuid_that_the_vmm_set() {
    if !kvm_opens() {
        return;
    }
    let folder = with_policy(BY_VENDOR);
    for options in [
        MICROCODE,
        &["-p", "policy.toml"],
        &["--learn"],
        &["-p", "policy.toml", "--audit"],
    ] {
        let options = [options, &["--trace", "of-%p-%t-%%.jsonl", "--json"]].concat();
        let ran = under(&folder, &options, "--vendors amd r:0x8b").code(0);
        let file = summary(&ran)["trace"].as_str().unwrap().to_owned();
        let lines = Lines::new(BufReader::new(fs::File::open(&file).unwrap())).unwrap();
        let header = lines.header().clone();
        let started = header.started.as_deref().unwrap().replace(['-', ':'], "");
        let name = format!("of-{}-{started}-%.jsonl", header.pid.unwrap());
        assert_eq!(file, folder.path().join(name).display().to_string());
        let cpuid = header.parse_cpuid().expect("the VMM has set one").unwrap();
        assert_eq!(cpuid.vendor(), Some(CpuVendor::Amd), "{options:?}");
        assert_eq!(lines.count(), 1, "{options:?}");
    }
}

#[test]
fn a_run_without_a_vcpu_leaves_no_trace_and_moves_none() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let options = [MICROCODE, &["--trace", "trace.jsonl"]].concat();
    under(&folder, &options, DESCRIPTORS)
        .code(0)
        .says(&["4 VMs and 0 vCPUs"]);
    let path = |name: &str| folder.path().join(name);
    assert!(!path("trace.jsonl").exists());

    under(&folder, &options, "r:0x8b").code(0);
    let first = fs::read(path("trace.jsonl")).unwrap();
    under(&folder, &options, DESCRIPTORS).code(0);
    assert_eq!(fs::read(path("trace.jsonl")).unwrap(), first);
    assert!(!path("trace.jsonl.1").exists());
    for number in 1..3 {
        let said = format!(
            "what was in `trace.jsonl` is in `{}` now",
            path(&format!("trace.jsonl.{number}")).display()
        );
        under(&folder, &options, "w:0x8b=1").code(0).says(&[&said]);
    }
    assert_eq!(fs::read(path("trace.jsonl.1")).unwrap(), first);
    assert_eq!(traced(&folder).1.len(), 1);
}

#[test]
fn a_trace_with_a_limit_is_cut_into_parts_that_say_so() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let options = ["--learn=all", "--trace", "trace.jsonl", "--trace-size", "64K"];
    let run = |accesses: usize| under(&folder, &options, &vec!["r:0x8b"; accesses].join(" ")).code(0);
    run(10);
    let (header, events) = traced(&folder);
    assert_eq!((header.part, events.len()), (None, 10));
    folder.run(&["learn", "trace.jsonl"]).code(0);

    run(700);
    let (header, second) = traced(&folder);
    assert_eq!(header.part, Some(2));
    let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
    // Its name was taken.
    folder.write("trace.jsonl", read("trace.jsonl.2"));
    let (header, first) = traced(&folder);
    assert_eq!((header.part, first.len() + second.len()), (Some(1), 700));
    assert!(first.last().unwrap().t <= second[0].t);
    assert!(read("trace.jsonl.2").len() <= 64 << 10);
    folder
        .run(&["learn", "trace.jsonl"])
        .code(2)
        .says(&["not all that the guest was served with", "--trace-size"]);
    let report = folder.run(&["report", "trace.jsonl"]).code(0);
    report.shows(&["trace.jsonl is part 1 of a trace that was cut by its size"]);
}

#[test]
fn more_events_than_a_ring_holds_are_lost_and_counted_or_written() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let accesses = vec!["r:0x8b"; 700].join(" ");
    let options = ["-p", "policies/fixed-microcode.toml", "--trace", "/dev/full", "--json"];
    let ran = under(&folder, &options, &accesses);
    // The header does not fit either, and that shows before a guest runs.
    assert_eq!(ran.code, Some(2), "{}", ran.err);

    let options = [
        "-p",
        "policies/fixed-microcode.toml",
        "--trace",
        "trace.jsonl",
        "--json",
    ];
    let ran = under(&folder, &options, &accesses).code(0);
    assert_eq!(seen(&ran).len(), 700);
    let written = traced(&folder).1.len() as u64;
    let summary = summary(&ran);
    assert_eq!(written + count(&summary["lost"], "events"), 700);
    assert_eq!(count(&list(&summary, "by_msr")[0], "count"), 700);
}

#[test]
fn learning_changes_nothing_and_tells_each_msr_and_direction_once() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    // The kernel ignores the write of 0x8b; passing it through as the host would set the revision.
    let accesses =
        "--filter --vcpus 2 r:0x8b w:0x8b=7 r:0x8b r:0x35 w:0x174=8 r:0x174 r:0x174 r:0xdeadbeef w:0xdeadbeef=1";
    let without = Ran::of(&mut bare(accesses)).code(0);
    let ran = under(&folder, &["--learn", "--trace", "trace.jsonl"], accesses).code(0);
    assert_eq!(seen(&ran), seen(&without));
    let events = traced(&folder).1.into_iter();
    let told = |event: Event| (event.msr.0, event.op.name(), event.did.name(), event.reason);
    let mut touched: Vec<_> = events.map(told).collect();
    touched.sort_unstable_by_key(|(msr, op, ..)| (*msr, *op));
    let allowed = [
        (0x35, "rdmsr"),
        (0x8b, "rdmsr"),
        (0x8b, "wrmsr"),
        (0x174, "rdmsr"),
        (0x174, "wrmsr"),
    ];
    let allowed = allowed.map(|(msr, op)| (msr, op, "allow", Some(Reason::Filter)));
    // Of what faulted each access is told.
    let faulted = ["rdmsr", "rdmsr", "wrmsr", "wrmsr"];
    let faulted = faulted.map(|op| (0xdeadbeef, op, "fault", Some(Reason::Unknown)));
    assert_eq!(touched, [&allowed[..], &faulted[..]].concat());
}

#[test]
fn learning_all_tells_every_access_and_says_that_it_is_not_faithful() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let accesses = "--filter w:0x174=8 r:0x174 r:0x174 r:0x35 r:0xdeadbeef";
    let ran = under(&folder, &["--learn=all", "--trace", "trace.jsonl"], accesses).code(0);
    let expected = [
        "wrmsr 0x174 done",
        "rdmsr 0x174 0x8",
        "rdmsr 0x174 0x8",
        "rdmsr 0x35 0x20004",
        "rdmsr 0xdeadbeef fault",
    ];
    assert_eq!(seen(&ran), expected);
    ran.says(&["not faithful"]);
    let (header, events) = traced(&folder);
    assert!(header.mode.unwrap_or_default().contains("not always"));
    let events: Vec<_> = events
        .into_iter()
        .map(|event| (event.msr.0, event.did.name()))
        .collect();
    let expected = [(0x174, "pass"), (0x174, "pass"), (0x174, "pass"), (0xdeadbeef, "fault")];
    assert_eq!(events, expected);
}

#[test]
fn an_audit_changes_nothing_and_tells_what_the_policy_would_do() {
    if !kvm_opens() {
        return;
    }
    let folder = with_policy(
        "default = \"deny\"\n[[rule]]\nmsr = \"0x174\"\nread = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = \"zero\"\n",
    );
    let accesses = "--filter r:0x35 r:0x8b r:0x8b w:0x174=8 r:0x174 w:0x174=9";
    let without = Ran::of(&mut bare(accesses)).code(0);
    let ran = under(&folder, &["-p", "policy.toml", "--audit", "--json"], accesses).code(0);
    assert_eq!(seen(&ran), seen(&without));
    let summary = summary(&ran);
    let expected = [
        ("0x35", "rdmsr", 1, "allow"),
        ("0x8b", "rdmsr", 1, "allow"),
        ("0x174", "wrmsr", 1, "allow"),
    ];
    assert_eq!(rows(&summary), expected);
    let would: Vec<_> = list(&summary, "by_msr")
        .iter()
        .map(|row| row["would"].clone())
        .collect();
    assert_eq!(would, ["deny", "zero", "deny"]);
}

#[test]
fn what_a_rule_logs_is_told_without_a_trace() {
    if !kvm_opens() {
        return;
    }
    let folder = with_policy(
        "default = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = \"zero\"\nlog = \"first\"\n\
         [[rule]]\nmsr = \"0x174\"\nwrite = \"deny\"\nlog = \"all\"\n",
    );
    let ran = under(&folder, &["-p", "policy.toml"], "r:0x8b r:0x8b w:0x174=3 w:0x174=4").code(0);
    let told = |what: &str| ran.err.lines().filter(|line| line.contains(what)).count();
    assert_eq!(
        told("rdmsr(0x8b IA32_BIOS_SIGN_ID) = 0x0 zero rule 0"),
        1,
        "{}",
        ran.err
    );
    assert_eq!(
        told("wrmsr(0x174 IA32_SYSENTER_CS, 0x3) = #GP deny rule 1"),
        1,
        "{}",
        ran.err
    );
    assert_eq!(told("wrmsr(0x174"), 2, "{}", ran.err);
}

#[test]
fn so_many_a_second_are_told_of_a_rule_and_replay_tells_as_many() {
    if !kvm_opens() {
        return;
    }
    let folder = with_policy(
        "default = \"allow\"\n[[rule]]\nmsr = [\"0x8b\", \"0x174\", \"0x175\"]\nread = \"zero\"\nlog = { per_second = 1 }\n",
    );
    // One of each second that they last, which is mostly the same one, and may end between any two.
    let vmm = "r:0x8b r:0x174 r:0x175 ".repeat(30);
    let ran = under(&folder, &["-p", "policy.toml"], vmm.trim()).code(0);
    let told = ran.err.lines().filter(|line| line.contains(" zero rule 0"));
    let told: Vec<&str> = told.map(|line| line.split('.').next().unwrap()).collect();
    let seconds: BTreeSet<&str> = told.iter().copied().collect();
    assert_eq!((told.is_empty(), told.len()), (false, seconds.len()), "{}", ran.err);
    under(&folder, &["-p", "policy.toml", "--trace", "trace.jsonl"], vmm.trim()).code(0);
    let events = traced(&folder).1;
    let seconds: BTreeSet<u64> = events.iter().map(|event| event.t.0 / 1_000_000_000).collect();
    let replayed = folder.run(&["replay", "--backend", "engine", "-p", "policy.toml", "trace.jsonl"]);
    let told = replayed.err.matches("log: ").count();
    assert_eq!((events.len(), told), (90, seconds.len()), "{}", replayed.err);
}
