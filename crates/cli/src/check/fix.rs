//! `check --fix`: carries out what the help of a finding says, where that is a change of the text.

use std::fs;
use std::io::Write;
use std::path::Path;

use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::AccessCount;
use msrgate_policy::{Diagnostic, Edit, Fix, Severity, Source};

use crate::exit::Failure;
use crate::load::{self, Loaded};
use crate::output::{self, Existing};
use crate::stream::Stream;
use crate::{input, words};

/// The most changes of one file: each is tried by itself.
const MOST: usize = 10_000;

/// What is known of a text.
struct State {
    /// What it means, if it is a policy that compiles.
    hash: Option<Vec<u8>>,
    /// Whether what it means depends on the guest, so that no comparison for one says all.
    asks: bool,
    sources: Vec<Source>,
    findings: Vec<Diagnostic>,
}

/// Changes the file of a policy as far as its findings say how, and says what was changed. A change stays only if there is less to
/// mend afterwards; a policy that compiles means the same then.
pub(super) fn fix(
    out: &mut Stream<impl Write>,
    path: &Path,
    cpuid: Option<&Cpuid>,
    profile: &[AccessCount],
) -> Result<(), Failure> {
    let shown = input::shown(path);
    if path == Path::new("-") || msrgate_policy::built_in(path).is_some() {
        return Err(Failure::input(format!("{shown} is no file that can be changed")));
    }
    let bytes = input::bytes(path)?;
    let Ok(mut text) = msrgate_policy::text_of(bytes.clone()) else {
        return Ok(());
    };
    let state = |text: &str| State::of(path, text, cpuid, profile);
    let mut now = state(&text);
    let mut done: Vec<(usize, String)> = Vec::new();
    let mut skipped = 0;
    while done.len() < MOST {
        let Some((found, edit)) = now.edits().nth(skipped) else {
            break;
        };
        let line = now
            .sources
            .first()
            .map_or(0, |source| source.line_column(edit.span.start).0);
        let says = said(&text, &found, &edit);
        let mut changed = text.clone();
        changed.replace_range(edit.span.clone(), &edit.with);
        let then = state(&changed);
        if now.is_better(&then) {
            done.push((line, says));
            (text, now) = (changed, then);
        } else {
            skipped += 1;
        }
    }
    if done.is_empty() {
        writeln!(out, "{shown}: nothing to change by itself")?;
        return Ok(());
    }
    replace(path, &text)?;
    for (line, says) in &done {
        writeln!(out, "{shown}:{line}: {says}")?;
    }
    let changes = words::counted(done.len() as u64, "change", "changes");
    writeln!(out, "{shown}: {changes} written")?;
    Ok(())
}

impl State {
    fn of(path: &Path, text: &str, cpuid: Option<&Cpuid>, profile: &[AccessCount]) -> State {
        match load::policy_in(path, text, cpuid, profile) {
            Ok(loaded) => State::of_policy(&loaded, cpuid),
            Err(refused) => State {
                hash: None,
                asks: false,
                sources: refused.sources,
                findings: refused.diagnostics,
            },
        }
    }

    fn of_policy(loaded: &Loaded, cpuid: Option<&Cpuid>) -> State {
        let findings = msrgate_policy::check(&loaded.policy, loaded.plan.map(), cpuid);
        State {
            hash: Some(loaded.plan.map().hash().to_vec()),
            asks: loaded.policy.asks_cpuid(),
            sources: loaded.policy.sources.clone(),
            findings: findings.into_iter().filter(Diagnostic::is_open).collect(),
        }
    }

    /// Whether another state has less to mend and means the same; without a meaning so far, whether it has fewer errors.
    fn is_better(&self, then: &State) -> bool {
        let errors = |state: &State| {
            let errors = state
                .findings
                .iter()
                .filter(|found| found.severity() == Severity::Error);
            errors.count()
        };
        match &self.hash {
            Some(_) => self.hash == then.hash && then.findings.len() < self.findings.len(),
            None => errors(then) < errors(self),
        }
    }

    /// What can be changed in the file itself, not in what it extends.
    fn edits(&self) -> impl Iterator<Item = (Diagnostic, Edit)> {
        let fixable = self
            .findings
            .iter()
            .filter(|found| !(self.asks && found.fix == Some(Fix::Rule)));
        let edits = fixable.filter_map(|found| Some((found.clone(), found.edit(&self.sources)?)));
        edits.filter(|(_, edit)| edit.source == 0)
    }
}

/// What a change does, in a clause.
fn said(text: &str, found: &Diagnostic, edit: &Edit) -> String {
    let before = text.get(edit.span.clone()).unwrap_or_default().trim();
    let before = before.lines().next().unwrap_or_default();
    match &found.fix {
        Some(Fix::Rule) => format!("{}: the rule is left out", found.code),
        Some(Fix::Key(_)) => format!("{}: `{before}` is left out", found.code),
        _ => format!("{}: `{before}` becomes `{}`", found.code, edit.with),
    }
}

/// Puts the text in the file's place, with the file's permissions.
fn replace(path: &Path, text: &str) -> Result<(), Failure> {
    // A link stays one.
    let target = fs::canonicalize(path);
    let written = target.and_then(|path| {
        let permissions = fs::metadata(&path)?.permissions();
        output::put(&path, text, Some(permissions), Existing::Replaced)
    });
    written.map_err(|error| Failure::input(format!("cannot write `{}`: {error}", path.display())))
}
