//! `msrgate explain`: what a guest can reach, from an access back to the rule that decides it, and what a kind of finding means.

use std::io::{self, Write};
use std::path::Path;

use msrgate_core::{Action, DecidedBy, Msr, Op, ReadAction, Reason, WriteAction};
use msrgate_guest::NoPreset;
use msrgate_msrs::{Class, number};
use msrgate_policy::{Cause, Code, Explanation, Policy, Sees};

use crate::args::ExplainArgs;
use crate::exit::{Exit, Failure};
use crate::json::{self, Printed, object};
use crate::load::{self, Loaded};
use crate::stream::Tone;
use crate::surface::{ClassSurface, Surface};
use crate::{cause, cpuid, stream, trace, words};

pub(crate) fn run(args: &ExplainArgs) -> Result<Exit, Failure> {
    if let Some(code) = code(args)? {
        return finding(code, args.json);
    }
    let what = subject(args.msr.as_deref())?;
    let cpuid = cpuid::given(&args.cpuid)?;
    let profile = trace::profile(&args.profile)?;
    let policy = load::unresolved_or_filter(&args.policy)?;
    let loaded = match args.host {
        true => load::planned_for_host(policy, cpuid.as_ref(), &profile)?,
        false => load::planned_or_report(policy, cpuid.as_ref(), &profile)?,
    };
    let msr = match what {
        Subject::All => {
            let surface = Surface::of(&loaded);
            match args.json {
                true => json::print(&surface.printed())?,
                false => surface.print(&mut stream::page(), args.all)?,
            }
            return Ok(Exit::Yes);
        }
        Subject::Class(class) => {
            let surface = ClassSurface::of(&loaded, class);
            match args.json {
                true => json::print(&surface.printed())?,
                false => surface.print(&mut stream::page(), args.all)?,
            }
            return Ok(Exit::Yes);
        }
        Subject::One(msr) => msr,
    };
    let explained = |op| loaded.explain(msr, op);
    let no_preset = |op| {
        let mut whys = loaded.no_presets.iter().filter(|_| op == Op::Read);
        whys.find(|(range, _)| range.contains(msr)).map(|(_, why)| *why)
    };
    match (args.op, args.json) {
        (Some(op), true) => json::print(&access(&loaded, &explained(op.into()), no_preset(op.into())))?,
        (None, true) => {
            let [read, write] = Op::ALL.map(|op| access(&loaded, &explained(op), no_preset(op)));
            json::print(&object! {
                /// The index.
                msr: msr.to_string(),
                /// The MSR's name; null if it is not known.
                name: words::name(msr),
                /// The explanation of reads.
                read: read,
                /// The explanation of writes.
                write: write,
            })?;
        }
        (op, false) => {
            for op in Op::ALL
                .into_iter()
                .filter(|each| op.is_none_or(|op| Op::from(op) == *each))
            {
                print(&mut stream::page(), &loaded.policy, &explained(op), no_preset(op))?;
            }
        }
    }
    Ok(Exit::Yes)
}

/// The code of a finding that stands in place of a policy.
fn code(args: &ExplainArgs) -> Result<Option<Code>, Failure> {
    let asked = args.policy.to_string_lossy();
    if args.msr.is_some() || args.policy.exists() {
        return Ok(None);
    }
    let (kind, number) = asked.split_at_checked(1).unwrap_or_default();
    let is_code = matches!(kind, "E" | "W" | "N" | "e" | "w" | "n") && number.parse::<u16>().is_ok();
    match Code::from_code(&asked.to_ascii_uppercase()) {
        None if is_code => Err(Failure::input(format!("no finding has the code `{asked}`"))),
        code => Ok(code),
    }
}

/// What a kind of finding means.
fn finding(code: Code, json: bool) -> Result<Exit, Failure> {
    if json {
        json::print(&code_of_finding(code))?;
        return Ok(Exit::Yes);
    }
    let mut out = stream::page();
    out.say(Tone::Title, &format!("{code}: {}", code.title()))?;
    writeln!(out)?;
    // Examples stand in from the margin, as the manual pages have them.
    let mut example = false;
    for line in words::finding(code).unwrap_or_default().lines() {
        match (line.starts_with("```"), example) {
            (true, _) => example = !example,
            (false, true) => writeln!(out, "    {line}")?,
            (false, false) => writeln!(out, "{line}")?,
        }
    }
    Ok(Exit::Yes)
}

