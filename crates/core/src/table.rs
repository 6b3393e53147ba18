//! What user space answers to an exit.

mod emulated_state;

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

pub use self::emulated_state::{EmulatedState, EmulatedStateError};
use crate::{
    Access, Disposition, Exit, Fault, FaultCause, Keeps, Log, Msr, MsrRange, OnLockedBits, Op, Outcome, ReadAction,
    ReadOutcome, Reason, WriteAction, WriteOutcome,
};

/// What the accesses of a range of MSRs get.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct Entry<A> {
    /// The MSRs.
    pub range: MsrRange,
    /// What they get.
    pub action: A,
    /// The rule that says so, counted from 0; `None` for the default.
    pub rule: Option<u32>,
    /// How much is logged.
    pub log: Log,
}

impl<A> Entry<A> {
    /// What a range of MSRs gets, by which rule, and how much of it is logged.
    pub const fn new(range: MsrRange, action: A, rule: Option<u32>, log: Log) -> Entry<A> {
        Entry {
            range,
            action,
            rule,
            log,
        }
    }
}

/// What user space answers to each access that the kernel hands to it.
///
/// Sorted and disjoint, for reads and writes apart; an access that the kernel answers has no entry. An entry of `Allow`
/// passes the access on to the kernel as the host would, for a filter that has no room to allow it; where the kernel
/// refuses, it gets what `unknown` says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ActionTable {
    reads: Box<[Entry<ReadAction>]>,
    writes: Box<[Entry<WriteAction>]>,
    unknown: (ReadAction, WriteAction),
    invalid: (ReadAction, WriteAction),
    /// Where each MSR with a state of its own keeps it in [`VcpuState::cells`].
    spans: Box<[Span]>,
    /// Whether `unknown` or `invalid` keeps shadows of MSRs that no entry names.
    spare: bool,
}

/// The state of the MSRs of a range lies in consecutive cells from `cell` on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Span {
    range: MsrRange,
    cell: usize,
}

impl ActionTable {
    /// The most MSRs of one table that may keep a state for each vCPU: what 16 ranges of a filter can cover.
    pub const MAX_CELLS: u64 = crate::abi::MAX_RANGES as u64 * crate::abi::MAX_RANGE_MSRS as u64;

    /// Shadows of MSRs that no entry names, which a vCPU has room for.
    pub const SPARE_CELLS: usize = 256;

    /// The only way in: `reads` and `writes` sorted and disjoint, and room for their state.
    ///
    /// `unknown` and `invalid` are what an access gets that the filter allows and the kernel then does not know or
    /// refuses; `Deny` in both directions leaves such an access to the kernel.
    pub fn new(
        reads: Vec<Entry<ReadAction>>,
        writes: Vec<Entry<WriteAction>>,
        unknown: (ReadAction, WriteAction),
        invalid: (ReadAction, WriteAction),
    ) -> Result<ActionTable, TableError> {
        sorted(&reads)?;
        sorted(&writes)?;
        let keeps = [&unknown, &invalid];
        let spare = keeps
            .iter()
            .any(|(read, write)| read.keeps() == Some(Keeps::Shadow) || write.keeps() == Some(Keeps::Shadow));
        let mut ranges: Vec<MsrRange> = Vec::new();
        ranges.extend(
            reads
                .iter()
                .filter(|entry| entry.action.keeps().is_some())
                .map(|entry| entry.range),
        );
        ranges.extend(
            writes
                .iter()
                .filter(|entry| entry.action.keeps().is_some())
                .map(|entry| entry.range),
        );
        ranges.sort_unstable();
        let mut spans: Vec<Span> = Vec::new();
        let mut cells: u64 = 0;
        for range in ranges {
            // What an earlier range already covers has its cells.
            let first = spans.last().map_or(Some(range.first()), |span| {
                Some(range.first().max(Msr(span.range.last().0.checked_add(1)?)))
            });
            let Some(rest) = first.and_then(|first| MsrRange::new(first, range.last())) else {
                continue;
            };
            let cell = usize::try_from(cells).map_err(|_| TableError::TooManyCells)?;
            cells += rest.len();
            if cells > Self::MAX_CELLS {
                return Err(TableError::TooManyCells);
            }
            spans.push(Span { range: rest, cell });
        }
        Ok(ActionTable {
            reads: reads.into(),
            writes: writes.into(),
            unknown,
            invalid,
            spans: spans.into(),
            spare,
        })
    }

