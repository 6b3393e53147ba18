//! Families of MSRs, whose members the same is known of.

use std::collections::{BTreeMap, BTreeSet};
use std::format;
use std::string::{String, ToString};
use std::vec::Vec;

use msrgate_core::Op;

use crate::entry::bare;
use crate::*;

/// In what members of a family differ from the others, and why: a pattern of their names, facts, the reason.
const OTHERWISE: [(&str, &[&str], &str); 14] = [
    (
        "IA32_MTRR_PHYS*[89]",
        &["exists", "condition"],
        "IA32_MTRRCAP tells of more than eight pairs, and CPUID does not",
    ),
    (
        "IA32_MTRR_PHYS*[89]",
        &["vendors", "state", "passthrough"],
        "AMD and KVM have eight pairs",
    ),
    (
        "IA32_FIXED_CTR[3456]",
        &["state"],
        "KVM gives guests three fixed counters",
    ),
    (
        "IA32_PERF_GLOBAL_STATUS_SET",
        &["condition"],
        "on processors that are older than it, it is a register outside the cores",
    ),
    (
        "IA32_PERF_GLOBAL_INUSE",
        &["condition"],
        "on processors that are older than it, it is a register outside the cores",
    ),
    (
        "MSR_UNCORE_PERFEVTSEL[67]",
        &["classes"],
        "the others are registers of a core on the Pentium 4",
    ),
    (
        "IA32_VMX_CR[04]_FIXED1",
        &["state"],
        "KVM makes it from the guest's CPUID",
    ),
    ("IA32_VMX_PROCBASED_CTLS3", &["state"], "KVM gives it to no guest"),
    (
        "MSR_LASTBRANCH_16_FROM_IP",
        &["classes", "host"],
        "on some models it tells why the frequency is limited",
    ),
    (
        "IA32_PL0_SSP",
        &["classes"],
        "FRED has the same register for its stack level 0",
    ),
    (
        "IA32_L2_QOS_*",
        &["vendors"],
        "AMD shares the third level of caches alone",
    ),
    (
        "HV_X64_MSR_STIMER[123]_CONFIG",
        &["state"],
        "KVM_GET_MSR_INDEX_LIST names the first timer alone",
    ),
    (
        "MSR_AMD64_SMCA_MC*_SYND[12]",
        &["condition"],
        "CPUID does not tell which models have them",
    ),
    (
        "IBS_OP_CTL2",
        &["condition"],
        "the feature of IBS tells of its older registers alone",
    ),
];

