//! `msrgate learn`: from what guests did to the smallest policy that serves them.

use std::error::Error;
use std::io::{self, BufRead, Read, Write};
use std::path::Path;

use msrgate_core::{ReadAction, WriteAction};
use msrgate_plan::{DecisionMap, Plan, PlanError};
use msrgate_policy::Policy;
use msrgate_trace::TraceError;
use msrgate_trace::learn::{Baseline, Change, Generalize, Kind, Learned, Summary};
use serde_json::{Value, json};

use crate::args::{LearnArgs, WidenArg};
use crate::exit::{Exit, Failure};
use crate::load;
use crate::{cpuid, input, stream, trace, words};

pub(crate) fn run(args: &LearnArgs) -> Result<Exit, Failure> {
    let cpuid = cpuid::given(&args.cpuid)?;
    let mut summary = Summary::default();
    for path in &args.traces {
        let name = input::shown(path);
        let from = trace::reader(path).map_err(|error| Failure::input(format!("cannot read `{name}`: {error}")))?;
        let next = read(path, from, args.incomplete)?;
        summary
            .merge(&next)
            .map_err(|error| Failure::input(format!("{name}: {error}")))?;
    }
    if args.summary {
        let mut out = io::BufWriter::new(stream::out());
        summary.write(&mut out)?;
        out.flush()?;
        return Ok(Exit::Yes);
    }
    let widen = Generalize {
        classes: args.widen.contains(&WidenArg::Classes),
        ranges: args.widen.contains(&WidenArg::Ranges),
        cpuid,
    };
    let learned = Learned::from(&summary, &widen);
    let Compiled { text, policy, map } = compiled(&learned)?;
    let plan = Plan::compile(&map);
    let older = match &args.since {
        Some(path) => Some(Before::read(path, &widen, args.incomplete)?),
        None => None,
    };
    let changes = older.as_ref().map(|older| learned.since(&map, older.older()));
    let mut out = stream::out();
    if args.json {
        writeln!(
            out,
            "{:#}",
            json(&learned, &text, &plan, older.as_ref(), changes.as_deref())
        )?;
    } else {
        write!(out, "{text}")?;
    }
    let mut exit = Exit::Yes;
    let mut stderr = stream::err();
    if learned.summary.events == 0 {
        writeln!(
            stderr,
            "msrgate: there is no access in what was given, so this policy denies everything"
        )?;
    }
    for remark in &learned.remarks {
        exit = Exit::No;
        writeln!(stderr, "msrgate: {} {} was {}", remark.op, remark.msr, remark.message)?;
    }
    if let (Some(path), Some(older), Some(changes)) = (&args.since, &older, &changes) {
        if changes.iter().any(|change| change.kind != Kind::Dropped) {
            exit = Exit::No;
        }
        let told = told(path, older, &map, changes);
        writeln!(stderr, "msrgate: {told}")?;
    }
    if let Err(error) = &plan {
        exit = Exit::No;
        writeln!(stderr, "msrgate: {}", policy.explain_error(error, None).message)?;
    }
    Ok(exit)
}

/// A learned policy as it is printed.
struct Compiled {
    text: String,
    policy: Policy,
    map: DecisionMap,
}

fn compiled(learned: &Learned) -> Result<Compiled, Failure> {
    let text = learned.to_string();
    let policy =
        Policy::parse("learned.toml", &text).map_err(|rejected| bug(format!("{:?}", rejected.diagnostics.first())))?;
    let map = policy.decision_map(None).map_err(|needed| bug(needed.to_string()))?;
    Ok(Compiled { text, policy, map })
}

/// What the learned policy is held against.
struct Before {
    map: DecisionMap,
    origin: Origin,
}

enum Origin {
    Policy(Box<Policy>),
    Summary(Box<Summary>),
}

impl Before {
    /// A policy, or a summary or trace that one would be learned from in the same way.
    fn read(path: &Path, widen: &Generalize, incomplete: bool) -> Result<Before, Failure> {
        let unreadable = |error: String| Failure::input(format!("cannot read `{}`: {error}", input::shown(path)));
        let io = |error: io::Error| unreadable(error.to_string());
        let mut from = trace::reader(path).map_err(io)?;
        let mut head = Vec::new();
        from.by_ref().take(4096).read_to_end(&mut head).map_err(io)?;
        let is_trace = msrgate_trace::is_trace(&head);
        let from = io::Cursor::new(head).chain(from);
        if is_trace {
            let summary = self::read(path, from, incomplete)?;
            return Ok(Before {
                map: compiled(&Learned::from(&summary, widen))?.map,
                origin: Origin::Summary(Box::new(summary)),
            });
        }
        let policy = load::unresolved_in(path, input::whole(from).map_err(unreadable)?)?;
        let map = load::map(&policy, widen.cpuid.as_ref())?;
        Ok(Before {
            map,
            origin: Origin::Policy(Box::new(policy)),
        })
    }

    /// Whether nothing is known to be missing from it.
    fn is_complete(&self) -> bool {
        match &self.origin {
            Origin::Policy(_) => true,
            Origin::Summary(summary) => summary.is_complete(),
        }
    }