    /// The entries of reads.
    pub fn reads(&self) -> &[Entry<ReadAction>] {
        &self.reads
    }

    /// The entries of writes.
    pub fn writes(&self) -> &[Entry<WriteAction>] {
        &self.writes
    }

    /// What a read and a write get that the kernel does not know.
    pub fn unknown(&self) -> &(ReadAction, WriteAction) {
        &self.unknown
    }

    /// What a read and a write get that the kernel refuses.
    pub fn invalid(&self) -> &(ReadAction, WriteAction) {
        &self.invalid
    }

    /// Whether the table says what an access gets that the filter denies.
    pub fn decides(&self, msr: Msr, op: Op) -> bool {
        match op {
            Op::Read => find(&self.reads, msr).is_some(),
            Op::Write => find(&self.writes, msr).is_some(),
        }
    }

    /// Whether the table passes an access that the filter denies on to the kernel.
    pub fn passes(&self, msr: Msr, op: Op) -> bool {
        match op {
            Op::Read => find(&self.reads, msr).is_some_and(|entry| entry.action == ReadAction::Allow),
            Op::Write => find(&self.writes, msr).is_some_and(|entry| entry.action == WriteAction::Allow),
        }
    }

    /// The names of all handlers that an exit may ask.
    pub fn handlers(&self) -> impl Iterator<Item = &str> {
        let reads = self.read_actions().filter_map(ReadAction::handler);
        reads.chain(self.write_actions().filter_map(WriteAction::handler))
    }

    /// All that a read may get: by an entry, or where the kernel does not know it or refuses it.
    pub fn read_actions(&self) -> impl Iterator<Item = &ReadAction> {
        let of_entries = self.reads.iter().map(|entry| &entry.action);
        of_entries.chain([&self.unknown.0, &self.invalid.0])
    }

    /// All that a write may get, likewise.
    pub fn write_actions(&self) -> impl Iterator<Item = &WriteAction> {
        let of_entries = self.writes.iter().map(|entry| &entry.action);
        of_entries.chain([&self.unknown.1, &self.invalid.1])
    }

    /// Whether some action makes a vCPU remember something: `shadow` or `once`.
    pub fn has_emulated_state(&self) -> bool {
        !self.spans.is_empty() || self.spare
    }

    /// The MSRs that keep a state of their own for each vCPU (`shadow`, `once`), in order, and the place of the first of
    /// each range: places are consecutive, from 0 on.
    pub fn cells(&self) -> impl Iterator<Item = (MsrRange, usize)> {
        self.spans.iter().map(|span| (span.range, span.cell))
    }

    /// The state of a new vCPU. Allocates all that its accesses will need.
    pub fn vcpu_state(&self) -> VcpuState {
        let cells = self
            .spans
            .last()
            .map_or(0, |span| span.cell + span.range.len() as usize);
        VcpuState {
            cells: vec![Cell::default(); cells].into(),
            spare: vec![(Msr::MIN, 0); if self.spare { Self::SPARE_CELLS } else { 0 }].into(),
            spare_used: 0,
            answering: false,
        }
    }

    /// What an exit gets. Never allocates, locks or panics, as far as `backing` does not.
    ///
    /// Fails closed: what no entry names, and what an action cannot do, faults.
    pub fn answer(&self, exit: Exit, state: &mut VcpuState, backing: &mut impl MsrBackend) -> Answer {
        match exit.access {
            Access::Read { msr } => self.read(msr, exit.reason, state, backing).seen(),
            Access::Write { msr, value } => self.write(msr, value, exit.reason, state, backing).seen(),
        }
    }

