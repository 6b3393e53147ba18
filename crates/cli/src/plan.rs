//! `msrgate plan`: what a policy compiles to.

mod emit;
mod html;
pub(crate) mod state;

use std::borrow::Cow;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use msrgate_core::{Argument, ArgumentKey, Disposition, Entry, FilterRange, MsrRange, Op, ReadAction, WriteAction};
use msrgate_policy::foreign::Format;
use msrgate_policy::state::State;
use msrgate_policy::{Diagnostic, Source};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::args::{Emit, PlanArgs};
use crate::exit::{Exit, Failure};
use crate::json::{self, Printed, object};
use crate::load::{self, Loaded};
use crate::render::Table;
use crate::stream::Stream;
use crate::surface::Surface;
use crate::{cause, cpuid, machine, page, refusal, stream, trace, words};

pub(crate) fn run(args: &PlanArgs) -> Result<Exit, Failure> {
    if args.host && !matches!(args.emit, None | Some(Emit::C | Emit::Json)) {
        return Err(Failure::input(
            "presets are in a C header alone: leave out --host, or take `--emit c`",
        ));
    }
    let cpuid = cpuid::given(&args.cpuid)?;
    let profile = trace::profile(&args.profile)?;
    let loaded = match args.host {
        true => load::policy_for_host(&args.policy, cpuid.as_ref(), &profile),
        false => load::policy_or_report(&args.policy, cpuid.as_ref(), &profile),
    };
    let mut out = stream::out();
    let loaded = match loaded {
        Err(Failure::TooMany(too_many)) if args.json || args.emit == Some(Emit::Json) => {
            json::print(&object! {
                /// As of `check`.
                refused: refusal::printed(&too_many),
            })?;
            return Err(Failure::TooMany(too_many));
        }
        loaded => loaded?,
    };
    if args.state {
        let state = State::of(&loaded.plan, cpuid.as_ref());
        if args.json {
            json::print(&state::printed(&loaded, &state))?;
        } else {
            state::print(&mut stream::page(), &loaded, &state)?;
        }
        return Ok(Exit::Yes);
    }
    // Without --host a plan is the same everywhere.
    let kernel = machine::linux().filter(|_| args.host);
    let notes = msrgate_policy::notes(&loaded.plan, cpuid.as_ref(), kernel);
    if let Some(html) = &args.html.html {
        let inputs = [&args.cpuid.cpuid, &args.profile.profile].into_iter().flatten();
        let sources = loaded.policy.sources.iter().map(Source::path);
        page::write(
            html,
            inputs.map(PathBuf::as_path).chain(sources),
            html::page(&loaded, &notes),
        )?;
        return Ok(Exit::Yes);
    }
    match args.emit {
        Some(Emit::C) => emit::c(&mut out, &loaded)?,
        Some(Emit::Rust) => emit::rust(&mut out, &loaded)?,
        Some(Emit::Crosvm) => emit::foreign(&mut out, &loaded, Format::Crosvm)?,
        Some(Emit::MsrSafe) => emit::foreign(&mut out, &loaded, Format::MsrSafe)?,
        Some(Emit::Json) => json::print(&printed(&loaded, &notes))?,
        None if args.json => json::print(&printed(&loaded, &notes))?,
        None => print(&mut stream::page(), &loaded, &notes, args.all)?,
    }
    Ok(Exit::Yes)
}

