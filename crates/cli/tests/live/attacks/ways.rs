//! VMMs that are built in other ways: what their guests see is the same.

use super::*;

const ACCESSES: [&str; 16] = [
    "r:0x8b",
    "w:0x8b=7",
    "r:0x10a",
    "w:0x10a=1",
    "r:0x174",
    "w:0x174=5",
    "r:0x174",
    "w:0x175=6",
    "w:0x175=7",
    "r:0x175",
    "w:0x176=0x33",
    "w:0x176=0x34",
    "r:0x176",
    "r:0xdeadbeef",
    "w:0xdeadbeef=1",
    "a:0x8b=1000",
];

const ANSWERED: [&str; 16] = [
    "rdmsr 0x8b 0x5",
    "wrmsr 0x8b done",
    "rdmsr 0x10a fault",
    "wrmsr 0x10a fault",
    "rdmsr 0x174 0x11",
    "wrmsr 0x174 done",
    "rdmsr 0x174 0x5",
    "wrmsr 0x175 done",
    "wrmsr 0x175 fault",
    "rdmsr 0x175 0x6",
    "wrmsr 0x176 done",
    "wrmsr 0x176 fault",
    "rdmsr 0x176 0x133",
    "rdmsr 0xdeadbeef 0x0",
    "wrmsr 0xdeadbeef done",
    "rdmsr 0x8b 0x5",
];

/// Runs two vCPUs under a policy, and compares what each guest gets.
#[track_caller]
fn sees(way: Way, policy: &str, options: &[&str], accesses: &[&str], expected: &[&str]) -> Option<Ran> {
    let program = vmm("accesses", way)?;
    let folder = with_policy(policy);
    let options = [&["-p", "policy.toml"], options].concat();
    let ran = Ran::of(&mut under(&folder, &options, &program, &[&["2"], accesses].concat())).code(0);
    let lines: Vec<&str> = ran.out.lines().collect();
    assert_eq!(lines, [expected, expected].concat(), "{way:?} {}", ran.err);
    Some(ran)
}

#[test]
fn allow_and_deny_hold_however_the_vmm_is_built() {
    let policy = "default = \"deny\"\n[[rule]]\nmsr = \"0x174\"\nread = \"allow\"\nwrite = \"allow\"\n";
    for way in Way::ALL {
        let expected = [
            "wrmsr 0x174 done",
            "rdmsr 0x174 0x5",
            "rdmsr 0x175 fault",
            "wrmsr 0x175 fault",
        ];
        let accesses = ["w:0x174=5", "r:0x174", "r:0x175", "w:0x175=1"];
        if let Some(ran) = sees(way, policy, &[], &accesses, &expected) {
            ran.says(&[
                "1 VM and 2 vCPUs, 4 accesses answered",
                "the guests got #GP 4 times",
                "rdmsr 0x175 IA32_SYSENTER_ESP: 2 times, the policy denies it",
                "wrmsr 0x175 IA32_SYSENTER_ESP: 2 times, the policy denies it",
            ]);
        }
    }
}

#[test]
fn fixed_answers_that_the_kernel_holds_hold_however_the_vmm_is_built() {
    for way in Way::ALL {
        let expected = ["rdmsr 0x8b 0x5", "wrmsr 0x8b done", "rdmsr 0x8b 0x5", "rdmsr 0x8b 0x5"];
        let accesses = ["r:0x8b", "w:0x8b=7", "r:0x8b", "a:0x8b=1000"];
        if let Some(ran) = sees(way, HELD, &[], &accesses, &expected) {
            ran.says(&["the kernel holds the policy's fixed answers of 0x8b"]);
        }
    }
}

#[test]
fn answers_reach_guests_however_the_vmm_is_built() {
    for way in Way::ALL {
        let options = ["--ignore-unknown", "--json"];
        let Some(ran) = sees(way, ANSWERS, &options, &ACCESSES, &ANSWERED) else {
            continue;
        };
        let told = summary(&ran);
        let once = list(&told, "by_msr").iter().find(|row| text(row, "msr") == "0x175");
        assert_eq!(count(once.unwrap(), "count"), 4, "{way:?} {told:#}");
        assert_eq!(
            (count(&told, "vms"), count(&told, "vcpus"), count(&told, "refused")),
            (1, 2, 0)
        );
        // With a trace nothing is held by the kernel.
        sees(
            way,
            ANSWERS,
            &["--ignore-unknown", "--trace", "trace.jsonl"],
            &ACCESSES,
            &ANSWERED,
        );
    }
}

#[test]
fn a_log_and_a_trace_have_each_access_however_the_vmm_is_built() {
    for way in Way::ALL {
        let policy =
            "default = \"allow\"\n[[rule]]\nmsr = \"0x174\"\nread = \"zero\"\nwrite = \"deny\"\nlog = \"all\"\n";
        let expected = ["rdmsr 0x174 0x0", "wrmsr 0x174 fault"];
        let Some(ran) = sees(way, policy, &[], &["r:0x174", "w:0x174=3"], &expected) else {
            continue;
        };
        for line in [
            "rdmsr(0x174 IA32_SYSENTER_CS) = 0x0 zero",
            "wrmsr(0x174 IA32_SYSENTER_CS, 0x3) = #GP deny",
        ] {
            assert_eq!(ran.err.matches(line).count(), 2, "{way:?} {}", ran.err);
        }
    }
}

#[test]
fn learning_and_auditing_change_nothing_however_the_vmm_is_built() {
    let accesses = [
        "2",
        "r:0x174",
        "w:0x174=8",
        "r:0x174",
        "r:0x175",
        "r:0xdeadbeef",
        "w:0xdeadbeef=1",
    ];
    for way in Way::ALL {
        let Some(program) = vmm("accesses", way) else { continue };
        let folder = with_policy(ANSWERS);
        let without = bare(&folder, &program, &accesses).code(0);
        for options in [
            &["--learn", "--trace", "trace.jsonl", "--json"][..],
            &["-p", "policy.toml", "--audit", "--json"],
        ] {
            let ran = Ran::of(&mut under(&folder, options, &program, &accesses)).code(0);
            assert_eq!(ran.out, without.out, "{way:?} {options:?} {}", ran.err);
            let told = summary(&ran);
            let touched = |msr: &str| {
                list(&told, "by_msr")
                    .iter()
                    .filter(|row| text(row, "msr") == msr)
                    .count()
            };
            assert_eq!(touched("0x174"), 2, "{way:?} {options:?} {told:#}");
        }
    }
}
