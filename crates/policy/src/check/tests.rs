use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;

use super::*;
use crate::FitAdvice;

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
        .filter(|found| found.is_open())
        .map(|found| found.code.code())
        .collect()
}

/// A rule, as its text.
fn rule(msr: &str, rest: &str) -> String {
    format!("[[rule]]\nmsr = {msr}\n{rest}\n")
}

/// The beginning of a policy that denies all but one access.
fn not_all_denied() -> String {
    format!("default = \"deny\"\n{}", rule("0xc0000080", "read = \"allow\""))
}

#[test]
fn a_rule_that_never_counts_is_found() {
    let overshadowed =
        "default = \"deny\"\n[[rule]]\nmsr = \"0..=0xff\"\nread = \"allow\"\n[[rule]]\nmsr = 0x10\nread = \"zero\"\n";
    assert_eq!(codes(overshadowed), ["W001"]);
    let partly = "default = \"deny\"\n[[rule]]\nmsr = 0x10\nread = \"allow\"\n[[rule]]\nmsr = \"0..=0xff\"\nread = \"zero\"\nwrite = \"ignore\"\n";
    assert_eq!(codes(partly), [""; 0]);
}

#[test]
fn a_rule_of_which_a_wider_one_before_it_takes_a_part_is_found() {
    let wide = rule("\"0..=0xff\"", "read = \"allow\"");
    let hidden = |later: &str| codes(&format!("default = \"deny\"\n{wide}{later}"));
    assert_eq!(hidden(&rule("0x10", "read = \"zero\"\nwrite = \"ignore\"")), ["W005"]);
    assert_eq!(hidden(&rule("[0x10, 0x100]", "read = \"zero\"")), ["W005"]);
    assert_eq!(hidden(&rule("\"0xe0..=0x110\"", "read = \"zero\"")), ["W005"]);
    // A range that only begins there crosses it.
    assert_eq!(hidden(&rule("\"0xe0..=0x1ff\"", "read = \"zero\"")), ["W005"]);
    // A class behind an exception to it, the other direction: the language's ways.
    assert_eq!(hidden(&rule("0x10", "write = \"ignore\"")), [""; 0]);
    let override_one = rule("0x176", "write = { once = true }") + &rule("0x176", "read = \"allow\"\nwrite = \"allow\"");
    assert_eq!(codes(&format!("default = \"deny\"\n{override_one}")), [""; 0]);
}

#[test]
fn a_rule_that_says_again_what_one_before_it_says_is_found() {
    let two = rule("[0x10, 0x11]", "read = \"allow\"");
    assert_eq!(
        codes(&format!(
            "default = \"deny\"\n{two}{}",
            rule("\"0x10..=0x11\"", "read = \"allow\"")
        )),
        ["W006"]
    );
    assert_eq!(
        codes(&format!(
            "default = \"deny\"\n{two}{}",
            rule("[0x11, 0x12]", "read = \"allow\"")
        )),
        ["W006"]
    );
    assert_eq!(
        codes(&format!(
            "default = \"deny\"\n{two}{}",
            rule("\"0x11..=0x12\"", "read = \"allow\"")
        )),
        [""; 0]
    );
}

#[test]
fn a_rule_that_says_what_the_rest_says_anyway_is_found() {
    let head = not_all_denied();
    assert_eq!(codes(&format!("{head}{}", rule("0x10", "read = \"deny\""))), ["W007"]);
    assert_eq!(
        codes(&format!("{head}{}", rule("0x10", "read = \"deny\"\nlog = \"all\""))),
        [""; 0]
    );
    assert_eq!(
        codes(&format!(
            "{head}{}",
            rule("0x10", "read = \"deny\"\nwrite = \"ignore\"")
        )),
        [""; 0]
    );
    let before_its_class = rule("0x10", "read = \"zero\"") + &rule("\"0..=0xff\"", "read = \"zero\"");
    assert_eq!(codes(&format!("{head}{before_its_class}")), ["W007"]);
}

