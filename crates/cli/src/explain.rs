//! `msrgate explain`: from an access back to the rule that decides it.

use std::io::{self, Write};
use std::path::Path;

use msrgate_core::{DecidedBy, Msr, Op, Reason};
use msrgate_guest::NoPreset;
use msrgate_msrs::number;
use msrgate_policy::{Cause, Explanation, Policy, Sees};
use serde_json::{Value, json};

use crate::args::ExplainArgs;
use crate::exit::{Exit, Failure};
use crate::load::{self, Loaded};
use crate::{cause, cpuid, stream, trace, words};

pub(crate) fn run(args: &ExplainArgs) -> Result<Exit, Failure> {
    let msr = msr(&args.msr)?;
    let cpuid = cpuid::given(&args.cpuid)?;
    let profile = trace::profile(&args.profile)?;
    let policy = load::unresolved_or_filter(&args.policy)?;
    let loaded = match args.host {
        true => load::planned_for_host(policy, cpuid.as_ref(), &profile)?,
        false => load::planned_or_report(policy, cpuid.as_ref(), &profile)?,
    };
    let explained = |op| loaded.explain(msr, op);
    let no_preset = |op| {
        let mut whys = loaded.no_presets.iter().filter(|_| op == Op::Read);
        whys.find(|(range, _)| range.contains(msr)).map(|(_, why)| *why)
    };
    let json = |op| json(&loaded, &explained(op), no_preset(op));
    let mut out = stream::out();
    match (args.op, args.json) {
        (Some(op), true) => writeln!(out, "{:#}", json(op.into()))?,
        (None, true) => {
            let both = json!({
                "msr": msr.to_string(),
                "name": words::name(msr),
                "read": json(Op::Read),
                "write": json(Op::Write),
            });
            writeln!(out, "{both:#}")?;
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
                "`{text}` is no MSR but a file; the policy comes first: `msrgate explain {} MSR`",
                words::quoted(Path::new(text))
            ));
        }
        let near = msrgate_msrs::nearest(text)
            .map(|near| format!("; did you mean `{near}`?"))
            .unwrap_or_default();
        Failure::input(format!("no MSR is named `{text}`{near}"))
    })
}

fn json(loaded: &Loaded, explanation: &Explanation<'_>, no_preset: Option<NoPreset>) -> Value {
    let rule = explanation.cause.rule().map(|(index, rule)| {
        let source = loaded.policy.sources.get(rule.place.source);
        json!({
            "index": index,
            "file": source.map(|source| source.path().display().to_string()),
            "line": source.map(|source| source.line_column(rule.place.span.start).0),
            "why": rule.why,
        })
    });
    let range = match explanation.decider {
        DecidedBy::Range { slot, bit } => json!({ "slot": slot, "bit": bit }),
        DecidedBy::X2apic | DecidedBy::Default => Value::Null,
    };
    let declined = |reason: Reason| match &explanation.sees {
        Sees::Kernel(_, declined) => declined.iter().find(|(when, _)| *when == reason),
        _ => None,
    };
    let declined = |reason| declined(reason).map(|(_, action)| action.name());
    let decided_by = cause::name(explanation);
    let lacks = match explanation.cause {
        Cause::Valid(entry) if decided_by == "valid" => cause::lacks(entry),
        _ => Value::Null,
    };
    json!({
        "msr": explanation.msr.to_string(),
        "name": words::name(explanation.msr),
        "op": explanation.op.name(),
        "action": explanation.action.name(),
        "decided_by": decided_by,
        "rule": rule,
        "lacks": lacks,
        "unknown": declined(Reason::Unknown),
        "invalid": declined(Reason::Invalid),
        "verdict": explanation.verdict.name(),
        "range": range,
        "sees": explanation.sees.to_string(),
        "exits": explanation.exits,
        "no_preset": no_preset.map(NoPreset::name),
        "touches": explanation.touches,
    })
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
        "x2apic" => "; not asked, since the kernel decides of x2APIC (0x800..=0x8ff)",
        "last-msr" => "; not asked, since the filter's default decides of what no range covers",
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
