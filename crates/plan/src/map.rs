//! What each MSR gets: a policy in normal form.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::{Display, Write};

use msrgate_core::{Log, Msr, Op, ReadAction, WriteAction};
use sha2::{Digest, Sha256};

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

    /// A name for what the map means: equal for maps that give every access the same, whatever rules say so and whatever
    /// the kernel holds.
    ///
    /// SHA-256 over one line for each interval.
    pub fn hash(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update("msrgate decision map 1\n");
        hash_intervals(&mut hash, Op::Read, &self.reads.map(|decision| decision.action.clone()));
        hash_intervals(
            &mut hash,
            Op::Write,
            &self.writes.map(|decision| decision.action.clone()),
        );
        for (name, (read, write)) in [("unknown", &self.unknown), ("invalid", &self.invalid)] {
            hash.update(format!("{name} {read}, {write}\n"));
        }
        hash.finalize().into()
    }
}

fn hash_intervals<A: Display + Clone + Eq>(hash: &mut Sha256, op: Op, actions: &Intervals<A>) {
    let mut line = String::new();
    for (range, action) in actions.iter() {
        line.clear();
        // Writing to a text does not fail.
        let _ = writeln!(line, "{op} {range} {action}");
        hash.update(&line);
    }
}

#[cfg(test)]
mod tests {
    use msrgate_core::MsrRange;

    use super::*;

    #[test]
    fn the_hash_names_the_meaning_and_not_the_rules() {
        let map = |rule, value| DecisionMap {
            reads: Intervals::first_match(
                Decision::of(ReadAction::Allow),
                [(
                    MsrRange::single(Msr(0x8b)),
                    Decision {
                        action: ReadAction::Value(value),
                        rule: Some(rule),
                        log: Log::None,
                    },
                )],
            ),
            ..DecisionMap::allow_all()
        };
        assert_eq!(map(0, 1).hash(), map(1, 1).hash());
        assert_ne!(map(0, 1).hash(), map(0, 2).hash());
        assert_ne!(map(0, 1).hash(), DecisionMap::allow_all().hash());
    }
}
