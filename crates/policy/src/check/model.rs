//! Where a policy and what the guest's CPUID shows do not fit.

use std::collections::HashSet;

use msrgate_core::{Op, ReadAction, WriteAction};
use msrgate_msrs::Entry;
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::DecisionMap;

use super::by_rule::by_rule;
use super::names::{named, some};
use crate::{Code, Diagnostic, Pattern, Rule};

/// MSRs that a rule allows by name and the guest's CPUID does not show, and MSRs that the policy denies and it shows.
pub(super) fn check(map: &DecisionMap, rules: &[(u32, &Rule)], cpuid: &Cpuid) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    // A rule of an extended policy is written for many guests.
    for (index, rule) in rules.iter().filter(|(_, rule)| rule.place.source == 0) {
        findings.extend(allows_absent(map, rule, *index, cpuid));
    }
    let denied: Vec<&Entry> = shown(cpuid).filter(|entry| denies(map, entry)).collect();
    let of_rules = by_rule(&denied, |entry| decider(map, entry));
    for (index, rule) in rules {
        findings.extend(
            of_rules
                .get(&Some(*index))
                .and_then(|denied| denies_shown(rule, denied, cpuid)),
        );
    }
    findings.extend(denies_whole_features(map, &denied, cpuid));
    findings
}

fn allows_absent(map: &DecisionMap, rule: &Rule, index: u32, cpuid: &Cpuid) -> Option<Diagnostic> {
    let absent = |entry: &&Entry| {
        let features = entry.exists().features();
        let reads = map.reads().get(entry.msr);
        let writes = map.writes().get(entry.msr);
        let allowed = reads.rule == Some(index) && reads.action == ReadAction::Allow
            || writes.rule == Some(index) && writes.action == WriteAction::Allow;
        allowed && !features.is_empty() && features.iter().all(|feature| cpuid.has(feature) == Some(false))
    };
    let one = |pattern: &Pattern| match pattern.ranges().as_slice() {
        [range] if range.first() == range.last() => msrgate_msrs::by_msr(range.first()),
        _ => None,
    };
    let absent: Vec<&Entry> = rule.msrs.iter().filter_map(one).filter(absent).collect();
    if absent.is_empty() {
        return None;
    }
    let message = format!(
        "the guest's CPUID does not show {}, so {} for this guest",
        features_of(&absent, cpuid, false),
        match absent.as_slice() {
            [one] => format!("there is no {}", one.name()),
            _ => format!("these MSRs are not there: {}", named(&absent)),
        }
    );
    Some(
        Diagnostic::at(Code::AllowsAbsent, rule.place.clone(), message).help(format!(
            "let the rule hold for guests that have it, `when = {{ features = [\"{}\"] }}`, or leave the MSR out",
            absent
                .first()
                .and_then(|entry| entry.exists().features().first())
                .unwrap_or(&"")
        )),
    )
}

fn denies_shown(rule: &Rule, denied: &[&Entry], cpuid: &Cpuid) -> Option<Diagnostic> {
    let features = features_of(denied, cpuid, true);
    let message = format!(
        "the guest's CPUID shows {features}, and this rule denies {}",
        named(denied)
    );
    Some(
        Diagnostic::at(Code::DeniesShown, rule.place.clone(), message).help(format!(
            "take {features} from the guest's CPUID, or let it have the MSRs"
        )),
    )
}

/// Features of which the guest can use nothing, since no rule names their MSRs.
fn denies_whole_features(map: &DecisionMap, denied: &[&Entry], cpuid: &Cpuid) -> Option<Diagnostic> {
    let served: HashSet<&str> = shown(cpuid)
        .filter(|entry| !denies(map, entry) || decider(map, entry).is_some())
        .flat_map(|entry| entry.exists().features())
        .copied()
        .collect();
    let by_default = denied.iter().filter(|entry| {
        let features = entry.exists().features();
        !features.iter().any(|feature| served.contains(feature))
    });
    let by_default: Vec<&Entry> = by_default.copied().collect();
    if by_default.is_empty() {
        return None;
    }
    let features = features_of(&by_default, cpuid, true);
    let message = format!(
        "the guest's CPUID shows {features}, and no rule allows any of their MSRs: {}",
        named(&by_default)
    );
    Some(
        Diagnostic::whole(Code::DeniesShown, message)
            .help("take these features from the guest's CPUID, or allow their MSRs by a rule"),
    )
}

/// The MSRs of which CPUID says by a feature that they are there.
fn shown(cpuid: &Cpuid) -> impl Iterator<Item = &'static Entry> + use<'_> {
    // What CPUID's `tsc` promises is RDTSC, which no filter takes away.
    let deniable = |entry: &&Entry| entry.is_filterable() && entry.name() != "IA32_TSC";
    let by_feature = |entry: &&Entry| !entry.exists().features().is_empty() && entry.exists_on(cpuid) == Some(true);
    msrgate_msrs::all().iter().filter(deniable).filter(by_feature)
}

/// Whether each access that the manual has of the MSR is #GP.
fn denies(map: &DecisionMap, entry: &Entry) -> bool {
    entry.access.ops().iter().all(|op| match op {
        Op::Read => map.reads().get(entry.msr).action == ReadAction::Deny,
        Op::Write => map.writes().get(entry.msr).action == WriteAction::Deny,
    })
}

/// The rule that decides the first of them; `None` for the default.
fn decider(map: &DecisionMap, entry: &Entry) -> Option<u32> {
    match entry.access.ops().first() {
        Some(Op::Write) => map.writes().get(entry.msr).rule,
        _ => map.reads().get(entry.msr).rule,
    }
}

/// The features of which `entries` depend and that the guest has, or has not: ``"`mtrr` and `mca`"``.
fn features_of(entries: &[&Entry], cpuid: &Cpuid, has: bool) -> String {
    let mut features: Vec<&str> = Vec::new();
    for feature in entries.iter().flat_map(|entry| entry.exists().features()) {
        if cpuid.has(feature) == Some(has) && !features.contains(feature) {
            features.push(feature);
        }
    }
    let quoted: Vec<String> = features.iter().map(|feature| format!("`{feature}`")).collect();
    some(&quoted)
}
