//! VMMs that close descriptors which are not theirs, and use the numbers again.

use super::*;

const BY_CPUID: &str = "default = \"deny\"\n[[rule]]\nmsr = \"0x277\"\nread = \"allow\"\nwrite = \"allow\"\n\
                        when = { vendor = \"intel\" }\n";

#[test]
fn each_of_two_vms_keeps_its_policy_where_the_vmm_closes_all_that_it_does_not_know() {
    for way in [Way::Dynamic, Way::Static, Way::Inline] {
        let Some(program) = vmm("descriptors", way) else {
            continue;
        };
        let folder = with_policy(BY_CPUID);
        let ran = Ran::of(&mut under(&folder, &["-p", "policy.toml"], &program, &["two"])).code(0);
        let expected = [
            "amd rdmsr 0x277 fault",
            "amd rdmsr 0x277 fault",
            "intel wrmsr 0x277 done",
            "intel rdmsr 0x277 0x606060606060606",
            // The first VM's filter is the first VM's.
            "amd rdmsr 0x277 fault",
            "intel rdmsr 0x277 fault",
            "intel wrmsr 0x277 done",
        ];
        assert_eq!(ran.out.lines().collect::<Vec<_>>(), expected, "{way:?} {}", ran.err);
    }
}

#[test]
fn a_vmm_has_the_descriptors_that_it_has_without_msrgate() {
    let Some(program) = vmm("descriptors", Way::Dynamic) else {
        return;
    };
    for options in [
        &["-p", "policy.toml"][..],
        &["-p", "policy.toml", "--trace", "trace.jsonl"],
        &["--learn", "--trace", "trace.jsonl"],
    ] {
        let folder = with_policy(ANSWERS);
        let opened = |ran: &Ran| -> Vec<String> {
            let lines = ran.out.lines().filter(|line| !line.contains("msr"));
            lines.map(str::to_owned).collect()
        };
        for what in ["disks", "each"] {
            let without = opened(&bare(&folder, &program, &[what]).code(0));
            assert!(!without.is_empty());
            let ran = Ran::of(&mut under(&folder, options, &program, &[what])).code(0);
            assert_eq!(opened(&ran), without, "{options:?} {}", ran.err);
        }
    }
}

#[test]
fn memory_and_trace_outlast_a_vmm_that_closes_all_that_it_does_not_know() {
    let Some(program) = vmm("descriptors", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    let options = ["-p", "policy.toml", "--ignore-unknown", "--trace", "trace.jsonl"];
    let ran = Ran::of(&mut under(&folder, &options, &program, &["each"])).code(0);
    let expected = [
        "each rdmsr 0x8b 0x5",
        "each wrmsr 0x175 done",
        "each wrmsr 0x175 fault",
        "each rdmsr 0x175 0x6",
        "each wrmsr 0x176 done",
        "each wrmsr 0x176 fault",
        "each rdmsr 0x176 0x133",
        "each wrmsr 0x174 done",
        "each rdmsr 0x174 0x9",
        "each rdmsr 0xdeadbeef 0x0",
    ];
    let lines = ran.out.lines().filter(|line| line.starts_with("each"));
    assert_eq!(lines.collect::<Vec<_>>(), expected, "{}", ran.err);
    // The read of 0x175 is the kernel's.
    assert_eq!(whole(&traced(&folder)), (9, 0));
}

#[test]
fn a_number_that_becomes_another_vcpus_gets_the_other_vcpus_answers() {
    for way in Way::IN_C {
        let Some(program) = vmm("descriptors", way) else {
            continue;
        };
        let folder = with_policy(ANSWERS);
        let ran = Ran::of(&mut under(&folder, &["-p", "policy.toml"], &program, &["renumbered"])).code(0);
        let expected = [
            "first wrmsr 0x174 done",
            "second wrmsr 0x174 done",
            "second rdmsr 0x174 0x2",
            "first rdmsr 0x174 0x1",
            "third rdmsr 0x174 0x11",
            "first rdmsr 0x174 0x1",
            "second rdmsr 0x174 0x2",
            "fourth rdmsr 0x174 0x11",
            "fourth rdmsr 0x8b 0x5",
        ];
        assert_eq!(ran.out.lines().collect::<Vec<_>>(), expected, "{way:?} {}", ran.err);
    }
}
