//! What a report says, for people at a terminal and for programs.

use std::io::{self, Write};

use msrgate_core::{Disposition, Reason, Within};
use msrgate_policy::{Cause, Rule};
use msrgate_trace::report::{Cost, Counts, Got, Kind, Moment, Row};

use super::contents::Contents;
use crate::args::ListArgs;
use crate::json::{Printed, object};
use crate::load::Loaded;
use crate::render::{Effect, Table};
use crate::stream::{Stream, Tone};
use crate::{cause, render, words};

/// How many different values, and how many different callers, a line for people names.
const FEW: usize = 3;

pub(crate) fn printed(contents: &Contents) -> impl Printed {
    let report = &contents.report;
    let traces = contents
        .files
        .iter()
        .zip(report.traces())
        .map(|((name, error), trace)| {
            let header = &trace.header;
            object! {
                /// The trace's path as it was given.
                file: name,
                /// The host, as the header says it; null where it does not. Any text may be in it.
                host: &header.host,
                /// The host's kernel, as the header says it; null where it does not.
                kernel: &header.kernel,
                /// The guest, as the header says it; null where it does not. Any text may be in it.
                guest: &header.guest,
                /// The VMM, as the header says it; null where it does not. Any text may be in it.
                vmm: &header.vmm,
                /// How msrgate ran, as the header says it; null where it does not.
                mode: &header.mode,
                /// What the trace covers, as the header says it; null where it does not.
                coverage: serde_json::to_value(header.coverage).unwrap_or_default(),
                /// When it began, as the header says it; null where it does not.
                started: &header.started,
                /// What the VMM calls the VM, as the header says it; null where it does not. Any text may be in it.
                name: &header.name,
                /// The VMM's process, as the header says it; null where it does not.
                pid: header.pid,
                /// Whether the host had `kvm.ignore_msrs`, as the header says it; null where it does not.
                ignore_msrs: header.ignore_msrs,
                /// The processor, as the header says it; null where it does not.
                cpu: &header.cpu,
                /// The hash of the policy that the guest ran under; null if the header does not say.
                policy: &header.policy,
                /// How many accesses it tells of.
                accesses: trace.events,
                /// The latest of them, in nanoseconds from the earliest, wherever in the trace that stands.
                last_ns: trace.duration(),
                /// How many accesses are missing from it, as far as it tells.
                lost: trace.lost,
                /// Null, or why it could not be read to its end; what came before is in the other keys.
                error: error.as_ref().map(|error| object! {
                    /// The line, from 1; 0 where the whole text is meant.
                    line: error.line,
                    /// What is wrong.
                    message: error.to_string(),
                }),
            }
        });
    let vcpu = |place: u16, count: u64| {
        let vcpu = report.vcpus().get(usize::from(place));
        object! {
            /// The trace, from 0.
            trace: vcpu.map(|vcpu| vcpu.trace),
            /// Which VM.
            vm: vcpu.map(|vcpu| vcpu.vm),
            /// Which vCPU of it.
            vcpu: vcpu.map(|vcpu| vcpu.vcpu),
            /// How many.
            count: count,
        }
    };
    let timeline = report.timeline();
    let rows = report.rows().map(|row| {
        let explained = contents.explain(row.msr, row.op);
        object! {
            /// The MSR.
            msr: row.msr.to_string(),
            /// The MSR's name; null if it is not known.
            name: words::name(row.msr),
            /// The direction.
            op: row.op.name(),
            /// How many.
            count: row.count,
            /// How many of them the kernel's own register answered.
            allowed: of(row.kinds, Kind::Allowed),
            /// How many of them the policy put something else for.
            emulated: of(row.kinds, Kind::Emulated),
            /// How many of them were #GP.
            faulted: of(row.kinds, Kind::Faulted),
            /// How many left the kernel.
            exits: row.exits,
            /// How long they took, as `cost`.
            cost: cost(row.cost),
            /// The first of them.
            first: moment(report.first(row)),
            /// The last of them.
            last: moment(report.last(row)),
            /// What they got, at most 16 different things.
            got: row.got.each().iter().map(|(got, count)| object! {
                /// What was done, as in the [trace](trace.md); so are the next five, which are null where it says nothing.
                did: got.did.name(),
                /// Why it faulted.
                why: got.why.map(|why| why.name()),
                /// Why the kernel handed it over.
                reason: got.reason.map(Reason::name),
                /// What the policy would have done.
                would: got.would.map(Disposition::name),
                /// What the guest was in.
                r#in: got.within.map(Within::name),
                /// The number of the rule.
                rule: got.rule,
                /// How many.
                count: count,
            }).collect::<Vec<_>>(),
            /// How many got something else.
            got_otherwise: row.got.others(),
            /// What was read or written, the first 8 different values.
            values: row.values.each().iter().map(|(value, count)| object! {
                /// The value.
                value: format!("{value:#x}"),
                /// How often.
                count: count,
                /// What its bits mean; empty where they are not known.
                bits: words::bits_printed(row.msr, *value),
            }).collect::<Vec<_>>(),
            /// How often it was another value.
            other_values: row.values.others(),
            /// Who made them, as `vcpus`; at most 16.
            vcpus: row.vcpus.each().iter().map(|(place, count)| vcpu(*place, *count)).collect::<Vec<_>>(),
            /// How many other vCPUs made.
            other_vcpus: row.vcpus.others(),
            /// From which instruction pointers, the first 16 different ones; empty where the traces do not tell.
            rips: row.rips.each().iter().map(|(rip, count)| object! {
                /// An instruction pointer.
                rip: format!("{rip:#x}"),
                /// How often it was there.
                count: count,
            }).collect::<Vec<_>>(),
            /// How often it was another.
            other_rips: row.rips.others(),
            /// What the policy of `--policy` decides; null without one.
            policy: explained.map(|explained| object! {
                /// The action's word.
                action: explained.action.name(),
                /// The number of its rule, from 0; null where none decides.
                rule: explained.cause.rule().map(|(number, _)| number),
                /// What decides, as of `explain`.
                decided_by: cause::name(&explained),
                /// What the guest gets, in words.
                sees: explained.sees.to_string(),
                /// Whether the access leaves the kernel for user space.
                exits: explained.exits,
            }),
        }
    });
    object! {
        /// The traces in the order of the command line.
        traces: traces.collect::<Vec<_>>(),
        /// The policy of `--policy`; null without one.
        policy: contents.policy.as_ref().map(|Loaded { policy, plan, .. }| object! {
            /// The policy's name.
            name: &policy.name,
            /// The hash, as of `check`.
            hash: words::hex(&plan.map().hash()),
        }),
        /// How many there were.
        accesses: report.accesses(),
        /// How many of them the kernel's own register answered.
        allowed: of(report.kinds(), Kind::Allowed),
        /// How many of them the policy put something else for.
        emulated: of(report.kinds(), Kind::Emulated),
        /// How many of them were #GP.
        faulted: of(report.kinds(), Kind::Faulted),
        /// How many left the kernel for user space.
        exits: report.exits(),
        /// How long accesses took between the guest's exit and the answer; the way out of the guest and back is not in it.
        /// Null where the traces do not tell.
        cost: cost(report.cost()),
        /// How many of the accesses that did not fault the policy of `--policy` denies; null without one.
        served_but_denied: contents.policy.as_ref().map(|_| contents.broken()),
        /// How many were of MSRs for which `by_msr` has no room: it has 32768 rows at most.
        unlisted: report.unlisted(),
        /// How many accesses are missing from the traces, as far as they tell.
        lost: report.lost(),
        /// Whose, of at most 256 vCPUs.
        gaps: report.lost_by_vcpu().map(|lost| object! {
            /// The trace, from 0.
            trace: lost.trace,
            /// The VM.
            vm: lost.vm,
            /// The vCPU.
            vcpu: lost.vcpu,
            /// How many are missing.
            events: lost.events,
            /// When the first [gap](trace.md#a-gap) is, in nanoseconds from the trace's earliest access.
            first_ns: lost.first,
            /// When the last is.
            last_ns: lost.last,
        }).collect::<Vec<_>>(),
        /// Who made them, at most 256.
        vcpus: (0..).zip(report.vcpus()).map(|(place, each)| vcpu(place, each.count)).collect::<Vec<_>>(),
        /// When; several traces are laid over each other. The first bucket begins at the earliest access, or by less than
        /// its width before.
        timeline: object! {
            /// How wide each is.
            bucket_ns: timeline.width(),
            /// At most 128.
            buckets: timeline.buckets().map(|kinds| object! {
                /// How many accesses were allowed.
                allowed: of(*kinds, Kind::Allowed),
                /// How many were emulated.
                emulated: of(*kinds, Kind::Emulated),
                /// How many were #GP.
                faulted: of(*kinds, Kind::Faulted),
            }).collect::<Vec<_>>(),
        },
        /// By MSR, reads before writes.
        by_msr: rows.collect::<Vec<_>>(),
        /// The rules of the policy; empty without one.
        rules: rules(contents),
        /// What a reader has to know: accesses that are missing, a trace that breaks off, another policy, no room.
        notes: contents.missing().into_iter().chain(contents.notes()).collect::<Vec<_>>(),
    }
}