    /// [`ActionTable::answer`] of a read.
    pub fn read(
        &self,
        msr: Msr,
        reason: Reason,
        state: &mut VcpuState,
        backing: &mut impl MsrBackend,
    ) -> Answer<ReadOutcome> {
        state.once_at_a_time(|state| self.answer_read(msr, reason, state, backing))
    }

    /// [`ActionTable::answer`] of a write.
    pub fn write(
        &self,
        msr: Msr,
        value: u64,
        reason: Reason,
        state: &mut VcpuState,
        backing: &mut impl MsrBackend,
    ) -> Answer<WriteOutcome> {
        state.once_at_a_time(|state| self.answer_write(msr, value, reason, state, backing))
    }

    fn answer_read(
        &self,
        msr: Msr,
        reason: Reason,
        state: &mut VcpuState,
        backing: &mut impl MsrBackend,
    ) -> Answer<ReadOutcome> {
        let fallbacks = (&self.unknown.0, &self.invalid.0);
        let Some((action, rule, log)) = decision(&self.reads, fallbacks, msr, reason) else {
            return Answer::of(Err(FaultCause::NoRule), Disposition::Fault, None, Log::None);
        };
        let result = match action {
            ReadAction::Deny => return Answer::denied(rule, log),
            ReadAction::Allow if reason == Reason::Filter => match backing.kernel_read(msr) {
                Ok(value) => return Answer::of(Ok(value), Disposition::Pass, rule, log),
                // The kernel refuses the guest too, and does not say here which of two reasons it would have given.
                Err(_) => return self.answer_read(msr, Reason::Unknown, state, backing),
            },
            ReadAction::Allow => Err(FaultCause::NoRule),
            ReadAction::Value(value) => Ok(*value),
            ReadAction::Shadow(initial) => Ok(self.shadow(msr, state).unwrap_or(*initial)),
            ReadAction::Mask { keep, set } => backing.kernel_read(msr).map(|value| value & keep | set),
            ReadAction::Host => backing.host_read(msr),
            ReadAction::Handler(name) => backing.handler_read(name, msr),
        };
        Answer::of(result, action.did(), rule, log)
    }

    fn answer_write(
        &self,
        msr: Msr,
        value: u64,
        reason: Reason,
        state: &mut VcpuState,
        backing: &mut impl MsrBackend,
    ) -> Answer<WriteOutcome> {
        let fallbacks = (&self.unknown.1, &self.invalid.1);
        let Some((action, rule, log)) = decision(&self.writes, fallbacks, msr, reason) else {
            return Answer::of(Err(FaultCause::NoRule), Disposition::Fault, None, Log::None);
        };
        let result = match action {
            WriteAction::Deny => return Answer::denied(rule, log),
            WriteAction::Allow if reason == Reason::Filter => match backing.kernel_write(msr, value) {
                Ok(()) => return Answer::of(Ok(()), Disposition::Pass, rule, log),
                Err(_) => return self.answer_write(msr, value, Reason::Unknown, state, backing),
            },
            WriteAction::Allow => Err(FaultCause::NoRule),
            WriteAction::Ignore => Ok(()),
            WriteAction::Shadow => self.keep(msr, value, state),
            WriteAction::Mask { may_change, otherwise } => backing.kernel_read(msr).and_then(|old| {
                if *otherwise == OnLockedBits::Deny && (old ^ value) & !may_change != 0 {
                    return Err(FaultCause::BitsLocked);
                }
                backing.kernel_write(msr, old & !may_change | value & may_change)
            }),
            WriteAction::Only(values) if values.contains(&value) => backing.kernel_write(msr, value),
            WriteAction::Only(_) => Err(FaultCause::ValueNotListed),
            WriteAction::Once => self.write_once(msr, value, state, backing),
            WriteAction::Handler(name) => backing.handler_write(name, msr, value),
        };
        Answer::of(result, action.did(), rule, log)
    }

