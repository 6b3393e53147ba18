//! What a report says, for people at a terminal and for programs.

use std::io::{self, Write};

use msrgate_core::{Disposition, Reason, Within};
use msrgate_policy::{Cause, Rule};
use msrgate_trace::report::{Cost, Counts, Got, Kind, Moment, Row};
use serde_json::{Value, json};

use super::contents::Contents;
use crate::args::ListArgs;
use crate::load::Loaded;
use crate::render::{Effect, Table};
use crate::stream::{Stream, Tone};
use crate::{cause, render, words};

/// How many different values, and how many different callers, a line for people names.
const FEW: usize = 3;

pub(super) fn json(contents: &Contents) -> Value {
    let report = &contents.report;
    let traces = contents
        .files
        .iter()
        .zip(report.traces())
        .map(|((name, error), trace)| {
            let header = &trace.header;
            json!({
                "file": name,
                "host": header.host,
                "kernel": header.kernel,
                "guest": header.guest,
                "vmm": header.vmm,
                "mode": header.mode,
                "coverage": header.coverage,
                "started": header.started,
                "name": header.name,
                "pid": header.pid,
                "ignore_msrs": header.ignore_msrs,
                "cpu": header.cpu,
                "policy": header.policy,
                "accesses": trace.events,
                "last_ns": trace.duration(),
                "lost": trace.lost,
                "error": error.as_ref().map(|error| json!({ "line": error.line, "message": error.to_string() })),
            })
        });
    let vcpu = |place: u16, count: u64| {
        let vcpu = report.vcpus().get(usize::from(place));
        json!({
            "trace": vcpu.map(|vcpu| vcpu.trace),
            "vm": vcpu.map(|vcpu| vcpu.vm),
            "vcpu": vcpu.map(|vcpu| vcpu.vcpu),
            "count": count,
        })
    };
    let timeline = report.timeline();
    let rows = report.rows().map(|row| {
        let explained = contents.explain(row.msr, row.op);
        json!({
            "msr": row.msr.to_string(),
            "name": words::name(row.msr),
            "op": row.op.name(),
            "count": row.count,
            "allowed": of(row.kinds, Kind::Allowed),
            "emulated": of(row.kinds, Kind::Emulated),
            "faulted": of(row.kinds, Kind::Faulted),
            "exits": row.exits,
            "cost": cost(row.cost),
            "first": moment(report.first(row)),
            "last": moment(report.last(row)),
            "got": row.got.each().iter().map(|(got, count)| json!({
                "did": got.did.name(),
                "why": got.why.map(|why| why.name()),
                "reason": got.reason.map(Reason::name),
                "would": got.would.map(Disposition::name),
                "in": got.within.map(Within::name),
                "rule": got.rule,
                "count": count,
            })).collect::<Vec<_>>(),
            "got_otherwise": row.got.others(),
            "values": values(&row.values, "value"),
            "other_values": row.values.others(),
            "vcpus": row.vcpus.each().iter().map(|(place, count)| vcpu(*place, *count)).collect::<Vec<_>>(),
            "other_vcpus": row.vcpus.others(),
            "rips": values(&row.rips, "rip"),
            "other_rips": row.rips.others(),
            "policy": explained.map(|explained| json!({
                "action": explained.action.name(),
                "rule": explained.cause.rule().map(|(number, _)| number),
                "decided_by": cause::name(&explained),
                "sees": explained.sees.to_string(),
                "exits": explained.exits,
            })),
        })
    });
    json!({
        "traces": traces.collect::<Vec<_>>(),
        "policy": contents.policy.as_ref().map(|Loaded { policy, plan, .. }| json!({
            "name": policy.name,
            "hash": words::hex(&plan.map().hash()),
        })),
        "accesses": report.accesses(),
        "allowed": of(report.kinds(), Kind::Allowed),
        "emulated": of(report.kinds(), Kind::Emulated),
        "faulted": of(report.kinds(), Kind::Faulted),
        "exits": report.exits(),
        "cost": cost(report.cost()),
        "served_but_denied": contents.policy.as_ref().map(|_| contents.broken()),
        "unlisted": report.unlisted(),
        "lost": report.lost(),
        "gaps": report.lost_by_vcpu().map(|lost| json!({
            "trace": lost.trace,
            "vm": lost.vm,
            "vcpu": lost.vcpu,
            "events": lost.events,
            "first_ns": lost.first,
            "last_ns": lost.last,
        })).collect::<Vec<_>>(),
        "vcpus": (0..).zip(report.vcpus()).map(|(place, each)| vcpu(place, each.count)).collect::<Vec<_>>(),
        "timeline": {
            "bucket_ns": timeline.width(),
            "buckets": timeline.buckets().map(|kinds| json!({
                "allowed": of(*kinds, Kind::Allowed),
                "emulated": of(*kinds, Kind::Emulated),
                "faulted": of(*kinds, Kind::Faulted),
            })).collect::<Vec<_>>(),
        },
        "by_msr": rows.collect::<Vec<_>>(),
        "rules": rules(contents),
        "notes": contents.missing().into_iter().chain(contents.notes()).collect::<Vec<_>>(),
    })
}

