//! What the order of the rules decides, and most likely not as meant: rules that others hide, repeat or make useless.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::Hash;

use msrgate_core::{Log, Msr, MsrRange, Op, ReadAction, WriteAction};
use msrgate_plan::{Decision, DecisionMap, Intervals};

use super::names::listed;
use crate::{Code, Diagnostic, Fix, Pattern, Policy, Rule};

/// How many intervals of the decision map are looked at for rules that hide each other: ranges within ranges have the square
/// of their number. What is left of the rules then is only looked at for whether it counts at all.
const EFFORT: usize = 4_000_000;

/// Findings about the policy's own rules. Those of policies that it extends are there to be overridden.
pub(super) fn check(policy: &Policy, map: &DecisionMap, rules: &[(u32, &Rule)]) -> Vec<Diagnostic> {
    let mut deciding: HashSet<u32> = HashSet::new();
    deciding.extend(map.reads().iter().filter_map(|(_, decision)| decision.rule));
    deciding.extend(map.writes().iter().filter_map(|(_, decision)| decision.rule));
    let (default_read, default_write) = policy.default_actions();
    // One of the policy's own that never counts is reported itself, and is to go.
    let stays = |(index, rule): &&(u32, &Rule)| deciding.contains(index) || rule.place.source != 0;
    let staying: Vec<(u32, &Rule)> = rules.iter().filter(stays).copied().collect();
    let mut useful = without_which_something_changes(&staying, default_read, |rule| {
        let action = rule.read.clone()?;
        let log = rule.log_of(action == ReadAction::Allow);
        Some((action, log))
    });
    useful.extend(without_which_something_changes(&staying, default_write, |rule| {
        let action = rule.write.clone()?;
        let log = rule.log_of(action == WriteAction::Allow);
        Some((action, log))
    }));
    let own = rules.iter().filter(|(_, rule)| rule.place.source == 0);
    let mut search = Search {
        policy,
        map,
        widths: policy.rules.iter().map(|rule| width(&rule.ranges())).collect(),
        left: EFFORT,
        wide: (0..)
            .zip(&policy.rules)
            .flat_map(|(number, rule)| wide(rule).map(move |range| (number, range)))
            .collect(),
        crossings: EFFORT,
    };
    own.filter_map(|&(index, rule)| {
        let hidden = search.hidden(rule, index);
        let crossed = search.crossed(rule, index);
        if !deciding.contains(&index) {
            Some(never_counts(policy, map, rule, &hidden))
        } else if let Some(part) = hidden.iter().find(|part| !part.same) {
            Some(partly_hidden(rule, part))
        } else if let Some((earlier, both)) = crossed {
            Some(crosses(rule, earlier, both))
        } else if !useful.contains(&index) {
            Some(useless(rule))
        } else {
            hidden.first().map(|part| said_again(rule, part))
        }
    })
    .collect()
}

/// A pattern of a rule, in one direction, that rules before it decide for the most part.
struct Hidden<'a> {
    pattern: &'a Pattern,
    op: Op,
    /// The first of them.
    by: Option<&'a Rule>,
    /// Whether they decide all of it.
    whole: bool,
    /// Whether all that they decide gets what the rule says.
    same: bool,
}

/// The search for patterns that earlier rules decide.
struct Search<'a> {
    policy: &'a Policy,
    map: &'a DecisionMap,
    /// How many MSRs each rule names.
    widths: Vec<u64>,
    /// How many intervals may still be looked at.
    left: usize,
    /// The ranges that rules name by their ends, with the rule's number.
    wide: Vec<(u32, MsrRange)>,
    /// How many pairs of these may still be looked at.
    crossings: usize,
}

