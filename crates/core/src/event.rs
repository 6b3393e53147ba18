//! The record of one access.

use core::fmt;

use crate::{FaultCause, Msr, Op, Reason};

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

/// What was done with an access: an action, or what came of it.
///
/// The numbers stand in saved plans and in the hashes of policies: a new one goes to the end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Disposition {
    /// The kernel answered.
    Allow,
    /// The policy says to fault.
    Deny,
    /// Read as zero.
    Zero,
    /// Read as a fixed value.
    Value,
    /// Answered from, or kept in, the vCPU's shadow register.
    Shadow,
    /// Passed on to the kernel's register through a mask.
    Mask,
    /// Read from the physical CPU.
    Host,
    /// Answered by a named handler.
    Handler,
    /// The write went nowhere.
    Ignore,
    /// Written, the value being one of those allowed.
    Only,
    /// Written, for the first and last time.
    Once,
    /// Passed on to the kernel's register as the host would.
    Pass,
    /// Faulted although the policy does not say `deny`; [`Event::why`] tells.
    Fault,
}

impl Disposition {
    /// All of them, each at the place of its number.
    pub const ALL: [Disposition; 13] = [
        Disposition::Allow,
        Disposition::Deny,
        Disposition::Zero,
        Disposition::Value,
        Disposition::Shadow,
        Disposition::Mask,
        Disposition::Host,
        Disposition::Handler,
        Disposition::Ignore,
        Disposition::Only,
        Disposition::Once,
        Disposition::Pass,
        Disposition::Fault,
    ];

    /// The word that policies, traces and JSON use.
    pub const fn name(self) -> &'static str {
        match self {
            Disposition::Allow => "allow",
            Disposition::Deny => "deny",
            Disposition::Zero => "zero",
            Disposition::Value => "value",
            Disposition::Shadow => "shadow",
            Disposition::Mask => "mask",
            Disposition::Host => "host",
            Disposition::Handler => "handler",
            Disposition::Ignore => "ignore",
            Disposition::Only => "only",
            Disposition::Once => "once",
            Disposition::Pass => "pass",
            Disposition::Fault => "fault",
        }
    }

    /// From the word; `None` for another.
    pub fn from_name(name: &str) -> Option<Disposition> {
        Disposition::ALL.into_iter().find(|did| did.name() == name)
    }

    /// From the number; `None` for another.
    pub fn from_number(number: u8) -> Option<Disposition> {
        Disposition::ALL.get(usize::from(number)).copied()
    }

    /// Whether the guest got #GP.
    pub const fn is_fault(self) -> bool {
        matches!(self, Disposition::Deny | Disposition::Fault)
    }
}

impl fmt::Display for Disposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
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
