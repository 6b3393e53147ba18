//! `msrgate check`: is a policy right, and does it fit?

use std::io::Write;
use std::path::Path;

use msrgate_msrs::Linux;
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::AccessCount;
use msrgate_policy::{Diagnostic, Severity, Source};
use serde_json::{Value, json};

use crate::args::CheckArgs;
use crate::exit::{Exit, Failure};
use crate::load::{self, Loaded};
use crate::refusal::{self, TooMany};
use crate::stream::Tone;
use crate::{cpuid, hint, input, machine, render, stream, trace, words};

pub(crate) fn run(args: &CheckArgs) -> Result<Exit, Failure> {
    let cpuid = cpuid::given(&args.cpuid)?;
    let profile = trace::profile(&args.profile)?;
    let kernel = args.kernel.or_else(machine::linux);
    let mut exit = Exit::Yes;
    let mut objects = Vec::new();
    for path in &args.policies {
        let checked = check(path, cpuid.as_ref(), kernel, &profile);
        // Unreadable input weighs more than findings.
        if checked.exit as u8 > exit as u8 {
            exit = checked.exit;
        }
        if args.json {
            objects.push(checked.json(path));
        } else {
            checked.print(path)?;
        }
    }
    if args.json {
        let object = match objects.as_slice() {
            [one] => one.clone(),
            several => json!({ "ok": exit == Exit::Yes, "policies": several }),
        };
        writeln!(stream::out(), "{object:#}")?;
    }
    Ok(exit)
}

/// What was found about one policy.
struct Checked {
    exit: Exit,
    sources: Vec<Source>,
    findings: Vec<Diagnostic>,
    /// On the plan.
    notes: Vec<Diagnostic>,
    loaded: Option<Loaded>,
    too_many: Option<Box<TooMany>>,
}

fn check(path: &Path, cpuid: Option<&Cpuid>, kernel: Option<Linux>, profile: &[AccessCount]) -> Checked {
    match load::policy(path, cpuid, profile) {
        Ok(loaded) => {
            let findings = msrgate_policy::check(&loaded.policy, loaded.plan.map(), cpuid);
            let exit = if findings.iter().any(Diagnostic::is_open) {
                Exit::No
            } else {
                Exit::Yes
            };
            Checked {
                exit,
                sources: loaded.policy.sources.clone(),
                findings,
                notes: msrgate_policy::notes(&loaded.plan, cpuid, kernel),
                loaded: Some(loaded),
                too_many: None,
            }
        }
        Err(refused) => Checked {
            exit: refused.exit,
            sources: refused.sources,
            findings: refused.diagnostics,
            notes: Vec::new(),
            loaded: None,
            too_many: refused.too_many,
        },
    }
}

impl Checked {
    fn json(&self, path: &Path) -> Value {
        let shown = input::shown(path);
        let finding = |found: &Diagnostic, whole: Option<&str>| {
            let place = found
                .place
                .as_ref()
                .and_then(|place| Some((place, self.sources.get(place.source)?)));
            let (line, column) = place.map_or((None, None), |(place, source)| {
                let (line, column) = source.line_column(place.span.start);
                (Some(line), Some(column))
            });
            let file = place.map(|(_, source)| source.path().display().to_string());
            json!({
                "code": found.code.code(),
                "severity": found.severity().name(),
                "message": found.message,
                "file": file.or(whole.map(str::to_owned)),
                "line": line,
                "column": column,
                "help": hint::help(found),
                "accepted": found.accepted,
            })
        };
        let findings = self.findings.iter().map(|found| finding(found, None));
        let notes = self.notes.iter().map(|note| finding(note, Some(&shown)));
        let findings: Vec<Value> = findings.chain(notes).collect();
        let stem = Path::new(&shown).file_stem();
        let stem = stem.map(|stem| stem.to_string_lossy().into_owned());
        let name = self.loaded.as_ref().map(|loaded| loaded.policy.name.clone()).or(stem);
        let hash = self.loaded.as_ref().map(|loaded| words::hex(&loaded.plan.map().hash()));
        let mut object = json!({
            "ok": self.exit == Exit::Yes,
            "policy": { "name": name, "hash": hash },
            "findings": findings,
        });
        if let Some(too_many) = &self.too_many {
            object["refused"] = refusal::json(too_many);
        }
        object
    }

    fn print(&self, path: &Path) -> Result<(), Failure> {
        let open: Vec<&Diagnostic> = self.findings.iter().filter(|found| found.is_open()).collect();
        render::findings(&open, &self.sources)?;
        let path = input::shown(path);
        let mut out = stream::page();
        let Some(loaded) = &self.loaded else {
            let errors = words::counted(open.len() as u64, "error", "errors");
            out.say(Tone::Bad, &format!("{path}: refused, {errors}"))?;
            return Ok(());
        };
        let verdict = match open.len() {
            0 => "ok".to_owned(),
            n => words::counted(n as u64, "finding", "findings"),
        };
        let ranges = loaded.plan.filter().ranges();
        let bytes: usize = ranges.iter().map(|range| range.bitmap().len() * 8).sum();
        let rules = words::counted(loaded.policy.rules.len() as u64, "rule", "rules");
        out.say(
            if open.is_empty() { Tone::Good } else { Tone::Odd },
            &format!(
                "{path}: {verdict}; {rules}, {} of 16 ranges, {bytes} bytes of bitmaps, proven equal to the policy",
                ranges.len()
            ),
        )?;
        for found in self.findings.iter().chain(&self.notes) {
            let place = found.place.as_ref().and_then(|place| {
                let source = self.sources.get(place.source)?;
                Some(format!(
                    " at {}:{}",
                    source.path().display(),
                    source.line_column(place.span.start).0
                ))
            });
            let place = place.unwrap_or_default();
            match &found.accepted {
                Some(reason) => writeln!(out, "  accepted {}{place}: {reason}", found.code)?,
                None if found.severity() == Severity::Note => {
                    writeln!(out, "  note {}{place}: {}", found.code, hint::line(found))?
                }
                None => {}
            }
        }
        Ok(())
    }
}
