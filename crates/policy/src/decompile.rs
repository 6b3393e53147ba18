//! From what a filter or a plan says back to a policy.
//!
//! ```
//! use msrgate_policy::{Policy, decompile, raw};
//!
//! let filter = r#"{ "default": "deny", "ranges": [
//!     { "base": "0x174", "nmsrs": 3, "flags": 3, "bitmap": "0700000000000000" }
//! ] }"#;
//! let text = decompile(&raw::read(filter.as_bytes())?).to_string();
//! assert!(text.contains("msr   = \"@sysenter\""), "{text}");
//! assert!(Policy::parse("decompiled.toml", &text).is_ok());
//! # Ok::<(), raw::RawError>(())
//! ```
//!
//! A policy can say one thing in many ways. Several are written down, and the shortest text is taken: reads and writes in
//! one rule or apart, exceptions in a rule of their own or left out of ranges, and rules in any order, since a rule may
//! name MSRs that an earlier one decides. The default is the filter's: what it gives to nearly all MSRs.

mod rule;
mod segments;

use std::fmt;

use msrgate_core::{ReadAction, Verdict, WriteAction};
use msrgate_plan::DecisionMap;

use self::segments::{Segments, Want};
pub use rule::DecompiledRule;

use crate::print;
use crate::raw::RawInput;

/// A policy that says what a filter or a plan does.
#[derive(Clone, Debug)]
pub struct Decompiled {
    /// What an access gets that no rule decides.
    pub default: Verdict,
    /// What a read and a write get that the kernel does not know.
    pub unknown: (ReadAction, WriteAction),
    /// What a read and a write get that the kernel refuses.
    pub invalid: (ReadAction, WriteAction),
    /// The rules; the first that names an access decides it.
    pub rules: Vec<DecompiledRule>,
    /// What its reader should know, in sentences.
    pub comments: Vec<String>,
}

/// How many parts of the MSR space, in all orders, are still looked at from every side. A filter of more parts is noise to
/// a reader whichever way it is written, and takes long.
const MANY: usize = 2000;

/// The most rules times parts for which a short text is searched at all: each rule is held against each part.
const WORK: usize = 4_000_000;

/// The shortest policy that is found to say what was given.
///
/// What accesses get is the same as in the plan. Of a raw filter what it leaves to the kernel is the same, but for the
/// x2APIC's registers: no filter stops them, so the policy does not claim to.
pub fn decompile(given: &RawInput) -> Decompiled {
    let (map, exact) = match &given.plan {
        Some(map) => (map.clone(), true),
        None => (DecisionMap::of_filter(&given.filter), false),
    };
    let segments = Segments::of(&map, exact);
    let default = given.filter.default_verdict();
    let said = |rules| Decompiled {
        default,
        unknown: map.unknown().clone(),
        invalid: map.invalid().clone(),
        rules,
        comments: Vec::new(),
    };
    let shortest = candidates(&segments, default)
        .into_iter()
        .map(|(rules, weight)| (said(rules), weight))
        .min_by_key(|(decompiled, weight)| decompiled.to_string().len() * weight);
    let mut decompiled = shortest.map_or_else(|| said(Vec::new()), |(decompiled, _)| decompiled);
    decompiled.comments = comments(given);
    decompiled
}

/// Rules over a default that say the same in different ways, and how heavy their length weighs: exceptions in a rule of
/// their own have to save a third, since a reader has to take them off what follows; rules for reads and rules for
/// writes a sixth, since a reader has to put them together.
fn candidates(segments: &Segments, default: Verdict) -> Vec<(Vec<DecompiledRule>, usize)> {
    let defaults = match default {
        Verdict::Allow => (ReadAction::Allow, WriteAction::Allow),
        Verdict::Deny => (ReadAction::Deny, WriteAction::Deny),
    };
    let wants = segments.wants(&defaults);
    if wants.len().saturating_mul(segments.len()) > WORK {
        return vec![(segments.plain(&defaults, &wants), 10)];
    }
    let reads: Vec<Want> = parts(&wants, |want| (want.0.clone(), None));
    let writes: Vec<Want> = parts(&wants, |want| (None, want.1.clone()));
    let holes: &[u64] = if segments.len() > MANY { &[0] } else { &[0, 64, 12288] };
    let mut candidates = Vec::new();
    let mut before = None;
    for &hole in holes {
        let ops = [(true, true), (true, false), (false, true)];
        let gaps = ops.map(|ops| segments.gaps(&defaults, ops, hole));
        if before.replace(gaps) == Some(gaps) {
            continue;
        }
        let (explicit, weight) = match hole {
            0 => (None, 10),
            longest => (Some(longest), 15),
        };
        for order in orders(wants.clone(), segments.len()) {
            candidates.push((segments.rules(&defaults, explicit, (true, true), &order), weight));
        }
        let best = |wants: &Vec<Want>, ops| {
            let orders = orders(wants.clone(), segments.len());
            let rules = orders
                .iter()
                .map(|order| segments.rules(&defaults, explicit, ops, order));
            rules.min_by_key(|rules| length(rules)).unwrap_or_default()
        };
        let apart = joined(best(&reads, (true, false)), best(&writes, (false, true)));
        candidates.push((apart, weight * 6 / 5));
    }
    candidates
}

