//! What a decision map compiles to.

use alloc::vec;
use alloc::vec::Vec;

use msrgate_core::abi::MAX_RANGES;
use msrgate_core::{
    ActionTable, DecidedBy, Entry, Filter, FilterError, FilterRange, Log, Msr, MsrRange, Op, Ops, ReadAction,
    ReadSource, Reason, Reasons, TableError, Verdict, WriteAction, WriteTarget,
};

use crate::cover::{RangeSet, TooMany, smallest};
use crate::note::notes;
use crate::order::by_visits;
use crate::proof::{Realised, first_difference};
use crate::spill::{spilled_in, spilled_of};
use crate::{
    AccessCount, CompileOptions, Decision, DecisionMap, Direction, Group, Intervals, Note, PlanError, Preset, preset,
};

/// How many ranges the map needs.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Minimum {
    /// Ranges of the smallest filter.
    pub ranges: u64,
    /// Whether the search left no smaller filter out.
    pub proved: bool,
    /// Whether as many ranges cannot take fewer bytes either. Where reads and writes differ at many MSRs, not all ways in which
    /// they can share ranges are tried.
    pub bytes_proved: bool,
    /// What planning reads and writes apart would take.
    pub separate: u64,
    /// As many accesses as `ranges`, each 12288 MSRs or more from the others, that all differ from the filter's default:
    /// no range can serve two of them, so there can be no fewer. `None` where the search, which leaves no filter out,
    /// is what says so.
    pub witness: Option<Vec<(Msr, Op)>>,
}

/// A filter, the reasons for which the kernel hands accesses to user space, and what user space answers then.
///
/// Compiled from a [`DecisionMap`] and proven equal to it, but for what its notes name and what the database of MSRs says
/// that passes a filter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    filter: Filter,
    reasons: Reasons,
    table: ActionTable,
    presets: Vec<Preset>,
    notes: Vec<Note>,
    minimum: Minimum,
    hash: Option<[u8; 32]>,
    map: DecisionMap,
}

/// What a plan is made of beside its map.
pub(crate) struct Parts {
    pub(crate) filter: Filter,
    pub(crate) reasons: Reasons,
    pub(crate) presets: Vec<Preset>,
    pub(crate) spilled: Vec<(MsrRange, Op)>,
    pub(crate) minimum: Minimum,
}

impl Plan {
    /// The fewest ranges that do exactly what `map` says.
    ///
    /// Fails where 16 ranges do not suffice, or where more MSRs are to keep a state than a filter covers.
    pub fn compile(map: &DecisionMap) -> Result<Plan, PlanError> {
        Plan::compile_for(map, &CompileOptions::default())
    }

    /// [`Plan::compile`] for a kernel and a guest of which more is known, which changes nothing of what the plan means.
    ///
    /// What the kernel holds ([`CompileOptions::with_presets`]) becomes a preset where the filter has room. Where 16 ranges do not
    /// suffice, what may be spilled ([`CompileOptions::spilling`]) is passed through from user space, as little of it as does.
    pub fn compile_for(map: &DecisionMap, options: &CompileOptions) -> Result<Plan, PlanError> {
        let mut presets = preset::chosen(map, options.held());
        let mut realised = map.with_presets(&presets);
        let mut allowed = realised.allowed();
        let mut spilled = Vec::new();
        let (default, covering) = match fitting(&realised, &allowed) {
            Ok(fits) => fits,
            Err(error) => {
                spilled = map.chosen_to_spill(options, error)?;
                presets.clear();
                realised = map.clone();
                allowed = DecisionMap::without_spilled(&map.allowed(), &spilled);
                fitting(map, &allowed)?
            }
        };
        let realised = &realised;
        let ranges = by_visits(covering.ranges.clone(), options.profile())
            .iter()
            .map(|(direction, range)| filter_range(*direction, *range, &covering, &allowed, default))
            .collect::<Result<Vec<FilterRange>, FilterError>>()?;
        let minimum = Minimum {
            ranges: ranges.len() as u64,
            proved: true,
            bytes_proved: covering.bytes_proved,
            separate: covering.separate,
            witness: covering.witness.clone(),
        };
        let filter = match default {
            Verdict::Deny if ranges.is_empty() => deny_all()?,
            _ => Filter::new(default, ranges)?,
        };
        let reasons = reasons(realised, &spilled);
        let parts = Parts {
            filter,
            reasons,
            presets,
            spilled,
            minimum,
        };
        Plan::proven(map, options, parts)
    }