    /// The cell of an MSR that an entry gives a state.
    fn cell(&self, msr: Msr) -> Option<usize> {
        let after = self.spans.partition_point(|span| span.range.first() <= msr);
        let span = self.spans.get(after.checked_sub(1)?)?;
        let distance = msr.0.checked_sub(span.range.first().0)?;
        span.range.contains(msr).then_some(span.cell + distance as usize)
    }

    fn shadow(&self, msr: Msr, state: &VcpuState) -> Option<u64> {
        match self.cell(msr) {
            Some(cell) => state.cells.get(cell)?.shadow,
            None => {
                let used = state.spare.get(..state.spare_used)?;
                used.iter().find(|(kept, _)| *kept == msr).map(|(_, value)| *value)
            }
        }
    }

    fn keep(&self, msr: Msr, value: u64, state: &mut VcpuState) -> Result<(), FaultCause> {
        if let Some(cell) = self.cell(msr) {
            let cell = state.cells.get_mut(cell).ok_or(FaultCause::ShadowFull)?;
            cell.shadow = Some(value);
            return Ok(());
        }
        let used = state.spare_used;
        let known = state.spare.iter().take(used).position(|(kept, _)| *kept == msr);
        let slot = state
            .spare
            .get_mut(known.unwrap_or(used))
            .ok_or(FaultCause::ShadowFull)?;
        *slot = (msr, value);
        state.spare_used = used.max(known.unwrap_or(used) + 1);
        Ok(())
    }

    fn write_once(
        &self,
        msr: Msr,
        value: u64,
        state: &mut VcpuState,
        backing: &mut impl MsrBackend,
    ) -> Result<(), FaultCause> {
        let cell = self
            .cell(msr)
            .and_then(|cell| state.cells.get_mut(cell))
            .ok_or(FaultCause::ShadowFull)?;
        if cell.written {
            return Err(FaultCause::AlreadyWritten);
        }
        backing.kernel_write(msr, value)?;
        cell.written = true;
        Ok(())
    }
}

fn sorted<A>(entries: &[Entry<A>]) -> Result<(), TableError> {
    let pairs = entries.iter().zip(entries.iter().skip(1));
    for (a, b) in pairs {
        if a.range.last() >= b.range.first() {
            return Err(TableError::NotSorted { msr: b.range.first() });
        }
    }
    Ok(())
}

/// What an exit gets, by its reason: action, rule and log. `None` where the filter denies what no entry names.
#[inline]
fn decision<'a, A>(
    entries: &'a [Entry<A>],
    (unknown, invalid): (&'a A, &'a A),
    msr: Msr,
    reason: Reason,
) -> Option<(&'a A, Option<u32>, Log)> {
    match reason {
        Reason::Filter => find(entries, msr).map(|entry| (&entry.action, entry.rule, entry.log)),
        Reason::Unknown => Some((unknown, None, Log::None)),
        Reason::Invalid => Some((invalid, None, Log::None)),
    }
}

#[inline]
fn find<A>(entries: &[Entry<A>], msr: Msr) -> Option<&Entry<A>> {
    let after = entries.partition_point(|entry| entry.range.first() <= msr);
    entries
        .get(after.checked_sub(1)?)
        .filter(|entry| entry.range.contains(msr))
}

/// What the actions of one vCPU remember: shadow registers, and which MSRs have had their one write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VcpuState {
    cells: Box<[Cell]>,
    spare: Box<[(Msr, u64)]>,
    spare_used: usize,
    answering: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Cell {
    shadow: Option<u64>,
    written: bool,
}

impl VcpuState {
    fn once_at_a_time<T>(
        &mut self,
        answer: impl FnOnce(&mut VcpuState) -> Answer<Result<T, Fault>>,
    ) -> Answer<Result<T, Fault>> {
        if self.answering {
            // A handler that got back here would answer for an access that is already being answered.
            return Answer::of(Err(FaultCause::ReEntered), Disposition::Fault, None, Log::None);
        }
        self.answering = true;
        let answer = answer(self);
        self.answering = false;
        answer
    }

