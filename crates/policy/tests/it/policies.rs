//! The policies that come with msrgate: each is used here as its own comment says.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use msrgate_core::abi::MAX_RANGES;
use msrgate_core::{ReadAction, WriteAction};
use msrgate_plan::{By, DecisionMap, Differences, Plan};
use msrgate_policy::raw::RawInput;
use msrgate_policy::{Code, Diagnostic, Disk, Files, Policy, check, decompile};

use crate::agreement;

fn root() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// A policy, and over it the fragments that it is to be tried with.
struct Extended<'a>(&'a str);

impl Files for Extended<'_> {
    fn read(&self, path: &Path) -> Result<(PathBuf, String), String> {
        if path == Path::new("policy.toml") {
            Ok((path.to_path_buf(), self.0.to_owned()))
        } else {
            Disk.read(path)
        }
    }
}

fn toml_files(folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join(folder)).expect(folder);
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    paths
}

fn load(path: &Path) -> Policy {
    Policy::from_file(path).unwrap_or_else(|rejected| panic!("{}: {:#?}", path.display(), rejected.diagnostics))
}

/// The codes of what is to be mended.
fn open(policy: &Policy, map: &DecisionMap) -> Vec<&'static str> {
    let findings = check(policy, map, None).into_iter();
    findings
        .filter(Diagnostic::is_open)
        .map(|found| found.code.code())
        .collect()
}

fn map(policy: &Policy) -> DecisionMap {
    policy.decision_map(None).expect("needs no CPUID")
}

#[test]
fn each_policy_is_without_findings_and_its_plan_is_what_its_rules_say() {
    let paths = toml_files("policies");
    assert!(paths.len() >= 10, "{paths:?}");
    for path in paths {
        let policy = load(&path);
        let map = map(&policy);
        assert_eq!(open(&policy, &map), [""; 0], "{}", path.display());
        let plan = Plan::compile(&map).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(plan.filter().ranges().len() <= MAX_RANGES, "{}", path.display());
        agreement::assert_agreement(&policy, None, &map, Some(&plan));
    }
}

#[test]
fn each_policy_reads_back_as_it_is_printed() {
    for path in toml_files("policies") {
        let policy = load(&path);
        let printed = policy.to_string();
        let again = Policy::parse("printed.toml", &printed)
            .unwrap_or_else(|rejected| panic!("{}: {:#?}\n{printed}", path.display(), rejected.diagnostics));
        assert_eq!(policy, again, "{}", path.display());
        assert_eq!(map(&policy).hash(), map(&again).hash(), "{}", path.display());
    }
}

#[test]
fn each_policys_plan_decompiles_to_a_policy_that_is_equal_to_it_and_has_no_finding_more() {
    let codes = |policy: &Policy, map: &DecisionMap| -> BTreeSet<&str> {
        check(policy, map, None).iter().map(|found| found.code.code()).collect()
    };
    for path in toml_files("policies") {
        let policy = load(&path);
        let map = map(&policy);
        let plan = Plan::compile(&map).expect("a plan");
        for said in [Some(map.clone()), None] {
            let by = if said.is_some() { By::Actions } else { By::Verdicts };
            let given = RawInput {
                filter: plan.filter().clone(),
                plan: said,
                presets: Vec::new(),
                remarks: Vec::new(),
            };
            let text = decompile(&given).to_string();
            let again = Policy::parse("decompiled.toml", &text).expect(&text);
            let again_map = self::map(&again);
            assert_eq!(map.differences(&again_map, by), Differences::default(), "{text}");
            if by == By::Actions {
                let (mut found, before) = (codes(&again, &again_map), codes(&policy, &map));
                // A group may name what another rule says too, where that is shorter.
                found.remove("W006");
                assert!(found.is_subset(&before), "{found:?}, {before:?}: {text}");
            }
        }
    }
}

#[test]
fn each_policy_says_what_it_is_for_how_to_use_it_and_why_each_rule_is_there() {
    for path in toml_files("policies") {
        let policy = load(&path);
        let stem = path.file_stem().expect("a name").to_string_lossy().into_owned();
        assert_eq!(policy.name, stem);
        let text = fs::read_to_string(&path).expect("readable");
        let usage = format!("msrgate check policies/{stem}.toml\n");
        for wanted in ["# What it does: ", "# Limits: ", &usage] {
            assert!(text.contains(wanted), "{}: {wanted:?}", path.display());
        }
        for rule in &policy.rules {
            assert!(rule.why.is_some(), "{}: a rule without a `why`: {rule}", path.display());
        }
    }
}

#[test]
fn each_fragment_works_by_itself_under_a_policy_that_extends_it() {
    let paths = toml_files("policies/base");
    assert!(!paths.is_empty());
    for path in paths {
        let text = format!(
            "version = 1\ndefault = \"deny\"\nextends = {:?}\n",
            path.display().to_string()
        );
        let policy = Policy::load(Path::new("policy.toml"), &Extended(&text))
            .unwrap_or_else(|rejected| panic!("{}: {:#?}", path.display(), rejected.diagnostics));
        let map = map(&policy);
        let all: BTreeSet<u32> = (0..).take(policy.rules.len()).collect();
        let deciding = map.reads().iter().filter_map(|(_, decision)| decision.rule);
        let deciding: BTreeSet<u32> = deciding
            .chain(map.writes().iter().filter_map(|(_, decision)| decision.rule))
            .collect();
        assert_eq!(all, deciding, "{}: rules that never count", path.display());
        assert_eq!(open(&policy, &map), [""; 0], "{}", path.display());
        Plan::compile(&map).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let own = fs::read_to_string(&path).expect("readable");
        assert!(own.contains("extends = "), "{}: how to use it", path.display());
        assert!(policy.rules.iter().all(|rule| rule.why.is_some()), "{}", path.display());
    }
}

#[test]
fn linux_finds_all_that_it_does_unguarded_on_any_processor() {
    for name in ["linux-microvm", "linux-pc"] {
        let policy = load(&root().join(format!("policies/{name}.toml")));
        let findings = check(&policy, &map(&policy), None);
        let missing = findings.iter().find(|found| found.code == Code::NoGuestStarts);
        let missing = missing.map_or("", |found| &found.message);
        assert!(!missing.contains("Linux"), "{name}: {missing}");
    }
}

#[test]
fn linux_gets_nothing_that_tells_of_the_host_or_changes_it() {
    let map = map(&load(&root().join("policies/linux-pc.toml")));
    for name in [
        "MSR_PKG_ENERGY_STATUS",
        "PKG_ENERGY_STAT",
        "IA32_PPIN",
        "IA32_THERM_STATUS",
        "IA32_APERF",
        "IA32_PERF_CTL",
        "VM_CR",
    ] {
        let msr = msrgate_msrs::by_name(name).expect(name).msr;
        assert_eq!(map.reads().get(msr).action, ReadAction::Deny, "{name}");
        assert_eq!(map.writes().get(msr).action, WriteAction::Deny, "{name}");
    }
}