    /// The plan of these parts, if it does what the map says.
    pub(crate) fn proven(map: &DecisionMap, options: &CompileOptions, parts: Parts) -> Result<Plan, PlanError> {
        let Parts {
            filter,
            reasons,
            presets,
            spilled,
            minimum,
        } = parts;
        let realised = map.with_presets(&presets);
        let table = table(&realised, &spilled)?;
        let realised = Realised {
            filter: &filter,
            reasons,
            table: &table,
            presets: &presets,
        };
        if let Some((msr, op)) = first_difference(map, options, &realised) {
            return Err(PlanError::NotProven { msr, op });
        }
        Ok(Plan {
            notes: notes(map, options, &presets, &spilled),
            table,
            filter,
            reasons,
            presets,
            minimum,
            hash: hash(map),
            map: map.clone(),
        })
    }

    /// The plan with accesses handed to user space for `reasons` too: those that another owner of the VM asked for.
    #[must_use]
    pub fn with_exit_reasons(self, reasons: Reasons) -> Plan {
        Plan {
            reasons: self.reasons.union(reasons),
            ..self
        }
    }

    /// What the plan means.
    pub fn map(&self) -> &DecisionMap {
        &self.map
    }

    /// What the kernel gets.
    pub fn filter(&self) -> &Filter {
        &self.filter
    }

    /// For which reasons the kernel must hand an access to user space.
    pub fn reasons(&self) -> Reasons {
        self.reasons
    }

    /// What user space answers.
    pub fn table(&self) -> &ActionTable {
        &self.table
    }

    /// Values to put into the kernel's own MSRs before the guest runs, in order of MSR. The filter allows reads of
    /// these and no write.
    pub fn presets(&self) -> &[Preset] {
        &self.presets
    }

    /// What whoever relies on the plan must know.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Whether an access of the guest comes to the kernel's own register of `msr`: whether RDMSR shows something of it, or
    /// WRMSR may change it. Not where reads find a preset: that is the policy's value.
    ///
    /// Where neither does, nothing of the register has to be saved with the guest, unless instructions use it (RDTSC,
    /// SWAPGS) or the VMM gave it a value.
    pub fn reaches(&self, msr: Msr, op: Op) -> bool {
        if self.filter.verdict(msr, op) == Verdict::Allow {
            let preset = self.presets.iter().any(|preset| preset.msr == msr);
            return op == Op::Write || !preset;
        }
        match op {
            Op::Read => action(self.table.reads(), msr).is_some_and(|action| action.source() == ReadSource::Register),
            Op::Write => {
                action(self.table.writes(), msr).is_some_and(|action| action.target() == WriteTarget::Register)
            }
        }
    }

    /// What the map leaves to the kernel and user space passes on to it, since the filter has no room to allow it: in
    /// order of MSR, reads first. Their entries in the table say `Allow`.
    pub fn spilled(&self) -> impl Iterator<Item = (MsrRange, Op)> {
        spilled_in(&self.table)
    }

    /// How many of the accesses of `profile` each range of the filter decides, by slot.
    pub fn visits(&self, profile: &[AccessCount]) -> Vec<u64> {
        let mut visits = vec![0u64; self.filter.ranges().len()];
        for touched in profile {
            if let DecidedBy::Range { slot, .. } = self.filter.decide(touched.msr, touched.op).1
                && let Some(visits) = visits.get_mut(usize::from(slot))
            {
                *visits = visits.saturating_add(touched.count);
            }
        }
        visits
    }