    /// The state that a vCPU has under `next` after it ran under `table` with this one: MSRs that keep a state under
    /// both keep what they hold.
    #[must_use]
    pub fn carried(&self, table: &ActionTable, next: &ActionTable) -> VcpuState {
        let mut state = next.vcpu_state();
        for span in &next.spans {
            for (msr, cell) in span.range.iter().zip(span.cell..) {
                let kept = table.cell(msr).and_then(|cell| self.cells.get(cell));
                if let (Some(kept), Some(cell)) = (kept, state.cells.get_mut(cell)) {
                    *cell = *kept;
                }
            }
        }
        if next.spare && table.spare {
            state.spare.clone_from(&self.spare);
            state.spare_used = self.spare_used;
        }
        state
    }
}

/// What actions may ask of the world around the guest.
///
/// An error says why the guest faults.
pub trait MsrBackend {
    /// The value of the kernel's register, as the host reads it (KVM_GET_MSRS).
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause>;
    /// Writes the kernel's register as the host does (KVM_SET_MSRS).
    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause>;
    /// The physical CPU's value.
    fn host_read(&mut self, msr: Msr) -> Result<u64, FaultCause>;
    /// Asks the handler of this name.
    fn handler_read(&mut self, name: &str, msr: Msr) -> Result<u64, FaultCause>;
    /// Tells the handler of this name.
    fn handler_write(&mut self, name: &str, msr: Msr, value: u64) -> Result<(), FaultCause>;
}

/// What an exit gets, and what an event says of it.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Answer<O = Outcome> {
    /// What the guest gets.
    pub outcome: O,
    /// What was done.
    pub did: Disposition,
    /// Why it faulted where the policy does not say `deny`.
    pub why: Option<FaultCause>,
    /// The rule that decided, counted from 0; `None` for the default.
    pub rule: Option<u32>,
    /// How much is logged.
    pub log: Log,
}

impl Answer {
    /// What the kernel gave to an access that user space passed on to it.
    pub const fn passed(outcome: Outcome) -> Answer {
        Answer {
            outcome,
            did: Disposition::Pass,
            why: None,
            rule: None,
            log: Log::None,
        }
    }

    /// A fault that the policy did not ask for.
    pub const fn fault(why: FaultCause, rule: Option<u32>) -> Answer {
        Answer {
            outcome: Outcome::Fault,
            did: Disposition::Fault,
            why: Some(why),
            rule,
            log: Log::None,
        }
    }
}

impl<T> Answer<Result<T, Fault>> {
    fn of(result: Result<T, FaultCause>, did: Disposition, rule: Option<u32>, log: Log) -> Self {
        let why = result.as_ref().err().copied();
        Answer {
            outcome: result.map_err(|_| Fault),
            did: if why.is_some() { Disposition::Fault } else { did },
            why,
            rule,
            log,
        }
    }

    fn denied(rule: Option<u32>, log: Log) -> Self {
        Answer {
            outcome: Err(Fault),
            did: Disposition::Deny,
            why: None,
            rule,
            log,
        }
    }
}

impl<O: Into<Outcome>> Answer<O> {
    /// The answer with its outcome as an observer sees it, without the direction in its type.
    pub fn seen(self) -> Answer {
        Answer {
            outcome: self.outcome.into(),
            did: self.did,
            why: self.why,
            rule: self.rule,
            log: self.log,
        }
    }
}

/// Why entries are not a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum TableError {
    /// An entry starts before the one ahead of it ends.
    NotSorted {
        /// Where the later entry starts.
        msr: Msr,
    },
    /// More MSRs are to keep a state than [`ActionTable::MAX_CELLS`].
    TooManyCells,
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TableError::NotSorted { msr } => write!(f, "the entry at {msr} is out of order"),
            TableError::TooManyCells => write!(
                f,
                "more than {} MSRs would keep a state for each vCPU (`shadow` or `once`)",
                ActionTable::MAX_CELLS
            ),
        }
    }
}

impl core::error::Error for TableError {}

#[cfg(test)]
mod tests;
