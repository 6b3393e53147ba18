//! `msrgate learn`: from what guests did to the smallest policy that serves them.

use std::error::Error;
use std::io::{self, BufRead, Read, Write};
use std::path::Path;

use msrgate_core::{ReadAction, WriteAction};
use msrgate_plan::{DecisionMap, Plan, PlanError};
use msrgate_policy::Policy;
use msrgate_trace::TraceError;
use msrgate_trace::learn::{Baseline, Change, Generalize, Kind, Learned, Summary};

use crate::args::{LearnArgs, WidenArg};
use crate::exit::{Exit, Failure};
use crate::json::{self, Printed, object};
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
        json::print(&printed(&learned, &text, &plan, older.as_ref(), changes.as_deref()))?;
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
pub(crate) struct Before {
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
        true => format!("nothing differs from {name}"),
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

/// What is printed is parsed, so that nothing is printed that is not a policy.
fn bug(what: String) -> Failure {
    Failure::input(format!(
        "the learned policy is not valid: {what}; please report it with the traces"
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
    if summary.ignoring > 0 {
        let name = words::plain(&name);
        writeln!(
            io::stderr(),
            "msrgate: {name}: the host had `kvm.ignore_msrs`: what KVM does not know looks served and is allowed, and faults on \
             other hosts"
        )?;
    }
    Ok(summary)
}

pub(crate) fn printed(
    learned: &Learned,
    text: &str,
    plan: &Result<Plan, PlanError>,
    older: Option<&Before>,
    changes: Option<&[Change]>,
) -> impl Printed {
    let summary = &learned.summary;
    let rules = learned.rules.iter().map(|rule| {
        let unseen = rule.unseen.iter().map(|(range, op)| {
            object! {
                /// The first MSR.
                first: range.first().to_string(),
                /// The last MSR.
                last: range.last().to_string(),
                /// The direction.
                op: op.name(),
            }
        });
        let facts = &rule.facts;
        object! {
            /// The MSRs, as the policy spells them.
            msrs: &rule.msrs,
            /// The action's word for reads; null if the rule does not decide reads.
            read: rule.read.as_ref().map(ReadAction::name),
            /// The action's word for writes; null if the rule does not decide writes.
            write: rule.write.as_ref().map(WriteAction::name),
            /// The reason, as it stands in the policy.
            why: rule.why(summary.traces),
            /// How often it was read.
            reads: facts.reads,
            /// How often it was written.
            writes: facts.writes,
            /// In how many traces that MSR and direction was that is in the fewest.
            fewest: facts.fewest,
            /// In how many traces that MSR and direction was that is in the most.
            most: facts.most,
            /// Some of these traces.
            names: facts.names.iter().collect::<Vec<_>>(),
            /// When the first access was, in nanoseconds since the first access of its trace.
            first: facts.first,
            /// When the last was, likewise.
            last: facts.last,
            /// What the rule allows and was not seen.
            unseen: unseen.collect::<Vec<_>>(),
        }
    });
    let faulted = summary.faulted.iter().map(|((msr, op), count)| {
        object! {
            /// The MSR.
            msr: msr.to_string(),
            /// The MSR's name; null if it is not known.
            name: words::name(*msr),
            /// The direction.
            op: op.name(),
            /// How often.
            count: count,
            /// Whether it was also served, and so is not denied.
            served: summary.seen.contains_key(&(*msr, *op)),
        }
    });
    let remarks = learned.remarks.iter().map(|remark| {
        object! {
            /// The MSR.
            msr: remark.msr.to_string(),
            /// The direction.
            op: remark.op.name(),
            /// What the trace does not tell.
            message: &remark.message,
        }
    });
    let changes = changes.map(|changes| {
        let each = changes.iter().map(|change| {
            object! {
                /// `"added"`, `"changed"` or `"dropped"`; see [learn.md](learn.md#later-traces).
                change: change.kind.name(),
                /// The first MSR.
                first: change.range.first().to_string(),
                /// The last MSR.
                last: change.range.last().to_string(),
                /// The direction.
                op: change.op.name(),
                /// The names of these MSRs that the database knows.
                names: msrgate_msrs::within(change.range).iter().map(|entry| entry.name()).collect::<Vec<_>>(),
                /// What the accesses got, with what the action is given.
                before: &change.before,
                /// What they get.
                after: &change.after,
                /// What says so, in words.
                why: &change.why,
            }
        });
        each.collect::<Vec<_>>()
    });
    object! {
        /// How many there were, each as often as it was given.
        traces: summary.traces,
        /// Some of their names: the four that sort first.
        names: summary.names.iter().collect::<Vec<_>>(),
        /// How many accesses were in them.
        events: summary.events,
        /// How many of these faulted.
        faults: summary.faults,
        /// How many were of the x2APIC's registers, which no filter stops.
        unfiltered: summary.unfiltered,
        /// How many accesses are missing from the traces, as far as they tell; above 0 with `--incomplete` only.
        lost: summary.lost,
        /// How many of the traces lack [some of what the guest was served with](trace.md#the-header); above 0 with
        /// `--incomplete` only.
        partial: summary.partial,
        /// How many of the traces are from a host with `kvm.ignore_msrs`, where what KVM does not know looks served.
        ignoring: summary.ignoring,
        /// Whether none are known to be missing, from OLDER of `--since` neither.
        complete: summary.is_complete() && older.is_none_or(Before::is_complete),
        /// The rules of the policy, by their first MSR.
        rules: rules.collect::<Vec<_>>(),
        /// What was #GP; the 4096 with the smallest indices.
        faulted: faulted.collect::<Vec<_>>(),
        /// What a trace does not tell, so that the policy may serve the guest otherwise.
        remarks: remarks.collect::<Vec<_>>(),
        /// With `--since`: what is otherwise than before, by MSR. Null without it.
        changes: changes,
        /// How many ranges of a filter the policy takes; null if it takes more than there are.
        ranges: plan.as_ref().ok().map(|plan| plan.filter().ranges().len()),
        /// The policy's text.
        policy: text,
    }
}
