//! What holds for every policy, tried on random ones.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use msrgate_core::{Filter, Log, Msr, MsrRange, OnLockedBits, Op, ReadAction, Verdict, WriteAction};
use msrgate_msrs::cpuid::{CpuVendor, Cpuid};
use msrgate_plan::{By, DecisionMap, Intervals, Plan, PlanError};
use msrgate_policy::raw::{self, RawInput};
use msrgate_policy::{
    Acceptance, Code, Diagnostic, Pattern, Place, Policy, PolicyErrors, Provider, Rule, Severity, Spill, Validity,
    When, check, decompile,
};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{self, Index, select};

use crate::agreement;

fn pattern() -> impl Strategy<Value = Pattern> {
    let named = select(vec![
        "IA32_TSC",
        "ia32_efer",
        "MSR_IA32_UCODE_REV",
        "IA32_SYSENTER_CS..=IA32_SYSENTER_EIP",
        "IA32_SYSENTER_*",
        "IA32_MC?_CTL",
        "*MTRR*",
        "@syscall",
        "@Mtrr",
        "@rapl",
        "@kvm",
        "@x2apic",
        "0..=0xffffffff",
        "4294967295",
    ])
    .prop_map(|text| Pattern::parse(text).expect(text));
    // Near each other, so that they overlap, and near the places where filters behave in their own way.
    let bases = vec![
        0,
        0x10,
        0x170,
        0x7f8,
        0x8f8,
        0x3000,
        0xc000_0080,
        0xc001_0000,
        0xffff_ffe0,
    ];
    let long = prop_oneof![8 => 0..40_u32, 1 => 12_200..12_400_u32];
    let range = (select(bases), 0..32_u32, long).prop_map(|(base, offset, length)| {
        let first = base + offset;
        let last = first.saturating_add(length);
        Pattern::Range(MsrRange::new(Msr(first), Msr(last)).expect("in order"))
    });
    prop_oneof![1 => named, 2 => range]
}

/// Any text; proptest's own leaves control characters out.
fn text() -> impl Strategy<Value = String> {
    "(?s).{0,40}"
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(u64::MAX), any::<u64>()]
}

fn handler() -> impl Strategy<Value = Arc<str>> {
    "[a-z0-9_.-]{1,8}".prop_map(Arc::from)
}

/// What needs no answer of the kernel, which is what `unknown` and `invalid` may say.
fn own_read_action() -> impl Strategy<Value = ReadAction> {
    prop_oneof![
        Just(ReadAction::Deny),
        value().prop_map(ReadAction::Value),
        value().prop_map(ReadAction::Shadow),
        Just(ReadAction::Host),
        handler().prop_map(ReadAction::Handler),
    ]
}

fn own_write_action() -> impl Strategy<Value = WriteAction> {
    prop_oneof![
        Just(WriteAction::Deny),
        Just(WriteAction::Ignore),
        Just(WriteAction::Shadow),
        handler().prop_map(WriteAction::Handler),
    ]
}

fn read_action() -> impl Strategy<Value = ReadAction> {
    prop_oneof![
        3 => Just(ReadAction::Allow),
        4 => own_read_action(),
        1 => (value(), value()).prop_map(|(keep, set)| ReadAction::Mask { keep, set }),
    ]
}

fn write_action() -> impl Strategy<Value = WriteAction> {
    let otherwise = select(vec![OnLockedBits::Deny, OnLockedBits::Drop]);
    prop_oneof![
        3 => Just(WriteAction::Allow),
        4 => own_write_action(),
        1 => (value(), otherwise).prop_map(|(may_change, otherwise)| WriteAction::Mask { may_change, otherwise }),
        1 => vec(value(), 1..4).prop_map(|values| WriteAction::Only(values.into())),
        1 => Just(WriteAction::Once),
    ]
}

fn when() -> impl Strategy<Value = When> {
    let vendors = select(vec![CpuVendor::Intel, CpuVendor::Amd, CpuVendor::Hygon]);
    let ranges = || {
        vec(
            (0..40_u32, 0..200_u32).prop_map(|(first, length)| (first, first + length)),
            0..3,
        )
    };
    let features = select(vec!["mtrr", "x2apic", "arch_capabilities"]).prop_map(str::to_owned);
    let some = (vec(vendors, 0..3), ranges(), ranges(), vec(features, 0..2));
    let some = some.prop_map(|(vendor, family, model, features)| When {
        vendor,
        family,
        model,
        features,
    });
    prop_oneof![3 => Just(When::default()), 1 => some]
}

