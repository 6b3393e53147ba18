//! A learned policy as a file.

use std::fmt;

use msrgate_core::{Msr, MsrRange, Op, ReadAction, WriteAction};
use msrgate_msrs::spell::{name, runs};
use msrgate_msrs::{Need, System};
use msrgate_policy::print;

use super::rule::{Facts, Learned, LearnedRule};
use super::summary::Summary;

/// How many MSRs a sentence names.
const NAMED: usize = 12;

/// How many MSRs a sentence names that a system needs.
const NEEDED: usize = 4;

/// As a policy that a person can go on from: commented, each rule with its reason.
impl fmt::Display for Learned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let summary = &self.summary;
        let from = format!(
            "Learned from {}{}: {}, of which {} faulted.",
            counted(summary.traces, "trace"),
            names(summary.names.iter(), summary.traces),
            counted(summary.events, "access"),
            summary.faults
        );
        print::comment(f, &from)?;
        if summary.lost > 0 {
            writeln!(f, "#")?;
            print::comment(
                f,
                &format!(
                    "Incomplete: what it was learned from lacks {}, so it may deny what a guest needs.",
                    counted(summary.lost, "access")
                ),
            )?;
        }
        if summary.partial > 0 {
            writeln!(f, "#")?;
            print::comment(
                f,
                &format!(
                    "Incomplete: {} some of what guests were served with, which this policy denies.",
                    match summary.partial {
                        1 => "1 trace lacks".to_owned(),
                        count => format!("{count} traces lack"),
                    }
                ),
            )?;
        }
        if summary.ignoring > 0 {
            writeln!(f, "#")?;
            print::comment(
                f,
                &format!(
                    "{} from a host with `kvm.ignore_msrs`: what KVM does not know looks served there and is allowed here, and \
                     faults on other hosts.",
                    match summary.ignoring {
                        1 => "1 trace is".to_owned(),
                        count => format!("{count} traces are"),
                    }
                ),
            )?;
        }
        writeln!(f, "#")?;
        let widened = self.rules.iter().any(|rule| !rule.unseen.is_empty());
        print::comment(
            f,
            match widened {
                false => {
                    "What it does: each MSR gets, in each direction in which a guest was served, what it got then; all \
                     else is #GP."
                }
                true => {
                    "What it does: each MSR gets, in each direction in which a guest was served, what it got then; some \
                     more are allowed, which the reasons name; all else is #GP."
                }
            },
        )?;
        writeln!(f, "#")?;
        print::comment(
            f,
            "Limits: what a guest did not do while it was watched it cannot do under this policy.",
        )?;
        if !summary.faulted.is_empty() {
            let faulted: Vec<(Msr, Op)> = summary.faulted.keys().copied().collect();
            let only: Vec<(Msr, Op)> = faulted
                .into_iter()
                .filter(|key| !summary.seen.contains_key(key))
                .collect();
            if !only.is_empty() {
                print::comment(
                    f,
                    &format!("Denied as it was then, since it only faulted: {}.", accesses(&only)),
                )?;
            }
        }
        if summary.unfiltered > 0 {
            print::comment(
                f,
                &format!(
                    "Without a rule, since no filter stops them: {} of the x2APIC's registers.",
                    counted(summary.unfiltered, "access")
                ),
            )?;
        }
        for remark in &self.remarks {
            let what = name(remark.msr);
            print::comment(f, &format!("Look at: {} {what} was {}.", remark.op, remark.message))?;
        }
        writeln!(f, "version = 1")?;
        writeln!(f, "name    = \"learned\"")?;
        writeln!(f, "default = \"deny\"")?;
        self.rules.iter().try_for_each(|rule| {
            let why = rule.why(summary.traces);
            print::rule(f, &rule.msrs, rule.read.as_ref(), rule.write.as_ref(), Some(&why))
        })
    }
}

/// The names of a range's first and last MSR, or of the only one.
pub(super) fn span(range: MsrRange) -> String {
    match range.len() {
        1 => name(range.first()),
        _ => format!("{}..={}", name(range.first()), name(range.last())),
    }
}

impl Summary {
    /// How often guests made accesses, in which traces and when, as a clause.
    pub fn history(&self, accesses: &[(Msr, Op)]) -> String {
        let mut facts = Facts::default();
        let mut faults: u64 = 0;
        for access in accesses {
            if let Some(seen) = self.seen.get(access) {
                facts.add(access.1, seen);
            }
            faults = faults.saturating_add(self.faulted.get(access).copied().unwrap_or_default());
        }
        let faults = print::counted(faults, "fault", "faults");
        match (facts.most, faults.starts_with("0 ")) {
            (0, _) => faults,
            (_, true) => facts.text(self.traces),
            (_, false) => format!("{} and {faults}", facts.text(self.traces)),
        }
    }

    /// What speaks for serving accesses, or against it: how often guests made them, which systems need them, and what they
    /// tell of the host; in a sentence.
    pub fn evidence(&self, accesses: &[(Msr, Op)]) -> String {
        let history = self.history(accesses);
        let parts = [Some(history), needed(accesses), telling(accesses)];
        parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
    }
}

