//! What a policy lets one guest learn of others, and what must travel when a guest is saved.

use msrgate_core::{MsrRange, ReadAction, ReadSource, WriteTarget};
use msrgate_msrs::{Entry, Host, State};
use msrgate_plan::DecisionMap;

use super::by_rule::by_rule;
use super::names::{named, some};
use crate::{Code, Diagnostic, Pattern, Rule};

/// Rules by which a guest reads what tells of the host and its other guests.
pub(super) fn check(map: &DecisionMap, rules: &[(u32, &Rule)]) -> Vec<Diagnostic> {
    let secret: Vec<&Entry> = msrgate_msrs::all().iter().filter(|entry| entry.is_secret()).collect();
    let secret = by_rule(&secret, |entry| map.reads().get(entry.msr).rule);
    let decided = |(index, rule): &(u32, &Rule)| tells_of_host(rule, secret.get(&Some(*index))?);
    rules.iter().filter_map(decided).collect()
}

/// What whoever saves a guest of this policy must know.
pub(super) fn notes(map: &DecisionMap) -> Vec<Diagnostic> {
    unlisted(map).into_iter().chain(kept(map)).collect()
}

/// `secret` are the MSRs that tell of the host and of which the rule decides reads.
fn tells_of_host(rule: &Rule, secret: &[&Entry]) -> Option<Diagnostic> {
    // Only of what a rule names can be said that it is meant.
    let named_by_rule = |entry: &&&Entry| {
        let names = |pattern: &Pattern| pattern.ranges().iter().any(|range| range.contains(entry.msr));
        let meant = |pattern: &&Pattern| !matches!(pattern, Pattern::Range(range) if range.len() > 1);
        match rule.read.as_ref().map(|read| (read.source(), read.needs_exit())) {
            Some((ReadSource::Host, _)) => rule.msrs.iter().any(names),
            Some((ReadSource::Register, false)) => {
                entry.hardware_reaches_guest() && rule.msrs.iter().filter(meant).any(names)
            }
            _ => false,
        }
    };
    let told: Vec<&Entry> = secret.iter().filter(named_by_rule).copied().collect();
    if told.is_empty() {
        return None;
    }
    let mut what: Vec<String> = Vec::new();
    for kind in [Host::Identity, Host::Activity, Host::Trace] {
        if told.iter().any(|entry| entry.host == kind) {
            what.push(kind.to_string());
        }
    }
    let how = match rule.read.as_ref().map(ReadAction::source) {
        Some(ReadSource::Host) => "gives the guest the physical CPU's",
        _ => "lets the guest have the physical CPU's, where the VMM turns exits off,",
    };
    let message = format!("this rule {how} {}: {}", named(&told), what.join("; "));
    Some(Diagnostic::at(Code::TellsOfHost, rule.place.clone(), message).help(
        "answer with `zero`, or with a handler that gives the guest its own share; where the guest is the operator's: \
         `accept = { W009 = \"who may know\" }`",
    ))
}

fn unlisted(map: &DecisionMap) -> Option<Diagnostic> {
    let reaches_kernel = |entry: &&Entry| {
        let decision = map.writes().get(entry.msr);
        // What no rule names is as without a policy.
        decision.action.target() == WriteTarget::Register && decision.rule.is_some()
    };
    let unlisted = msrgate_msrs::all()
        .iter()
        .filter(|entry| entry.state == State::Unlisted && entry.holds_guest_state());
    let unlisted: Vec<&Entry> = unlisted.filter(reaches_kernel).collect();
    (!unlisted.is_empty()).then(|| {
        let message = format!(
            "the guest may write {}, which KVM_GET_MSR_INDEX_LIST does not name: a snapshot must save them too",
            named(&unlisted)
        );
        Diagnostic::whole(Code::StateUnlisted, message)
    })
}

fn kept(map: &DecisionMap) -> Option<Diagnostic> {
    let keeps = map.reads().zip(map.writes(), |read, write| {
        read.action.keeps().is_some() || write.action.keeps().is_some()
    });
    let kept = keeps.iter().filter(|(_, keeps)| **keeps);
    let kept: Vec<String> = kept.map(|(range, _)| name(range)).collect();
    (!kept.is_empty()).then(|| {
        let message = format!(
            "what `shadow` and `once` remember of {} is no state of KVM's",
            some(&kept)
        );
        Diagnostic::whole(Code::StateKept, message)
    })
}

/// The name of a single MSR that has one, else the range.
fn name(range: MsrRange) -> String {
    let single = msrgate_msrs::by_msr(range.first()).filter(|_| range.len() == 1);
    single.map_or_else(|| range.to_string(), |entry| entry.name().to_owned())
}