#[test]
fn what_is_accepted_does_not_count_and_what_accepts_nothing_does() {
    let (head, open) = (not_all_denied(), rule("0xc0000080", "read = \"allow\""));
    let useless = |accept: &str| rule("0x10", &format!("read = \"deny\"{accept}"));
    let accepted = useless("\naccept = { W007 = \"said for the reader\" }");
    assert_eq!(codes(&format!("{head}{accepted}")), [""; 0]);
    let by_the_policy = format!("default = \"deny\"\naccept = {{ W007 = \"said for the reader\" }}\n{open}");
    assert_eq!(codes(&format!("{by_the_policy}{}", useless(""))), [""; 0]);
    assert_eq!(codes(&format!("{by_the_policy}{accepted}")), ["W010"]);
    // A rule accepts for itself alone, and only the code that it names.
    let another = accepted.clone() + &rule("0x20", "read = \"deny\"");
    assert_eq!(codes(&format!("{head}{another}")), ["W007"]);
    let wrong = useless("\naccept = { W001 = \"said for the reader\" }");
    assert_eq!(codes(&format!("{head}{wrong}")), ["W007", "W010"]);
    // What is accepted may be there for another guest.
    let of_older = format!("default = \"deny\"\naccept = {{ W011 = \"older guests\" }}\n{open}");
    assert_eq!(codes(&of_older), [""; 0]);
    let of_intel = format!(
        "default = \"allow\"\naccept = {{ W003 = \"for a guest of Intel's\" }}\n{}",
        rule("0x17", "read = \"allow\"\nlog = \"all\"\nwhen = { vendor = \"intel\" }")
    );
    assert_eq!(found(&of_intel, &Cpuid::parse_raw(AMD).unwrap()), []);
    let policy = policy(&format!("{head}{accepted}"));
    let found = check(&policy, &policy.decision_map(None).unwrap(), None);
    assert_eq!(found[0].accepted.as_deref(), Some("said for the reader"));
}

/// Codes and messages for a guest with this CPUID.
fn found(rest: &str, cpuid: &Cpuid) -> Vec<(&'static str, String)> {
    let policy = policy(rest);
    let findings = check(&policy, &policy.decision_map(Some(cpuid)).unwrap(), Some(cpuid)).into_iter();
    let open = findings.filter(Diagnostic::is_open);
    open.map(|found| (found.code.code(), found.message)).collect()
}

#[test]
fn a_rule_that_denies_what_a_system_does_unguarded_is_found() {
    let allowing = |rules: &str| {
        let policy = policy(&format!("default = \"allow\"\n{rules}"));
        let findings = check(&policy, &policy.decision_map(None).unwrap(), None).into_iter();
        let open = findings.filter(Diagnostic::is_open);
        open.map(|found| (found.code.code(), found.message)).collect::<Vec<_>>()
    };
    let found = allowing(&rule("\"IA32_EFER\"", "write = \"deny\""));
    assert!(found.len() == 1 && found[0].0 == "W008", "{found:?}");
    for wanted in ["wrmsr IA32_EFER", "Linux and Windows and FreeBSD", "long mode"] {
        assert!(found[0].1.contains(wanted), "{}", found[0].1);
    }
    let found = allowing(&rule("\"@syscall\"", "write = \"deny\""));
    assert!(found.len() == 1 && found[0].1.contains("wrmsr IA32_LSTAR"), "{found:?}");
    // The other direction, an answer in another way, and what only a hypervisor has.
    assert_eq!(allowing(&rule("\"IA32_STAR\"", "read = \"deny\"")), []);
    assert_eq!(allowing(&rule("\"IA32_EFER\"", "write = \"ignore\""))[0].0, "W013");
    assert_eq!(allowing(&rule("\"@hyperv\"", "read = \"deny\"\nwrite = \"deny\"")), []);
}