fn rule() -> impl Strategy<Value = Rule> {
    let log = prop_oneof![
        Just(Log::None),
        Just(Log::All),
        Just(Log::First),
        (1..=u32::MAX).prop_map(Log::PerSecond)
    ];
    let actions = (option::of(read_action()), option::of(write_action()));
    let parts = (vec(pattern(), 1..4), actions, when(), log, option::of(text()), accept());
    parts.prop_map(|(msrs, (read, write), when, log, why, accept)| Rule {
        msrs,
        read,
        write,
        when,
        log,
        why,
        accept,
        place: Place { source: 0, span: 0..0 },
    })
}

fn accept() -> impl Strategy<Value = Vec<Acceptance>> {
    let warnings: Vec<Code> = Code::all()
        .filter(|code| code.severity() == Severity::Warning)
        .collect();
    let accepted = (sample::subsequence(warnings, 0..3), "[a-z].{0,20}");
    accepted.prop_map(|(codes, reason)| {
        let one = |code| Acceptance {
            code,
            reason: reason.clone(),
            place: Place { source: 0, span: 0..0 },
        };
        codes.into_iter().map(one).collect()
    })
}

fn providers() -> impl Strategy<Value = BTreeMap<String, Provider>> {
    let word = "[ -~é]{1,9}";
    let provider = prop_oneof![
        vec(word, 1..4).prop_map(Provider::Command),
        word.prop_map(|path| Provider::Socket(path.into())),
    ];
    btree_map("[a-zA-Z0-9_.-]{1,9}", provider, 0..3)
}

/// Any policy that one file can hold.
fn policy() -> impl Strategy<Value = Policy> {
    let default = select(vec![Verdict::Allow, Verdict::Deny]);
    let valid = prop_oneof![4 => Just(Validity::Any), 1 => Just(Validity::CpuModel)];
    let fallback = || {
        prop_oneof![
            1 => Just((ReadAction::Deny, WriteAction::Deny)),
            1 => (own_read_action(), own_write_action()),
        ]
    };
    let parts = (
        text(),
        default,
        fallback(),
        fallback(),
        (valid, select(vec![Spill::Refuse, Spill::UserSpace])),
        (accept(), providers()),
        vec(rule(), 0..10),
    );
    parts.prop_map(
        |(name, default, unknown, invalid, (valid, spill), (accept, providers), rules)| Policy {
            name,
            default,
            unknown,
            invalid,
            valid,
            spill,
            accept,
            providers,
            rules: without_repetition(rules),
            sources: Vec::new(),
        },
    )
}

/// Rules as the language takes them: none lists MSRs twice, or says again what one before it says.
fn without_repetition(mut rules: Vec<Rule>) -> Vec<Rule> {
    let mut decided = HashSet::new();
    for rule in &mut rules {
        let mut listed = HashSet::new();
        rule.msrs.retain(|pattern| listed.insert(pattern.ranges()));
        let mut ranges = rule.ranges();
        ranges.sort_unstable();
        let mut first = |op: Op| decided.insert((ranges.clone(), format!("{:?}", rule.when), op));
        if rule.read.is_some() && !first(Op::Read) {
            rule.read = None;
        }
        if rule.write.is_some() && !first(Op::Write) {
            rule.write = None;
        }
    }
    rules.retain(|rule| rule.read.is_some() || rule.write.is_some());
    rules
}

fn cpuid() -> impl Strategy<Value = Cpuid> {
    let intel = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];
    let amd = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
    (
        select(vec![intel, amd]),
        any::<u32>(),
        any::<[u32; 3]>(),
        any::<[u32; 4]>(),
    )
        .prop_map(|([ebx, ecx, edx], version, [b, c, d], leaf_7)| {
            Cpuid::from_entries([
                (0, 0, [0x16, ebx, ecx, edx]),
                (1, 0, [version, b, c, d]),
                (7, 0, leaf_7),
                (0x8000_0001, 0, [0, 0, c, d]),
            ])
        })
}

/// What each access gets, without the numbers of the rules that say so.
#[expect(clippy::type_complexity, reason = "two maps of the same shape")]
fn meaning(map: &DecisionMap) -> (Intervals<(ReadAction, Log)>, Intervals<(WriteAction, Log)>) {
    (
        map.reads().map(|decision| (decision.action.clone(), decision.log)),
        map.writes().map(|decision| (decision.action.clone(), decision.log)),
    )
}

fn normalised<V: Clone + Eq>(map: &Intervals<V>) -> Intervals<V> {
    let somewhere = map.get(Msr(0x1234)).clone();
    Intervals::first_match(somewhere, map.iter().map(|(range, value)| (range, value.clone())))
}

/// Where the rules stand that are reported to never count.
fn never_counting(findings: &[Diagnostic]) -> Vec<Place> {
    let never = findings.iter().filter(|found| match found.code {
        Code::Unreachable => true,
        Code::Repeated => found.message.ends_with("never counts"),
        _ => false,
    });
    never.filter_map(|found| found.place.clone()).collect()
}

