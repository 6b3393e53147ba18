//! `msrgate plan`: what a policy compiles to.

mod emit;
mod state;

use std::fmt;
use std::io::Write;

use msrgate_core::{Argument, ArgumentKey, Disposition, Entry, FilterRange, Op, ReadAction, WriteAction};
use msrgate_policy::Diagnostic;
use msrgate_policy::foreign::Format;
use msrgate_policy::state::State;
use serde_json::{Map, Value, json};

use crate::args::{Emit, PlanArgs};
use crate::exit::{Exit, Failure};
use crate::load::{self, Loaded};
use crate::render::Table;
use crate::stream::Stream;
use crate::{cause, cpuid, machine, refusal, stream, trace, words};

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
            writeln!(out, "{:#}", json!({ "refused": refusal::json(&too_many) }))?;
            return Err(Failure::TooMany(too_many));
        }
        loaded => loaded?,
    };
    if args.state {
        let state = State::of(&loaded.plan, cpuid.as_ref());
        if args.json {
            writeln!(out, "{:#}", state::json(&loaded, &state))?;
        } else {
            state::print(&mut stream::page(), &loaded, &state)?;
        }
        return Ok(Exit::Yes);
    }
    // Without --host a plan is the same everywhere.
    let kernel = machine::linux().filter(|_| args.host);
    let notes = msrgate_policy::notes(&loaded.plan, cpuid.as_ref(), kernel);
    match args.emit {
        Some(Emit::C) => emit::c(&mut out, &loaded)?,
        Some(Emit::Rust) => emit::rust(&mut out, &loaded)?,
        Some(Emit::Crosvm) => emit::foreign(&mut out, &loaded, Format::Crosvm)?,
        Some(Emit::MsrSafe) => emit::foreign(&mut out, &loaded, Format::MsrSafe)?,
        Some(Emit::Json) => writeln!(out, "{:#}", json(&loaded, &notes))?,
        None if args.json => writeln!(out, "{:#}", json(&loaded, &notes))?,
        None => print(&mut stream::page(), &loaded, &notes)?,
    }
    Ok(Exit::Yes)
}

fn json(loaded: &Loaded, notes: &[Diagnostic]) -> Value {
    let (plan, options) = (&loaded.plan, &loaded.options);
    let visits = plan.visits(options.profile());
    let ranges = plan.filter().ranges().iter().zip(visits).map(|(range, visits)| {
        json!({
            "base": format!("{:#x}", range.base()),
            "nmsrs": range.nmsrs(),
            "read": range.ops().contains(Op::Read),
            "write": range.ops().contains(Op::Write),
            "bitmap": words::hex(&range.bitmap_bytes()),
            "visits": (!options.profile().is_empty()).then_some(visits),
        })
    });
    let mut actions: Vec<(u32, Op, Value)> = Vec::new();
    for entry in plan.table().reads() {
        actions.push((
            entry.range.first().0,
            Op::Read,
            action(
                loaded,
                entry,
                Op::Read,
                done(entry.action.did(), entry.action.name()),
                arguments(entry.action.arguments()),
            ),
        ));
    }
    for entry in plan.table().writes() {
        let arguments = arguments(entry.action.arguments());
        actions.push((
            entry.range.first().0,
            Op::Write,
            action(
                loaded,
                entry,
                Op::Write,
                done(entry.action.did(), entry.action.name()),
                arguments,
            ),
        ));
    }
    actions.sort_by_key(|(first, op, _)| (*first, *op));
    let fallback = |(read, write): &(ReadAction, WriteAction)| {
        json!({
            "read": read.name(),
            "read_arguments": arguments(read.arguments()),
            "write": write.name(),
            "write_arguments": arguments(write.arguments()),
        })
    };
    let minimum = plan.minimum();
    json!({
        "default": plan.filter().default_verdict().name(),
        "ranges": ranges.collect::<Vec<_>>(),
        "reasons": plan.reasons().iter().map(|reason| reason.name()).collect::<Vec<_>>(),
        "presets": words::presets(plan.presets()),
        "no_presets": loaded.no_presets.iter().map(|(range, why)| json!({
            "first": range.first().to_string(),
            "last": range.last().to_string(),
            "why": why.name(),
        })).collect::<Vec<_>>(),
        "spilled": plan.spilled().map(|(range, op)| json!({
            "first": range.first().to_string(),
            "last": range.last().to_string(),
            "op": op.name(),
            "exits": options.touches(range, op),
        })).collect::<Vec<_>>(),
        "valid": loaded.policy.lacking(loaded.cpuid.as_ref()).map(|entry| json!({
            "msr": entry.msr.to_string(),
            "name": entry.name(),
            "lacks": cause::lacks(entry),
        })).collect::<Vec<_>>(),
        "actions": actions.into_iter().map(|(_, _, action)| action).collect::<Vec<_>>(),
        "unknown": fallback(plan.table().unknown()),
        "invalid": fallback(plan.table().invalid()),
        "notes": notes.iter().map(|note| json!({
            "code": note.code.code(),
            "message": note.message,
        })).collect::<Vec<_>>(),
        "minimum": {
            "ranges": minimum.ranges,
            "proved": minimum.proved,
            "bytes_proved": minimum.bytes_proved,
            "separate": minimum.separate,
            "witness": minimum.witness.as_deref().map(refusal::accesses),
        },
        "system_calls": msrgate_kvm::system_calls(plan).iter().map(|call| json!({
            "stage": call.stage.name(),
            "call": call.name,
            "argument": call.argument.map(|argument| format!("{argument:#x}")),
            "argument_name": call.argument_name,
        })).collect::<Vec<_>>(),
        "hash": words::hex(&plan.map().hash()),
    })
}

