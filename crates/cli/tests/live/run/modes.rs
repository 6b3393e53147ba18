//! Each mode says of each access what the guest got.

use std::collections::{BTreeMap, BTreeSet};

use msrgate_core::Disposition;

use super::*;

/// MSRs of all kinds: known to KVM, unknown, read-only, with values that KVM refuses, and with what the policy answers.
const MSRS: [u32; 16] = [
    0x10,
    0x1b,
    0x8b,
    0xfe,
    0x174,
    0x175,
    0x176,
    0x179,
    0x277,
    0x606,
    0xc000_0080,
    0xc000_0102,
    0xc001_0015,
    0xdead,
    0x4000_0000,
    0x8000_1234,
];

const POLICY: &str = "default = \"allow\"\n\
    [[rule]]\nmsr = \"0x8b\"\nread = { value = 5 }\nwrite = \"ignore\"\n\
    [[rule]]\nmsr = \"0x175\"\nread = \"deny\"\nwrite = \"deny\"\n\
    [[rule]]\nmsr = \"0x176\"\nread = { shadow = 0 }\nwrite = \"shadow\"\n";

/// 64 accesses: each MSR is read, written with a value that many registers refuse, with one that they take, and read.
fn accesses() -> String {
    let of = |msr: &u32| format!("r:{msr:#x} w:{msr:#x}=0xffffffffffffffff w:{msr:#x}=0x6 r:{msr:#x}");
    MSRS.iter().map(of).collect::<Vec<_>>().join(" ")
}

/// What the guest printed, a line each: which access, and whether it faulted.
fn printed(ran: &Ran) -> Vec<(u32, Op, bool)> {
    let access = |line: &&str| {
        let mut words = line.split(' ');
        let (op, msr, got) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        let op = if op == "rdmsr" { Op::Read } else { Op::Write };
        let msr = u32::from_str_radix(msr.trim_start_matches("0x"), 16).unwrap();
        (msr, op, got == "fault")
    };
    seen(ran).iter().map(access).collect()
}

fn faults(accesses: &[(u32, Op, bool)]) -> BTreeMap<(u32, Op), u64> {
    let mut counts = BTreeMap::new();
    for (msr, op, _) in accesses.iter().filter(|(.., faulted)| *faulted) {
        *counts.entry((*msr, *op)).or_insert(0) += 1;
    }
    counts
}

fn faults_of_events(events: &[Event]) -> BTreeMap<(u32, Op), u64> {
    let accesses: Vec<_> = events
        .iter()
        .map(|event| (event.msr.0, event.op, event.did.is_fault()))
        .collect();
    faults(&accesses)
}

fn faults_of_summary(summary: &Value) -> BTreeMap<(u32, Op), u64> {
    let row = |row: &Value| {
        let op = if text(row, "op") == "rdmsr" {
            Op::Read
        } else {
            Op::Write
        };
        let msr = u32::from_str_radix(text(row, "msr").trim_start_matches("0x"), 16).unwrap();
        ((msr, op), count(row, "faulted"))
    };
    let rows = list(summary, "by_msr").iter().map(row);
    rows.filter(|(_, count)| *count > 0).collect()
}

#[test]
fn each_fault_that_the_guest_prints_is_in_the_trace_and_in_the_summary_and_no_other_is() {
    if !kvm_opens() {
        return;
    }
    let accesses = accesses();
    let policy = ["-p", "policy.toml"];
    let modes: [(&str, &[&str]); 5] = [
        ("enforced", &policy),
        ("audit", &["-p", "policy.toml", "--audit"]),
        ("learn", &["--learn"]),
        ("ignore unknown", &["-p", "policy.toml", "--ignore-unknown"]),
        ("nothing but the kernel", &["-p", "allow.toml"]),
    ];
    for (name, options) in modes {
        let folder = with_policy(POLICY);
        fs::write(folder.path().join("allow.toml"), "version = 1\ndefault = \"allow\"\n").unwrap();
        let options = [options, &["--trace", "trace.jsonl", "--json", "--rip"]].concat();
        let ran = under(&folder, &options, &accesses).code(0);
        let printed = printed(&ran);
        assert_eq!(printed.len(), 64);
        let expected = faults(&printed);
        assert!(expected.len() > 3, "{name}: {expected:?}");
        let (_, events) = traced(&folder);
        assert_eq!(faults_of_events(&events), expected, "{name}: trace\n{events:#?}");
        assert_eq!(faults_of_summary(&summary(&ran)), expected, "{name}: summary");
        for event in events.iter().filter(|event| event.did == Disposition::Fault) {
            assert!(event.rip.is_some_and(|rip| rip >= 0x8000), "{name}: {event:?}");
        }
        // Each fault stands where the guest met it.
        let order = |faults: Vec<(u32, Op)>| faults;
        let in_trace = events
            .iter()
            .filter(|event| event.did.is_fault())
            .map(|event| (event.msr.0, event.op));
        let in_print = printed
            .iter()
            .filter(|(.., fault)| *fault)
            .map(|(msr, op, _)| (*msr, *op));
        assert_eq!(order(in_trace.collect()), order(in_print.collect()), "{name}");
        if name == "learn" {
            learned(&folder, &printed);
        }
    }
}