impl<'a> Search<'a> {
    fn hidden(&mut self, rule: &'a Rule, index: u32) -> Vec<Hidden<'a>> {
        let mut hidden = Vec::new();
        for pattern in &rule.msrs {
            if let Some(action) = &rule.read {
                hidden.extend(self.part(self.map.reads(), (rule, index), pattern, Op::Read, action));
            }
            if let Some(action) = &rule.write {
                hidden.extend(self.part(self.map.writes(), (rule, index), pattern, Op::Write, action));
            }
        }
        hidden
    }

    /// An earlier rule whose range begins or ends within a range of this one and goes on outside of it, and says something
    /// else of what both name.
    fn crossed(&mut self, rule: &Rule, index: u32) -> Option<(&'a Rule, MsrRange)> {
        for own in wide(rule) {
            let before = self.wide.iter().take_while(|(number, _)| *number < index);
            for (number, before) in before {
                self.crossings = self.crossings.checked_sub(1)?;
                let both = MsrRange::new(before.first().max(own.first()), before.last().min(own.last()));
                let Some(both) = both.filter(|both| both != before && *both != own) else {
                    continue;
                };
                let earlier = self.policy.rules.get(usize::try_from(*number).ok()?)?;
                let differs = earlier
                    .read
                    .as_ref()
                    .zip(rule.read.as_ref())
                    .is_some_and(|(one, other)| one != other)
                    || earlier
                        .write
                        .as_ref()
                        .zip(rule.write.as_ref())
                        .is_some_and(|(one, other)| one != other);
                if differs && (earlier.when.is_always() || earlier.when == rule.when) {
                    return Some((earlier, both));
                }
            }
        }
        None
    }

    /// Only where it is no override: the rules before it either say the same of all of the pattern, or are wider than it.
    fn part<A: Clone + Eq>(
        &mut self,
        map: &Intervals<Decision<A>>,
        (rule, index): (&'a Rule, u32),
        pattern: &'a Pattern,
        op: Op,
        action: &A,
    ) -> Option<Hidden<'a>> {
        let (mut all, mut lost, mut by, mut same) = (0, 0, None, true);
        let ranges = pattern.ranges();
        let own_width = width(&ranges);
        for range in ranges {
            all += range.len();
            for (part, decision) in map.within(range) {
                self.left = self.left.checked_sub(1)?;
                let number = decision.rule.filter(|&number| number < index);
                let number = number.and_then(|number| usize::try_from(number).ok());
                let earlier =
                    number.and_then(|number| Some((self.policy.rules.get(number)?, self.widths.get(number)?)));
                let Some((earlier, earlier_width)) = earlier else {
                    continue;
                };
                // For a guest of another kind the rule may count.
                if !earlier.when.is_always() && earlier.when != rule.when {
                    continue;
                }
                let same_here = decision.action == *action;
                if !same_here && *earlier_width <= own_width {
                    continue;
                }
                same &= same_here;
                lost += part.len();
                by = by.or(Some(earlier));
            }
        }
        let whole = lost == all;
        (whole || !same && lost * 2 > all).then_some(Hidden {
            pattern,
            op,
            by,
            whole,
            same,
        })
    }
}

impl Hidden<'_> {
    /// What is hidden, as the subject of a sentence.
    fn subject(&self) -> String {
        let op = match self.op {
            Op::Read => "reads",
            Op::Write => "writes",
        };
        format!("{op} of {}", listed(&[self.pattern]))
    }
}

/// The ranges that a rule names by their ends.
fn wide(rule: &Rule) -> impl Iterator<Item = MsrRange> {
    rule.msrs.iter().filter_map(|pattern| match pattern {
        Pattern::Range(range) if range.len() > 1 => Some(*range),
        _ => None,
    })
}

fn width(ranges: &[MsrRange]) -> u64 {
    ranges.iter().map(|range| range.len()).sum()
}