    /// How many ranges the map needs.
    pub fn minimum(&self) -> &Minimum {
        &self.minimum
    }

    /// The name of what the plan means, `DecisionMap::hash`; `None` where whoever compiled it did so without the feature
    /// `hash`. A saved vCPU is told by it.
    pub fn hash(&self) -> Option<[u8; 32]> {
        self.hash
    }

    /// The plan with the hash that its bytes have.
    pub(crate) fn with_hash(self, hash: Option<[u8; 32]>) -> Plan {
        Plan { hash, ..self }
    }
}

#[cfg(feature = "hash")]
fn hash(map: &DecisionMap) -> Option<[u8; 32]> {
    Some(map.hash())
}

#[cfg(not(feature = "hash"))]
fn hash(_: &DecisionMap) -> Option<[u8; 32]> {
    None
}

/// What the entry that covers `msr` gives it.
fn action<A>(entries: &[Entry<A>], msr: Msr) -> Option<&A> {
    let after = entries.partition_point(|entry| entry.range.last() < msr);
    let entry = entries.get(after).filter(|entry| entry.range.contains(msr))?;
    Some(&entry.action)
}

/// The smallest covering, if the kernel can hold it.
fn fitting(map: &DecisionMap, allowed: &Intervals<(bool, bool)>) -> Result<(Verdict, RangeSet), PlanError> {
    let (default, covering) = smallest(allowed).map_err(|TooMany { at_least, separate }| PlanError::TooManyRanges {
        needed: at_least,
        exact: false,
        separate,
        witness: None,
        groups: Vec::new(),
    })?;
    if covering.ranges.len() > MAX_RANGES {
        return Err(PlanError::TooManyRanges {
            needed: covering.ranges.len() as u64,
            exact: true,
            separate: covering.separate,
            witness: covering.witness.clone(),
            groups: covering
                .ranges
                .iter()
                .map(|(direction, range)| Group::of(map, default, *direction, *range))
                .collect(),
        });
    }
    Ok((default, covering))
}

/// The range with the bits that the map asks for.
fn filter_range(
    direction: Direction,
    range: MsrRange,
    covering: &RangeSet,
    allowed: &Intervals<(bool, bool)>,
    default: Verdict,
) -> Result<FilterRange, FilterError> {
    let overridden = |op: Direction, msr: Msr| {
        covering
            .ranges
            .iter()
            .any(|(direction, range)| *direction == op && range.contains(msr))
    };
    let mut bitmap = vec![0u64; range.len().div_ceil(64) as usize];
    let mut set = |msr: Msr| {
        let bit = (msr.0 - range.first().0) as usize;
        if let Some(word) = bitmap.get_mut(bit / 64) {
            *word |= 1 << (bit % 64);
        }
    };
    for (part, (read, write)) in allowed.within(range) {
        for msr in part.iter() {
            let bit = match direction {
                Direction::Read => *read,
                Direction::Write => *write,
                Direction::Both if read == write => *read,
                // A one-direction range before this one decides a direction; the bit is the other's.
                Direction::Both => match (overridden(Direction::Read, msr), overridden(Direction::Write, msr)) {
                    (true, false) => *write,
                    (false, true) => *read,
                    _ => default == Verdict::Allow,
                },
            };
            // No filter decides x2APIC's registers; a bit that nothing needs stays as the default has it.
            let bit = if MsrRange::X2APIC.contains(msr) {
                default == Verdict::Allow
            } else {
                bit
            };
            if bit {
                set(msr);
            }
        }
    }
    FilterRange::new(
        range.first().0,
        u32::try_from(range.len()).unwrap_or(u32::MAX),
        direction.ops(),
        bitmap,
    )
}

/// Denying everything takes a range, since the kernel refuses a default of deny without one: one MSR that it denies as
/// the default would.
fn deny_all() -> Result<Filter, FilterError> {
    Filter::new(Verdict::Deny, vec![FilterRange::new(0, 1, Ops::BOTH, vec![0])?])
}