/// Which systems make some of these accesses unguarded; of a single MSR also what for.
fn needed(accesses: &[(Msr, Op)]) -> Option<String> {
    let mut systems: Vec<(System, Vec<&Need>)> = Vec::new();
    let needs = msrgate_msrs::needs().iter();
    for need in needs.filter(|need| accesses.contains(&(need.msr, need.op))) {
        match systems.iter_mut().find(|(system, _)| *system == need.system) {
            Some((_, needs)) => needs.push(need),
            None => systems.push((need.system, vec![need])),
        }
    }
    systems.sort_by_key(|(system, _)| *system);
    let several = accesses
        .iter()
        .any(|(msr, _)| Some(*msr) != accesses.first().map(|(msr, _)| *msr));
    let clause = |(system, needs): &(System, Vec<&Need>)| {
        if !several {
            let whys: Vec<String> = needs.iter().map(|need| format!("{}: {}", need.op, need.why)).collect();
            return format!("{system} needs it ({})", whys.join("; "));
        }
        let mut names: Vec<String> = needs.iter().map(|need| name(need.msr)).collect();
        names.dedup();
        let more = names.len().saturating_sub(NEEDED);
        names.truncate(NEEDED);
        if more > 0 {
            names.push(format!("{more} more"));
        }
        format!("{system} needs {}", names.join(", "))
    };
    let clauses: Vec<String> = systems.iter().map(clause).collect();
    (!clauses.is_empty()).then(|| clauses.join("; "))
}

/// What of the host the values of these reads tell, where it is of others.
fn telling(accesses: &[(Msr, Op)]) -> Option<String> {
    let mut told: Vec<String> = Vec::new();
    for (msr, op) in accesses {
        let secret = msrgate_msrs::by_msr(*msr).filter(|entry| entry.is_secret() && *op == Op::Read);
        let told_by = secret.map(|entry| entry.host.to_string());
        told.extend(told_by.filter(|kind| !told.contains(kind)));
    }
    (!told.is_empty()).then(|| format!("of the host it may tell {}", told.join(", ")))
}

impl LearnedRule {
    /// What speaks for the rule, in a sentence; `traces` is how many there were in all.
    pub fn why(&self, traces: u64) -> String {
        let class = match (self.class, self.msrs.as_slice()) {
            (_, [one]) if one.starts_with('@') => String::new(),
            (Some(class), _) => format!("{class}: "),
            (None, _) => "not in the database: ".to_owned(),
        };
        let mut text = format!("{class}{}", self.facts.text(traces));
        for part in [needed(&self.served), telling(&self.served)].into_iter().flatten() {
            text.push_str(&format!("; {part}"));
        }
        if self.read.as_ref().is_some_and(|read| *read != ReadAction::Allow)
            || self.write.as_ref().is_some_and(|write| *write != WriteAction::Allow)
        {
            text.push_str("; answered as it was then");
        }
        for op in Op::ALL {
            let ranges: Vec<_> = self.unseen.iter().filter(|(_, other)| *other == op).collect();
            let total: u64 = ranges.iter().map(|(range, _)| range.len()).sum();
            if total == 0 {
                continue;
            }
            let mut named: Vec<String> = ranges.iter().take(NAMED).map(|(range, _)| span(*range)).collect();
            if ranges.len() > named.len() {
                named.push(counted((ranges.len() - named.len()) as u64, "more range"));
            }
            text.push_str(&format!("; {op} not seen of {}", named.join(", ")));
        }
        text
    }
}

impl Facts {
    pub(super) fn text(&self, traces: u64) -> String {
        let counts = match (self.reads, self.writes) {
            (0, 0) => return "never used".to_owned(),
            (reads, 0) => counted(reads, "read"),
            (0, writes) => counted(writes, "write"),
            (reads, writes) => format!("{} and {}", counted(reads, "read"), counted(writes, "write")),
        };
        let spread = match (self.fewest, self.most) {
            (1, 1) if traces == 1 => "in the trace".to_owned(),
            (fewest, most) if fewest == most => format!("in {most} of {traces} traces"),
            (fewest, most) => format!("each in {fewest} to {most} of {traces} traces"),
        };
        let names = names(self.names.iter(), self.most);
        let when = match (self.first, self.last) {
            (0, 0) => String::new(),
            (first, last) if seconds(first) == seconds(last) => format!(", {} s after its start", seconds(first)),
            (first, last) => format!(", {} s to {} s after its start", seconds(first), seconds(last)),
        };
        format!("{counts} {spread}{names}{when}")
    }
}

fn seconds(nanoseconds: u64) -> String {
    format!("{:.3}", nanoseconds as f64 / 1e9)
}

/// ` (a, b and 3 more)`.
pub(super) fn names<'a>(names: impl Iterator<Item = &'a String>, total: u64) -> String {
    let names: Vec<&str> = names.map(String::as_str).collect();
    let more = total.saturating_sub(names.len() as u64);
    match (names.is_empty(), more) {
        (true, _) => String::new(),
        (false, 0) => format!(" ({})", names.join(", ")),
        (false, more) => format!(" ({} and {more} more)", names.join(", ")),
    }
}

fn accesses(keys: &[(Msr, Op)]) -> String {
    let mut parts = Vec::new();
    for op in Op::ALL {
        let msrs: Vec<Msr> = keys
            .iter()
            .filter(|(_, other)| *other == op)
            .map(|(msr, _)| *msr)
            .collect();
        let ranges = runs(&msrs);
        let mut named: Vec<String> = ranges.iter().take(NAMED).map(|range| span(*range)).collect();
        if ranges.len() > named.len() {
            named.push(counted((ranges.len() - named.len()) as u64, "more range"));
        }
        if !named.is_empty() {
            parts.push(format!("{op} {}", named.join(", ")));
        }
    }
    parts.join("; ")
}

/// So many of a noun; of one that ends in s the plural has an e more.
pub(super) fn counted(count: u64, noun: &str) -> String {
    let plural = if noun.ends_with('s') { "es" } else { "s" };
    print::counted(count, noun, &format!("{noun}{plural}"))
}
