//! The proof that a plan does what its map says, for every MSR and direction.

use msrgate_core::{
    ActionTable, Filter, Log, Msr, MsrRange, Op, ReadAction, Reason, Reasons, Verdict, WriteAction, WriteTarget,
};

use crate::spill::spilled_in;
use crate::{CompileOptions, DecisionMap, Intervals, Preset};

/// What a plan does.
pub(crate) struct Realised<'a> {
    pub(crate) filter: &'a Filter,
    pub(crate) reasons: Reasons,
    pub(crate) table: &'a ActionTable,
    pub(crate) presets: &'a [Preset],
}

/// The first access that the plan treats otherwise than the map; `None` proves that there is none.
///
/// Walks intervals on which neither the filter nor the map nor the table changes, so it leaves no access out. What no
/// filter decides is excepted: x2APIC's registers, and MSR 0xffffffff, which gets the filter's default. Of a preset it
/// proves that the map wants this value and that no write gets to it; that the kernel holds it, who installs proves.
pub(crate) fn first_difference(map: &DecisionMap, options: &CompileOptions, plan: &Realised<'_>) -> Option<(Msr, Op)> {
    let deflects = plan.reasons.contains(Reason::Filter);
    let table = plan.table;
    let reads = Intervals::first_match(
        None,
        table
            .reads()
            .iter()
            .map(|entry| (entry.range, Some((&entry.action, entry.rule, entry.log)))),
    );
    let writes = Intervals::first_match(
        None,
        table
            .writes()
            .iter()
            .map(|entry| (entry.range, Some((&entry.action, entry.rule, entry.log)))),
    );
    let read_verdicts = Intervals::of_filter(plan.filter, Op::Read);
    let write_verdicts = Intervals::of_filter(plan.filter, Op::Write);

    let presets = plan.presets.iter();
    let presets = Intervals::first_match(
        None,
        presets.map(|preset| (MsrRange::single(preset.msr), Some(preset.value))),
    );
    let answered = reads.zip(&presets, |entry, preset| (*entry, *preset));

    let read_right = map.reads().zip(&answered, |decision, answered| match answered {
        (None, None) => (decision.action == ReadAction::Allow).then_some(Verdict::Allow),
        (None, Some(value)) => {
            let same = decision.action == ReadAction::Value(*value) && decision.log == Log::None;
            same.then_some(Verdict::Allow)
        }
        (Some(_), Some(_)) => None,
        // Left to the kernel, and passed on to it.
        (Some((ReadAction::Allow, rule, log)), None) => {
            let same = decision.action == ReadAction::Allow && *rule == decision.rule && *log == decision.log;
            (same && deflects).then_some(Verdict::Deny)
        }
        (Some((action, rule, log)), None) => {
            let same = **action == decision.action && *rule == decision.rule && *log == decision.log;
            let kernel_can = decision.action == ReadAction::Deny && decision.log == Log::None;
            (same && decision.action != ReadAction::Allow && (deflects || kernel_can)).then_some(Verdict::Deny)
        }
    });
    // The kernel goes on to hold a preset only if no write gets to its register.
    let kept = |write: &WriteAction| write.target() == WriteTarget::Elsewhere;
    let overwritten = plan
        .presets
        .iter()
        .find(|preset| !kept(&map.writes().get(preset.msr).action));
    let overwritten = overwritten.map(|preset| (preset.msr, Op::Write));
    let write_right = map.writes().zip(&writes, |decision, entry| match entry {
        None => (decision.action == WriteAction::Allow).then_some(Verdict::Allow),
        Some((WriteAction::Allow, rule, log)) => {
            let same = decision.action == WriteAction::Allow && *rule == decision.rule && *log == decision.log;
            (same && deflects).then_some(Verdict::Deny)
        }
        Some((action, rule, log)) => {
            let same = **action == decision.action && *rule == decision.rule && *log == decision.log;
            let kernel_can = decision.action == WriteAction::Deny && decision.log == Log::None;
            (same && decision.action != WriteAction::Allow && (deflects || kernel_can)).then_some(Verdict::Deny)
        }
    });
    let read = differs(&read_right, &read_verdicts).map(|msr| (msr, Op::Read));
    let write = differs(&write_right, &write_verdicts).map(|msr| (msr, Op::Write));
    let fallbacks = table.unknown() == map.unknown() && table.invalid() == map.invalid();
    let kernels = (ReadAction::Deny, WriteAction::Deny);
    let handed_over = |reason, pair: &_| *pair == kernels || plan.reasons.contains(reason);
    let fallbacks =
        fallbacks && handed_over(Reason::Unknown, map.unknown()) && handed_over(Reason::Invalid, map.invalid());
    let fallback = (!fallbacks).then_some((Msr::MIN, Op::Read));
    read.or(write)
        .or(overwritten)
        .or(fallback)
        .or_else(|| not_to_be_passed(map, options, table))
}

/// The first access that is passed on and may not be: the options have to name it, and what the kernel refuses has to get the
/// same for whichever reason, since user space is not told it.
fn not_to_be_passed(map: &DecisionMap, options: &CompileOptions, table: &ActionTable) -> Option<(Msr, Op)> {
    let spillable = options.spillable().unwrap_or_default();
    let [reads, writes] = Op::ALL.map(|op| {
        let of = spillable.iter().filter(|spillable| spillable.op == op);
        Intervals::first_match(false, of.map(|spillable| (MsrRange::single(spillable.msr), true)))
    });
    spilled_in(table).find_map(|(range, op)| {
        let named = match op {
            Op::Read => &reads,
            Op::Write => &writes,
        };
        let (part, _) = named
            .within(range)
            .find(|(_, named)| !**named || map.unknown() != map.invalid())?;
        Some((part.first(), op))
    })
}

/// The first MSR that a filter decides and whose verdict is not the one that is right; `None` as the right verdict means
/// that none would be.
fn differs(right: &Intervals<Option<Verdict>>, verdicts: &Intervals<Verdict>) -> Option<Msr> {
    let equal = right.zip(verdicts, |right, verdict| *right == Some(*verdict));
    let excepted = Intervals::first_match(false, [(MsrRange::X2APIC, true), (MsrRange::single(Msr::MAX), true)]);
    let fine = equal.zip(&excepted, |equal, excepted| *equal || *excepted);
    fine.iter().find(|(_, fine)| !**fine).map(|(range, _)| range.first())
}