fn of(kinds: [u64; 3], kind: Kind) -> u64 {
    let [allowed, emulated, faulted] = kinds;
    match kind {
        Kind::Allowed => allowed,
        Kind::Emulated => emulated,
        Kind::Faulted => faulted,
    }
}

fn cost(cost: Cost) -> Value {
    match cost.count {
        0 => Value::Null,
        count => json!({ "accesses": count, "ns": cost.sum, "most_ns": cost.most }),
    }
}

fn moment(moment: Moment) -> Value {
    json!({ "trace": moment.trace, "ns": moment.t })
}

fn values<const MOST: usize>(counts: &Counts<u64, MOST>, key: &str) -> Vec<Value> {
    let each = counts.each().iter();
    each.map(|(value, count)| json!({ key: format!("{value:#x}"), "count": count }))
        .collect()
}

fn rules(contents: &Contents) -> Value {
    let Some(Loaded { policy, .. }) = &contents.policy else {
        return json!([]);
    };
    let rules = policy.rules.iter().enumerate().zip(contents.decided());
    rules
        .map(|((number, rule), count)| {
            let source = policy.sources.get(rule.place.source);
            json!({
                "index": number,
                "file": source.map(|source| source.path().display().to_string()),
                "line": source.map(|source| source.line_column(rule.place.span.start).0),
                "text": rule.to_string().trim(),
                "why": rule.why,
                "accesses": count,
            })
        })
        .collect()
}

pub(super) fn text(out: &mut Stream<impl Write>, contents: &Contents, list: &ListArgs) -> io::Result<()> {
    let report = &contents.report;
    let several = report.traces().len() > 1;
    for (number, ((name, _), trace)) in contents.files.iter().zip(report.traces()).enumerate() {
        let header = &trace.header;
        let parts = [
            &header.guest,
            &header.vmm,
            &header.host,
            &header.kernel,
            &header.started,
            &header.mode,
        ];
        let parts: Vec<&str> = parts.into_iter().flatten().map(String::as_str).collect();
        let number = if several { format!("{number}: ") } else { String::new() };
        writeln!(
            out,
            "{number}{}: {}",
            words::plain(name),
            words::plain(&parts.join("; "))
        )?;
    }
    for note in contents.missing() {
        writeln!(out, "note: {}", words::plain(&note))?;
    }
    if let Some(loaded) = &contents.policy {
        let broken = contents.broken();
        let tone = if broken == 0 { Tone::Good } else { Tone::Bad };
        let name = &loaded.policy.name;
        out.say(
            tone,
            &format!("`{name}` denies {broken} of the accesses that the guest was served with"),
        )?;
    }
    let [allowed, emulated, faulted] = report.kinds();
    writeln!(
        out,
        "{} by {}: {allowed} allowed, {emulated} emulated, {faulted} faulted{}",
        words::counted(report.accesses(), "access", "accesses"),
        words::counted(report.vcpus().len() as u64, "vCPU", "vCPUs"),
        match report.lost() {
            0 => String::new(),
            lost => format!("; {} missing", words::counted(lost, "more is", "more are")),
        }
    )?;
    writeln!(
        out,
        "{} left the kernel for user space{}",
        report.exits(),
        match (report.exits(), report.cost()) {
            (0, _) => String::new(),
            (_, Cost { count: 0, .. }) => "; the traces do not tell how long that took".to_owned(),
            (exits, cost) if exits == cost.count => format!(", where it took {}", words::duration(cost.sum)),
            (_, cost) => format!(", where {} of them took {}", cost.count, words::duration(cost.sum)),
        }
    )?;
    let has_rules = report
        .rows()
        .any(|row| row.got.each().iter().any(|(got, _)| got.rule.is_some()));
    let has_rips = report.rows().any(|row| !row.rips.each().is_empty());
    let has_cost = report.cost().count > 0;
    let has_vcpus = report.vcpus().len() > 1;
    let has_policy = contents.policy.is_some();
    let titles = [
        ("MSR", true),
        ("name", true),
        ("op", true),
        ("count", true),
        ("got", true),
        ("policy", has_policy),
        ("values", true),
        ("each", has_cost),
        ("vCPUs", has_vcpus),
        ("rule", has_rules),
        ("from", has_rips),
        ("first s", true),
        ("last s", true),
        ("why", has_policy),
    ];
    let titles: Vec<&str> = titles
        .into_iter()
        .filter(|(_, there)| *there)
        .map(|(title, _)| title)
        .collect();
    let mut table = Table::new(&titles);
    let (rows, rest) = render::list(report.rows().collect(), list, out.width.is_some(), |row| {
        (effect(contents, row), row.count, (row.msr, row.op))
    });
    for row in rows {
        let explained = contents.explain(row.msr, row.op);
        let mut cells = vec![
            row.msr.to_string(),
            words::name(row.msr).unwrap_or_default().to_owned(),
            row.op.to_string(),
            row.count.to_string(),
            got(row),
        ];
        cells.extend(explained.as_ref().map(|explained| match explained.cause {
            Cause::Rule(number, _) => format!("{}, rule {number}", explained.action.name()),
            Cause::Valid(_) => format!("{}, by `valid`", explained.action.name()),
            _ => format!("{}, by default", explained.action.name()),
        }));
        cells.push(few(&row.values, |value| format!("{value:#x}")));
        cells.extend(has_cost.then(|| row.cost.mean().map_or_else(String::new, words::duration)));
        cells.extend(has_vcpus.then(|| few(&row.vcpus, |place| vcpu(contents, *place))));
        cells.extend(has_rules.then(|| rules_of(row)));
        cells.extend(has_rips.then(|| few(&row.rips, |rip| format!("{rip:#x}"))));
        cells.push(time(report.first(row), several));
        cells.push(time(report.last(row), several));
        let why = |(_, rule): (_, &Rule)| rule.why.clone().unwrap_or_default();
        cells.extend(explained.map(|explained| explained.cause.rule().map(why).unwrap_or_default()));
        table.add(effect(contents, row).tone(), cells);
    }
    if !table.is_empty() {
        writeln!(out)?;
        table.print(out)?;
        render::rest(out, rest, ["row", "rows"])?;
        writeln!(out)?;
    }
    for note in contents.notes() {
        writeln!(out, "note: {}", words::plain(&note))?;
    }
    Ok(())
}

