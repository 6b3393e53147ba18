//! Inputs that are large or clever take no more work than their size. Each of these took minutes, or for ever, where work
//! grows with the square of the size or faster.

use msrgate_policy::foreign::{Format, import};
use msrgate_policy::{Code, Diagnostic, Policy, check, decompile, raw};

fn policy(rules: impl Iterator<Item = String>) -> String {
    let rules: String = rules.map(|rule| format!("\n[[rule]]\n{rule}\n")).collect();
    format!("version = 1\ndefault = \"deny\"\n{rules}")
}

fn codes(findings: &[Diagnostic]) -> Vec<Code> {
    let mut codes: Vec<Code> = findings.iter().map(|found| found.code).collect();
    codes.dedup();
    codes
}

#[test]
fn c_of_many_macros_variables_and_filters_is_read_once() {
    let many = |part: &dyn Fn(u32) -> String| (0..100_000).map(part).collect::<String>();
    let filter = "static __u64 deny;\nstruct kvm_msr_filter f = { .ranges = { { 3, 1, 0x10, (__u8 *)&deny } } };\n";
    for (text, read) in [
        (many(&|n| format!("#define A{n} (1 | 2)\n")), true),
        (many(&|n| format!("static __u64 a{n}; /* */ ")), true),
        (many(&|n| format!("struct kvm_msr_filter f{n} = {{}};\n")), false),
        (many(&|_| "kvm_msr_filter ".to_owned()), false),
        ("(".repeat(200_000), false),
    ] {
        let given = raw::read(format!("{filter}{text}").as_bytes());
        assert_eq!(given.is_ok(), read, "{:?}", given.err());
    }
    let repeats = many(&|_| "'\\001' <repeats 20000 times>, ".to_owned());
    let text = format!("$1 = {{flags = 0, ranges = {{{{flags = 1, nmsrs = 1, base = 1, bitmap = 0x1 {repeats}");
    assert!(raw::read(text.as_bytes()).is_err());
}

#[test]
fn ranges_within_ranges_are_checked() {
    let rules = (0..60_000)
        .rev()
        .map(|n| format!("msr = \"{n}..={}\"\nread = \"allow\"", 200_000 - n));
    let policy = Policy::parse("p.toml", &policy(rules)).expect("a policy");
    let map = policy.decision_map(None).expect("a map");
    // Each rule decides the MSRs around those of the rules before it.
    let findings = check(&policy, &map, None);
    assert!(!codes(&findings).contains(&Code::Unreachable));
}

#[test]
fn rules_that_each_accept_something_are_checked() {
    let rules = (0..80_000).map(|n| format!("msr = {n}\nread = \"deny\"\naccept = {{ W007 = \"a\" }}"));
    let policy = Policy::parse("p.toml", &policy(rules)).expect("a policy");
    let map = policy.decision_map(None).expect("a map");
    let findings = check(&policy, &map, None);
    let accepted = findings
        .iter()
        .filter(|found| found.accepted.is_some() && found.code == Code::Useless);
    assert!(accepted.count() > 70_000);
}

#[test]
fn a_glob_of_many_stars_is_matched() {
    let stars = "*".repeat(8 << 20);
    let rules = [format!("msr = \"{stars}IA32_TSC{stars}\"\nread = \"allow\"")];
    let policy = Policy::parse("p.toml", &policy(rules.into_iter())).expect("a policy");
    assert!(policy.rules[0].ranges().iter().any(|range| range.first().0 == 0x10));
}

#[test]
fn findings_on_one_long_line_have_their_columns() {
    let rules: Vec<String> = (0..50_000)
        .map(|n| format!("{{msr=\"NO{n}\",read=\"deny\"}}"))
        .collect();
    let text = format!("version = 1\ndefault = \"deny\"\nrule = [{}]\n", rules.join(","));
    let rejected = Policy::parse("p.toml", &text).expect_err("these are no MSRs");
    assert_eq!(rejected.diagnostics.len(), rules.len());
    let mut column = "rule = [{msr=".len() + 1;
    for (found, rule) in rejected.diagnostics.iter().zip(&rules) {
        let place = found.place.as_ref().expect("a place");
        assert_eq!(rejected.sources[0].line_column(place.span.start), (3, column));
        column += rule.len() + 1;
    }
    assert!(rejected.diagnostics[0].help.is_some());
}

#[test]
fn other_tools_lists_are_read() {
    let count = 100_000;
    let flags: String = (0..count)
        .map(|n| format!("index={n},type=r,action=pass,filter=yes\n"))
        .collect();
    let list: String = (0..count).map(|n| format!("{n:#x} {:#x}\n", n + 1)).collect();
    let modifiers: Vec<String> = (0..count)
        .map(|n| format!("{{\"addr\":\"{n}\",\"bitmap\":\"x{n:b}\"}}"))
        .collect();
    let template = format!("{{\"msr_modifiers\":[{}]}}", modifiers.join(","));
    for (format, text) in [
        (Format::Crosvm, flags),
        (Format::MsrSafe, list),
        (Format::Firecracker, template),
    ] {
        let imported = import(format, &text).expect("a list");
        assert_eq!(imported.msrs.len(), count);
        let text = imported.to_string();
        assert!(text.matches("[[rule]]").count() > 0, "{}", format.name());
    }
}

#[test]
fn more_ranges_than_any_filter_needs_are_refused() {
    let rules = (0..5_000).map(|_| "msr = \"*\"\nread = \"deny\"".to_owned());
    let rejected = Policy::parse("p.toml", &policy(rules)).expect_err("far too many");
    assert!(codes(&rejected.diagnostics).contains(&Code::TooManyMsrs));
    let message = &rejected
        .diagnostics
        .iter()
        .find(|found| found.code == Code::TooManyMsrs)
        .expect("it")
        .message;
    assert!(message.contains("524288"), "{message}");
    // A policy of single MSRs may have a hundred thousand.
    let rules = (0..100_000).map(|n| format!("msr = {}\nread = \"allow\"", n * 2));
    assert_eq!(
        Policy::parse("p.toml", &policy(rules)).expect("a policy").rules.len(),
        100_000
    );
}

#[test]
fn a_plan_of_many_different_answers_is_decompiled() {
    let count = 8 * 12288 / 2;
    let actions: Vec<String> = (0..count)
        .map(|n| {
            let msr = n * 2;
            format!(r#"{{"first":"{msr}","last":"{msr}","op":"rdmsr","action":"value","value":"{n}"}}"#)
        })
        .collect();
    let bitmaps: Vec<String> = (0..8)
        .map(|slot| {
            let (base, bitmap) = (slot * 12288, "aa".repeat(12288 / 8));
            format!(r#"{{"base":{base},"nmsrs":12288,"flags":1,"bitmap":"{bitmap}"}}"#)
        })
        .collect();
    let plan = format!(
        r#"{{"default":"allow","ranges":[{}],"actions":[{}],"unknown":{{"read":"deny","write":"deny"}},"invalid":{{"read":"deny","write":"deny"}}}}"#,
        bitmaps.join(","),
        actions.join(",")
    );
    let given = raw::read(plan.as_bytes()).unwrap_or_else(|error| panic!("{error}"));
    let decompiled = decompile(&given);
    assert_eq!(decompiled.rules.len(), count);
    let map = Policy::parse("p.toml", &decompiled.to_string())
        .expect("a policy")
        .decision_map(None)
        .expect("a map");
    assert!(
        map.differences(given.plan.as_ref().expect("a plan"), msrgate_plan::By::Actions)
            .is_empty()
    );
}