/// What `explain CODE` prints for programs.
pub(crate) fn code_of_finding(code: Code) -> impl Printed {
    object! {
        /// The code.
        code: code.code(),
        /// `"error"`, `"warning"` or `"note"`.
        severity: code.severity().name(),
        /// What it is, in a clause.
        title: code.title(),
        /// The finding's paragraph in [findings.md](findings.md), in Markdown.
        text: words::finding(code).unwrap_or_default(),
    }
}

/// What is to be explained.
enum Subject {
    All,
    Class(Class),
    One(Msr),
}

fn subject(text: Option<&str>) -> Result<Subject, Failure> {
    let Some(text) = text else {
        return Ok(Subject::All);
    };
    let Some(name) = text.strip_prefix('@') else {
        return msr(text).map(Subject::One);
    };
    name.parse().map(Subject::Class).map_err(|_| {
        let near = msrgate_msrs::nearest_of(name, msrgate_msrs::classes());
        let near = near.map(|near| format!("; did you mean `@{near}`")).unwrap_or_default();
        Failure::input(format!(
            "there is no class `@{name}`{near}; `msrgate explain POLICY --all` lists all"
        ))
    })
}

fn msr(text: &str) -> Result<Msr, Failure> {
    if let Ok(index) = number::parse(text) {
        return u32::try_from(index)
            .map(Msr)
            .map_err(|_| Failure::input(format!("`{text}` is too large for an MSR index, which has 32 bits")));
    }
    let named = msrgate_msrs::by_name(text).map(|entry| entry.msr);
    named.or_else(|| msrgate_msrs::printed(text)).ok_or_else(|| {
        if Path::new(text).exists() {
            return Failure::input(format!(
                "`{text}` is not an MSR but a file; the policy comes first: `msrgate explain {} MSR`",
                words::quoted(Path::new(text))
            ));
        }
        let near = msrgate_msrs::nearest(text)
            .map(|near| format!("; did you mean `{near}`?"))
            .unwrap_or_default();
        Failure::input(format!("no MSR is named `{text}`{near}"))
    })
}

/// What becomes of an access, for programs.
pub(crate) fn access(
    loaded: &Loaded,
    explanation: &Explanation<'_>,
    no_preset: Option<NoPreset>,
) -> impl Printed + use<> {
    let rule = explanation.cause.rule().map(|(index, rule)| {
        let source = loaded.policy.sources.get(rule.place.source);
        object! {
            /// The rule's number, from 0.
            index: index,
            /// The file in which its `[[rule]]` stands.
            file: source.map(|source| source.path().display().to_string()),
            /// The line there.
            line: source.map(|source| source.line_column(rule.place.span.start).0),
            /// The rule's reason; null if it gives none.
            why: rule.why.clone(),
        }
    });
    let range = match explanation.decider {
        DecidedBy::Range { slot, bit } => Some(object! {
            /// The range, from 0.
            slot: slot,
            /// The bit in its bitmap.
            bit: bit,
        }),
        DecidedBy::X2apic | DecidedBy::Default => None,
    };
    let declined = |reason: Reason| match &explanation.sees {
        Sees::Kernel(_, declined) => declined.iter().find(|(when, _)| *when == reason),
        _ => None,
    };
    let declined = |reason| declined(reason).map(|(_, action)| action.name());
    let decided_by = cause::name(explanation);
    let lacks = match explanation.cause {
        Cause::Valid(entry) if decided_by == "valid" => Some(cause::lacks(entry)),
        _ => None,
    };
    object! {
        /// The index.
        msr: explanation.msr.to_string(),
        /// The MSR's name; null if it is not known.
        name: words::name(explanation.msr),
        /// The direction.
        op: explanation.op.name(),
        /// The action's word.
        action: explanation.action.name(),
        /// The values that the action has, and what their bits mean; of a `mask` of reads what is kept and what is set.
        bits: fixed(&explanation.action).iter().map(|(_, value)| object! {
            /// A value.
            value: format!("{value:#x}"),
            /// The value's fields that are not zero.
            bits: words::bits_printed(explanation.msr, *value),
        }).collect::<Vec<_>>(),
        /// What decides: `"rule"`, `"default"`, `"valid"` (the guest's CPUID does not show the MSR), `"x2apic"` (the kernel,
        /// which no filter stops there), or `"last-msr"` (the filter's default, since no range covers 0xffffffff). A VMM's
        /// own filter, which may deny what the policy leaves to the kernel, is known to `run` only: `vmm-filter` in its
        /// [trace](trace.md#an-event).
        decided_by: decided_by,
        /// The rule that decides; null where none does.
        rule: rule,
        /// What of its CPUID says that the guest lacks the MSR; null where that does not decide.
        lacks: lacks,
        /// What user space answers where the kernel does not know the MSR: the action's word; null where it is not asked.
        unknown: declined(Reason::Unknown),
        /// What user space answers where the kernel refuses the access: likewise.
        invalid: declined(Reason::Invalid),
        /// The filter's word: `"allow"` or `"deny"`.
        verdict: explanation.verdict.name(),
        /// What gave the verdict; null for the filter's default, and for the x2APIC's MSRs.
        range: range,
        /// What the guest gets, in words.
        sees: explanation.sees.to_string(),
        /// Whether the access leaves the kernel for user space.
        exits: explanation.exits,
        /// Why a fixed answer makes an exit, as `no_presets[].why` of `plan`; null where it makes none, and without
        /// `--host`.
        no_preset: no_preset.map(NoPreset::name),
        /// How often the trace of `--profile` has the access; null without one.
        touches: explanation.touches,
    }
}