/// How much is not as the kernel gives it.
fn effect(contents: &Contents, row: &Row) -> Effect {
    match row.kinds {
        _ if contents.breaks(row) => Effect::Broken,
        [_, _, faulted] if faulted > 0 => Effect::Fault,
        [_, emulated, _] if emulated > 0 => Effect::Other,
        _ if contents.decides(row) != Kind::Allowed => Effect::Other,
        _ => Effect::None,
    }
}

/// What the accesses of a row got: each word, with its count where there are several.
pub(super) fn got(row: &Row) -> String {
    let each = row.got.each();
    // Rules apart, which have their own column.
    let mut words: Vec<(String, u64)> = Vec::new();
    for (got, count) in each {
        let word = word(got);
        match words.iter_mut().find(|(known, _)| *known == word) {
            Some((_, sum)) => *sum += count,
            None => words.push((word, *count)),
        }
    }
    let alone = words.len() == 1 && row.got.others() == 0;
    let mut words: Vec<String> = words
        .into_iter()
        .map(|(word, count)| if alone { word } else { format!("{count} {word}") })
        .collect();
    if row.got.others() > 0 {
        words.push(format!("{} otherwise", row.got.others()));
    }
    words.join(", ")
}

/// What was done, with what there is to say of it.
pub(super) fn word(got: &Got) -> String {
    let within = got.within.map(|within| format!(" in {within}")).unwrap_or_default();
    format!("{}{within}", words::outcome(got.did, got.why, got.reason, got.would))
}

/// The rules that the trace names.
pub(super) fn rules_of(row: &Row) -> String {
    let mut rules: Vec<u32> = row.got.each().iter().filter_map(|(got, _)| got.rule).collect();
    rules.sort_unstable();
    rules.dedup();
    let rules: Vec<String> = rules.iter().map(u32::to_string).collect();
    rules.join(", ")
}

/// Who made an access: the vCPU, with the VM and the trace where there are several.
pub(super) fn vcpu(contents: &Contents, place: u16) -> String {
    let report = &contents.report;
    let Some(vcpu) = report.vcpus().get(usize::from(place)) else {
        return String::new();
    };
    let several = report.traces().len() > 1;
    let vms = several || report.vcpus().iter().any(|other| other.vm != vcpu.vm);
    match (several, vms) {
        (true, _) => format!("{}/{}/{}", vcpu.trace, vcpu.vm, vcpu.vcpu),
        (false, true) => format!("{}/{}", vcpu.vm, vcpu.vcpu),
        (false, false) => vcpu.vcpu.to_string(),
    }
}

fn few<T: PartialEq, const MOST: usize>(counts: &Counts<T, MOST>, word: impl Fn(&T) -> String) -> String {
    let mut each: Vec<&(T, u64)> = counts.each().iter().collect();
    each.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let mut words: Vec<String> = each.iter().take(FEW).map(|(thing, _)| word(thing)).collect();
    if each.len() > FEW || counts.others() > 0 {
        words.push("…".to_owned());
    }
    words.join(", ")
}

/// Seconds from the trace's earliest event on, after the trace's number where there are several.
pub(super) fn time(moment: Moment, several: bool) -> String {
    let seconds = moment.t as f64 / 1e9;
    match several {
        true => format!("{}: {seconds:.6}", moment.trace),
        false => format!("{seconds:.6}"),
    }
}
