use msrgate_plan::Plan;

use super::*;
use crate::cpuid::Cpuid;

const AMD: &str = "0x00000000 0x00: eax=0x0000000d ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65\n\
                   0x00000001 0x00: eax=0x00830f10 ebx=0x00000000 ecx=0x00000000 edx=0x00001000\n";

fn policy(rest: &str) -> Policy {
    let text = format!("version = 1\n{rest}");
    Policy::parse("p.toml", &text).unwrap_or_else(|rejected| panic!("{:#?}", rejected.diagnostics))
}

fn codes(rest: &str) -> Vec<&'static str> {
    let policy = policy(rest);
    let map = policy.decision_map(None).unwrap();
    check(&policy, &map, None)
        .iter()
        .map(|found| found.code.code())
        .collect()
}

#[test]
fn a_rule_that_never_counts_is_found() {
    let overshadowed =
        "default = \"deny\"\n[[rule]]\nmsr = \"0..=0xff\"\nread = \"allow\"\n[[rule]]\nmsr = 0x10\nread = \"zero\"\n";
    assert_eq!(codes(overshadowed), ["W001"]);
    let partly = "default = \"deny\"\n[[rule]]\nmsr = \"0..=0xff\"\nread = \"allow\"\n[[rule]]\nmsr = 0x10\nread = \"zero\"\nwrite = \"ignore\"\n";
    assert_eq!(codes(partly), [""; 0]);
}

#[test]
fn a_rule_that_no_filter_can_enforce_is_found() {
    assert_eq!(
        codes("default = \"allow\"\n[[rule]]\nmsr = \"@x2apic\"\nwrite = \"deny\"\n"),
        ["W002"]
    );
    assert_eq!(
        codes("default = \"allow\"\n[[rule]]\nmsr = \"0..=0x1fff\"\nwrite = \"deny\"\n"),
        [""; 0]
    );
}

#[test]
fn logging_what_the_kernel_answers_is_found() {
    assert_eq!(
        codes("default = \"deny\"\n[[rule]]\nmsr = 0x10\nread = \"allow\"\nlog = \"all\"\n"),
        ["W003"]
    );
    assert_eq!(
        codes("default = \"deny\"\n[[rule]]\nmsr = 0x10\nread = \"allow\"\nwrite = \"deny\"\nlog = \"all\"\n"),
        [""; 0]
    );
}

#[test]
fn half_a_shadow_register_is_found() {
    assert_eq!(
        codes("default = \"allow\"\n[[rule]]\nmsr = 0x10\nwrite = \"shadow\"\n"),
        ["W004"]
    );
    let halves =
        "default = \"allow\"\n[[rule]]\nmsr = 0x10\nwrite = \"shadow\"\n[[rule]]\nmsr = 0x10\nread = { shadow = 0 }\n";
    assert_eq!(codes(halves), [""; 0]);
}

#[test]
fn too_many_ranges_are_told_with_groups_and_places() {
    let rules: String = (0..17)
        .map(|i| format!("[[rule]]\nmsr = {}\nread = \"deny\"\n", i * 0x10000))
        .collect();
    let policy = policy(&format!("default = \"allow\"\n{rules}"));
    let error = Plan::compile(&policy.decision_map(None).unwrap()).unwrap_err();
    let diagnostic = policy.explain_error(&error);
    assert_eq!(diagnostic.code, Code::TooManyRanges);
    assert!(
        diagnostic.message.starts_with("the policy needs 17 filter ranges"),
        "{}",
        diagnostic.message
    );
    assert!(
        diagnostic
            .message
            .contains("reads of 0x20000: 1 access, rules at p.toml:9"),
        "{}",
        diagnostic.message
    );
}

#[test]
fn a_policy_that_asks_the_cpu_needs_its_cpuid() {
    let policy = policy(
        "default = \"allow\"\nvalid = \"cpu-model\"\n[[rule]]\nmsr = 0x8b\nread = \"zero\"\nwhen = { vendor = \"intel\" }\n",
    );
    let needed = policy.decision_map(None).unwrap_err();
    assert_eq!(needed.diagnostic().code, Code::CpuidNeeded);
    let amd = Cpuid::parse_raw(AMD).unwrap();
    let map = policy.decision_map(Some(&amd)).unwrap();
    // The rule is for Intel; MTRRs are there by CPUID, machine check banks are not.
    assert!(map.allows(Msr(0x8b), msrgate_core::Op::Read));
    assert!(map.allows(Msr(0x2ff), msrgate_core::Op::Read));
    assert!(!map.allows(Msr(0x400), msrgate_core::Op::Read));
    assert!(!map.allows(Msr(0x3a), msrgate_core::Op::Write) || crate::database::by_msr(Msr(0x3a)).is_none());
    for msr in [0x8b, 0x2ff, 0x400, 0x1b, 0xc001_0015].map(Msr) {
        let read = policy.read(msr, Some(&amd)).unwrap().0;
        assert_eq!(read, map.reads.get(msr).action, "{msr}");
    }
}
