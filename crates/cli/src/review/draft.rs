//! The policy's text with the rules of the answers in it, compiled.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use msrgate_core::{Msr, Op, ReadAction, WriteAction};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_msrs::{Class, spell};
use msrgate_policy::{Cause, Code, Diagnostic, Severity, print};
use msrgate_trace::learn::Summary;

use super::answer::Answer;
use super::question::Question;
use crate::exit::Failure;
use crate::load::{self, Loaded, Refused};

/// Why a finding about a rule of a review may stand: whoever answered was told.
const ACCEPTED: &str = "chosen in a review";

/// What the accesses of one MSR get by the answers.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
struct Chosen {
    read: Option<ReadAction>,
    write: Option<WriteAction>,
}

impl Chosen {
    fn accesses(&self, msrs: &[Msr]) -> Vec<(Msr, Op)> {
        let decided = [(Op::Read, self.read.is_some()), (Op::Write, self.write.is_some())];
        let of = |msr: &Msr| {
            let msr = *msr;
            decided
                .into_iter()
                .filter(|(_, decided)| *decided)
                .map(move |(op, _)| (msr, op))
        };
        msrs.iter().flat_map(of).collect()
    }
}

/// A rule to be written, and where in the text that was read.
struct Added {
    at: usize,
    msrs: Vec<Msr>,
    chosen: Chosen,
    why: String,
    accept: BTreeSet<Code>,
}

impl fmt::Display for Added {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Chosen { read, write } = &self.chosen;
        let msrs = spell::patterns(&self.msrs);
        print::rule(f, &msrs, read.as_ref(), write.as_ref(), Some(&self.why))?;
        if !self.accept.is_empty() {
            let accept = self.accept.iter().map(|code| format!("{code} = \"{ACCEPTED}\""));
            writeln!(f, "accept = {{ {} }}", accept.collect::<Vec<_>>().join(", "))?;
        }
        Ok(())
    }
}

/// The policy as far as it is answered.
pub(crate) struct Draft<'a> {
    path: PathBuf,
    base: String,
    cpuid: Option<&'a Cpuid>,
    summary: &'a Summary,
    /// The policy as it was read, before any answer.
    original: Loaded,
    /// Where rules stand, by the offset in `base` and the MSR.
    chosen: BTreeMap<(usize, Msr), Chosen>,
    /// The findings that were open before.
    before: Vec<(Code, String)>,
    text: String,
    loaded: Loaded,
}

