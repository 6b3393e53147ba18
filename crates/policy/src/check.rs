//! What a policy says and most likely does not mean.

use std::collections::HashSet;

use msrgate_core::{Log, Msr, MsrRange, ReadAction, WriteAction};
use msrgate_plan::{DecisionMap, Group, PlanError};

use crate::cpuid::Cpuid;
use crate::{Code, Diagnostic, Policy, Rule};

/// Findings about a policy that can be used. `map` is its decision map for the same `cpuid`.
pub fn check(policy: &Policy, map: &DecisionMap, cpuid: Option<&Cpuid>) -> Vec<Diagnostic> {
    let Ok(rules) = policy.rules_for(cpuid) else {
        return Vec::new();
    };
    let mut deciding: HashSet<u32> = HashSet::new();
    deciding.extend(map.reads.iter().filter_map(|(_, decision)| decision.rule));
    deciding.extend(map.writes.iter().filter_map(|(_, decision)| decision.rule));
    let mut findings = Vec::new();
    for (index, rule) in rules {
        // A rule of an extended policy that this one overrides does what it is for.
        let own = rule.place.source == 0;
        if own && !deciding.contains(&index) {
            findings.push(unreachable(policy, map, rule));
        }
        if forbids(rule) && rule.ranges().iter().all(|range| never_filtered(*range)) {
            findings.push(
                Diagnostic::at(
                    Code::Unenforceable,
                    rule.place.clone(),
                    "no filter can stop these MSRs, so the kernel answers them whatever this rule says",
                )
                .help("leave the rule out: the kernel never filters 0x800..=0x8ff (x2APIC), and no range covers 0xffffffff"),
            );
        }
        let answered_by_kernel = |kernel: bool, said: bool| !said || kernel;
        let read = answered_by_kernel(rule.read == Some(ReadAction::Allow), rule.read.is_some());
        let write = answered_by_kernel(rule.write == Some(WriteAction::Allow), rule.write.is_some());
        if rule.log != Log::None && read && write {
            findings.push(
                Diagnostic::at(
                    Code::LogsNothing,
                    rule.place.clone(),
                    "the kernel answers what this rule allows, which makes no exit, so there is nothing to log",
                )
                .help("leave `log` out; `msrgate run --learn` shows what a guest touches"),
            );
        }
        let read_shadow = matches!(rule.read, Some(ReadAction::Shadow(_)));
        let write_shadow = matches!(rule.write, Some(WriteAction::Shadow));
        if read_shadow != write_shadow && !shadow_partner(map, rule, read_shadow) {
            let (message, help) = if read_shadow {
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
            findings.push(Diagnostic::at(Code::WithoutEffect, rule.place.clone(), message).help(help));
        }
    }
    findings
}

fn unreachable(policy: &Policy, map: &DecisionMap, rule: &Rule) -> Diagnostic {
    let message = "rules before this one decide all its accesses, so it never counts";
    let diagnostic = Diagnostic::at(Code::Unreachable, rule.place.clone(), message)
        .help("the first rule that names an MSR wins: move this one up, or leave it out");
    let first = rule.ranges().first().map(|range| range.first());
    let decides = first.and_then(|msr| match rule.read {
        Some(_) => map.reads.get(msr).rule,
        None => map.writes.get(msr).rule,
    });
    match decides.and_then(|number| policy.rules.get(usize::try_from(number).ok()?)) {
        Some(earlier) => diagnostic.second(earlier.place.clone(), "this one decides"),
        None => diagnostic,
    }
}

fn forbids(rule: &Rule) -> bool {
    rule.read.as_ref().is_some_and(|action| *action != ReadAction::Allow)
        || rule.write.as_ref().is_some_and(|action| *action != WriteAction::Allow)
}

fn never_filtered(range: MsrRange) -> bool {
    range.is_within(MsrRange::X2APIC) || range == MsrRange::single(Msr::MAX)
}

/// Whether the other direction of an MSR of the rule has its shadow by another rule.
fn shadow_partner(map: &DecisionMap, rule: &Rule, reads: bool) -> bool {
    rule.ranges().into_iter().any(|range| {
        if reads {
            map.writes
                .within(range)
                .any(|(_, decision)| decision.action == WriteAction::Shadow)
        } else {
            map.reads
                .within(range)
                .any(|(_, decision)| matches!(decision.action, ReadAction::Shadow(_)))
        }
    })
}

impl Policy {
    /// A failed compile as a finding: with the numbers, who asks for the ranges, and what to change.
    pub fn explain_error(&self, error: &PlanError) -> Diagnostic {
        match error {
            PlanError::TooManyRanges { groups, .. } => {
                let mut message = error.to_string();
                for group in groups {
                    message.push_str(&format!("\n  {}", self.group(group)));
                }
                let cheapest = groups.iter().min_by_key(|group| group.accesses);
                let help = match cheapest {
                    Some(group) => format!(
                        "leave out rules of {} of these groups, or join neighbours by giving the MSRs between them the same \
                         treatment; the least is lost with {}",
                        groups.len().saturating_sub(msrgate_core::abi::MAX_RANGES),
                        group.range
                    ),
                    None => {
                        "the rules differ from the default over too much of the MSR space: choose the other default, \
                             and name what differs from it"
                            .to_owned()
                    }
                };
                Diagnostic::whole(Code::TooManyRanges, message).help(help)
            }
            PlanError::Table(_) => Diagnostic::whole(Code::TooMuchState, error.to_string())
                .help("name the MSRs that keep a state (`shadow`, `once`) one by one, or in smaller ranges"),
            _ => Diagnostic::whole(Code::PlannerBug, error.to_string()).help("please report it with the policy"),
        }
    }

    fn group(&self, group: &Group) -> String {
        let direction = match group.direction {
            msrgate_plan::Direction::Read => "reads",
            msrgate_plan::Direction::Write => "writes",
            msrgate_plan::Direction::Both => "reads and writes",
        };
        let rules: Vec<String> = group.rules.iter().filter_map(|rule| self.rule_place(*rule)).collect();
        let rules = match rules.len() {
            0 => "the default".to_owned(),
            1..=4 => format!("rules at {}", rules.join(", ")),
            n => format!("{n} rules, the first at {}", rules.first().map_or("?", |place| place)),
        };
        {
            let accesses = match group.accesses {
                1 => "1 access".to_owned(),
                n => format!("{n} accesses"),
            };
            format!("{direction} of {}: {accesses}, {rules}", group.range)
        }
    }

    /// File and line of a rule, by its number.
    pub fn rule_place(&self, rule: u32) -> Option<String> {
        let rule = self.rules.get(usize::try_from(rule).ok()?)?;
        let source = self.sources.get(rule.place.source)?;
        Some(format!(
            "{}:{}",
            source.path.display(),
            source.line_column(rule.place.span.start).0
        ))
    }
}

#[cfg(test)]
mod tests;