pub(crate) fn printed(loaded: &Loaded, notes: &[Diagnostic]) -> impl Printed {
    let (plan, options) = (&loaded.plan, &loaded.options);
    let visits = plan.visits(options.profile());
    let ranges = plan.filter().ranges().iter().zip(visits).map(|(range, visits)| {
        object! {
            /// The first MSR.
            base: format!("{:#x}", range.base()),
            /// How many MSRs.
            nmsrs: range.nmsrs(),
            /// Whether it holds for reads.
            read: range.ops().contains(Op::Read),
            /// Whether it holds for writes.
            write: range.ops().contains(Op::Write),
            /// The bytes that the kernel gets, in lower-case hexadecimal, filled up to whole words of 8 bytes. Bit `i % 8`
            /// of byte `i / 8` is that of MSR `base + i`; 1 allows.
            bitmap: words::hex(&range.bitmap_bytes()),
            /// How many accesses of the trace of `--profile` it decides; null without one.
            visits: (!options.profile().is_empty()).then_some(visits),
        }
    });
    let action = |range: MsrRange, op: Op, rule: Option<u32>, name: String, arguments: Map<String, Value>| {
        object! {
            /// The first MSR.
            first: range.first().to_string(),
            /// The last MSR.
            last: range.last().to_string(),
            /// The direction.
            op: op.name(),
            /// The action's word; `"pass"` for what is spilled.
            action: name,
            /// The number of the rule, from 0, its own rules before those of extended policies; null for the default.
            rule: rule,
            /// `"rule"`, `"default"`, or `"valid"` where `valid` denies each MSR from `first` to `last`.
            decided_by: match rule {
                Some(_) => "rule",
                None => cause::without_rule(loaded, range).0,
            },
            /// What the action is given.
            #[serde(flatten)]
            arguments: Arguments(arguments),
        }
    };
    let mut actions = Vec::new();
    for Entry {
        range,
        action: read,
        rule,
        ..
    } in plan.table().reads()
    {
        let (name, arguments) = (done(read.did(), read.name()), arguments(read.arguments()));
        actions.push((
            range.first(),
            Op::Read,
            action(*range, Op::Read, *rule, name, arguments),
        ));
    }
    for Entry {
        range,
        action: write,
        rule,
        ..
    } in plan.table().writes()
    {
        let (name, arguments) = (done(write.did(), write.name()), arguments(write.arguments()));
        actions.push((
            range.first(),
            Op::Write,
            action(*range, Op::Write, *rule, name, arguments),
        ));
    }
    actions.sort_by_key(|(first, op, _)| (*first, *op));
    let fallback = |(read, write): &(ReadAction, WriteAction)| {
        object! {
            /// The action's word for reads.
            read: read.name(),
            /// What the action for reads is given, by the keys that `actions[]` has for it.
            read_arguments: arguments(read.arguments()),
            /// The action's word for writes.
            write: write.name(),
            /// What the action for writes is given, likewise.
            write_arguments: arguments(write.arguments()),
        }
    };
    let minimum = plan.minimum();
    object! {
        /// What the filter's default is: `"allow"` or `"deny"`.
        default: plan.filter().default_verdict().name(),
        /// The filter's ranges in the order of their slots; the first that covers an access decides it.
        ranges: ranges.collect::<Vec<_>>(),
        /// For which reasons the kernel is to hand accesses over: of `"filter"`, `"unknown"` and `"invalid"`. Empty if none
        /// is.
        reasons: plan.reasons().iter().map(|reason| reason.name()).collect::<Vec<_>>(),
        /// Fixed answers that cost no exit, since the kernel holds them: put into its own MSRs before the guest runs. Empty
        /// without `--host`, since then no machine is asked.
        presets: words::presets(plan.presets()),
        /// The other fixed answers, which make an exit, and why; in order of MSR. Empty without `--host`.
        no_presets: loaded.no_presets.iter().map(|(range, why)| object! {
            /// The first MSR.
            first: range.first().to_string(),
            /// The last MSR.
            last: range.last().to_string(),
            /// `"logged"`: what the rule logs has to leave the kernel; `"written"`: writes reach the kernel's register;
            /// `"unkept"`: KVM is not known to keep a value here that only the host changes; `"unheld"`: it was tried, and
            /// this kernel gives another; `"no-room"`: the filter has no range left.
            why: why.name(),
        }).collect::<Vec<_>>(),
        /// What the policy leaves to the kernel and user space passes on to it, since 16 ranges do not hold it all; empty
        /// where it fits.
        spilled: plan.spilled().map(|(range, op)| object! {
            /// The first MSR.
            first: range.first().to_string(),
            /// The last MSR.
            last: range.last().to_string(),
            /// The direction.
            op: op.name(),
            /// How many exits that is in the trace of `--profile`; null without one.
            exits: options.touches(range, op),
        }).collect::<Vec<_>>(),
        /// The MSRs that `valid = "cpu-model"` denies to the guest, whatever a rule says, by MSR.
        valid: loaded.policy.lacking(loaded.cpuid.as_ref()).map(|entry| object! {
            /// The MSR.
            msr: entry.msr.to_string(),
            /// The MSR's name.
            name: entry.name(),
            /// What of its CPUID says so, as of `explain`.
            lacks: cause::lacks(entry),
        }).collect::<Vec<_>>(),
        /// What accesses get that the kernel does not answer; sorted, disjoint in each direction.
        actions: actions.into_iter().map(|(_, _, action)| action).collect::<Vec<_>>(),
        /// What accesses get that the filter allows and the kernel then does not know.
        unknown: fallback(plan.table().unknown()),
        /// What accesses get that the filter allows and the kernel then refuses.
        invalid: fallback(plan.table().invalid()),
        /// What no filter can do of what the policy asks for.
        notes: notes.iter().map(|note| object! {
            /// The code, see [findings.md](findings.md).
            code: note.code.code(),
            /// What is wrong.
            message: &note.message,
        }).collect::<Vec<_>>(),
        /// How few ranges are possible.
        minimum: object! {
            /// The fewest.
            ranges: minimum.ranges,
            /// Whether the search left no smaller filter out.
            proved: minimum.proved,
            /// Whether as many ranges cannot take fewer bytes either. Where reads and writes differ at many MSRs, not all
            /// ways in which they can share ranges are tried, and this is false.
            bytes_proved: minimum.bytes_proved,
            /// How many it would be if reads and writes were planned apart.
            separate: minimum.separate,
            /// As many accesses as ranges, each at least 12288 MSRs from the others: no range can serve two of them. Null
            /// where the search says that there is no smaller filter, which leaves none out.
            witness: minimum.witness.as_deref().map(refusal::accesses),
        },
        /// What a VMM's seccomp filter must let through where the library puts the plan in force.
        system_calls: msrgate_kvm::system_calls(plan).iter().map(|call| object! {
            /// When: `install`, `vcpu`, `dispatch`, `drain`, `replace` or `drop`; dispatching and draining are the vCPU's
            /// thread's.
            stage: call.stage.name(),
            /// The system call.
            call: call.name,
            /// The call's second argument where that is to be compared; null for others.
            argument: call.argument.map(|argument| format!("{argument:#x}")),
            /// What the argument is: an ioctl's request, what `fcntl` does; null likewise.
            argument_name: call.argument_name,
        }).collect::<Vec<_>>(),
        /// As `policy.hash` of `check`.
        hash: words::hex(&plan.map().hash()),
    }
}

