//! What to change in a policy that needs too many ranges.

use std::collections::BTreeSet;

use msrgate_core::abi::MAX_RANGES;
use msrgate_core::{MsrRange, Op, Verdict};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::{Change, ChangedPart, DecisionMap, Direction, Group, Intervals, Plan, PlanError, SpillError};

use crate::print::counted;
use crate::{Code, Diagnostic, Policy};

/// More rules than these are not tried one by one.
const MOST_RULES: usize = 64;

/// Nor so many that the intervals of the map, each time anew, are more than these.
const EFFORT: usize = 1_000_000;

/// What a refusal lists of one kind.
const LISTED: usize = 24;

/// Changes to a policy that needs too many ranges, with each of which it compiles.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FitAdvice {
    /// The fewest accesses that have to get another verdict.
    pub change: Option<Change>,
    /// Rules that can be left out whole instead; `None` where no such rules were found.
    pub without: Option<Without>,
}

/// Rules with whose removal a policy fits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Without {
    /// The numbers of the rules, from 0; none of them can stay.
    pub rules: Vec<u32>,
    /// How many accesses get something else then.
    pub accesses: u64,
}

impl FitAdvice {
    /// Searches for the changes; `map` is the policy's for `cpuid`.
    pub fn search(policy: &Policy, map: &DecisionMap, cpuid: Option<&Cpuid>) -> FitAdvice {
        let change = map.smallest_change();
        let without = change
            .as_ref()
            .and_then(|change| Without::search(policy, map, cpuid, change));
        FitAdvice { change, without }
    }
}

impl Without {
    /// The rules that the smallest change is about, as far as each is needed.
    fn search(policy: &Policy, map: &DecisionMap, cpuid: Option<&Cpuid>, change: &Change) -> Option<Without> {
        let mut rules: BTreeSet<u32> = change.parts.iter().filter_map(|part| part.rule).collect();
        let fitting = |rules: &BTreeSet<u32>| {
            let map = policy.without(rules).decision_map(cpuid).ok()?;
            Plan::compile(&map).ok().map(|_| map)
        };
        let mut changed = fitting(&rules).filter(|_| !rules.is_empty())?;
        let intervals = map.reads().len() + map.writes().len();
        if rules.len() <= MOST_RULES.min(EFFORT / intervals) {
            for rule in rules.clone() {
                rules.remove(&rule);
                match fitting(&rules) {
                    Some(map) => changed = map,
                    None => _ = rules.insert(rule),
                }
            }
        }
        Some(Without {
            rules: rules.into_iter().collect(),
            accesses: differing(map.reads(), changed.reads(), |decision| &decision.action)
                + differing(map.writes(), changed.writes(), |decision| &decision.action),
        })
    }
}

/// How many MSRs get something else.
fn differing<V: Clone + Eq, A: Eq>(one: &Intervals<V>, other: &Intervals<V>, action: impl Fn(&V) -> &A) -> u64 {
    let differs = one.zip(other, |one, other| action(one) != action(other));
    let ranges = differs.iter().filter(|(_, differs)| **differs);
    ranges.map(|(range, _)| range.len()).sum()
}

impl Policy {
    /// The policy with these rules deciding nothing; the numbers of the others stay.
    fn without(&self, rules: &BTreeSet<u32>) -> Policy {
        let mut policy = self.clone();
        for (rule, _) in policy
            .rules
            .iter_mut()
            .zip(0..)
            .filter(|(_, number)| rules.contains(number))
        {
            (rule.read, rule.write) = (None, None);
        }
        policy
    }

    /// A failed compile as a finding: with the numbers, who asks for the ranges, and what to change.
    pub fn explain_error(&self, error: &PlanError, fit: Option<&FitAdvice>) -> Diagnostic {
        match error {
            PlanError::TooManyRanges { groups, witness, .. } => {
                let mut message = error.to_string();
                for group in groups.iter().take(LISTED) {
                    message.push_str(&format!("\n  {}", self.group(group)));
                }
                message.push_str(&more(groups.len()));
                if let Some(witness) = witness {
                    let enough: Vec<String> = (witness.iter().take(MAX_RANGES + 1))
                        .map(|(msr, op)| format!("{op} {msr}"))
                        .collect();
                    message.push_str(&format!(
                        "\nno range can serve two of these {}: {}",
                        enough.len(),
                        enough.join(", ")
                    ));
                }
                Diagnostic::whole(Code::TooManyRanges, message).help(self.advice(fit))
            }
            PlanError::Spill { why, .. } => self.cannot_spill(error, why),
            PlanError::Table(_) => Diagnostic::whole(Code::TooMuchState, error.to_string())
                .help("name the MSRs that keep a state (`shadow`, `once`) one by one, or in smaller ranges"),
            _ => Diagnostic::whole(Code::PlannerBug, error.to_string()).help("please report it with the policy"),
        }
    }

    fn cannot_spill(&self, error: &PlanError, why: &SpillError) -> Diagnostic {
        let SpillError::NotFaithful(accesses) = why else {
            return Diagnostic::whole(Code::CannotSpill, error.to_string())
                .help("say the same of `unknown` and of `invalid`, or leave out `spill`");
        };
        let mut message = error.to_string();
        for (range, op) in accesses.iter().take(LISTED) {
            let name = msrgate_msrs::by_msr(range.first()).filter(|_| range.len() == 1);
            let name = name.map(|known| format!(" ({})", known.name())).unwrap_or_default();
            message.push_str(&format!("\n  {op} {range}{name}"));
        }
        message.push_str(&more(accesses.len()));
        Diagnostic::whole(Code::CannotSpill, message).help(
            "deny these, or give them an action of their own (`mask` passes on by the rule's own word), or leave out rules \
             for MSRs far from others; docs/policy.md lists what may be passed through. Without `spill` the refusal names the \
             smallest change",
        )
    }