/// That a refusal names errors, and places that are there.
fn assert_well_formed(rejected: &PolicyErrors) {
    assert!(!rejected.diagnostics.is_empty());
    for found in &rejected.diagnostics {
        assert_eq!(found.severity(), Severity::Error, "{found:?}");
        let second = found.second.as_ref().map(|(place, _)| place);
        for place in found.place.iter().chain(second) {
            let text = rejected.sources[place.source].text();
            assert!(text.get(place.span.clone()).is_some(), "{found:?} in {text:?}");
        }
    }
}

/// That a text is a policy which reads back as printed, or is refused for reasons; a panic is neither.
fn assert_read_or_refused(text: &str) {
    match Policy::load(Path::new("p.toml"), &("p.toml", text)) {
        Ok(policy) => {
            let printed = policy.to_string();
            let again = Policy::parse("printed.toml", &printed);
            assert_eq!(again.as_ref().ok(), Some(&policy), "{text}\n→\n{printed}\n{again:?}");
        }
        Err(rejected) => assert_well_formed(&rejected),
    }
}

/// The words of the language, in no order.
fn babble() -> impl Strategy<Value = String> {
    let words = select(vec![
        "version",
        "default",
        "unknown",
        "invalid",
        "valid",
        "extends",
        "name",
        "[[rule]]",
        "[rule]",
        "rule",
        "msr",
        "read",
        "write",
        "when",
        "log",
        "why",
        "accept",
        "W001",
        "mask",
        "keep",
        "set",
        "may_change",
        "otherwise",
        "only",
        "once",
        "value",
        "shadow",
        "handler",
        "per_second",
        "vendor",
        "family",
        "model",
        "features",
        "=",
        "=",
        "=",
        "=",
        ".",
        ",",
        "{",
        "}",
        "[",
        "]",
        "\n",
        "\n",
        "\n",
        "\"",
        "\"\"\"",
        "'",
        "#",
        "1",
        "-1",
        "0x10",
        "1.5",
        "true",
        "1979-05-27",
        "\"allow\"",
        "\"deny\"",
        "\"zero\"",
        "\"@pmu\"",
        "\"IA32_TSC\"",
        "\"0x10..=0x5\"",
        "\"0x10..\"",
        "\"..=\"",
        "\"*\"",
        "\"?\"",
        "\"@\"",
        "\"p.toml\"",
        "\"é\"",
        "\u{0}",
        "\"\\ud800\"",
    ]);
    vec(words, 0..60).prop_map(|words| words.join(" "))
}

/// A filter in JSON, as somebody else would write it.
fn filter_in_json(filter: &Filter) -> String {
    let ranges: Vec<String> = filter
        .ranges()
        .iter()
        .map(|range| {
            let bitmap: String = range.bitmap_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            let (base, nmsrs, flags) = (range.base(), range.nmsrs(), range.ops().bits());
            format!("{{\"base\":{base},\"nmsrs\":{nmsrs},\"flags\":{flags},\"bitmap\":\"{bitmap}\"}}")
        })
        .collect();
    let flags = u32::from(filter.default_verdict() == Verdict::Deny);
    format!("{{\"flags\":{flags},\"ranges\":[{}]}}", ranges.join(","))
}

