//! What each MSR gets: a policy in normal form.

use alloc::vec::Vec;

use msrgate_core::{Log, Msr, Op, ReadAction, WriteAction};

use crate::{Intervals, Preset, Spillable, Touched};

/// What an access gets, and what says so.
#[derive(Clone, PartialEq, Eq, Debug)]
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
}

/// What each of the 2^32 MSRs gets, for reads and writes apart, and what an access gets that the kernel, having been
/// allowed to answer it, does not know or refuses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DecisionMap {
    /// What reads get.
    pub reads: Intervals<Decision<ReadAction>>,
    /// What writes get.
    pub writes: Intervals<Decision<WriteAction>>,
    /// What a read and a write get that the kernel does not know; `Deny` leaves them to the kernel's own #GP.
    pub unknown: (ReadAction, WriteAction),
    /// What a read and a write get that the kernel refuses; `Deny` leaves them to the kernel's own #GP.
    pub invalid: (ReadAction, WriteAction),
    /// What a kernel was found to hold itself once it is put there, in order of MSR: fixed answers that then cost no
    /// exit. Empty where no kernel was asked. No part of what the map means.
    pub held: Vec<Preset>,
    /// What may be passed through from user space where 16 ranges do not hold it all; `None` where such a map is to be
    /// refused. No part of what the map means.
    pub spill: Option<Vec<Spillable>>,
    /// How often a guest touches what, in order of MSR; empty where that is not known. No part of what the map means.
    pub profile: Vec<Touched>,
}

impl DecisionMap {
    /// Everything faults.
    pub fn deny_all() -> DecisionMap {
        DecisionMap {
            reads: Intervals::uniform(Decision::of(ReadAction::Deny)),
            writes: Intervals::uniform(Decision::of(WriteAction::Deny)),
            ..DecisionMap::allow_all()
        }
    }

    /// Everything is the kernel's.
    pub fn allow_all() -> DecisionMap {
        DecisionMap {
            reads: Intervals::uniform(Decision::of(ReadAction::Allow)),
            writes: Intervals::uniform(Decision::of(WriteAction::Allow)),
            unknown: (ReadAction::Deny, WriteAction::Deny),
            invalid: (ReadAction::Deny, WriteAction::Deny),
            held: Vec::new(),
            spill: None,
            profile: Vec::new(),
        }
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