impl<'a> Draft<'a> {
    pub(super) fn new(
        path: &Path,
        base: String,
        cpuid: Option<&'a Cpuid>,
        summary: &'a Summary,
    ) -> Result<Draft<'a>, Failure> {
        let read = || load::policy_in(path, &base, cpuid, &[]).map_err(|refused| refused.report());
        let (original, loaded) = (read()?, read()?);
        Ok(Draft {
            original,
            path: path.to_path_buf(),
            text: base.clone(),
            base,
            cpuid,
            summary,
            chosen: BTreeMap::new(),
            before: open(&loaded, cpuid).into_iter().map(key).collect(),
            loaded,
        })
    }

    pub(super) fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn is_changed(&self) -> bool {
        !self.chosen.is_empty()
    }

    /// Whether an answer decides the access.
    pub(super) fn decides(&self, msr: Msr, op: Op) -> bool {
        let of = self.chosen.iter().filter(|((_, other), _)| *other == msr);
        of.into_iter().any(|(_, chosen)| match op {
            Op::Read => chosen.read.is_some(),
            Op::Write => chosen.write.is_some(),
        })
    }

    /// The findings that the answers brought and that stand about other rules.
    pub(super) fn new_findings(&self) -> Vec<Diagnostic> {
        let mut new = open(&self.loaded, self.cpuid);
        new.retain(|found| !self.before.contains(&key(found.clone())));
        new
    }

    /// Puts answers into the policy; all of them, or none where the policy is none with them. Gives what is to be said of it.
    pub(super) fn answer(&mut self, answers: &[(&Question<'_>, Answer)]) -> Result<Vec<String>, String> {
        let mut chosen = self.chosen.clone();
        for (question, answer) in answers {
            self.choose(&mut chosen, question, *answer)?;
        }
        let mut added = self.added(&chosen);
        let (mut text, places) = self.with(&added);
        let mut loaded = self.load(&text)?;
        // What is found about the rules that are added was asked for.
        let mut told = Vec::new();
        for found in open(&loaded, self.cpuid) {
            let own = found.place.as_ref().filter(|place| place.source == 0);
            let rule = own.and_then(|place| places.iter().position(|rule| rule.contains(&place.span.start)));
            if let Some(rule) = rule.and_then(|rule| added.get_mut(rule)) {
                rule.accept.insert(found.code);
                told.push(format!("{}: {}", found.code, found.message));
            }
        }
        if !told.is_empty() {
            (text, _) = self.with(&added);
            loaded = self.load(&text)?;
        }
        (self.chosen, self.text, self.loaded) = (chosen, text, loaded);
        Ok(told)
    }

    fn load(&self, text: &str) -> Result<Loaded, String> {
        load::policy_in(&self.path, text, self.cpuid, &[]).map_err(|refused| {
            let Refused { diagnostics, .. } = *refused;
            let why = diagnostics
                .first()
                .map(|found| format!("{}: {}", found.code, found.message));
            why.unwrap_or_default()
        })
    }

    fn choose(
        &self,
        chosen: &mut BTreeMap<(usize, Msr), Chosen>,
        question: &Question<'_>,
        answer: Answer,
    ) -> Result<(), String> {
        let (msr, op) = (question.msr, question.op);
        let other = Op::ALL.into_iter().find(|other| *other != op).unwrap_or(op);
        if answer == Answer::Shadow
            && let Cause::Rule(number, _) = self.original.explain(msr, other).cause
        {
            let place = self.original.policy.rule_place(number).unwrap_or_default();
            return Err(format!(
                "a shadow takes both directions, and the rule at {place} decides {other}"
            ));
        }
        if answer == Answer::Shadow {
            chosen.retain(|(_, other), _| *other != msr);
        }
        let entry = chosen.entry((self.place(msr, op), msr)).or_default();
        let (read, write) = match answer {
            Answer::Allow => (ReadAction::Allow, WriteAction::Allow),
            Answer::Deny => (ReadAction::Deny, WriteAction::Deny),
            Answer::Zero => (ReadAction::Value(0), WriteAction::Ignore),
            Answer::Value(value) => (ReadAction::Value(value), WriteAction::Ignore),
            Answer::Ignore => (ReadAction::Value(0), WriteAction::Ignore),
            Answer::Shadow => {
                let initial = question.initial().unwrap_or_default();
                *entry = Chosen {
                    read: Some(ReadAction::Shadow(initial)),
                    write: Some(WriteAction::Shadow),
                };
                return Ok(());
            }
            Answer::Skip | Answer::Quit => return Ok(()),
        };
        match op {
            Op::Read => entry.read = Some(read),
            Op::Write => entry.write = Some(write),
        }
        Ok(())
    }

    /// Where a rule about the access has a say: at the end, or before the rule of the same file that denies it.
    fn place(&self, msr: Msr, op: Op) -> usize {
        let mut at = match self.original.explain(msr, op).cause {
            Cause::Rule(_, rule) if rule.place.source == 0 => rule.place.span.start,
            _ => return self.base.len(),
        };
        // With the comment above it.
        for line in self.base.get(..at).unwrap_or_default().split_inclusive('\n').rev() {
            if !line.trim_start().starts_with('#') {
                break;
            }
            at -= line.len();
        }
        at
    }

    /// The rules: those at the end share one where MSRs of a class get the same.
    fn added(&self, chosen: &BTreeMap<(usize, Msr), Chosen>) -> Vec<Added> {
        let mut added: Vec<Added> = Vec::new();
        let class = |msr: Msr| -> Option<Class> { msrgate_msrs::by_msr(msr)?.classes().first().copied() };
        for ((at, msr), chosen) in chosen.iter().filter(|(_, chosen)| **chosen != Chosen::default()) {
            let same = |rule: &&mut Added| {
                rule.at == *at
                    && *at == self.base.len()
                    && rule.chosen == *chosen
                    && rule.msrs.first().map(|first| class(*first)) == Some(class(*msr))
            };
            match added.iter_mut().find(same) {
                Some(rule) => rule.msrs.push(*msr),
                None => added.push(Added {
                    at: *at,
                    msrs: vec![*msr],
                    chosen: chosen.clone(),
                    why: String::new(),
                    accept: BTreeSet::new(),
                }),
            }
        }
        for rule in &mut added {
            let named = rule.msrs.first().and_then(|msr| class(*msr));
            let named = named.map_or_else(|| "not in the database".to_owned(), |class| class.to_string());
            let evidence = self.summary.evidence(&rule.chosen.accesses(&rule.msrs));
            rule.why = format!("{named}: {evidence}");
        }
        added
    }

    /// The text with these rules, and where each of them stands.
    fn with(&self, added: &[Added]) -> (String, Vec<std::ops::Range<usize>>) {
        let mut text = String::new();
        let mut places = Vec::new();
        let mut from = 0;
        for rule in added {
            text.push_str(self.base.get(from..rule.at).unwrap_or_default());
            from = rule.at;
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            let start = text.len();
            let written = rule.to_string();
            match rule.at < self.base.len() {
                // The rule before which it stands has its empty line already.
                true => text.push_str(&format!("{}\n", written.trim_start())),
                false => text.push_str(&written),
            }
            places.push(start..text.len());
        }
        text.push_str(self.base.get(from..).unwrap_or_default());
        (text, places)
    }
}

/// The warnings that the policy does not accept.
fn open(loaded: &Loaded, cpuid: Option<&Cpuid>) -> Vec<Diagnostic> {
    let mut found = msrgate_policy::check(&loaded.policy, loaded.plan.map(), cpuid);
    found.retain(|found| found.is_open() && found.severity() == Severity::Warning);
    found
}

fn key(found: Diagnostic) -> (Code, String) {
    (found.code, found.message)
}
