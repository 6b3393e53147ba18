//! `msrgate check`: is a policy right, and does it fit?

mod fix;
mod found;
mod github;
mod sarif;

use std::io::Write;
use std::path::Path;

use msrgate_msrs::Linux;
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::AccessCount;
use msrgate_policy::{Diagnostic, Severity};

use self::found::Checked;
use crate::args::{CheckArgs, FormatArg};
use crate::exit::{Exit, Failure};
use crate::json::{self, Printed, object};
use crate::load;
use crate::refusal;
use crate::stream::Tone;
use crate::surface::Surface;
use crate::{cpuid, hint, input, machine, render, stream, trace, words};

pub(crate) fn run(args: &CheckArgs) -> Result<Exit, Failure> {
    let cpuid = cpuid::given(&args.cpuid)?;
    let profile = trace::profile(&args.profile)?;
    let kernel = args.kernel.or_else(machine::linux);
    if args.fix {
        let mut stderr = stream::err();
        for path in &args.policies {
            fix::fix(&mut stderr, path, cpuid.as_ref(), &profile)?;
        }
    }
    let checked = args.policies.iter().map(|path| {
        let checked = check(path, cpuid.as_ref(), kernel, &profile);
        (input::shown(path), checked)
    });
    let checked: Vec<(String, Checked)> = checked.collect();
    // Unreadable input weighs more than findings.
    let exits = checked.iter().map(|(_, one)| one.exit);
    let exit = exits.max_by_key(|exit| *exit as u8).unwrap_or(Exit::Yes);
    match if args.json { FormatArg::Json } else { args.format } {
        FormatArg::Text => {
            for (path, one) in &checked {
                print(one, path, args.quiet)?;
            }
        }
        FormatArg::Json => {
            let objects: Vec<_> = checked.iter().map(|(path, one)| printed(one, path)).collect();
            match objects.as_slice() {
                [one] => json::print(one)?,
                several => json::print(&object! {
                    /// Whether there is neither an error nor a warning that the policy does not accept.
                    ok: exit == Exit::Yes,
                    /// With several policies: an object as that of one policy for each.
                    policies: several,
                })?,
            }
        }
        FormatArg::Github => {
            for (path, one) in &checked {
                github::write(&mut stream::out(), one, path)?;
            }
        }
        FormatArg::Sarif => writeln!(stream::out(), "{:#}", sarif::log(&checked))?,
    }
    Ok(exit)
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

pub(crate) fn printed(checked: &Checked, shown: &str) -> impl Printed {
    let finding = |found: &Diagnostic, whole: Option<&str>| {
        let place = checked.place(found);
        let (line, column) = place
            .as_ref()
            .map_or((None, None), |place| (Some(place.begin.0), Some(place.begin.1)));
        let file = place.map(|place| place.file);
        object! {
            /// `E…`, `W…` or `N…`; see [findings.md](findings.md).
            code: found.code.code(),
            /// `"error"`, `"warning"` or `"note"`.
            severity: found.severity().name(),
            /// What is wrong.
            message: found.message.clone(),
            /// In which file; null if it concerns the whole.
            file: file.or(whole.map(str::to_owned)),
            /// The line, from 1; null if it concerns the whole.
            line: line,
            /// The column in characters, from 1; null likewise.
            column: column,
            /// What to write instead; null if there is nothing to say.
            help: hint::help(found),
            /// Why the policy lets it stand; null if it does not. What is accepted does not count for `ok`.
            accepted: found.accepted.clone(),
        }
    };
    let findings = checked.findings.iter().map(|found| finding(found, None));
    let notes = checked.notes.iter().map(|note| finding(note, Some(shown)));
    let findings: Vec<_> = findings.chain(notes).collect();
    let stem = Path::new(shown).file_stem();
    let stem = stem.map(|stem| stem.to_string_lossy().into_owned());
    let name = checked
        .loaded
        .as_ref()
        .map(|loaded| loaded.policy.name.clone())
        .or(stem);
    let hash = checked
        .loaded
        .as_ref()
        .map(|loaded| words::hex(&loaded.plan.map().hash()));
    object! {
        /// Whether there is neither an error nor a warning that the policy does not accept.
        ok: checked.exit == Exit::Yes,
        /// Which policy.
        policy: object! {
            /// The policy's name.
            name: name,
            /// 32 bytes in hexadecimal that name what it means: two policies with the same hash decide every access alike.
            /// Null if it does not compile.
            hash: hash,
        },
        /// What was found, in the order of the text.
        findings: findings,
        /// Only if the policy needs more ranges than a filter has: why, and what would fit.
        #[serde(skip_serializing_if = "json::is_null")]
        refused: checked.too_many.as_deref().and_then(refusal::printed),
    }
}

fn print(checked: &Checked, path: &str, quiet: bool) -> Result<(), Failure> {
    let open: Vec<&Diagnostic> = checked.findings.iter().filter(|found| found.is_open()).collect();
    render::findings(&open, &checked.sources)?;
    if quiet {
        return Ok(());
    }
    let mut out = stream::page();
    let Some(loaded) = &checked.loaded else {
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
    for (key, line) in Surface::of(loaded).lines() {
        writeln!(out, "  {key:<9}{line}")?;
    }
    for found in checked.findings.iter().chain(&checked.notes) {
        let place = found.place.as_ref().and_then(|place| {
            let source = checked.sources.get(place.source)?;
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