fn never_counts(policy: &Policy, map: &DecisionMap, rule: &Rule, hidden: &[Hidden<'_>]) -> Diagnostic {
    let ranges = rule.ranges();
    let decides = |msr: Msr| match rule.read {
        Some(_) => map.reads().get(msr).rule,
        None => map.writes().get(msr).rule,
    };
    let number = ranges.iter().find_map(|range| decides(range.first()));
    let Some(earlier) = number.and_then(|number| policy.rules.get(usize::try_from(number).ok()?)) else {
        let message = "by its CPUID the guest has none of these MSRs, so `valid = \"cpu-model\"` denies them";
        return Diagnostic::at(Code::Unreachable, rule.place.clone(), message).help("leave the rule out");
    };
    let patterns = rule.msrs.len() * (usize::from(rule.read.is_some()) + usize::from(rule.write.is_some()));
    let diagnostic = if hidden.len() == patterns && hidden.iter().all(|part| part.same) {
        let message = "rules before this one say the same of all its accesses, so it never counts";
        Diagnostic::at(Code::Repeated, rule.place.clone(), message)
            .help("leave it out")
            .fix(Fix::Rule)
    } else {
        let message = "rules before this one decide all its accesses, so it never counts";
        Diagnostic::at(Code::Unreachable, rule.place.clone(), message)
            .help("the first rule that names an MSR wins: move this one up, or leave it out")
    };
    diagnostic.second(earlier.place.clone(), "this one decides")
}

fn partly_hidden(rule: &Rule, part: &Hidden<'_>) -> Diagnostic {
    let (subject, share) = (part.subject(), if part.whole { "" } else { ", for the most part" });
    let message = format!("a wider rule before this one decides {subject}{share}, and says something else");
    let diagnostic = Diagnostic::at(Code::PartlyHidden, rule.place.clone(), message).help(format!(
        "the first rule that names an MSR wins: move this rule before the wider one, or leave {subject} out of it"
    ));
    match part.by {
        Some(earlier) => diagnostic.second(earlier.place.clone(), "this one decides"),
        None => diagnostic,
    }
}

fn crosses(rule: &Rule, earlier: &Rule, both: MsrRange) -> Diagnostic {
    let both = format!("{}..={}", both.first(), both.last());
    let message = format!("a rule before this one names {both} too, and says something else: that one decides");
    Diagnostic::at(Code::PartlyHidden, rule.place.clone(), message)
        .help(format!(
            "end one of the two ranges where the other begins, or leave {both} to one of them"
        ))
        .second(earlier.place.clone(), "this one decides")
}

fn said_again(rule: &Rule, part: &Hidden<'_>) -> Diagnostic {
    let subject = part.subject();
    let message = format!("rules before this one say the same of {subject}");
    let diagnostic = Diagnostic::at(Code::Repeated, rule.place.clone(), message);
    let diagnostic = diagnostic.help(format!("leave {subject} out of one of them"));
    match part.by {
        Some(earlier) => diagnostic.second(earlier.place.clone(), "said here"),
        None => diagnostic,
    }
}

fn useless(rule: &Rule) -> Diagnostic {
    let message = "without this rule everything would be the same: what is behind it, or the default, says so anyway";
    Diagnostic::at(Code::Useless, rule.place.clone(), message)
        .help("leave it out, or keep it by `accept = { W007 = \"why it stays\" }`")
        .fix(Fix::Rule)
}

/// The rules without which something would get another action or be logged otherwise, in one direction.
///
/// A sweep over the space: wherever the rules that name an MSR change, the first is compared with the second.
fn without_which_something_changes<A: Eq + Hash>(
    rules: &[(u32, &Rule)],
    default: A,
    said: impl Fn(&Rule) -> Option<(A, Log)>,
) -> HashSet<u32> {
    // What rules say, by number: comparing what two rules say takes long where both list many values.
    let mut numbers: HashMap<(A, Log), usize> = HashMap::from([((default, Log::None), 0)]);
    let mut number = |said: (A, Log)| {
        let next = numbers.len();
        *numbers.entry(said).or_insert(next)
    };
    let said: BTreeMap<u32, (&Rule, usize)> = rules
        .iter()
        .filter_map(|&(index, rule)| Some((index, (rule, number(said(rule)?)))))
        .collect();
    // Where a rule begins and, one further, ends.
    let mut cuts: BTreeMap<u64, (Vec<u32>, Vec<u32>)> = BTreeMap::new();
    for (index, (rule, _)) in &said {
        for range in rule.ranges() {
            cuts.entry(range.first().0.into()).or_default().0.push(*index);
            cuts.entry(u64::from(range.last().0) + 1).or_default().1.push(*index);
        }
    }
    let mut useful = HashSet::new();
    // The rules here, each as often as its patterns name the MSR.
    let mut here: BTreeMap<u32, usize> = BTreeMap::new();
    for (begin, end) in cuts.into_values() {
        for index in begin {
            *here.entry(index).or_default() += 1;
        }
        for index in end {
            if let Some(times) = here.get_mut(&index) {
                *times -= 1;
                if *times == 0 {
                    here.remove(&index);
                }
            }
        }
        let mut in_order = here.keys().filter_map(|index| Some((*index, said.get(index)?)));
        let Some((index, (rule, first))) = in_order.next() else {
            continue;
        };
        let (always, behind) = match in_order.next() {
            // The rule behind may hold for this guest and not for others.
            Some((_, (behind, second))) => (behind.when.is_always() || behind.when == rule.when, second),
            None => (true, &0),
        };
        if !always || first != behind {
            useful.insert(index);
        }
    }
    useful
}
