//! Denials that stop operating systems, or leave them crippled.

use msrgate_core::{Op, ReadAction, WriteAction};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_msrs::{Need, System, Vendor};
use msrgate_plan::DecisionMap;

use super::by_rule::by_rule;
use super::names::some;
use crate::{Code, Diagnostic, Rule};

/// Needs that a rule denies, and a note on those that no rule allows.
///
/// A policy does not say which system it is for. A rule that denies what one needs is most likely a mistake; a default that
/// does may be meant for another guest.
pub(super) fn check(map: &DecisionMap, rules: &[(u32, &Rule)], cpuid: Option<&Cpuid>) -> Vec<Diagnostic> {
    let denied: Vec<&Need> = msrgate_msrs::needs()
        .iter()
        .filter(|need| applies(need, cpuid) && denies(map, need))
        .collect();
    let denied = by_rule(&denied, |need| decider(map, need));
    let by_rules = rules.iter();
    let by_rules = by_rules.filter_map(|(index, rule)| breaks(rule, denied.get(&Some(*index))?));
    let mut findings: Vec<Diagnostic> = by_rules.collect();
    if cpuid.is_none() {
        let of_interface = |need: &&Need| !applies(need, None) && denies(map, need);
        let offered: Vec<&Need> = msrgate_msrs::needs().iter().filter(of_interface).collect();
        let offered = by_rule(&offered, |need| decider(map, need));
        let by_rules = rules.iter();
        findings.extend(by_rules.filter_map(|(index, rule)| offered_elsewhere(rule, offered.get(&Some(*index))?)));
    }
    findings.extend(denied.get(&None).and_then(|needs| none_starts(needs)));
    findings
}

/// Whether a guest has the register. One of a hypervisor it has only where its CPUID says so.
fn applies(need: &Need, cpuid: Option<&Cpuid>) -> bool {
    let Some(entry) = msrgate_msrs::by_msr(need.msr) else {
        return true;
    };
    match cpuid {
        Some(cpuid) => entry.exists_on(cpuid) != Some(false),
        None => entry
            .vendors()
            .iter()
            .any(|vendor| matches!(vendor, Vendor::Intel | Vendor::Amd)),
    }
}

fn denies(map: &DecisionMap, need: &Need) -> bool {
    match need.op {
        Op::Read => map.reads().get(need.msr).action == ReadAction::Deny,
        Op::Write => map.writes().get(need.msr).action == WriteAction::Deny,
    }
}

fn decider(map: &DecisionMap, need: &Need) -> Option<u32> {
    match need.op {
        Op::Read => map.reads().get(need.msr).rule,
        Op::Write => map.writes().get(need.msr).rule,
    }
}

fn breaks(rule: &Rule, needs: &[&Need]) -> Option<Diagnostic> {
    let first = needs.first()?;
    let same = needs.iter().filter(|need| (need.msr, need.op) == (first.msr, first.op));
    let systems: Vec<String> = same.map(|need| need.system.to_string()).collect();
    let mut others: Vec<String> = needs.iter().map(|need| access(need)).collect();
    others.dedup();
    others.retain(|other| *other != access(first));
    let mut message = format!(
        "this rule denies {}, which {} {} unguarded: {}",
        access(first),
        systems.join(" and "),
        if systems.len() == 1 { "does" } else { "do" },
        first.why
    );
    if !others.is_empty() {
        message.push_str(&format!("; and also {}", some(&others)));
    }
    Some(Diagnostic::at(Code::BreaksGuest, rule.place.clone(), message).help(
        "allow it, or answer in another way than by #GP; where no such guest runs: `accept = { W008 = \"who runs\" }`",
    ))
}

/// A note on what a guest does where its CPUID offers a hypervisor's interface.
fn offered_elsewhere(rule: &Rule, needs: &[&Need]) -> Option<Diagnostic> {
    let first = needs.first()?;
    let message = format!(
        "this rule denies {}, which {} does unguarded where its CPUID shows the hypervisor's interface: {}",
        access(first),
        first.system,
        first.why
    );
    Some(
        Diagnostic::at(Code::InterfaceDenied, rule.place.clone(), message)
            .help("take the interface from the guest's CPUID too, as QEMU does with `kvmclock=off`"),
    )
}

fn none_starts(needs: &[&Need]) -> Option<Diagnostic> {
    let mut parts = Vec::new();
    for system in System::ALL {
        let of_system = needs.iter().filter(|need| need.system == system);
        let accesses: Vec<String> = of_system.map(|need| access(need)).collect();
        if !accesses.is_empty() {
            parts.push(format!("what {system} does unguarded: {}", some(&accesses)));
        }
    }
    (!parts.is_empty()).then(|| {
        let message = format!("no rule allows {}", parts.join("; nor "));
        Diagnostic::whole(Code::NoGuestStarts, message)
    })
}

/// `wrmsr IA32_EFER`.
fn access(need: &Need) -> String {
    match msrgate_msrs::by_msr(need.msr) {
        Some(entry) => format!("{} {}", need.op, entry.name()),
        None => format!("{} {}", need.op, need.msr),
    }
}
