//! Who says a line, and what it says of an access.

use msrgate_core::{Msr, Op};

/// Who says a line.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[non_exhaustive]
pub enum Speaker {
    /// The host's KVM.
    Kvm,
    /// The kernel of a Linux guest, of its own accesses.
    Linux,
    /// Linux' driver of /dev/cpu/N/msr, or a tool that uses it.
    MsrDriver,
    /// QEMU.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
    /// Xen.
    Xen,
    /// VirtualBox.
    VirtualBox,
    /// bhyve.
    Bhyve,
    /// VMware.
    Vmware,
    /// A system that stopped at #GP and printed its registers.
    Dump,
    /// A program whose lines are not known: another hypervisor, a VMM or a tool.
    Other,
}

impl Speaker {
    /// The name, for people.
    pub const fn name(self) -> &'static str {
        match self {
            Speaker::Kvm => "KVM",
            Speaker::Linux => "Linux",
            Speaker::MsrDriver => "the msr driver",
            Speaker::Qemu => "QEMU",
            Speaker::CloudHypervisor => "Cloud Hypervisor",
            Speaker::Firecracker => "Firecracker",
            Speaker::Xen => "Xen",
            Speaker::VirtualBox => "VirtualBox",
            Speaker::Bhyve => "bhyve",
            Speaker::Vmware => "VMware",
            Speaker::Dump => "a dump of registers",
            Speaker::Other => "another program",
        }
    }
}

/// What became of an access, and why, as far as a line says it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[non_exhaustive]
pub enum Cause {
    /// The hypervisor does not know the register; a read got 0, and a write went nowhere (`kvm.ignore_msrs`).
    Ignored,
    /// The hypervisor has the register and makes no use of what was written.
    Dropped,
    /// The hypervisor does not know the register: #GP.
    Unknown,
    /// The hypervisor has the register and refuses this access: #GP.
    Refused,
    /// #GP; the line does not say why.
    Fault,
    /// The kernel refused the VMM what it set or read for its guest, which the VMM tells, or KVM of a guest that has not run: no
    /// access of a guest's.
    Vmm,
    /// A CPU model has bits that the host has not, and the VMM leaves them out: no access of a guest's.
    Lacking,
    /// A program wrote or read it through the kernel's driver.
    Program,
    /// A guest reports its crash through a register of Hyper-V's.
    Crash,
    /// A guest reports that it crashed since a privileged instruction got #GP.
    Privileged,
}

impl Cause {
    /// The word that JSON uses.
    pub const fn name(self) -> &'static str {
        match self {
            Cause::Ignored => "ignored",
            Cause::Dropped => "dropped",
            Cause::Unknown => "unknown",
            Cause::Refused => "refused",
            Cause::Fault => "fault",
            Cause::Vmm => "vmm",
            Cause::Lacking => "lacking",
            Cause::Program => "program",
            Cause::Crash => "crash",
            Cause::Privileged => "privileged",
        }
    }
}

/// What a line says of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Found {
    /// Where in the line the words begin.
    pub(super) start: usize,
    pub(super) by: Speaker,
    pub(super) cause: Cause,
    pub(super) op: Option<Op>,
    pub(super) msr: Msr,
    pub(super) value: Option<u64>,
}