/// What user space does for an action, which is called `action`: what it leaves to the kernel is passed on to it.
fn done(did: Disposition, action: impl fmt::Display) -> String {
    match did {
        Disposition::Allow => Disposition::Pass.to_string(),
        _ => action.to_string(),
    }
}

/// What an action is given, beside other keys.
#[derive(Serialize)]
struct Arguments(Map<String, Value>);

impl JsonSchema for Arguments {
    fn schema_name() -> Cow<'static, str> {
        "Arguments".into()
    }

    /// What any action is given.
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let forms = ReadAction::forms().into_iter().chain(WriteAction::forms());
        let given = forms.flat_map(|form| form.parameters);
        let properties = given.map(|given| {
            let about = format!("Where the action takes it: {}.", given.key.meaning);
            (
                given.key.name.to_owned(),
                Value::from(json_schema!({ "description": about })),
            )
        });
        let properties: Map<String, Value> = properties.collect();
        json_schema!({ "type": "object", "properties": properties })
    }
}

/// What an action is given, by its keys.
fn arguments<'a>(given: impl Iterator<Item = (ArgumentKey, Argument<'a>)>) -> Map<String, Value> {
    let given = given.map(|(key, argument)| {
        let value = match argument {
            Argument::Number(value) | Argument::Implied(value) => number(value),
            Argument::Numbers(values) => values.iter().map(|value| number(*value)).collect(),
            Argument::Name(name) => name.into(),
            Argument::OnLockedBits(otherwise) => otherwise.name().into(),
        };
        (key.name.to_owned(), value)
    });
    given.collect()
}