    fn group(&self, group: &Group) -> String {
        let direction = match group.direction {
            Direction::Read => "reads",
            Direction::Write => "writes",
            Direction::Both => "reads and writes",
        };
        let places = self.first_places(&group.rules, 4);
        let rules = match group.rules.len() {
            0 => "the default".to_owned(),
            1..=4 => format!("rules at {}", places.join(", ")),
            n => format!("{n} rules, the first at {}", places.first().map_or("?", |place| place)),
        };
        format!("{direction} of {}: {}, {rules}", group.range, accesses(group.accesses))
    }

    /// What to change.
    fn advice(&self, fit: Option<&FitAdvice>) -> String {
        let Some(change) = fit.and_then(|fit| fit.change.as_ref()) else {
            return "choose the other default and name what differs from it, or treat the MSRs between two neighbours as \
                    the neighbours are treated"
                .to_owned();
        };
        let mut advice = format!(
            "{} that fits changes {}:",
            if change.proved {
                "the smallest change"
            } else {
                "the smallest change that was found"
            },
            accesses(change.accesses)
        );
        for part in change.parts.iter().take(LISTED) {
            advice.push_str(&format!("\n  {}", self.changed_part(part)));
        }
        advice.push_str(&more(change.parts.len()));
        let without = fit.and_then(|fit| fit.without.as_ref());
        let rules = self.first_rules(&change.parts);
        if without.is_none_or(|without| without.accesses > change.accesses) && !rules.is_empty() {
            advice.push_str(&format!("\nby this before all other rules:{rules}"));
        }
        if let Some(without) = without {
            let places = self.first_places(&without.rules, LISTED);
            let (s, rules) = match without.rules.len() {
                n if n > LISTED => (
                    "s",
                    format!("{n} places, the first {}", places.first().map_or("?", |place| place)),
                ),
                1 => ("", places.join(", ")),
                _ => ("s", places.join(", ")),
            };
            advice.push_str(&format!(
                "\nby leaving out the rule{s} at {rules}, which changes {}",
                accesses(without.accesses)
            ));
        }
        advice
    }

    /// Rules that make a change where they stand first; empty where they would be many, or one of them would say again
    /// what a rule there is for, which the language does not take.
    fn first_rules(&self, parts: &[ChangedPart]) -> String {
        if parts.len() > LISTED {
            return String::new();
        }
        let mut text = String::new();
        for (op, key) in [(Op::Read, "read"), (Op::Write, "write")] {
            for (to, word) in [(Verdict::Allow, "allow"), (Verdict::Deny, "deny")] {
                let of = parts.iter().filter(|part| (part.op, part.to) == (op, to));
                let mut ranges: Vec<MsrRange> = Vec::new();
                for part in of {
                    match ranges.last_mut() {
                        // Parts by several rules may lie next to each other.
                        Some(last) if last.last().0.checked_add(1) == Some(part.range.first().0) => {
                            *last = MsrRange::new(last.first(), part.range.last()).unwrap_or(*last);
                        }
                        _ => ranges.push(part.range),
                    }
                }
                let again = self.rules.iter().any(|rule| {
                    let decides = match op {
                        Op::Read => rule.read.is_some(),
                        Op::Write => rule.write.is_some(),
                    };
                    decides && rule.ranges() == ranges
                });
                if again {
                    return String::new();
                }
                if !ranges.is_empty() {
                    let msrs: Vec<String> = ranges.iter().map(|range| format!("\"{range}\"")).collect();
                    text.push_str(&format!(
                        "\n  [[rule]]\n  msr = [{}]\n  {key} = \"{word}\"",
                        msrs.join(", ")
                    ));
                }
            }
        }
        text
    }

    fn changed_part(&self, part: &ChangedPart) -> String {
        let op = match part.op {
            Op::Read => "reads",
            Op::Write => "writes",
        };
        let to = match part.to {
            Verdict::Allow => "left to the kernel",
            Verdict::Deny => "denied",
        };
        let by = match part.rule.and_then(|rule| self.rule_place(rule)) {
            Some(place) => format!("the rule at {place}"),
            None => "the default".to_owned(),
        };
        format!("{op} of {}: {to}, against {by}", part.range)
    }

    /// Where the first of these rules are, at most `most`: to find a line its source is read up to there.
    fn first_places(&self, rules: &[u32], most: usize) -> Vec<String> {
        let rules = rules.iter().take(most);
        rules.filter_map(|rule| self.rule_place(*rule)).collect()
    }

    /// File and line of a rule, by its number.
    pub fn rule_place(&self, rule: u32) -> Option<String> {
        let rule = self.rules.get(usize::try_from(rule).ok()?)?;
        let source = self.sources.get(rule.place.source)?;
        Some(format!(
            "{}:{}",
            source.path().display(),
            source.line_column(rule.place.span.start).0
        ))
    }
}

fn accesses(count: u64) -> String {
    counted(count, "access", "accesses")
}

fn more(all: usize) -> String {
    match all.saturating_sub(LISTED) {
        0 => String::new(),
        more => format!("\n  … and {more} more"),
    }
}
