//! What each MSR gets: a policy in normal form.

use msrgate_core::{Log, Msr, Op, ReadAction, WriteAction};

use crate::Intervals;

/// What an access gets, and what says so.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Decision<A> {
    /// What it gets.
    pub action: A,
    /// The rule that says so, counted from 0; `None` for the default.
    pub rule: Option<u32>,
    /// How much is logged.
    pub log: Log,
}

impl<A> Decision<A> {
    /// The decision of no rule.
    pub const fn of(action: A) -> Decision<A> {
        Decision {
            action,
            rule: None,
            log: Log::None,
        }
    }

    /// The decision, made by this rule; `None` for the default.
    #[must_use]
    pub fn by(self, rule: impl Into<Option<u32>>) -> Decision<A> {
        Decision {
            rule: rule.into(),
            ..self
        }
    }

    /// The decision with this much of it logged.
    #[must_use]
    pub fn logged(self, log: Log) -> Decision<A> {
        Decision { log, ..self }
    }
}

/// What each of the 2^32 MSRs gets, for reads and writes apart, and what an access gets that the kernel, having been
/// allowed to answer it, does not know or refuses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DecisionMap {
    reads: Intervals<Decision<ReadAction>>,
    writes: Intervals<Decision<WriteAction>>,
    unknown: (ReadAction, WriteAction),
    invalid: (ReadAction, WriteAction),
}

impl DecisionMap {
    /// What reads and writes get. What the kernel does not know or refuses gets its own #GP.
    pub const fn new(reads: Intervals<Decision<ReadAction>>, writes: Intervals<Decision<WriteAction>>) -> DecisionMap {
        DecisionMap {
            reads,
            writes,
            unknown: (ReadAction::Deny, WriteAction::Deny),
            invalid: (ReadAction::Deny, WriteAction::Deny),
        }
    }

    /// Everything faults.
    pub fn deny_all() -> DecisionMap {
        DecisionMap::new(
            Intervals::uniform(Decision::of(ReadAction::Deny)),
            Intervals::uniform(Decision::of(WriteAction::Deny)),
        )
    }

    /// Everything is the kernel's.
    pub fn allow_all() -> DecisionMap {
        DecisionMap::new(
            Intervals::uniform(Decision::of(ReadAction::Allow)),
            Intervals::uniform(Decision::of(WriteAction::Allow)),
        )
    }

    /// The map with these reads.
    #[must_use]
    pub fn with_reads(self, reads: Intervals<Decision<ReadAction>>) -> DecisionMap {
        DecisionMap { reads, ..self }
    }

    /// The map with these writes.
    #[must_use]
    pub fn with_writes(self, writes: Intervals<Decision<WriteAction>>) -> DecisionMap {
        DecisionMap { writes, ..self }
    }

    /// The map with this for [`DecisionMap::unknown`].
    #[must_use]
    pub fn with_unknown(self, unknown: (ReadAction, WriteAction)) -> DecisionMap {
        DecisionMap { unknown, ..self }
    }

    /// The map with this for [`DecisionMap::invalid`].
    #[must_use]
    pub fn with_invalid(self, invalid: (ReadAction, WriteAction)) -> DecisionMap {
        DecisionMap { invalid, ..self }
    }

    /// What reads get.
    pub const fn reads(&self) -> &Intervals<Decision<ReadAction>> {
        &self.reads
    }

    /// What writes get.
    pub const fn writes(&self) -> &Intervals<Decision<WriteAction>> {
        &self.writes
    }

    /// What a read and a write get that the kernel does not know; `Deny` leaves them to the kernel's own #GP.
    pub const fn unknown(&self) -> &(ReadAction, WriteAction) {
        &self.unknown
    }

    /// What a read and a write get that the kernel refuses; `Deny` leaves them to the kernel's own #GP.
    pub const fn invalid(&self) -> &(ReadAction, WriteAction) {
        &self.invalid
    }

    /// Whether the map leaves the access to the kernel.
    pub fn allows(&self, msr: Msr, op: Op) -> bool {
        match op {
            Op::Read => self.reads.get(msr).action == ReadAction::Allow,
            Op::Write => self.writes.get(msr).action == WriteAction::Allow,
        }
    }

    /// Where reads and writes are left to the kernel: (reads, writes).
    pub fn allowed(&self) -> Intervals<(bool, bool)> {
        self.reads.zip(&self.writes, |read, write| {
            (read.action == ReadAction::Allow, write.action == WriteAction::Allow)
        })
    }
}
