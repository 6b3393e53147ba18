//! `msrgate learn`: from what guests did to the smallest policy that serves them.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;

use msrgate_core::{ReadAction, WriteAction};
use msrgate_plan::{Plan, PlanError};
use msrgate_policy::Policy;
use msrgate_policy::learn::{Learned, Summary, Widen};
use serde_json::{Value, json};

use crate::args::{LearnArgs, WidenArg};
use crate::exit::{Exit, Failure};
use crate::{explain, load, replay};

pub(crate) fn run(args: &LearnArgs) -> Result<Exit, Failure> {
    let cpuid = load::cpuid(&args.cpuid)?;
    let mut summary = Summary::default();
    for path in &args.traces {
        let name = path.display();
        let unreadable = |error: &dyn std::fmt::Display| Failure::input(format!("{name}: {error}"));
        let next = read(path)?;
        summary.merge(&next).map_err(|error| unreadable(&error))?;
    }
    if args.summary {
        let mut out = io::BufWriter::new(io::stdout().lock());
        summary.write(&mut out)?;
        out.flush()?;
        return Ok(Exit::Yes);
    }
    let widen = Widen {
        classes: args.widen.contains(&WidenArg::Classes),
        ranges: args.widen.contains(&WidenArg::Ranges),
        cpuid,
    };
    let learned = Learned::from(&summary, &widen);
    let text = learned.to_string();
    let policy =
        Policy::parse("learned.toml", &text).map_err(|rejected| bug(format!("{:?}", rejected.diagnostics.first())))?;
    let map = policy.decision_map(None).map_err(|needed| bug(needed.to_string()))?;
    let plan = Plan::compile(&map);
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", json(&learned, &text, &plan))?;
    } else {
        write!(out, "{text}")?;
    }
    let mut exit = Exit::Yes;
    let mut stderr = io::stderr().lock();
    for remark in &learned.remarks {
        exit = Exit::No;
        writeln!(stderr, "msrgate: {} {} was {}", remark.op, remark.msr, remark.message)?;
    }
    if let Err(error) = &plan {
        exit = Exit::No;
        writeln!(stderr, "msrgate: {}", policy.explain_error(error, None).message)?;
    }
    Ok(exit)
}

/// What is printed is parsed, so that nothing is printed that is no policy.
fn bug(what: String) -> Failure {
    Failure::input(format!(
        "the learned policy is no policy: {what}; please report it with the traces"
    ))
}

/// A trace or a summary.
fn read(path: &Path) -> Result<Summary, Failure> {
    let shown = path.display();
    let from: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(BufReader::with_capacity(1 << 16, io::stdin()))
    } else {
        let unreadable = |error: io::Error| Failure::input(format!("cannot read `{shown}`: {error}"));
        let file = File::open(path).map_err(unreadable)?;
        let length = file.metadata().map_err(unreadable)?.len();
        Box::new(BufReader::with_capacity(
            1 << 16,
            replay::progress(length).wrap_read(file),
        ))
    };
    let name = match path.file_name() {
        Some(name) if path != Path::new("-") => name.to_string_lossy(),
        _ => "standard input".into(),
    };
    Summary::read(&name, from).map_err(|error| {
        // What came before a broken line can still be learned from, if the user says so.
        let before = error.line.map_or(0, |line| line.saturating_sub(1));
        let help = match before {
            0 => String::new(),
            lines => format!("; to learn from what comes before it: head -n {lines} {shown} | msrgate learn -"),
        };
        Failure::input(format!("{shown}: {error}{help}"))
    })
}

fn json(learned: &Learned, text: &str, plan: &Result<Plan, PlanError>) -> Value {
    let summary = &learned.summary;
    let rules = learned.rules.iter().map(|rule| {
        let unseen = rule.unseen.iter().map(|(range, op)| {
            json!({ "first": range.first().to_string(), "last": range.last().to_string(), "op": op.name() })
        });
        let facts = &rule.facts;
        json!({
            "msrs": rule.msrs,
            "read": rule.read.as_ref().map(ReadAction::name),
            "write": rule.write.as_ref().map(WriteAction::name),
            "why": rule.why(summary.traces),
            "reads": facts.reads,
            "writes": facts.writes,
            "fewest": facts.fewest,
            "most": facts.most,
            "names": facts.names.iter().collect::<Vec<_>>(),
            "first": facts.first,
            "last": facts.last,
            "unseen": unseen.collect::<Vec<_>>(),
        })
    });
    let faulted = summary.faulted.iter().map(|((msr, op), count)| {
        json!({
            "msr": msr.to_string(),
            "name": explain::name(*msr),
            "op": op.name(),
            "count": count,
            "served": summary.seen.contains_key(&(*msr, *op)),
        })
    });
    let remarks = learned
        .remarks
        .iter()
        .map(|remark| json!({ "msr": remark.msr.to_string(), "op": remark.op.name(), "message": remark.message }));
    json!({
        "traces": summary.traces,
        "names": summary.names.iter().collect::<Vec<_>>(),
        "events": summary.events,
        "faults": summary.faults,
        "unfiltered": summary.unfiltered,
        "rules": rules.collect::<Vec<_>>(),
        "faulted": faulted.collect::<Vec<_>>(),
        "remarks": remarks.collect::<Vec<_>>(),
        "ranges": plan.as_ref().ok().map(|plan| plan.filter().ranges().len()),
        "policy": text,
    })
}
