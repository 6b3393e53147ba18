use msrgate_plan::{By, Plan};

use super::*;
use crate::{Policy, raw};

/// The policy that comes out where the filter of this one goes in, without its comments; it says the same.
fn through_a_filter(policy: &str) -> String {
    let policy = Policy::parse("policy.toml", &format!("version = 1\n{policy}")).expect("a policy");
    let map = policy.decision_map(None).expect("no CPUID");
    let plan = Plan::compile(&map).expect("a plan");
    let given = RawInput {
        filter: plan.filter().clone(),
        plan: None,
        presets: Vec::new(),
        remarks: Vec::new(),
    };
    let text = decompile(&given).to_string();
    let again = Policy::parse("decompiled.toml", &text).unwrap_or_else(|rejected| panic!("{text}\n{rejected:#?}"));
    let again = again.decision_map(None).expect("no CPUID");
    let found = again.differences(&DecisionMap::of_filter(plan.filter()), By::Verdicts);
    assert!(found.is_empty(), "{text}\n{found:#?}");
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .skip(2)
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn names_classes_globs_and_ranges_are_found() {
    for (from, to) in [
        (
            "default = \"deny\"\n[[rule]]\nmsr = [\"IA32_SYSENTER_*\", \"IA32_EFER\"]\nread = \"allow\"\nwrite = \"allow\"",
            "default = \"deny\"\n\n[[rule]]\nmsr   = [\"@sysenter\", \"IA32_EFER\"]\nread  = \"allow\"\nwrite = \"allow\"",
        ),
        (
            "default = \"allow\"\n[[rule]]\nmsr = \"@mtrr\"\nread = \"zero\"\nwrite = \"ignore\"",
            "default = \"allow\"\n\n[[rule]]\nmsr   = \"@mtrr\"\nread  = \"deny\"\nwrite = \"deny\"",
        ),
        (
            "default = \"allow\"\n[[rule]]\nmsr = \"MSR_TURBO_RATIO_LIMIT*\"\nread = \"deny\"",
            "default = \"allow\"\n\n[[rule]]\nmsr   = \"MSR_TURBO_RATIO_*\"\nread  = \"deny\"",
        ),
        (
            "default = \"deny\"\n[[rule]]\nmsr = \"0x10000..=0x10040\"\nwrite = \"allow\"",
            "default = \"deny\"\n\n[[rule]]\nmsr   = \"0x10000..=0x10040\"\nwrite = \"allow\"",
        ),
        ("default = \"allow\"", "default = \"allow\""),
        ("default = \"deny\"", "default = \"deny\""),
    ] {
        assert_eq!(through_a_filter(from), to);
    }
}

#[test]
fn a_rule_goes_before_another_where_that_is_shorter() {
    // Reads of a window are open, and writes of some of it.
    let text = through_a_filter(
        "default = \"deny\"\n[[rule]]\nmsr = \"0x0..=0x1fff\"\nread = \"allow\"\n\
         [[rule]]\nmsr = [0x8b, 0x10, 0x1b]\nwrite = \"allow\"",
    );
    assert_eq!(text.matches("[[rule]]").count(), 2, "{text}");
    assert!(text.contains("0x1fff\""), "{text}");
    // A window but for one class.
    let text = through_a_filter(
        "default = \"deny\"\n[[rule]]\nmsr = \"@mtrr\"\nread = \"deny\"\nwrite = \"deny\"\n\
         [[rule]]\nmsr = \"0x0..=0x7ff\"\nread = \"allow\"\nwrite = \"allow\"",
    );
    assert!(
        text.contains("msr   = \"@mtrr\"\nread  = \"deny\"\nwrite = \"deny\""),
        "{text}"
    );
}

#[test]
fn what_no_filter_stops_is_not_claimed_to_be_closed() {
    let closed = through_a_filter("default = \"allow\"\n[[rule]]\nmsr = \"0x0..=0x1fff\"\nread = \"deny\"");
    assert!(closed.contains("0x7ff") && closed.contains("0x900"), "{closed}");
    // Opening them is true.
    let open = through_a_filter("default = \"deny\"\n[[rule]]\nmsr = \"0x700..=0x9ff\"\nread = \"allow\"");
    assert!(!open.contains("0x7ff"), "{open}");
}

#[test]
fn a_filter_whose_bits_take_turns_comes_back_too() {
    for words in [vec![0x5555_5555_5555_5555_u64; 64], vec![0x0123_4567_89ab_cdef; 20]] {
        let bitmap: String = words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let text = format!(
            "{{\"default\":\"deny\",\"ranges\":[{{\"base\":\"0xc0000000\",\"nmsrs\":{},\"flags\":3,\"bitmap\":\"{bitmap}\"}}]}}",
            words.len() * 64
        );
        let given = raw::read(text.as_bytes()).expect("a filter");
        let text = decompile(&given).to_string();
        let again = Policy::parse("decompiled.toml", &text).expect("a policy");
        let again = again.decision_map(None).expect("no CPUID");
        assert!(
            again
                .differences(&DecisionMap::of_filter(&given.filter), By::Verdicts)
                .is_empty()
        );
    }
}