fn of(kinds: [u64; 3], kind: Kind) -> u64 {
    let [allowed, emulated, faulted] = kinds;
    match kind {
        Kind::Allowed => allowed,
        Kind::Emulated => emulated,
        Kind::Faulted => faulted,
    }
}

fn cost(cost: Cost) -> Option<impl Printed> {
    match cost.count {
        0 => None,
        count => Some(object! {
            /// Of how many accesses the traces tell it.
            accesses: count,
            /// How long all of these took, in nanoseconds.
            ns: cost.sum,
            /// How long the slowest took.
            most_ns: cost.most,
        }),
    }
}

fn moment(moment: Moment) -> impl Printed {
    object! {
        /// In which trace.
        trace: moment.trace,
        /// When, in nanoseconds from that trace's earliest access.
        ns: moment.t,
    }
}

fn rules(contents: &Contents) -> Vec<impl Printed> {
    let Some(Loaded { policy, .. }) = &contents.policy else {
        return Vec::new();
    };
    let rules = policy.rules.iter().enumerate().zip(contents.decided());
    rules
        .map(|((number, rule), count)| {
            let source = policy.sources.get(rule.place.source);
            object! {
                /// The rule's number, from 0.
                index: number,
                /// The file in which its `[[rule]]` stands.
                file: source.map(|source| source.path().display().to_string()),
                /// The line there.
                line: source.map(|source| source.line_column(rule.place.span.start).0),
                /// The rule in the policy's language.
                text: rule.to_string().trim().to_owned(),
                /// The rule's reason; null if it gives none.
                why: &rule.why,
                /// How many of the accesses it decides.
                accesses: count,
            }
        })
        .collect()
}

pub(super) fn text(out: &mut Stream<impl Write>, contents: &Contents, list: &ListArgs) -> io::Result<()> {
    let report = &contents.report;
    let missing = contents.missing();
    if let Some(loaded) = &contents.policy {
        let broken = contents.broken();
        let tone = if broken == 0 { Tone::Good } else { Tone::Bad };
        let name = &loaded.policy.name;
        // What is missing may be what it denies.
        let known = if missing.is_empty() {
            ""
        } else {
            ", as far as the traces tell"
        };
        out.say(
            tone,
            &format!("`{name}` denies {broken} of the accesses that the guest was served with{known}"),
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
    for note in missing {
        writeln!(out, "note: {}", words::plain(&note))?;
    }
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
        cells.push(few(&row.values, |value| words::value(row.msr, *value)));
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
fn time(moment: Moment, several: bool) -> String {
    let seconds = moment.t as f64 / 1e9;
    match several {
        true => format!("{}: {seconds:.6}", moment.trace),
        false => format!("{seconds:.6}"),
    }
}
