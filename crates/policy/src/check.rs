//! What a policy says and most likely does not mean.

mod accept;
mod guest;
mod likely;
mod model;
mod order;
mod tenant;
mod by_rule;
mod names;

use msrgate_core::{Log, Msr, MsrRange, ReadAction, WriteAction};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::{DecisionMap, Intervals};

use crate::{Code, Diagnostic, Fix, Pattern, Policy, Rule};
use names::listed;

/// Findings about a policy that can be used, in the order of the text; those that it accepts are marked. `map` is its
/// decision map for the same `cpuid`.
pub fn check(policy: &Policy, map: &DecisionMap, cpuid: Option<&Cpuid>) -> Vec<Diagnostic> {
    let Ok(rules) = policy.rules_for(cpuid) else {
        return Vec::new();
    };
    let mut findings = order::check(policy, map, &rules);
    let shadows = Shadows::of(map);
    for (_, rule) in &rules {
        findings.extend(unenforceable(rule));
        findings.extend(logs_nothing(rule));
        findings.extend(half_a_shadow(&shadows, rule));
        findings.extend(needs_handler(policy, rule));
    }
    findings.extend(denies_all(map));
    findings.extend(needs_handler_by_default(policy));
    findings.extend(guest::check(map, &rules, cpuid));
    findings.extend(tenant::check(map, &rules));
    findings.extend(likely::check(map, &rules));
    if let Some(cpuid) = cpuid {
        findings.extend(model::check(map, &rules, cpuid));
    }
    findings.extend(tenant::notes(map));
    accept::settle(policy, &rules, &mut findings);
    let place = |found: &Diagnostic| found.place.as_ref().map(|place| (place.source, place.span.start));
    findings.sort_by_key(|found| (found.place.is_none(), place(found), found.code));
    findings
}

fn unenforceable(rule: &Rule) -> Option<Diagnostic> {
    let beyond = |pattern: &&Pattern| pattern.ranges().iter().all(|range| never_filtered(*range));
    let beyond: Vec<&Pattern> = rule.msrs.iter().filter(beyond).collect();
    if beyond.is_empty() || !forbids(rule) {
        return None;
    }
    let (message, leave_out) = if beyond.len() == rule.msrs.len() {
        let message = "no filter can stop these MSRs, so the kernel answers them whatever this rule says";
        (message.to_owned(), "the rule".to_owned())
    } else {
        let names = listed(&beyond);
        let message = format!("no filter can stop {names}, so the kernel answers them whatever this rule says");
        (message, names)
    };
    Some(
        Diagnostic::at(Code::Unenforceable, rule.place.clone(), message).help(format!(
            "leave {leave_out} out: the kernel never filters 0x800..=0x8ff (x2APIC), and no range covers 0xffffffff"
        )),
    )
}

fn logs_nothing(rule: &Rule) -> Option<Diagnostic> {
    let reads = rule.read.as_ref().is_none_or(|action| *action == ReadAction::Allow);
    let writes = rule.write.as_ref().is_none_or(|action| *action == WriteAction::Allow);
    let message = "the kernel answers what this rule allows, which makes no exit, so there is nothing to log";
    (rule.log != Log::None && reads && writes).then(|| {
        Diagnostic::at(Code::LogsNothing, rule.place.clone(), message)
            .help("leave `log` out")
            .fix(Fix::Key("log"))
    })
}

fn half_a_shadow(shadows: &Shadows, rule: &Rule) -> Option<Diagnostic> {
    let read = matches!(rule.read, Some(ReadAction::Shadow(_)));
    let write = matches!(rule.write, Some(WriteAction::Shadow));
    if read == write || shadows.partner(rule, read) {
        return None;
    }
    let (message, help) = if read {
        (
            "reads get a shadow register that no write reaches",
            "write `write = \"shadow\"` too, or a fixed value: { value = … }",
        )
    } else {
        (
            "writes go to a shadow register that no read shows",
            "write `read = { shadow = 0 }` too, or `write = \"ignore\"`",
        )
    };
    Some(Diagnostic::at(Code::WithoutEffect, rule.place.clone(), message).help(help))
}

/// A note on where a rule's handler can be.
fn needs_handler(policy: &Policy, rule: &Rule) -> Option<Diagnostic> {
    let read = rule.read.as_ref().and_then(ReadAction::handler);
    let write = rule.write.as_ref().and_then(WriteAction::handler);
    let name = read
        .into_iter()
        .chain(write)
        .find(|name| !policy.providers.contains_key(*name))?;
    Some(Diagnostic::at(Code::HandlerNeeded, rule.place.clone(), in_a_vmm(name)))
}

/// Finds that `unknown` or `invalid` names a handler.
fn needs_handler_by_default(policy: &Policy) -> Option<Diagnostic> {
    let fallbacks = [&policy.unknown, &policy.invalid].into_iter();
    let mut handlers = fallbacks.flat_map(|(read, write)| [read.handler(), write.handler()]);
    let name = handlers.find_map(|handler| handler.filter(|name| !policy.providers.contains_key(*name)))?;
    Some(Diagnostic::whole(Code::HandlerNeeded, in_a_vmm(name)))
}

fn in_a_vmm(handler: &str) -> String {
    format!(
        "the handler `{handler}` is code of a VMM that is built with msrgate's library; without it the access is #GP"
    )
}

fn denies_all(map: &DecisionMap) -> Option<Diagnostic> {
    let reads = map
        .reads()
        .iter()
        .all(|(_, decision)| decision.action == ReadAction::Deny);
    let writes = map
        .writes()
        .iter()
        .all(|(_, decision)| decision.action == WriteAction::Deny);
    (reads && writes).then(|| {
        let message = "every access is denied: no operating system starts under this policy";
        Diagnostic::whole(Code::DeniesAll, message).help(
            "allow what the guest needs, or begin with a policy that does; for a guest that touches no MSR, or under policies \
             that extend this one: `accept = { W016 = \"which guest\" }`",
        )
    })
}

fn forbids(rule: &Rule) -> bool {
    rule.read.as_ref().is_some_and(|action| *action != ReadAction::Allow)
        || rule.write.as_ref().is_some_and(|action| *action != WriteAction::Allow)
}

fn never_filtered(range: MsrRange) -> bool {
    range.is_within(MsrRange::X2APIC) || range == MsrRange::single(Msr::MAX)
}

/// Where reads and where writes have a shadow.
struct Shadows {
    reads: Intervals<bool>,
    writes: Intervals<bool>,
}

impl Shadows {
    fn of(map: &DecisionMap) -> Shadows {
        Shadows {
            reads: map
                .reads()
                .map(|decision| matches!(decision.action, ReadAction::Shadow(_))),
            writes: map.writes().map(|decision| decision.action == WriteAction::Shadow),
        }
    }

    /// Whether the other direction of an MSR of the rule has its shadow by another rule.
    fn partner(&self, rule: &Rule, reads: bool) -> bool {
        let others = if reads { &self.writes } else { &self.reads };
        let mut ranges = rule.ranges().into_iter();
        ranges.any(|range| others.within(range).any(|(_, shadow)| *shadow))
    }
}

#[cfg(test)]
mod tests;
