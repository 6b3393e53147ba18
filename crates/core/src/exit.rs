//! An access that the kernel hands to user space, and what user space answers.

use core::fmt;

use crate::{Access, abi};

/// Why the kernel hands an access to user space; the bits of `kvm_run.msr.reason`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reason {
    /// `KVM_MSR_EXIT_REASON_INVAL`: the kernel knows the MSR and refuses the access.
    Invalid = abi::REASON_INVALID as isize,
    /// `KVM_MSR_EXIT_REASON_UNKNOWN`: the kernel does not know the MSR.
    Unknown = abi::REASON_UNKNOWN as isize,
    /// `KVM_MSR_EXIT_REASON_FILTER`: the filter denies the access.
    Filter = abi::REASON_FILTER as isize,
}

impl Reason {
    /// All three, in the order of their bits.
    pub const ALL: [Reason; 3] = [Reason::Invalid, Reason::Unknown, Reason::Filter];

    /// From the kernel's number; `None` for one that is not exactly one known bit.
    pub const fn from_bits(bits: u32) -> Option<Reason> {
        match bits {
            abi::REASON_INVALID => Some(Reason::Invalid),
            abi::REASON_UNKNOWN => Some(Reason::Unknown),
            abi::REASON_FILTER => Some(Reason::Filter),
            _ => None,
        }
    }

    /// The word that traces and JSON use.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::Invalid => "invalid",
            Reason::Unknown => "unknown",
            Reason::Filter => "filter",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a vCPU is in while it makes an access, besides its own guest: KVM tells it in `kvm_run.flags`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Within {
    /// System management mode (`KVM_RUN_X86_SMM`).
    Smm,
    /// A guest of the guest (`KVM_RUN_X86_GUEST_MODE`, which KVM has from Linux 6.11 on).
    L2,
    /// A guest of the guest in system management mode.
    L2Smm,
}

impl Within {
    /// All three.
    pub const ALL: [Within; 3] = [Within::Smm, Within::L2, Within::L2Smm];

    /// From the kernel's flags; `None` for the vCPU's own guest.
    pub const fn from_flags(flags: u16) -> Option<Within> {
        match (flags & abi::RUN_X86_GUEST_MODE != 0, flags & abi::RUN_X86_SMM != 0) {
            (false, false) => None,
            (false, true) => Some(Within::Smm),
            (true, false) => Some(Within::L2),
            (true, true) => Some(Within::L2Smm),
        }
    }

    /// The word that traces and JSON use.
    pub const fn name(self) -> &'static str {
        match self {
            Within::Smm => "smm",
            Within::L2 => "l2",
            Within::L2Smm => "l2-smm",
        }
    }
}

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A set of reasons: the argument of `KVM_CAP_X86_USER_SPACE_MSR`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Reasons(u32);

impl Reasons {
    /// No access is handed to user space.
    pub const NONE: Reasons = Reasons(0);
    /// All three.
    pub const ALL: Reasons = Reasons(7);

    /// The set of one reason.
    pub const fn of(reason: Reason) -> Reasons {
        Reasons(reason as u32)
    }

    /// From the capability's argument; `None` where a bit is set that no reason has. The whole 64 bits count, as in
    /// the kernel.
    pub const fn from_bits(bits: u64) -> Option<Reasons> {
        if bits <= 7 { Some(Reasons(bits as u32)) } else { None }
    }

    /// The capability's argument.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether `reason` is in the set.
    pub const fn contains(self, reason: Reason) -> bool {
        self.0 & reason as u32 != 0
    }

    /// The reasons of either set.
    #[must_use]
    pub const fn union(self, other: Reasons) -> Reasons {
        Reasons(self.0 | other.0)
    }

    /// The reasons of the set, in the order of their bits.
    pub fn iter(self) -> impl Iterator<Item = Reason> {
        Reason::ALL.into_iter().filter(move |reason| self.contains(*reason))
    }
}

/// An access that waits for user space.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct Exit {
    /// What the guest tries.
    pub access: Access,
    /// Why the kernel does not answer it.
    pub reason: Reason,
}

impl Exit {
    /// An access that the kernel hands over, and why.
    pub const fn new(access: Access, reason: Reason) -> Exit {
        Exit { access, reason }
    }
}

/// The guest gets #GP(0).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Fault;

/// What a read gets: a value.
pub type ReadOutcome = Result<u64, Fault>;

/// What a write gets: it is done.
pub type WriteOutcome = Result<(), Fault>;

/// What an access got, for who looks on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// The read got this value.
    Value(u64),
    /// The write was done.
    Done,
    /// The guest got #GP(0).
    Fault,
}

impl From<ReadOutcome> for Outcome {
    fn from(outcome: ReadOutcome) -> Outcome {
        outcome.map_or(Outcome::Fault, Outcome::Value)
    }
}

impl From<WriteOutcome> for Outcome {
    fn from(outcome: WriteOutcome) -> Outcome {
        outcome.map_or(Outcome::Fault, |()| Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_exactly_one_known_bit() {
        for bits in 0..64 {
            let expected = Reason::ALL.into_iter().find(|reason| *reason as u32 == bits);
            assert_eq!(Reason::from_bits(bits), expected);
        }
    }

    #[test]
    fn other_flags_say_nothing_of_where_an_access_was_made() {
        // KVM_RUN_X86_BUS_LOCK is 2.
        let within = |flags| [flags, flags | 2, flags | 0xfff8].map(Within::from_flags);
        assert_eq!(within(0), [None; 3]);
        assert_eq!(within(1), [Some(Within::Smm); 3]);
        assert_eq!(within(4), [Some(Within::L2); 3]);
        assert_eq!(within(5), [Some(Within::L2Smm); 3]);
    }

    #[test]
    fn a_mask_with_an_unknown_bit_is_no_mask() {
        for bit in 0..64 {
            assert_eq!(Reasons::from_bits(1 << bit).is_some(), bit < 3, "bit {bit}");
        }
    }
}