fn action<A>(loaded: &Loaded, entry: &Entry<A>, op: Op, name: String, arguments: Map<String, Value>) -> Value {
    let mut object = Map::new();
    object.insert("first".to_owned(), entry.range.first().to_string().into());
    object.insert("last".to_owned(), entry.range.last().to_string().into());
    object.insert("op".to_owned(), op.name().into());
    object.insert("action".to_owned(), name.into());
    object.insert("rule".to_owned(), entry.rule.into());
    let decided_by = match entry.rule {
        Some(_) => "rule",
        None => cause::without_rule(loaded, entry.range).0,
    };
    object.insert("decided_by".to_owned(), decided_by.into());
    object.extend(arguments);
    Value::Object(object)
}

/// What user space does for an action, which is called `action`: what it leaves to the kernel is passed on to it.
fn done(did: Disposition, action: impl fmt::Display) -> String {
    match did {
        Disposition::Allow => Disposition::Pass.to_string(),
        _ => action.to_string(),
    }
}

/// What an action is given, by its keys.
fn arguments<'a>(given: impl Iterator<Item = (ArgumentKey, Argument<'a>)>) -> Map<String, Value> {
    given
        .map(|(key, argument)| {
            let value = match argument {
                Argument::Number(value) | Argument::Implied(value) => number(value),
                Argument::Numbers(values) => values.iter().map(|value| number(*value)).collect(),
                Argument::Name(name) => name.into(),
                Argument::OnLockedBits(otherwise) => otherwise.name().into(),
            };
            (key.name.to_owned(), value)
        })
        .collect()
}

fn number(value: u64) -> Value {
    format!("{value:#x}").into()
}

fn print(out: &mut Stream<impl Write>, loaded: &Loaded, notes: &[Diagnostic]) -> Result<(), Failure> {
    let plan = &loaded.plan;
    let filter = plan.filter();
    let bytes: usize = filter.ranges().iter().map(|range| range.bitmap().len() * 8).sum();
    writeln!(
        out,
        "policy   {}, hash {}",
        loaded.policy.name,
        words::hex(&plan.map().hash())
    )?;
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
    for entry in plan.table().reads() {
        table.add_row(action_row(
            loaded,
            entry,
            Op::Read,
            done(entry.action.did(), &entry.action),
        ));
    }
    for entry in plan.table().writes() {
        table.add_row(action_row(
            loaded,
            entry,
            Op::Write,
            done(entry.action.did(), &entry.action),
        ));
    }
    if !table.is_empty() {
        writeln!(out, "what is not left to the kernel:")?;
        table.print(out)?;
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
