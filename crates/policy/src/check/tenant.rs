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
    let decided = |(index, rule): &(u32, &Rule)| {
        let secret = secret.get(&Some(*index))?;
        Some(
            tells_of_host(rule, secret)
                .into_iter()
                .chain(leaves_secret(rule, secret)),
        )
    };
    rules.iter().filter_map(decided).flatten().collect()
}

/// What whoever saves a guest of this policy must know.
pub(super) fn notes(map: &DecisionMap) -> Vec<Diagnostic> {
    unlisted(map).into_iter().chain(kept(map)).collect()
}

/// `secret` are the MSRs that tell of the host and of which the rule decides reads.
fn tells_of_host(rule: &Rule, secret: &[&Entry]) -> Option<Diagnostic> {
    let told: Vec<&Entry> = match rule.read.as_ref().map(|read| (read.source(), read.needs_exit())) {
        Some((ReadSource::Host, _)) => secret.iter().filter(|entry| names(rule, entry)).copied().collect(),
        Some((ReadSource::Register, false)) => {
            let reaches = |entry: &&&Entry| {
                let meant = rule.msrs.iter().any(|pattern| means(pattern, entry));
                entry.hardware_reaches_guest() && meant
            };
            secret.iter().filter(reaches).copied().collect()
        }
        _ => Vec::new(),
    };
    if told.is_empty() {
        return None;
    }
    let how = match rule.read.as_ref().map(ReadAction::source) {
        Some(ReadSource::Host) => "gives the guest the physical CPU's",
        _ => "lets the guest have the physical CPU's, where the VMM turns exits off,",
    };
    let message = format!("this rule {how} {}: {}", named(&told), what(&told));
    Some(Diagnostic::at(Code::TellsOfHost, rule.place.clone(), message).help(
        "answer with `zero`, or with a handler that gives the guest its own share; where the guest is the operator's: \
         `accept = { W009 = \"who may know\" }`",
    ))
}

/// Finds a rule by which reads show registers that KVM has a value of its own for, or does not know.
fn leaves_secret(rule: &Rule, secret: &[&Entry]) -> Option<Diagnostic> {
    if rule.read.as_ref().map(ReadAction::source) != Some(ReadSource::Register) {
        return None;
    }
    let hidden = |entry: &&Entry| !entry.hardware_reaches_guest() && entry.state == State::Nothing && entry.is_secret();
    // A class or a glob means such registers where at least half of it are such.
    let mostly = |pattern: &&Pattern| {
        let all: Vec<&Entry> = pattern.ranges().into_iter().flat_map(msrgate_msrs::within).collect();
        all.iter().copied().filter(hidden).count() * 2 >= all.len()
    };
    let named_so = |entry: &&Entry| {
        let patterns = rule.msrs.iter().filter(mostly);
        patterns.into_iter().any(|pattern| means(pattern, entry))
    };
    let left: Vec<&Entry> = secret.iter().copied().filter(hidden).filter(named_so).collect();
    if left.is_empty() {
        return None;
    }
    let message = format!(
        "this rule leaves {} to the kernel, of which the hardware's value tells {}",
        named(&left),
        what(&left)
    );
    Some(Diagnostic::at(Code::LeavesSecret, rule.place.clone(), message).help(
        "answer with `zero`, which depends on no kernel and no VMM; where the guest is the operator's: \
         `accept = { W017 = \"who may know\" }`",
    ))
}

/// Whether a rule names the MSR in whatever way.
fn names(rule: &Rule, entry: &Entry) -> bool {
    let has = |pattern: &Pattern| pattern.ranges().iter().any(|range| range.contains(entry.msr));
    rule.msrs.iter().any(has)
}

/// Whether a pattern names the MSR otherwise than by a range that it lies in: only of that can be said that it is meant.
fn means(pattern: &Pattern, entry: &Entry) -> bool {
    let meant = !matches!(pattern, Pattern::Range(range) if range.len() > 1);
    meant && pattern.ranges().iter().any(|range| range.contains(entry.msr))
}

/// What these tell.
fn what(told: &[&Entry]) -> String {
    let kinds = [Host::Identity, Host::Activity, Host::Trace];
    let kinds = kinds
        .iter()
        .filter(|kind| told.iter().any(|entry| entry.host == **kind));
    kinds.map(Host::to_string).collect::<Vec<_>>().join("; ")
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
            "what `shadow` and `once` remember of {} is not a state of KVM's",
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