/// What is learned allows what was served, and names what faulted.
fn learned(folder: &Folder, printed: &[(u32, Op, bool)]) {
    let learned = folder.run(&["learn", "--json", "trace.jsonl"]).code(0).json();
    let faulted: BTreeSet<(String, String)> = list(&learned, "faulted")
        .iter()
        .map(|row| (text(row, "msr").to_owned(), text(row, "op").to_owned()))
        .collect();
    let expected = printed.iter().filter(|(.., fault)| *fault);
    let expected = expected
        .map(|(msr, op, _)| (format!("{msr:#x}"), op.name().to_owned()))
        .collect();
    assert_eq!(faulted, expected);
    fs::write(folder.path().join("learned.toml"), text(&learned, "policy")).unwrap();
    let each: BTreeSet<(u32, Op)> = printed.iter().map(|(msr, op, _)| (*msr, *op)).collect();
    for (msr, op) in each {
        let explained = folder
            .run(&["explain", "--json", "learned.toml", &format!("{msr:#x}"), op_word(op)])
            .json();
        let served = printed.contains(&(msr, op, false));
        assert_eq!(
            text(&explained, "action") == "allow",
            served,
            "{msr:#x} {op} {explained:#}"
        );
    }
}

fn op_word(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write => "write",
    }
}

#[test]
fn an_audit_tells_what_was_served_and_beside_it_what_the_policy_would_do() {
    if !kvm_opens() {
        return;
    }
    let folder = with_policy("default = \"deny\"\n");
    let options = ["-p", "policy.toml", "--audit", "--trace", "trace.jsonl"];
    let ran = under(&folder, &options, "r:0x174 w:0x174=8 r:0xdead").code(0);
    assert_eq!(
        seen(&ran),
        ["rdmsr 0x174 0x0", "wrmsr 0x174 done", "rdmsr 0xdead fault"]
    );
    ran.says(&["allow; policy: deny", "rdmsr 0xdead: 1 time, KVM does not know the MSR"]);
    let events: Vec<_> = traced(&folder)
        .1
        .into_iter()
        .map(|event| (event.did, event.would))
        .collect();
    let would = Some(Disposition::Deny);
    assert_eq!(
        events,
        [
            (Disposition::Allow, would),
            (Disposition::Allow, would),
            (Disposition::Fault, would)
        ]
    );
    let report = folder.run(&["report", "-p", "policy.toml", "trace.jsonl"]).code(0);
    report.shows(&[
        "2 allowed, 0 emulated, 1 faulted",
        "denies 2 of the accesses that the guest was served with",
    ]);
    let learned = folder.run(&["learn", "trace.jsonl"]).code(0);
    learned.shows(&["IA32_SYSENTER_CS"]);
}

#[test]
fn nothing_is_learned_from_what_a_policy_decided() {
    if !kvm_opens() {
        return;
    }
    for options in [
        &["-p", "policy.toml", "--ignore-unknown"][..],
        &["-p", "policy.toml"],
        &["-p", "policy.toml", "--audit"],
    ] {
        let folder = with_policy(POLICY);
        under(
            &folder,
            &[options, &["--trace", "trace.jsonl"]].concat(),
            "r:0x8b r:0x174 r:0xdead",
        )
        .code(0);
        let ran = folder.run(&["learn", "trace.jsonl"]).code(2);
        ran.says(&["not all that the guest was served with is in it", "msrgate run --learn"]);
        let report = folder.run(&["report", "trace.jsonl"]).code(0);
        report.shows(&["what the policy left to the kernel is missing"]);
    }
}

#[test]
fn what_is_learned_of_a_random_guest_under_a_random_policy_gives_it_the_same() {
    if !kvm_opens() {
        return;
    }
    let mut seed = 12_u64;
    let mut below = |count: usize| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as usize % count
    };
    for _ in 0..3 {
        let mut policy = "default = \"deny\"\n".to_owned();
        for msr in &MSRS[2..] {
            // All that is answered, so that the trace has all.
            let read = ["\"deny\"", "\"zero\"", "{ value = 7 }", "{ shadow = 3 }"][below(4)];
            let write = ["\"deny\"", "\"ignore\"", "\"shadow\"", "{ only = [1, 2] }"][below(4)];
            policy += &format!("[[rule]]\nmsr = {msr:#x}\nread = {read}\nwrite = {write}\n");
        }
        let mut accesses = Vec::new();
        for _ in 0..60 {
            // Not the clock, and not the local APIC's place.
            let msr = MSRS[2 + below(MSRS.len() - 2)];
            accesses.push(if below(2) == 0 {
                format!("r:{msr:#x}")
            } else {
                format!("w:{msr:#x}={}", below(4))
            });
        }
        let accesses = accesses.join(" ");
        let folder = with_policy(&policy);
        for options in [&["-p", "policy.toml"][..], &["--learn"]] {
            let traced = [options, &["--trace", "trace.jsonl"]].concat();
            let before = under(&folder, &traced, &accesses).code(0);
            let learned = folder.run(&["learn", "trace.jsonl"]).code(0).out;
            folder.write("learned.toml", &learned);
            let after = under(&folder, &["-p", "learned.toml"], &accesses).code(0);
            assert_eq!(seen(&after), seen(&before), "{options:?}\n{policy}\n{learned}");
        }
    }
}