type Fact = (&'static str, fn(&Entry) -> String);

/// What members of one number, such as IA32_PMC0 and IA32_PMC1, have in common.
const OF_NUMBERED: [Fact; 10] = [
    ("classes", |entry| format!("{:?}", entry.classes())),
    ("vendors", |entry| format!("{:?}", entry.vendors())),
    // A bank's condition ends in the count that it needs.
    ("exists", |entry| {
        let digits = |ch: char| ch.is_ascii_digit();
        format!(
            "{} {:?}",
            condition(entry),
            entry.exists().to_string().trim_end_matches(digits)
        )
    }),
    ("access", |entry| entry.access.to_string()),
    ("state", |entry| entry.state.to_string()),
    ("host", |entry| entry.host.to_string()),
    ("kept", |entry| format!("{:?}", entry.kept)),
    ("passthrough", |entry| {
        format!("{:?}", Op::ALL.map(|op| entry.passes_through(op)))
    }),
    ("bypass", |entry| {
        format!("{:?}", entry.bypasses().map(|bypass| bypass.says).collect::<Vec<_>>())
    }),
    ("needed", |entry| {
        format!(
            "{:?}",
            (entry.is_essential(), entry.is_changed_in_place(), entry.is_hot())
        )
    }),
];

/// What neighbours whose names begin alike, such as IA32_VMX_BASIC and IA32_VMX_MISC, have in common.
const OF_NEIGHBOURS: [Fact; 1] = [("condition", condition)];

/// Whether CPUID has a say in it.
fn condition(entry: &Entry) -> String {
    (*entry.exists() != Exists::Model).to_string()
}

/// The name with `#` for each number in it.
fn without_numbers(name: &str) -> String {
    let mut family = String::new();
    for letter in name.chars() {
        match letter.is_ascii_digit() {
            false => family.push(letter),
            true if family.ends_with('#') => {}
            true => family.push('#'),
        }
    }
    family
}

/// The first two words of a name.
fn first_words(name: &str) -> Vec<&str> {
    bare(name).split('_').take(2).collect()
}

/// Whether a name is of a pattern, which may have sets of characters, such as `[12]`.
fn is(name: &str, pattern: &str) -> bool {
    match pattern
        .split_once('[')
        .and_then(|(before, rest)| Some((before, rest.split_once(']')?)))
    {
        Some((before, (set, after))) => set.chars().any(|one| is(name, &format!("{before}{one}{after}"))),
        None => wildcard::matches(pattern.as_bytes(), name.as_bytes()),
    }
}

#[test]
fn members_of_a_family_agree_or_it_is_said_why_not() {
    let mut numbered: BTreeMap<String, Vec<&Entry>> = BTreeMap::new();
    let mut neighbours: Vec<Vec<&Entry>> = Vec::new();
    for entry in all() {
        numbered.entry(without_numbers(entry.name())).or_default().push(entry);
        let last = neighbours.last_mut().filter(|family| {
            let last = family[family.len() - 1];
            last.msr.0 + 1 == entry.msr.0 && first_words(last.name()) == first_words(entry.name())
        });
        match last {
            Some(family) => family.push(entry),
            None => neighbours.push(Vec::from([entry])),
        }
    }
    let numbered = numbered.values().map(|family| (family, OF_NUMBERED.as_slice()));
    let neighbours = neighbours.iter().map(|family| (family, OF_NEIGHBOURS.as_slice()));
    let (mut used, mut wrong) = (BTreeSet::new(), Vec::new());
    for (family, facts) in numbered.chain(neighbours) {
        for (fact, of) in facts {
            let otherwise = |entry: &Entry| {
                OTHERWISE
                    .iter()
                    .find(|(names, facts, _)| facts.contains(fact) && is(entry.name(), names))
            };
            let Some(first) = family.iter().find(|entry| otherwise(entry).is_none()) else {
                continue;
            };
            for entry in family.iter().filter(|entry| of(entry) != of(first)) {
                match otherwise(entry) {
                    Some((names, _, _)) => _ = used.insert((*names, *fact)),
                    None => wrong.push(format!(
                        "{fact}: {} {} has {}, and {} {}",
                        entry.msr,
                        entry.name(),
                        of(entry),
                        first.name(),
                        of(first)
                    )),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // An exception that is none hides a fault.
    for (names, facts, _) in OTHERWISE {
        for fact in facts {
            assert!(used.contains(&(names, *fact)), "{names}: {fact} is that of its family");
        }
    }
}

#[test]
fn numbers_of_a_family_have_no_gap() {
    let mut families: BTreeMap<(String, String), BTreeSet<u32>> = BTreeMap::new();
    for name in all().iter().flat_map(Entry::names) {
        for (at, _) in name.match_indices(|ch: char| ch.is_ascii_digit()) {
            let (before, rest) = name.split_at(at);
            let digits = rest.find(|ch: char| !ch.is_ascii_digit()).unwrap_or(rest.len());
            let (number, after) = rest.split_at(digits);
            if !before.ends_with(|ch: char| ch.is_ascii_digit()) {
                let key = (before.to_string(), after.to_string());
                families.entry(key).or_default().insert(number.parse().unwrap());
            }
        }
    }
    // A processor has no idle states of the numbers between.
    families.retain(|(before, _), _| !["MSR_PKG_C", "MSR_CORE_C", "MSR_PKGC"].contains(&before.as_str()));
    for ((before, after), numbers) in families.iter().filter(|(_, numbers)| numbers.len() > 2) {
        let (first, last) = (numbers.first().unwrap(), numbers.last().unwrap());
        let missing: Vec<u32> = (*first..*last).filter(|number| !numbers.contains(number)).collect();
        assert_eq!(missing, [], "{before}…{after}");
    }
}

#[test]
fn a_register_that_is_named_after_a_class_is_of_it() {
    // Words that mean more than the class.
    let ordinary = ["feature", "platform", "power", "thermal", "uncore"];
    for entry in all() {
        for word in entry.name().split(|ch: char| !ch.is_ascii_alphabetic()) {
            let class = word
                .parse::<Class>()
                .ok()
                .filter(|class| !ordinary.contains(&class.name()));
            assert!(
                class.is_none_or(|class| entry.classes().contains(&class)),
                "{}",
                entry.name()
            );
        }
    }
    assert_eq!(
        super::class("smm")
            .unwrap()
            .filter(|entry| (0x4e0..=0x4e3).contains(&entry.msr.0))
            .count(),
        3
    );
}