#[test]
fn an_answer_in_place_of_a_register_that_the_processor_works_by_is_found() {
    let found = |rules: &str| codes(&format!("default = \"allow\"\n{rules}"));
    for (msr, action, is) in [
        ("IA32_LSTAR", "write = \"ignore\"", true),
        ("@syscall", "write = \"shadow\"\nread = { shadow = 0 }", true),
        ("MSR_KVM_SYSTEM_TIME_NEW", "write = \"ignore\"", true),
        ("IA32_EFER", "read = \"zero\"", true),
        ("IA32_APIC_BASE", "read = { value = 0xfee00900 }", true),
        ("IA32_LSTAR", "write = { once = true }", false),
        ("IA32_LSTAR", "read = \"zero\"", false),
        ("IA32_BIOS_SIGN_ID", "write = \"ignore\"", false),
        ("IA32_EFER", "read = { mask = { set = 0x1 } }", false),
    ] {
        let found = found(&rule(&format!("\"{msr}\""), action));
        assert_eq!(found.contains(&"W013"), is, "{msr} {action}: {found:?}");
    }
}

#[test]
fn an_index_where_nothing_has_msrs_is_found_where_a_known_one_is_near() {
    for (msr, meant) in [
        ("0xc000080", Some("IA32_EFER")),
        ("0xc00000080", None), // an error: it has 36 bits
        ("0xc00100150", None),
        ("0x4b5640d01", None),
        ("0x4b56401", None),
        ("0xc00010", None),
        ("0xc001015", Some("HWCR")),
        ("0x474f4f00", None),
        ("0x1ab", None),
    ] {
        let text = format!(
            "version = 1\ndefault = \"allow\"\n{}",
            rule(&format!("\"{msr}\""), "read = \"deny\"")
        );
        let Ok(policy) = Policy::parse("p.toml", &text) else {
            continue;
        };
        let findings = check(&policy, &policy.decision_map(None).unwrap(), None);
        let found = findings.iter().find(|found| found.code.code() == "W014");
        let help = found.and_then(|found| found.help.clone()).unwrap_or_default();
        assert_eq!(found.is_some(), meant.is_some(), "{msr}: {help}");
        assert!(help.contains(meant.unwrap_or_default()), "{msr}: {help}");
    }
}

#[test]
fn a_denied_interface_of_a_hypervisor_is_a_note_where_no_cpuid_tells() {
    let notes = |rules: &str| {
        let policy = policy(&format!("default = \"allow\"\n{rules}"));
        let findings = check(&policy, &policy.decision_map(None).unwrap(), None);
        let found = findings.into_iter().filter(|found| found.code.code() == "N023");
        found.map(|found| found.message).collect::<Vec<_>>()
    };
    let clock = notes(&rule("\"@kvmclock\"", "write = \"deny\""));
    assert!(clock.len() == 1 && clock[0].contains("Linux"), "{clock:?}");
    let hyperv = notes(&rule("\"@hyperv\"", "write = \"deny\""));
    assert!(hyperv.len() == 1 && hyperv[0].contains("Windows"), "{hyperv:?}");
    assert_eq!(notes(&rule("\"@kvmclock\"", "write = \"allow\"")), [""; 0]);
    assert_eq!(notes(&rule("\"IA32_EFER\"", "write = \"deny\"")), [""; 0]);
}

