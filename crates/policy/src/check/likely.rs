//! Answers by which a guest goes on and fails later, and places where there is no MSR.

use msrgate_core::{Msr, ReadAction, ReadSource, WriteAction, WriteTarget};
use msrgate_msrs::Entry;
use msrgate_plan::DecisionMap;

use super::names::named;
use crate::{Code, Diagnostic, Pattern, Rule};

pub(super) fn check(map: &DecisionMap, rules: &[(u32, &Rule)]) -> Vec<Diagnostic> {
    let made_up = rules.iter().filter_map(|(index, rule)| made_up(map, rule, *index));
    let nowhere = rules.iter().filter_map(|(_, rule)| nowhere(rule));
    let otherwise = rules
        .iter()
        .filter_map(|(index, rule)| reads_otherwise(map, rule, *index));
    made_up.chain(otherwise).chain(nowhere).collect()
}

/// A rule that takes a write, or makes a read up, of a register that the processor or KVM works by.
fn made_up(map: &DecisionMap, rule: &Rule, index: u32) -> Option<Diagnostic> {
    let made_up = |entry: &Entry| {
        let decision = map.reads().get(entry.msr);
        decision.rule == Some(index) && decision.action.source() == ReadSource::Policy
    };
    let written: Vec<&Entry> = named_by(rule, Entry::is_essential)
        .filter(|entry| {
            let decision = map.writes().get(entry.msr);
            decision.rule == Some(index)
                && decision.action.needs_exit()
                && decision.action.target() == WriteTarget::Elsewhere
        })
        .collect();
    let read: Vec<&Entry> = named_by(rule, Entry::is_changed_in_place)
        .filter(|entry| made_up(entry))
        .collect();
    let message = if !written.is_empty() {
        format!(
            "this rule takes writes of {} and keeps them from the register, by which the processor or KVM works: the guest \
             goes on as if it were set, and fails later or runs unprotected",
            named(&written)
        )
    } else if !read.is_empty() {
        format!(
            "this rule makes up what reads of {} give: a guest reads it to change bits of it, and writes back the others as \
             they were read",
            named(&read)
        )
    } else {
        return None;
    };
    Some(Diagnostic::at(Code::TakenForDone, rule.place.clone(), message).help(
        "write `allow`, or close it after the first write with { once = true }; where no guest uses it: `accept = { W013 = \
         \"why not\" }`",
    ))
}

/// A rule that answers reads of a register of which the guest's writes come to the kernel and are kept there.
fn reads_otherwise(map: &DecisionMap, rule: &Rule, index: u32) -> Option<Diagnostic> {
    let fixed = |entry: &&Entry| {
        let decision = map.reads().get(entry.msr);
        // W013 says more of what is changed in place.
        decision.rule == Some(index)
            && matches!(decision.action, ReadAction::Value(_))
            && map.writes().get(entry.msr).action == WriteAction::Allow
            && !entry.is_changed_in_place()
    };
    let registers: Vec<&Entry> = named_by(rule, Entry::keeps_writes).filter(fixed).collect();
    if registers.is_empty() {
        return None;
    }
    let message = format!(
        "the guest's writes of {} come to the kernel's register, and its reads get a fixed value: it does not read what it wrote",
        named(&registers)
    );
    Some(Diagnostic::at(Code::ReadsOtherwise, rule.place.clone(), message).help(
        "decide writes too, `write = \"ignore\"` or `\"deny\"`, or keep them with `read = { shadow = … }` and `write = \
         \"shadow\"`; where no guest reads it back: `accept = { W015 = \"why not\" }`",
    ))
}

/// The MSRs of a kind that a rule means.
fn named_by(rule: &Rule, kind: fn(&Entry) -> bool) -> impl Iterator<Item = &'static Entry> {
    let of_kind = msrgate_msrs::all().iter().filter(move |entry| kind(entry));
    of_kind.filter(|entry| names(rule, entry.msr))
}

/// Whether a rule means this MSR, and does not only cover it by a range.
fn names(rule: &Rule, msr: Msr) -> bool {
    rule.msrs.iter().any(|pattern| {
        let wide = matches!(pattern, Pattern::Range(range) if range.len() > 1);
        !wide && pattern.ranges().iter().any(|range| range.contains(msr))
    })
}

/// A rule with an index where nothing has MSRs, a digit away from one that is known.
fn nowhere(rule: &Rule) -> Option<Diagnostic> {
    rule.msrs.iter().find_map(|pattern| {
        let Pattern::Range(range) = pattern else { return None };
        let msr = range.first();
        if range.len() > 1 || is_somewhere(msr) {
            return None;
        }
        let meant = neighbours(msr.0).find_map(|index| msrgate_msrs::by_msr(Msr(index)))?;
        let message = format!("neither a processor nor a hypervisor is known to have MSRs near `{pattern}`");
        let help = format!(
            "is {} meant, {}? else: `accept = {{ W014 = \"whose it is\" }}`",
            meant.msr,
            meant.name()
        );
        Some(Diagnostic::at(Code::Nowhere, rule.place.clone(), message).help(help))
    })
}

/// Where processors and hypervisors have MSRs: the architecture's, Hyper-V's, KVM's, AMD's.
fn is_somewhere(msr: Msr) -> bool {
    matches!(msr.0, 0..=0x1_ffff | 0x4000_0000..=0x4000_ffff | 0x4b56_4d00..=0x4b56_4dff | 0xc000_0000..=0xc001_ffff | u32::MAX)
}

/// Indices that are this one with a digit of its hexadecimal form left out, or one put in twice.
fn neighbours(index: u32) -> impl Iterator<Item = u32> {
    let text = format!("{index:x}");
    (0..text.len()).flat_map(move |at| {
        let (before, after) = text.split_at_checked(at).unwrap_or_default();
        let digit = after.get(..1).unwrap_or_default();
        let without = format!("{before}{}", after.get(1..).unwrap_or_default());
        [format!("{before}{digit}{after}"), without]
            .into_iter()
            .filter_map(|text| u32::from_str_radix(&text, 16).ok())
            // A small index is no misspelling of a large one.
            .filter(|index| *index >= 0x4000_0000)
    })
}
