//! The record of one access.

use crate::{Disposition, FaultCause, Msr, Op, Reason, Within};

/// How much of a rule's accesses is logged.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Log {
    /// Nothing.
    None,
    /// Each access.
    All,
    /// The first of each MSR and direction.
    First,
    /// At most this many a second.
    PerSecond(u32),
}

/// Nanoseconds: a length of time, or a moment as the time since a start that the source of an event chose.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Nanos(pub u64);

/// The record of one access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// When it was.
    pub t: Nanos,
    /// Which VM of the process, counted from 0.
    pub vm: u32,
    /// Which vCPU of the VM.
    pub vcpu: u32,
    /// The direction.
    pub op: Op,
    /// The register.
    pub msr: Msr,
    /// What the read got or the write gave; 0 for a read that faulted.
    pub value: u64,
    /// Why the kernel handed it to user space; `None` where it did not.
    pub reason: Option<Reason>,
    /// What was done.
    pub did: Disposition,
    /// Why it faulted where the policy does not say `deny`.
    pub why: Option<FaultCause>,
    /// What the policy would do, where it is not in force: `did` is what the guest got.
    pub would: Option<Disposition>,
    /// The rule that decided or would, counted from 0; `None` for the default.
    pub rule: Option<u32>,
    /// The guest's instruction pointer, where it is known.
    pub rip: Option<u64>,
    /// Where it was made, if not in the vCPU's own guest.
    pub within: Option<Within>,
    /// How long the guest's exit took until its answer, where it was measured.
    pub cost: Option<Nanos>,
}

/// Events that are missing: whatever wrote events down could not write these.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    /// About when they were lost, on the clock of the events around.
    pub t: Nanos,
    /// Which VM of the process they were of.
    pub vm: u32,
    /// Which vCPU of the VM.
    pub vcpu: u32,
    /// How many.
    pub events: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_of_what_was_done_reads_back() {
        for did in Disposition::ALL {
            assert_eq!(Disposition::from_name(did.name()), Some(did));
        }
        assert!(
            Disposition::ALL
                .iter()
                .zip(0..)
                .all(|(did, number)| *did as u8 == number)
        );
        assert!(
            FaultCause::ALL
                .iter()
                .zip(0..)
                .all(|(why, number)| *why as u8 == number)
        );
        assert_eq!(Disposition::from_name("passed"), None);
    }
}