#[test]
fn what_a_system_needs_of_a_hypervisor_it_needs_where_cpuid_shows_it() {
    let leaves = |features: u32| {
        Cpuid::from_entries([
            (0, 0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            (0x4000_0000, 0, [0x4000_0005, 0x7263_694d, 0x666f_736f, 0x7648_2074]),
            (0x4000_0001, 0, [u32::from_le_bytes(*b"Hv#1"), 0, 0, 0]),
            (0x4000_0003, 0, [features, 0, 0, 0]),
        ])
    };
    let closed = rule("\"HV_X64_MSR_HYPERCALL\"", "read = \"deny\"\nwrite = \"deny\"");
    let breaks = |features| {
        let found = found(&format!("default = \"allow\"\n{closed}"), &leaves(features));
        found
            .iter()
            .any(|(code, message)| *code == "W008" && message.contains("Windows"))
    };
    assert!(breaks(1 << 5));
    assert!(!breaks(0));
}

#[test]
fn what_no_rule_allows_and_a_system_needs_is_a_note() {
    let note = |rules: &str| {
        let policy = policy(&format!("default = \"deny\"\n{rules}"));
        let findings = check(&policy, &policy.decision_map(None).unwrap(), None).into_iter();
        let mut notes = findings.filter(|found| found.code == Code::NoGuestStarts);
        notes.next().map(|found| found.message)
    };
    let all = note("").unwrap();
    for system in ["Linux does", "Windows does", "FreeBSD does"] {
        assert!(all.contains(system), "{all}");
    }
    assert_eq!(
        note(&rule("\"0..=0xffffffff\"", "read = \"allow\"\nwrite = \"allow\"")),
        None
    );
    // What a rule denies is the rule's finding.
    assert_eq!(
        note(&rule("\"0..=0xffffffff\"", "read = \"deny\"\nwrite = \"deny\"")),
        None
    );
}

#[test]
fn what_would_tell_of_the_host_is_found_where_a_rule_leaves_it_to_the_kernel() {
    let denying = |rules: &str| codes(&format!("default = \"deny\"\n{rules}"));
    for named in [
        "\"MSR_PKG_ENERGY_STATUS\"",
        "\"@rapl\"",
        "\"IA32_PPIN\"",
        "\"MSR_*_ENERGY_STATUS\"",
    ] {
        assert_eq!(denying(&rule(named, "read = \"allow\"")), ["W017"], "{named}");
    }
    // Once, by the rule that says more.
    let both = rule("[\"IA32_APERF\", \"MSR_PKG_ENERGY_STATUS\"]", "read = \"allow\"");
    assert_eq!(denying(&both), ["W009", "W017"]);
    let accepted = "read = \"allow\"\naccept = { W017 = \"the operator's guest\" }";
    assert_eq!(denying(&rule("\"MSR_PKG_ENERGY_STATUS\"", accepted)), [""; 0]);
    // What is not left to the kernel, what KVM keeps for the guest, what is no secret, and what nobody named.
    for (named, read) in [
        ("\"MSR_PKG_ENERGY_STATUS\"", "read = \"zero\""),
        ("\"IA32_MC0_ADDR\"", "read = \"allow\""),
        ("\"MSR_RAPL_POWER_UNIT\"", "read = \"allow\""),
        ("\"0x610..=0x620\"", "read = \"allow\""),
        ("\"@pmu\"", "read = \"allow\""),
    ] {
        assert_eq!(denying(&rule(named, read)), [""; 0], "{named}");
    }
    assert_eq!(codes("default = \"allow\"\n"), [""; 0]);
}

#[test]
fn what_tells_of_the_host_is_found_where_a_rule_means_it() {
    let denying = |rules: &str| codes(&format!("default = \"deny\"\n{rules}"));
    assert_eq!(denying(&rule("\"MSR_PKG_ENERGY_STATUS\"", "read = \"host\"")), ["W009"]);
    assert_eq!(denying(&rule("\"0x610..=0x620\"", "read = \"host\"")), ["W009"]);
    assert_eq!(denying(&rule("\"IA32_APERF\"", "read = \"allow\"")), ["W009"]);
    // How the host is set up is no secret; a range means no MSR of it.
    assert_eq!(denying(&rule("\"MSR_RAPL_POWER_UNIT\"", "read = \"host\"")), [""; 0]);
    assert_eq!(denying(&rule("\"0..=0xfff\"", "read = \"allow\"")), [""; 0]);
    // A rule before it answers otherwise.
    let policy = policy(&format!(
        "default = \"deny\"\n{}{}",
        rule("\"IA32_APERF\"", "read = \"zero\""),
        rule("\"@pstate\"", "read = \"allow\"")
    ));
    let found = check(&policy, &policy.decision_map(None).unwrap(), None);
    assert!(
        found[0].message.contains("IA32_MPERF") && !found[0].message.contains("APERF"),
        "{found:?}"
    );
}

#[test]
fn what_the_guests_cpuid_shows_and_the_policy_denies_is_found() {
    // Leaf 1 of this guest shows the MTRRs and nothing else.
    let amd = Cpuid::parse_raw(AMD).unwrap();
    let shown = |rest: &str| -> Vec<String> {
        let found = found(rest, &amd).into_iter().filter(|(code, _)| *code == "W012");
        found.map(|(_, message)| message).collect()
    };
    let closed = rule("\"@mtrr\"", "read = \"deny\"\nwrite = \"deny\"");
    let by_rule = shown(&format!("default = \"allow\"\n{closed}"));
    assert!(by_rule.len() == 1 && by_rule[0].contains("`mtrr`"), "{by_rule:?}");
    let by_default = shown("default = \"deny\"\n");
    assert!(
        by_default.len() == 1 && by_default[0].contains("no rule"),
        "{by_default:?}"
    );
    // One direction is enough to use it, one MSR to use the feature.
    let served = format!("default = \"deny\"\n{}", rule("\"IA32_MTRRCAP\"", "read = \"allow\""));
    assert_eq!(found(&served, &amd), []);
    let served = format!(
        "default = \"allow\"\n{}",
        rule("\"IA32_MTRR_DEF_TYPE\"", "write = \"deny\"")
    );
    assert_eq!(found(&served, &amd), []);
}

#[test]
fn what_a_rule_allows_by_name_and_the_guests_cpuid_lacks_is_found() {
    let amd = Cpuid::parse_raw(AMD).unwrap();
    let allows = |msr: &str| {
        found(
            &format!(
                "default = \"allow\"\ninvalid = \"ignore\"\naccept = {{ W007 = \"not the question\" }}\n{}",
                rule(msr, "read = \"allow\"\nwrite = \"allow\"")
            ),
            &amd,
        )
    };
    let one = allows("[\"IA32_TSC_DEADLINE\", \"IA32_MTRRCAP\"]");
    assert!(
        one.len() == 1 && one[0].0 == "W011" && one[0].1.contains("IA32_TSC_DEADLINE") && !one[0].1.contains("MTRRCAP"),
        "{one:?}"
    );
    assert_eq!(allows("0x6e0").len(), 1);
    assert_eq!(allows("\"@apic\""), []);
    assert_eq!(allows("\"IA32_MISC_ENABLE\""), []);
}

#[test]
fn what_a_snapshot_must_save_is_a_note_that_counts_for_nothing() {
    let policy = policy(&format!(
        "default = \"deny\"\n{}{}",
        rule("\"IA32_MTRR_DEF_TYPE\"", "write = \"allow\""),
        rule("0x176", "write = { once = true }")
    ));
    let found = check(&policy, &policy.decision_map(None).unwrap(), None);
    assert_eq!(
        found.iter().map(|found| found.code.code()).collect::<Vec<_>>(),
        ["N020", "N021", "N022"]
    );
    assert!(found[1].message.contains("IA32_MTRR_DEF_TYPE") && found[2].message.contains("IA32_SYSENTER_EIP"));
    assert!(!found.iter().any(Diagnostic::is_open));
}

#[test]
fn a_rule_about_msrs_that_the_cpu_model_lacks_is_told_so() {
    let policy = policy(&format!(
        "default = \"deny\"\nvalid = \"cpu-model\"\n{}",
        rule("\"IA32_MCG_CAP\"", "read = \"allow\"")
    ));
    let amd = Cpuid::parse_raw(AMD).unwrap();
    let found = check(&policy, &policy.decision_map(Some(&amd)).unwrap(), Some(&amd));
    assert!(
        found[0].code == Code::Unreachable && found[0].message.contains("CPUID"),
        "{found:?}"
    );
}

#[test]
fn a_rule_that_no_filter_can_enforce_is_found() {
    assert_eq!(
        codes("default = \"allow\"\n[[rule]]\nmsr = \"@x2apic\"\nwrite = \"deny\"\n"),
        ["W002"]
    );
    assert_eq!(
        codes("default = \"allow\"\n[[rule]]\nmsr = \"0x7f0..=0x8ff\"\nwrite = \"deny\"\n"),
        [""; 0]
    );
    let among_others = rule("[0x10, \"IA32_X2APIC_TPR\"]", "write = \"deny\"");
    assert_eq!(codes(&format!("default = \"allow\"\n{among_others}")), ["W002"]);
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
    let fit = FitAdvice::search(&policy, &policy.decision_map(None).unwrap(), None);
    let diagnostic = policy.explain_error(&error, Some(&fit));
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
    let help = diagnostic.help.unwrap();
    let change = "the smallest change that fits changes 1 access:\n  reads of 0x0: left to the kernel, against the rule at p.toml:3\n";
    assert!(help.starts_with(change), "{help}");
    let removal = "\nby leaving out the rule at p.toml:3, which changes 1 access";
    assert!(help.ends_with(removal), "{help}");
    assert!(!help.contains("before all other rules"), "{help}");
}

#[test]
fn the_rule_to_paste_makes_a_policy_fit() {
    let msrs: Vec<String> = (0..18).map(|i| format!("{:#x}", i * 0x10000)).collect();
    let rules = format!(
        "[[rule]]\nmsr = [{}]\nread = \"zero\"\nwrite = \"ignore\"\n",
        msrs.join(", ")
    );
    let refused = policy(&format!("default = \"allow\"\n{rules}"));
    let map = refused.decision_map(None).unwrap();
    let error = Plan::compile(&map).unwrap_err();
    let fit = FitAdvice::search(&refused, &map, None);
    assert_eq!(fit.change.as_ref().unwrap().accesses, 4);
    let help = refused.explain_error(&error, Some(&fit)).help.unwrap();
    let pasted = help
        .split("all other rules:")
        .nth(1)
        .unwrap()
        .split("\nby leaving")
        .next()
        .unwrap();
    let mended = policy(&format!("default = \"allow\"\n{pasted}\n{rules}"));
    let plan = Plan::compile(&mended.decision_map(None).unwrap()).unwrap();
    assert_eq!(plan.filter().ranges().len(), 16);
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
    assert!(!map.allows(Msr(0x3a), msrgate_core::Op::Write) || msrgate_msrs::by_msr(Msr(0x3a)).is_none());
    for msr in [0x8b, 0x2ff, 0x400, 0x1b, 0xc001_0015].map(Msr) {
        let read = policy.read(msr, Some(&amd)).unwrap().0;
        assert_eq!(read, map.reads().get(msr).action, "{msr}");
    }
}

#[test]
fn ranges_that_cross_are_told_and_those_within_one_another_are_exceptions() {
    let found = |first: &str, second: &str, action: &str| {
        let rules = format!(
            "[[rule]]\nmsr = \"{first}\"\nread = \"deny\"\n[[rule]]\nmsr = \"{second}\"\nread = \"{action}\"\n"
        );
        let policy = policy(&format!("default = \"allow\"\n{rules}"));
        let findings = check(&policy, &policy.decision_map(None).unwrap(), None);
        findings
            .into_iter()
            .filter(|found| found.code == Code::PartlyHidden)
            .count()
    };
    assert_eq!(found("0x300..=0x30f", "0x308..=0x320", "zero"), 1);
    assert_eq!(found("0x308..=0x320", "0x300..=0x30f", "zero"), 1);
    assert_eq!(found("0x308..=0x310", "0x300..=0x320", "zero"), 0, "an exception");
    assert_eq!(found("0x300..=0x30f", "0x310..=0x320", "zero"), 0, "side by side");
    assert_eq!(found("0x300..=0x30f", "0x308..=0x320", "deny"), 0, "the same");
}

#[test]
fn a_fixed_read_beside_a_write_that_the_kernel_keeps_is_found() {
    let of = |msr: &str, rest: &str| codes(&format!("default = \"allow\"\n{}", rule(msr, rest)));
    let zero = "read = \"zero\"";
    // The guest writes its entry point and its base, and reads zero.
    assert_eq!(of("0xc0000102", zero), ["W015"]);
    assert_eq!(of("\"IA32_LSTAR\"", zero), ["W015"]);
    assert_eq!(
        of(
            "[\"IA32_STAR\", \"IA32_FMASK\"]",
            "read = { value = 5 }\nwrite = \"allow\""
        ),
        ["W015"]
    );
    // What is changed in place has a warning that says more.
    assert_eq!(of("\"IA32_EFER\"", zero), ["W013"]);
    for (msr, rest) in [
        ("\"IA32_TSC\"", "read = \"zero\"\nwrite = \"ignore\""),
        ("0xc0000102", "read = \"zero\"\nwrite = { once = true }"),
        ("0xc0000102", "read = { mask = { set = 1 } }"),
        // Read-only, cleared before it is read, of no known MSR, a status that KVM does not keep.
        ("\"IA32_MTRRCAP\"", zero),
        ("0x8b", zero),
        ("0x1234", zero),
        ("\"MSR_RAPL_POWER_UNIT\"", zero),
        ("\"0xc0000080..=0xc0000102\"", zero),
    ] {
        assert_eq!(of(msr, rest), [""; 0], "{msr} {rest}");
    }
    let by_the_rest = rule("0xc0000102", zero) + &rule("\"@segment\"", "write = \"allow\"");
    assert_eq!(codes(&format!("default = \"deny\"\n{by_the_rest}")), ["W015"]);
}

#[test]
fn a_policy_that_denies_everything_is_found() {
    assert_eq!(codes("default = \"deny\"\n"), ["W016"]);
    assert_eq!(codes("default = \"deny\"\nunknown = \"ignore\"\n"), ["W016"]);
    assert_eq!(codes(&not_all_denied()), [""; 0]);
    let ignored = rule("\"0x10..=0x11\"", "write = \"ignore\"");
    assert_eq!(codes(&format!("default = \"deny\"\n{ignored}")), [""; 0]);
    assert_eq!(
        codes("default = \"deny\"\naccept = { W016 = \"Hyperlight's\" }\n"),
        [""; 0]
    );
    assert_eq!(codes("default = \"allow\"\n"), [""; 0]);
}

#[test]
fn a_handler_is_told_to_be_a_vmms() {
    let messages = |text: &str| {
        let policy = policy(text);
        let findings = check(&policy, &policy.decision_map(None).unwrap(), None).into_iter();
        let notes = findings.filter(|found| found.code == Code::HandlerNeeded);
        notes
            .map(|note| (note.place.is_some(), note.message))
            .collect::<Vec<_>>()
    };
    for rest in ["read = { handler = \"x\" }", "write = { handler = \"x\" }"] {
        let found = messages(&format!("default = \"allow\"\n{}", rule("0x10", rest)));
        assert_eq!(found.len(), 1);
        assert!(found[0].0 && found[0].1.contains("`x`"), "{found:?}");
    }
    let found = messages("default = \"allow\"\nunknown = { write = { handler = \"y\" } }\n");
    assert!(
        matches!(found.as_slice(), [(false, message)] if message.contains("`y`")),
        "{found:?}"
    );
    assert_eq!(messages("default = \"allow\"\n"), []);
}