fn number(value: u64) -> Value {
    format!("{value:#x}").into()
}

fn print(out: &mut Stream<impl Write>, loaded: &Loaded, notes: &[Diagnostic], all: bool) -> Result<(), Failure> {
    let plan = &loaded.plan;
    let filter = plan.filter();
    let bytes: usize = filter.ranges().iter().map(|range| range.bitmap().len() * 8).sum();
    writeln!(
        out,
        "policy   {}, hash {}",
        loaded.policy.name,
        words::hex(&plan.map().hash())
    )?;
    let surface = Surface::of(loaded);
    for (key, line) in surface.lines() {
        writeln!(out, "{key:<9}{line}")?;
    }
    writeln!(out, "default  {}", filter.default_verdict().name())?;
    let minimum = plan.minimum();
    let proved = match (minimum.proved, minimum.bytes_proved) {
        (true, true) => "no fewer are possible",
        (true, false) => "no fewer are possible, but perhaps fewer bytes",
        (false, _) => "fewer may be possible",
    };
    writeln!(
        out,
        "ranges   {} of 16, {bytes} bytes; {proved}; {} if reads and writes were planned apart",
        filter.ranges().len(),
        minimum.separate,
    )?;
    if minimum.ranges == 0 && !filter.ranges().is_empty() {
        writeln!(
            out,
            "         the one range denies what the default denies: the kernel refuses to deny all without one"
        )?;
    }
    let reasons: Vec<&str> = plan.reasons().iter().map(|reason| reason.name()).collect();
    let reasons = if reasons.is_empty() {
        "none: no access leaves the kernel".to_owned()
    } else {
        reasons.join(", ")
    };
    writeln!(out, "reasons  {reasons}\n")?;
    surface.table(out, all)?;
    writeln!(out)?;
    if !filter.ranges().is_empty() {
        let mut header = vec!["slot", "first", "last", "for", "allows", "denies", "bytes"];
        let profiled = !loaded.options.profile().is_empty();
        header.extend(profiled.then_some("visits"));
        let mut table = Table::new(&header);
        let visits = plan.visits(loaded.options.profile());
        for ((slot, range), visits) in filter.ranges().iter().enumerate().zip(visits) {
            let mut row = range_row(slot, range).to_vec();
            row.extend(profiled.then(|| visits.to_string()));
            table.add_row(row);
        }
        table.print(out)?;
        writeln!(out)?;
    }
    let mut table = Table::new(&["first", "last", "op", "action", "names", "rule"]);
    // What the default denies is the complement of the classes above.
    let mut folded = 0;
    let by_default =
        |range: MsrRange, rule: Option<u32>| rule.is_none() && cause::without_rule(loaded, range).0 == "default";
    for entry in plan.table().reads() {
        match !all && entry.action == ReadAction::Deny && by_default(entry.range, entry.rule) {
            true => folded += 1,
            false => table.add_row(action_row(
                loaded,
                entry,
                Op::Read,
                done(entry.action.did(), &entry.action),
            )),
        }
    }
    for entry in plan.table().writes() {
        match !all && entry.action == WriteAction::Deny && by_default(entry.range, entry.rule) {
            true => folded += 1,
            false => table.add_row(action_row(
                loaded,
                entry,
                Op::Write,
                done(entry.action.did(), &entry.action),
            )),
        }
    }
    if !table.is_empty() || folded > 0 {
        writeln!(out, "what is not left to the kernel:")?;
        if !table.is_empty() {
            table.print(out)?;
        }
        let rest = words::counted(folded, "range", "ranges");
        match (folded, table.is_empty()) {
            (0, _) => {}
            (_, true) => writeln!(out, "{rest} denied by the default; --all shows each")?,
            (_, false) => writeln!(out, "and {rest} denied by the default; --all shows each")?,
        }
        writeln!(out)?;
    }
    if !plan.presets().is_empty() {
        let mut table = Table::new(&["MSR", "value", "name"]);
        for preset in plan.presets() {
            let name = msrgate_msrs::by_msr(preset.msr)
                .map(|known| known.name())
                .unwrap_or_default();
            table.add_row([preset.msr.to_string(), format!("{:#x}", preset.value), name.to_owned()]);
        }
        writeln!(
            out,
            "presets: fixed answers that this kernel holds, read without an exit:"
        )?;
        table.print(out)?;
        writeln!(out)?;
    }
    let mut table = Table::new(&["first", "last", "since"]);
    for (range, why) in &loaded.no_presets {
        table.add_row([range.first().to_string(), range.last().to_string(), why.to_string()]);
    }
    if !table.is_empty() {
        writeln!(
            out,
            "fixed answers that this kernel does not give by itself, so that they make an exit:"
        )?;
        table.print(out)?;
        writeln!(out)?;
    }
    let mut table = Table::new(&["first", "last", "op", "exits"]);
    for (range, op) in plan.spilled() {
        let exits = match loaded.options.touches(range, op) {
            None => "one each time".to_owned(),
            Some(exits) => format!("{exits} in the profile"),
        };
        table.add_row([
            range.first().to_string(),
            range.last().to_string(),
            op.to_string(),
            exits,
        ]);
    }
    if !table.is_empty() {
        writeln!(
            out,
            "spilled: left to the kernel, and passed on to it from user space, since 16 ranges do not hold it all:"
        )?;
        table.print(out)?;
        writeln!(out)?;
    }
    for (when, (read, write)) in [
        ("does not know", plan.table().unknown()),
        ("refuses", plan.table().invalid()),
    ] {
        if (read, write) != (&ReadAction::Deny, &WriteAction::Deny) {
            writeln!(out, "what the kernel {when}: rdmsr {read}, wrmsr {write}\n")?;
        }
    }
    for note in notes {
        writeln!(out, "note {}: {}", note.code, note.message)?;
    }
    Ok(())
}

fn range_row(slot: usize, range: &FilterRange) -> [String; 7] {
    let set: u32 = range.bitmap().iter().map(|word| word.count_ones()).sum();
    let span = range
        .span()
        .map(|span| (span.first().to_string(), span.last().to_string()));
    let (first, last) = span.unwrap_or_default();
    let ops: Vec<&str> = Op::ALL
        .into_iter()
        .filter(|op| range.ops().contains(*op))
        .map(Op::name)
        .collect();
    [
        slot.to_string(),
        first,
        last,
        ops.join(" "),
        set.to_string(),
        (range.nmsrs() - set).to_string(),
        (range.bitmap().len() * 8).to_string(),
    ]
}

fn action_row<A>(loaded: &Loaded, entry: &Entry<A>, op: Op, action: String) -> [String; 6] {
    let rule = entry
        .rule
        .and_then(|rule| loaded.policy.rule_place(rule))
        .unwrap_or_else(|| cause::without_rule(loaded, entry.range).1);
    [
        entry.range.first().to_string(),
        entry.range.last().to_string(),
        op.to_string(),
        action,
        words::names(entry.range),
        rule,
    ]
}