/// The values that an action has, and what each is, where it is not the answer.
fn fixed(action: &Action) -> Vec<(&'static str, u64)> {
    match action {
        Action::Read(ReadAction::Value(value) | ReadAction::Shadow(value)) => vec![("", *value)],
        Action::Read(ReadAction::Mask { keep, set }) => vec![("kept: ", *keep), ("set: ", *set)],
        Action::Write(WriteAction::Mask { may_change, .. }) => vec![("may change: ", *may_change)],
        Action::Write(WriteAction::Only(values)) => values.iter().map(|value| ("", *value)).collect(),
        _ => Vec::new(),
    }
}

fn print(
    out: &mut impl Write,
    policy: &Policy,
    explanation: &Explanation<'_>,
    no_preset: Option<NoPreset>,
) -> io::Result<()> {
    let name = words::name(explanation.msr)
        .map(|name| format!(" {name}"))
        .unwrap_or_default();
    writeln!(out, "{} {}{name}", explanation.op, explanation.msr)?;
    let past = match cause::name(explanation) {
        "x2apic" => "; not consulted, since the kernel itself decides about the x2APIC (0x800..=0x8ff)",
        "last-msr" => "; not consulted, since no range covers the MSR and the filter's default decides",
        _ => "",
    };
    match explanation.cause {
        Cause::Rule(index, rule) => {
            let place = policy.rule_place(index).unwrap_or_default();
            writeln!(out, "  rule     {index}, {place}{past}")?;
            if let Some(why) = &rule.why {
                writeln!(out, "  why      {why}")?;
            }
        }
        Cause::Valid(entry) => writeln!(
            out,
            "  rule     none; `valid` decides: the guest's {}{past}",
            cause::lacks_in_words(entry)
        )?,
        _ => writeln!(out, "  rule     none; the default decides{past}")?,
    }
    writeln!(out, "  action   {}", explanation.action)?;
    for (what, value) in fixed(&explanation.action) {
        let bits = words::bits(explanation.msr, value);
        if !bits.is_empty() {
            writeln!(out, "  bits     {what}{bits}")?;
        }
    }
    let decider = match explanation.decider {
        DecidedBy::X2apic => "before any range: x2APIC is never filtered".to_owned(),
        DecidedBy::Range { slot, bit } => format!("range in slot {slot}, bit {bit}"),
        DecidedBy::Default => "no range; the filter's default".to_owned(),
    };
    writeln!(out, "  filter   {}: {decider}", explanation.verdict.name())?;
    writeln!(out, "  sees     {}", explanation.sees)?;
    let exits = if explanation.exits {
        "leaves the kernel: user space answers, which costs some microseconds"
    } else {
        "stays in the kernel"
    };
    writeln!(out, "  cost     {exits}")?;
    if let Some(no_preset) = no_preset {
        writeln!(out, "  preset   none: {no_preset}")?;
    }
    if let Some(touches) = explanation.touches {
        let times = words::counted(touches, "time", "times");
        let exits = if explanation.exits { ", an exit each" } else { "" };
        writeln!(out, "  profile  {times}{exits}")?;
    }
    Ok(())
}