/// The different parts of wants that `part` makes, but for nothing.
fn parts(wants: &[Want], part: impl Fn(&Want) -> Want) -> Vec<Want> {
    let mut parts: Vec<Want> = Vec::new();
    for part in wants.iter().map(part) {
        if part != (None, None) && !parts.contains(&part) {
            parts.push(part);
        }
    }
    parts
}

/// The orders in which rules are tried: all where that is not much work, else as they come and the other way round.
fn orders(wants: Vec<Want>, parts: usize) -> Vec<Vec<Want>> {
    let all = (1..=wants.len()).fold(1, usize::saturating_mul);
    match all.saturating_mul(parts) {
        _ if all == 1 || parts > MANY => vec![wants],
        0..=MANY => permutations(&wants),
        _ => {
            let reversed = wants.iter().rev().cloned().collect();
            vec![wants, reversed]
        }
    }
}

fn permutations(wants: &[Want]) -> Vec<Vec<Want>> {
    let Some((first, rest)) = wants.split_first() else {
        return vec![Vec::new()];
    };
    let mut all = Vec::new();
    for permutation in permutations(rest) {
        for at in 0..=permutation.len() {
            let mut with = permutation.clone();
            with.insert(at, first.clone());
            all.push(with);
        }
    }
    all
}

fn length(rules: &[DecompiledRule]) -> usize {
    rules
        .iter()
        .map(|rule| 30 + rule.msrs.iter().map(|msr| msr.len() + 4).sum::<usize>())
        .sum()
}

/// Rules for reads and rules for writes, one rule where they name the same MSRs. The two have no order between them, since
/// none decides what the other does.
fn joined(reads: Vec<DecompiledRule>, writes: Vec<DecompiledRule>) -> Vec<DecompiledRule> {
    let mut rules = Vec::new();
    let mut writes = writes.into_iter();
    for mut read in reads {
        // The writes before the one with these MSRs must stand before it.
        let same = writes.clone().position(|write| write.msrs == read.msrs);
        if let Some(before) = same {
            rules.extend(writes.by_ref().take(before));
            read.write = writes.next().and_then(|write| write.write);
        }
        rules.push(read);
    }
    rules.extend(writes);
    rules
}

fn comments(given: &RawInput) -> Vec<String> {
    let mut comments = Vec::new();
    if given.plan.is_none() {
        comments.push(
            "What user space answers where the filter denies, a filter does not tell: here it is #GP. An action that \
             answers (`value`, `ignore`, …) denies too."
                .to_owned(),
        );
        if given.filter.default_verdict() == Verdict::Deny {
            comments.push("No filter stops 0x800..=0x8ff, whatever the default is.".to_owned());
        }
    }
    comments.extend(given.remarks.iter().map(|remark| format!("In the filter: {remark}.")));
    comments
}

/// As a policy that a person can go on from.
impl fmt::Display for Decompiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for text in &self.comments {
            print::comment(f, text)?;
        }
        writeln!(f, "version = 1")?;
        writeln!(f, "name    = \"decompiled\"")?;
        writeln!(f, "default = \"{}\"", self.default.name())?;
        print::fallbacks(f, &self.unknown, &self.invalid)?;
        self.rules
            .iter()
            .try_for_each(|rule| print::rule(f, &rule.msrs, rule.read.as_ref(), rule.write.as_ref(), None))
    }
}

#[cfg(test)]
mod tests;