/// What user space answers: all that is not left to the kernel, and what is and was spilled.
/// What user space answers where a filter leaves to the kernel what `map` allows, but for what is spilled.
fn table(map: &DecisionMap, spilled: &[(MsrRange, Op)]) -> Result<ActionTable, TableError> {
    let reads = entries(map.reads(), |action| *action == ReadAction::Allow, spilled, Op::Read);
    let writes = entries(map.writes(), |action| *action == WriteAction::Allow, spilled, Op::Write);
    ActionTable::new(reads, writes, map.unknown().clone(), map.invalid().clone())
}

impl DecisionMap {
    /// What a hypervisor of one's own answers of what the map does not allow, without the limits of a filter: 16 ranges of
    /// 12288 MSRs are KVM's. [`VmxBitmap::recompute_by`](msrgate_core::VmxBitmap::recompute_by) takes the map's
    /// [`allows`](DecisionMap::allows) for what is passed through.
    ///
    /// # Errors
    /// Where more MSRs are to keep a state than a table has room for.
    pub fn table(&self) -> Result<ActionTable, TableError> {
        table(self, &[])
    }
}

fn entries<A: Clone + Eq>(
    decisions: &Intervals<Decision<A>>,
    allow: impl Fn(&A) -> bool,
    spilled: &[(MsrRange, Op)],
    op: Op,
) -> Vec<Entry<A>> {
    let spilled = spilled_of(spilled, op);
    let with_spilled = decisions.zip(&spilled, |decision, spilled| (decision.clone(), *spilled));
    with_spilled
        .iter()
        .filter(|(_, (decision, spilled))| *spilled || !allow(&decision.action))
        .map(|(range, (decision, _))| Entry::new(range, decision.action.clone(), decision.rule, decision.log))
        .collect()
}

/// A policy of pure allow and deny never leaves the kernel; a denial that is to be logged must.
fn reasons(map: &DecisionMap, spilled: &[(MsrRange, Op)]) -> Reasons {
    let read = |decision: &Decision<ReadAction>| {
        decision.action.needs_exit() || decision.action == ReadAction::Deny && decision.log != Log::None
    };
    let write = |decision: &Decision<WriteAction>| {
        decision.action.needs_exit() || decision.action == WriteAction::Deny && decision.log != Log::None
    };
    let kernels = (ReadAction::Deny, WriteAction::Deny);
    let mut reasons = Reasons::NONE;
    let answered = map.reads().iter().any(|(_, decision)| read(decision))
        || map.writes().iter().any(|(_, decision)| write(decision));
    if answered || !spilled.is_empty() {
        reasons = reasons.union(Reasons::of(Reason::Filter));
    }
    if *map.unknown() != kernels {
        reasons = reasons.union(Reasons::of(Reason::Unknown));
    }
    if *map.invalid() != kernels {
        reasons = reasons.union(Reasons::of(Reason::Invalid));
    }
    reasons
}

impl Group {
    fn of(map: &DecisionMap, default: Verdict, direction: Direction, range: MsrRange) -> Group {
        let default = default == Verdict::Allow;
        let mut rules = Vec::new();
        let mut accesses = 0;
        let mut count = |range: MsrRange, allowed: bool, rule: Option<u32>| {
            if allowed != default {
                accesses += range.len();
                rules.extend(rule);
            }
        };
        if direction != Direction::Write {
            for (part, decision) in map.reads().within(range) {
                count(part, decision.action == ReadAction::Allow, decision.rule);
            }
        }
        if direction != Direction::Read {
            for (part, decision) in map.writes().within(range) {
                count(part, decision.action == WriteAction::Allow, decision.rule);
            }
        }
        rules.sort_unstable();
        rules.dedup();
        Group {
            direction,
            range,
            rules,
            accesses,
        }
    }
}

#[cfg(test)]
mod tests;
