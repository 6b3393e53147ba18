//! What matters of an MSR when a guest moves, when tenants share a host, and when a policy gives a fixed answer.

use core::fmt;

/// How the guest's value of an MSR goes along when the guest is saved, migrated or restored.
///
/// The value is what the guest wrote, or what the VMM gave it to read. KVM's own lists are in `arch/x86/kvm/x86.c`:
/// `msrs_to_save_base`, `msrs_to_save_pmu` and `emulated_msrs_all`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// There is nothing to save: it is a command, the processor's own value, or KVM does not give it to guests.
    Nothing,
    /// By `KVM_GET_MSRS`. `KVM_GET_MSR_INDEX_LIST` names it on kernels and processors that give it to guests.
    Listed,
    /// By `KVM_GET_MSRS`, though `KVM_GET_MSR_INDEX_LIST` does not name it: a VMM must know of it by itself.
    Unlisted,
    /// By `KVM_GET_SREGS`.
    Sregs,
    /// By `KVM_GET_LAPIC`.
    Lapic,
}

impl State {
    /// The word that JSON uses; `None` for [`State::Nothing`].
    pub const fn name(self) -> Option<&'static str> {
        match self {
            State::Nothing => None,
            State::Listed => Some("listed"),
            State::Unlisted => Some("unlisted"),
            State::Sregs => Some("sregs"),
            State::Lapic => Some("lapic"),
        }
    }
}

/// How it is saved, for people.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Nothing => "-",
            State::Listed => "KVM_GET_MSRS; KVM_GET_MSR_INDEX_LIST names it",
            State::Unlisted => "KVM_GET_MSRS; KVM_GET_MSR_INDEX_LIST does not name it",
            State::Sregs => "KVM_GET_SREGS",
            State::Lapic => "KVM_GET_LAPIC",
        })
    }
}

/// What the hardware's value of an MSR tells of the host.
///
/// A guest gets the hardware's value only where KVM passes it through, or a policy says `host`. MSRs of which KVM
/// always gives a guest its own value say [`Host::Nothing`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Host {
    /// Nothing: the value is the guest's own, or follows from the processor's model.
    Nothing,
    /// How the host is set up: microcode, straps, limits, the memory map. It differs from host to host, so that a
    /// guest notices a migration, but tells nothing of others.
    Setup,
    /// Which processor it is: a number that no other processor has.
    Identity,
    /// What the host does now, and with it other guests: energy, temperature, frequency, idle time, traffic.
    Activity,
    /// Addresses that others used: branch records, samples, memory errors.
    Trace,
}

impl Host {
    /// The word that JSON uses; `None` for [`Host::Nothing`].
    pub const fn name(self) -> Option<&'static str> {
        match self {
            Host::Nothing => None,
            Host::Setup => Some("setup"),
            Host::Identity => Some("identity"),
            Host::Activity => Some("activity"),
            Host::Trace => Some("trace"),
        }
    }
}

/// What it tells, for people.
impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Host::Nothing => "-",
            Host::Setup => "how it is set up",
            Host::Identity => "which processor it is",
            Host::Activity => "what it and its other guests do now",
            Host::Trace => "addresses that others used",
        })
    }
}

/// What KVM does with the value of an MSR, on every kernel from 5.10 to 7.2: who reads each in `arch/x86/kvm` was looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kept {
    /// Anything else, or it is not known.
    Not,
    /// KVM stores it for the guest's reads and makes no other use of it, so that a value from the host changes nothing else.
    Stored,
    /// KVM has one answer, as long as nobody writes it.
    Constant,
}