    fn older(&self) -> Baseline<'_> {
        match &self.origin {
            Origin::Policy(policy) => Baseline::Policy(policy, &self.map),
            Origin::Summary(summary) => Baseline::Summary(summary, &self.map),
        }
    }
}

/// How many changes are told to people.
const TOLD: usize = 100;

/// What changed, for people.
fn told(path: &Path, older: &Before, map: &DecisionMap, changes: &[Change]) -> String {
    let counts = [Kind::Added, Kind::Changed, Kind::Dropped].map(|kind| {
        let count = changes.iter().filter(|change| change.kind == kind).count();
        format!("{count} {}", kind.name())
    });
    let name = words::plain(&input::shown(path));
    let mut text = match changes.is_empty() {
        true => format!("nothing is otherwise than in {name}"),
        false => format!("since {name}: {}", counts.join(", ")),
    };
    let mut changes: Vec<&Change> = changes.iter().collect();
    changes.sort_by_key(|change| change.kind);
    for change in changes.iter().take(TOLD) {
        text.push_str(&format!("\n  {}", words::plain(&change.to_string())));
    }
    if changes.len() > TOLD {
        text.push_str(&format!("\n  and {} more, which --json has", changes.len() - TOLD));
    }
    if (older.map.unknown(), older.map.invalid()) != (map.unknown(), map.invalid()) {
        text.push_str(
            "\n  what the kernel does not know or refuses, which the older one answers, is left to the kernel",
        );
    }
    text
}

/// What is printed is parsed, so that nothing is printed that is no policy.
fn bug(what: String) -> Failure {
    Failure::input(format!(
        "the learned policy is no policy: {what}; please report it with the traces"
    ))
}

/// A trace or a summary; one that is not complete is refused, or told where `incomplete` lets it through.
fn read(path: &Path, from: impl BufRead, incomplete: bool) -> Result<Summary, Failure> {
    let shown = input::shown(path);
    let name = match path.file_name() {
        Some(name) if path != Path::new("-") => name.to_string_lossy(),
        _ => "standard input".into(),
    };
    let summary = Summary::read(&name, from).map_err(|error| {
        // What came before a broken line of a trace can still be learned from, if the user says so.
        let of_trace = error.source().is_some_and(|source| source.is::<TraceError>());
        let before = error.line.map_or(0, |line| line.saturating_sub(1));
        Failure::input(match (path == Path::new("-"), of_trace, before) {
            (true, ..) => format!("{name}: {error}"),
            (false, true, 1..) => format!(
                "{shown}: {error}; to learn from what comes before it: head -n {before} {} | msrgate learn -",
                words::quoted(path)
            ),
            _ => format!("{shown}: {error}"),
        })
    })?;
    let lost = (summary.lost > 0).then(|| {
        let lost = words::counted(summary.lost, "access is", "accesses are");
        (format!("{lost} missing from it"), "may deny", "record the guest again")
    });
    let partial = (summary.partial > 0).then(|| {
        let what = "not all that the guest was served with is in it".to_owned();
        (
            what,
            "denies",
            "record the guest with `msrgate run --learn` and without --trace-size",
        )
    });
    for (what, denies, otherwise) in lost.into_iter().chain(partial) {
        if !incomplete {
            return Err(Failure::input(format!(
                "{name}: {what}, so a policy that is learned from it {denies} what the guest needs: {otherwise}, or learn \
                 from what is there with --incomplete"
            )));
        }
        writeln!(
            io::stderr(),
            "msrgate: {}: {what}: a policy that is learned from it {denies} what the guest needs",
            words::plain(&name)
        )?;
    }
    Ok(summary)
}

fn json(
    learned: &Learned,
    text: &str,
    plan: &Result<Plan, PlanError>,
    older: Option<&Before>,
    changes: Option<&[Change]>,
) -> Value {
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
            "name": words::name(*msr),
            "op": op.name(),
            "count": count,
            "served": summary.seen.contains_key(&(*msr, *op)),
        })
    });
    let remarks = learned
        .remarks
        .iter()
        .map(|remark| json!({ "msr": remark.msr.to_string(), "op": remark.op.name(), "message": remark.message }));
    let changes = changes.map(|changes| {
        let each = changes.iter().map(|change| {
            json!({
                "change": change.kind.name(),
                "first": change.range.first().to_string(),
                "last": change.range.last().to_string(),
                "op": change.op.name(),
                "names": msrgate_msrs::within(change.range).iter().map(|entry| entry.name()).collect::<Vec<_>>(),
                "before": change.before,
                "after": change.after,
                "why": change.why,
            })
        });
        each.collect::<Vec<_>>()
    });
    json!({
        "traces": summary.traces,
        "names": summary.names.iter().collect::<Vec<_>>(),
        "events": summary.events,
        "faults": summary.faults,
        "unfiltered": summary.unfiltered,
        "lost": summary.lost,
        "partial": summary.partial,
        "complete": summary.is_complete() && older.is_none_or(Before::is_complete),
        "rules": rules.collect::<Vec<_>>(),
        "faulted": faulted.collect::<Vec<_>>(),
        "remarks": remarks.collect::<Vec<_>>(),
        "changes": changes,
        "ranges": plan.as_ref().ok().map(|plan| plan.filter().ranges().len()),
        "policy": text,
    })
}
