//! Why an access faults.

use core::fmt;

/// Why an access faulted where the policy does not say `deny`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
#[repr(u8)]
pub enum FaultCause {
    /// No rule says what user space answers.
    NoRule,
    /// The kernel gave a reason that is not one known bit.
    UnknownReason,
    /// The kernel's register could not be read or written.
    KernelRefused,
    /// The physical CPU's register could not be read.
    HostUnreadable,
    /// A write would change a bit outside `may_change`.
    BitsLocked,
    /// The value is none of `only`.
    ValueNotListed,
    /// `once`, and it was written before.
    AlreadyWritten,
    /// No handler of the name is there.
    NoHandler,
    /// The handler answered with a fault.
    HandlerFault,
    /// The handler panicked.
    HandlerPanicked,
    /// The vCPU was asked to answer while it was answering.
    ReEntered,
    /// No room for another shadow register.
    ShadowFull,
    /// The policy leaves it to the kernel, and the VMM's own filter denies it.
    VmmFilter,
}

impl FaultCause {
    /// All causes, each at the place of its number.
    pub const ALL: [FaultCause; 13] = [
        FaultCause::NoRule,
        FaultCause::UnknownReason,
        FaultCause::KernelRefused,
        FaultCause::HostUnreadable,
        FaultCause::BitsLocked,
        FaultCause::ValueNotListed,
        FaultCause::AlreadyWritten,
        FaultCause::NoHandler,
        FaultCause::HandlerFault,
        FaultCause::HandlerPanicked,
        FaultCause::ReEntered,
        FaultCause::ShadowFull,
        FaultCause::VmmFilter,
    ];

    /// The word that traces and JSON use.
    pub const fn name(self) -> &'static str {
        match self {
            FaultCause::NoRule => "no-rule",
            FaultCause::UnknownReason => "unknown-reason",
            FaultCause::KernelRefused => "kernel-refused",
            FaultCause::HostUnreadable => "host-unreadable",
            FaultCause::BitsLocked => "bits-locked",
            FaultCause::ValueNotListed => "value-not-listed",
            FaultCause::AlreadyWritten => "already-written",
            FaultCause::NoHandler => "no-handler",
            FaultCause::HandlerFault => "handler-fault",
            FaultCause::HandlerPanicked => "handler-panicked",
            FaultCause::ReEntered => "re-entered",
            FaultCause::ShadowFull => "shadow-full",
            FaultCause::VmmFilter => "vmm-filter",
        }
    }

    /// From the word; `None` for another.
    pub fn from_name(name: &str) -> Option<FaultCause> {
        FaultCause::ALL.into_iter().find(|why| why.name() == name)
    }
}

impl fmt::Display for FaultCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