/// The map of what `decompile` makes of this.
fn decompiled(given: &RawInput) -> DecisionMap {
    let text = decompile(given).to_string();
    let policy = Policy::parse("decompiled.toml", &text);
    let policy = policy.unwrap_or_else(|rejected| panic!("{text}\n{:#?}", rejected.diagnostics));
    policy.decision_map(None).expect("no CPUID needed")
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_and_its_filter_decompile_to_policies_that_are_equal_to_them(policy in policy(), cpuid in cpuid()) {
        let map = policy.decision_map(Some(&cpuid)).expect("a CPUID");
        if let Ok(plan) = Plan::compile(&map) {
            let given = RawInput { filter: plan.filter().clone(), plan: Some(map.clone()), presets: Vec::new(), remarks: Vec::new() };
            prop_assert_eq!(decompiled(&given).differences(&map, By::Actions), Default::default());

            let given = raw::read(filter_in_json(plan.filter()).as_bytes()).expect("what the kernel takes");
            prop_assert_eq!(&given.filter, plan.filter());
            let again = decompiled(&given);
            let raw = DecisionMap::of_filter(plan.filter());
            prop_assert_eq!(again.differences(&raw, By::Verdicts), Default::default());
            // And so is the filter that comes out of it.
            let plan = Plan::compile(&again).expect("what a filter says fits into one");
            prop_assert_eq!(DecisionMap::of_filter(plan.filter()).differences(&raw, By::Verdicts), Default::default());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_map_is_what_the_rules_say_and_a_plan_is_what_the_map_says(policy in policy(), cpuid in cpuid()) {
        let map = policy.decision_map(Some(&cpuid)).expect("a CPUID is there");
        let plan = match Plan::compile_for(&map, &policy.options()) {
            Ok(plan) => Some(plan),
            Err(PlanError::TooManyRanges { .. } | PlanError::Spill { .. } | PlanError::Table(_)) => None,
            Err(error) => panic!("{error}"),
        };
        agreement::assert_agreement(&policy, Some(&cpuid), &map, plan.as_ref());
    }

    #[test]
    fn a_policy_reads_back_as_it_is_printed(policy in policy(), cpuid in cpuid()) {
        let printed = policy.to_string();
        let again = Policy::parse("printed.toml", &printed);
        prop_assert_eq!(again.as_ref().ok(), Some(&policy), "{}\n{:?}", printed, again);
        let hash = |policy: &Policy| policy.decision_map(Some(&cpuid)).expect("a CPUID is there").hash();
        prop_assert_eq!(again.as_ref().map(&hash).ok(), Some(hash(&policy)));
    }

    #[test]
    fn a_map_made_from_a_map_is_that_map(policy in policy(), cpuid in cpuid()) {
        let map = policy.decision_map(Some(&cpuid)).expect("a CPUID is there");
        prop_assert_eq!(&normalised(map.reads()), map.reads());
        prop_assert_eq!(&normalised(map.writes()), map.writes());
    }

    #[test]
    fn rules_that_are_reported_as_unreachable_can_go(policy in policy(), cpuid in cpuid()) {
        let mut policy = Policy::parse("p.toml", &policy.to_string()).expect("reads back");
        let map = policy.decision_map(Some(&cpuid)).expect("a CPUID is there");
        let findings = check(&policy, &map, Some(&cpuid));
        let unreachable = never_counting(&findings);
        policy.rules.retain(|rule| !unreachable.contains(&rule.place));
        let without = policy.decision_map(Some(&cpuid)).expect("a CPUID is there");
        prop_assert_eq!(meaning(&map), meaning(&without));
        // And those that stay do count.
        let counting = |map: &DecisionMap| {
            let reads = map.reads().iter().filter_map(|(_, decision)| decision.rule);
            reads.chain(map.writes().iter().filter_map(|(_, decision)| decision.rule)).collect::<HashSet<u32>>()
        };
        let holding = policy.rules.iter().filter(|rule| rule.when.holds(&cpuid)).count();
        prop_assert_eq!(counting(&without).len(), holding);
    }

    #[test]
    fn a_rule_that_is_reported_as_useless_can_go(policy in policy(), cpuid in cpuid()) {
        let mut policy = Policy::parse("p.toml", &policy.to_string()).expect("reads back");
        let map = policy.decision_map(Some(&cpuid)).expect("a CPUID is there");
        // It is said of what is left when those are gone that never count.
        let unreachable = never_counting(&check(&policy, &map, Some(&cpuid)));
        policy.rules.retain(|rule| !unreachable.contains(&rule.place));
        let map = policy.decision_map(Some(&cpuid)).expect("a CPUID is there");
        for found in check(&policy, &map, Some(&cpuid)).iter().filter(|found| found.code == Code::Useless) {
            let mut without = policy.clone();
            without.rules.retain(|rule| Some(&rule.place) != found.place.as_ref());
            prop_assert_eq!(without.rules.len() + 1, policy.rules.len());
            let without = without.decision_map(Some(&cpuid)).expect("a CPUID is there");
            prop_assert_eq!(meaning(&map), meaning(&without));
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in text()) {
        assert_read_or_refused(&text);
    }

    #[test]
    fn no_order_of_the_languages_words_makes_the_parser_panic(
        start in select(vec!["", "extends = ", "unknown = ", "[[rule]]\nmsr = ", "[[rule]]\nread = ", "[[rule]]\nwrite = ",
            "[[rule]]\nwhen = ", "[[rule]]\nlog = ", "accept = "]),
        text in babble(),
    ) {
        assert_read_or_refused(&format!("version = 1\ndefault = \"deny\"\n{start}{text}"));
    }

    #[test]
    fn a_damaged_policy_is_read_or_refused(
        policy in policy(),
        damage in vec((any::<Index>(), 0..6_usize, prop_oneof![Just(String::new()), babble(), ".{0,3}"]), 1..4),
    ) {
        let mut text: Vec<char> = policy.to_string().chars().collect();
        for (place, removed, added) in damage {
            let from = place.index(text.len() + 1);
            let to = (from + removed).min(text.len());
            text.splice(from..to, added.chars());
        }
        assert_read_or_refused(&text.into_iter().collect::<String>());
    }

}
