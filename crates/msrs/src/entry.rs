//! A row of the table, and the table, which `build.rs` makes from `msrs.toml`.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use msrgate_core::{Msr, Op};

use crate::bypass::{Bypass, BypassKind, Linux, Passes};
use crate::class::Class;
use crate::cpuid::{CpuVendor, Cpuid};
use crate::facts::{Host, Kept, State};
use crate::field::{Field, fields};
use crate::need::{Need, System};
use crate::refusal::Refusal;
use crate::restore::{self, Restore};
use crate::wildcard::matches;

include!(concat!(env!("OUT_DIR"), "/table.rs"));

/// Every MSR that is known, by index.
pub fn all() -> &'static [Entry] {
    TABLE
}

/// All needs that are known, by MSR.
pub fn needs() -> &'static [Need] {
    NEEDS
}

/// All ways past a KVM filter that are known.
pub fn bypasses() -> &'static [Bypass] {
    BYPASSES
}

/// All that KVM has and refuses.
#[cfg(test)]
pub(crate) fn refusals() -> &'static [Refusal] {
    REFUSALS
}

/// What KVM_SET_MSRS takes of registers that tell a guest what its processor can do, in order of index.
pub fn restores() -> &'static [Restore] {
    RESTORES
}

/// The MSR that has this name or alias, as [`bare`] and in capitals.
pub(crate) fn by_bare_name(wanted: &str) -> Option<&'static Entry> {
    let key = |at: &(u32, u8, u16)| {
        bare(text((at.0, at.1.into())))
            .bytes()
            .map(|byte| byte.to_ascii_uppercase())
    };
    let place = BY_NAME.binary_search_by(|at| key(at).cmp(wanted.bytes())).ok()?;
    TABLE.get(usize::from(BY_NAME.get(place)?.2))
}

/// A name without Linux's `MSR_`.
pub(crate) fn bare(name: &str) -> &str {
    match name.split_at_checked(4) {
        Some((prefix, rest)) if prefix.eq_ignore_ascii_case("MSR_") => rest,
        _ => name,
    }
}

/// The text at a place.
fn text((from, length): (u32, u16)) -> &'static str {
    let from = from as usize;
    TEXTS.get(from..from + usize::from(length)).unwrap_or_default()
}

/// One MSR.
///
/// Where one index means one thing on Intel's processors and another on AMD's, it is one entry: Intel's name
/// first, the other an alias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// The index.
    pub msr: Msr,
    /// What the manual lets software do with it.
    pub access: Access,
    /// How the guest's value goes along when the guest is saved or migrated.
    pub state: State,
    /// What the value tells a guest of the host.
    pub host: Host,
    /// What KVM does with the value.
    pub kept: Kept,
    passthrough: [bool; 2],
    hot: bool,
    hardware: bool,
    essential: bool,
    changed_in_place: bool,
    // Places in `TEXTS`.
    names: (u32, u16),
    command: (u32, u16),
    rewrite: (u32, u16),
    fields: (u32, u16),
    fields_source: (u32, u16),
    // Places in `CLASSES`, `VENDORS`, `EXISTS` and `SOURCES`.
    classes: u16,
    vendors: u16,
    exists: u16,
    source: u16,
}

/// Whose MSR it is: a vendor of processors or a hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Vendor {
    /// Intel.
    Intel,
    /// AMD, and Hygon after it.
    Amd,
    /// VIA, with IDT and Centaur before it.
    Via,
    /// Transmeta.
    Transmeta,
    /// KVM.
    Kvm,
    /// Hyper-V, and those that offer its interface.
    Hyperv,
    /// Xen.
    Xen,
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Vendor::Intel => "intel",
            Vendor::Amd => "amd",
            Vendor::Via => "via",
            Vendor::Transmeta => "transmeta",
            Vendor::Kvm => "kvm",
            Vendor::Hyperv => "hyperv",
            Vendor::Xen => "xen",
        })
    }
}

/// When an MSR is there. The strings are names of [`crate::cpuid::features`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exists {
    /// On every processor of its vendors that KVM runs on.
    Always,
    /// On some models of its vendors; CPUID does not say which.
    Model,
    /// Where CPUID says so.
    Feature(&'static str),
    /// Where CPUID names one of these.
    AnyFeature(&'static [&'static str]),
}

impl Exists {
    /// The features of which CPUID must name one; none where CPUID has no say.
    pub fn features(&self) -> &[&'static str] {
        match self {
            Exists::Always | Exists::Model => &[],
            Exists::Feature(feature) => core::slice::from_ref(feature),
            Exists::AnyFeature(features) => features,
        }
    }
}

/// The feature, several joined by `|`, or `-` where CPUID has no say.
impl fmt::Display for Exists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exists::Always | Exists::Model => f.write_str("-"),
            Exists::Feature(feature) => f.write_str(feature),
            Exists::AnyFeature(features) => f.write_str(&features.join("|")),
        }
    }
}

/// What the manual lets software do with an MSR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read and write, though not every bit of it.
    ReadWrite,
    /// A write faults.
    ReadOnly,
    /// A read faults.
    WriteOnly,
}

impl Access {
    /// The accesses that do not fault.
    pub const fn ops(self) -> &'static [Op] {
        match self {
            Access::ReadWrite => &Op::ALL,
            Access::ReadOnly => &[Op::Read],
            Access::WriteOnly => &[Op::Write],
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Access::ReadWrite => "read-write",
            Access::ReadOnly => "read-only",
            Access::WriteOnly => "write-only",
        })
    }
}

impl Entry {
    /// The name in the manual.
    pub fn name(&self) -> &'static str {
        self.names().next().unwrap_or_default()
    }

    /// The name, then the aliases.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + use<> {
        text(self.names).split(' ')
    }

    /// Other names: Linux's, AMD's, QEMU's, VirtualBox's, older ones.
    pub fn aliases(&self) -> impl Iterator<Item = &'static str> + use<> {
        self.names().skip(1)
    }

    /// What it is for, the main use first.
    pub fn classes(&self) -> &'static [Class] {
        CLASSES.get(usize::from(self.classes)).copied().unwrap_or_default()
    }

    /// Whose it is.
    pub fn vendors(&self) -> &'static [Vendor] {
        VENDORS.get(usize::from(self.vendors)).copied().unwrap_or_default()
    }

    /// When it is there.
    pub fn exists(&self) -> &'static Exists {
        EXISTS.get(usize::from(self.exists)).unwrap_or(&Exists::Model)
    }

    /// The property of QEMU's CPU models without which QEMU leaves the MSR alone or sets it to 0.
    pub fn qemu_property(&self) -> Option<&'static str> {
        restore::qemu_property(self.exists().features().first()?)
    }

    /// The document and the title of the section that define it.
    pub fn source(&self) -> &'static str {
        SOURCES.get(usize::from(self.source)).copied().unwrap_or_default()
    }

    /// Whether the MSR is there on a CPU; `None` if CPUID does not tell.
    ///
    /// A feature bit goes before the vendor's name: KVM gives AMD guests `IA32_ARCH_CAPABILITIES` when their CPUID
    /// says so.
    pub fn exists_on(&self, cpuid: &Cpuid) -> Option<bool> {
        match self.exists() {
            Exists::Feature(feature) => cpuid.has(feature),
            Exists::AnyFeature(features) => Some(features.iter().any(|feature| cpuid.has(feature) == Some(true))),
            Exists::Always => self.made_by(cpuid.vendor()?),
            Exists::Model => self.made_by(cpuid.vendor()?).filter(|made| !made),
        }
    }

    /// Whether a guest can write a value that must be saved with it.
    ///
    /// If a policy lets writes through to the kernel, whoever saves the guest must save this MSR; if the policy keeps
    /// the value itself (`shadow`), whoever runs the policy must.
    pub fn holds_guest_state(&self) -> bool {
        self.state != State::Nothing && self.access != Access::ReadOnly
    }

    /// Whether a guest reads what it wrote: the register holds its value, and a write is no command.
    ///
    /// The microcode's revision is an exception: a guest writes 0 before it reads, and KVM keeps nothing of that (`kvm_set_msr_common`).
    pub fn keeps_writes(&self) -> bool {
        self.access == Access::ReadWrite
            && self.holds_guest_state()
            && self.command().is_none()
            && self.name() != "IA32_BIOS_SIGN_ID"
    }

    /// Whether the value identifies the machine or tells of what others do or did on it: what a tenant must not see.
    pub fn is_secret(&self) -> bool {
        matches!(self.host, Host::Identity | Host::Activity | Host::Trace)
    }

    /// Whether KVM may let a guest read the hardware's value, where the VMM asks for it.
    ///
    /// `KVM_CAP_X86_DISABLE_EXITS` passes them through (`vmx_possible_passthrough_msrs`, `svm_recalc_msr_intercepts`). Of
    /// all others that tell of the host KVM keeps a value for the guest, or does not know them.
    pub fn hardware_reaches_guest(&self) -> bool {
        self.hardware
    }

    /// Whether the access gets the guest the same if user space passes it through (KVM_GET_MSRS, KVM_SET_MSRS).
    pub fn passes_through(&self, op: Op) -> bool {
        let [read, write] = self.passthrough;
        match op {
            Op::Read => read,
            Op::Write => write,
        }
    }

    /// Whether guests access it while they run, and not only when they start.
    pub fn is_hot(&self) -> bool {
        self.hot
    }

    /// Whether the processor or KVM works by it: a write that only seems done makes a system fail, or leaves it unprotected.
    pub fn is_essential(&self) -> bool {
        self.essential
    }

    /// Whether systems read it to change bits of it and write the others back.
    pub fn is_changed_in_place(&self) -> bool {
        self.changed_in_place
    }

    /// What a write does, where it acts and is not kept; `None` for a register that keeps what is written.
    pub fn command(&self) -> Option<&'static str> {
        Some(text(self.command)).filter(|command| !command.is_empty())
    }

    /// The fields that are known of its value, from the lowest bit up.
    pub fn fields(&self) -> impl Iterator<Item = Field> + use<> {
        fields(text(self.fields))
    }

    /// The document and the title of the section that have the fields.
    pub fn fields_source(&self) -> &'static str {
        match text(self.fields_source) {
            "" => self.source(),
            source => source,
        }
    }

    /// What it does to a guest that a value which was read is written back; `None` where that is nothing.
    pub fn rewrite(&self) -> Option<&'static str> {
        Some(text(self.rewrite)).filter(|rewrite| !rewrite.is_empty())
    }

    /// Whether a KVM filter can stop every access to it, on every kernel that is known, except where
    /// [`unfiltered`](Entry::unfiltered) says otherwise.
    pub fn is_filterable(&self) -> bool {
        let mut kinds = self.bypasses().map(|bypass| bypass.kind);
        self.msr != Msr::MAX && !kinds.any(|kind| matches!(kind, BypassKind::Exempt | BypassKind::Hardware))
    }

    /// Whether it is one of the registers that a way past a KVM filter is to; `false` of a way to all.
    pub fn is_reached_by(&self, bypass: &Bypass) -> bool {
        bypass.of.iter().any(|of| match of.strip_prefix('@') {
            Some(class) => self.classes().iter().any(|one| one.name() == class),
            None => matches(of.as_bytes(), self.name().as_bytes()),
        })
    }

    /// The ways past a KVM filter to this MSR, without those to all.
    pub fn bypasses(&self) -> impl Iterator<Item = &'static Bypass> {
        bypasses().iter().filter(|bypass| self.is_reached_by(bypass))
    }

    /// When KVM refuses an access in this direction, though it has the register.
    pub fn refusals(&self, op: Op) -> impl Iterator<Item = &'static Refusal> {
        let of = |refusal: &Refusal| {
            refusal
                .of
                .iter()
                .any(|of| matches(of.as_bytes(), self.name().as_bytes()))
        };
        REFUSALS
            .iter()
            .filter(move |refusal| refusal.ops.contains(&op) && of(refusal))
    }

    /// Whether KVM is known to have the register: it keeps a value of it, has an answer, or refuses it. `false` where that is
    /// not known.
    pub fn is_known_to_kvm(&self) -> bool {
        let refused = || Op::ALL.into_iter().any(|op| self.refusals(op).next().is_some());
        self.state != State::Nothing || self.kept != Kept::Not || self.passthrough.contains(&true) || refused()
    }

    /// What passes a KVM filter nevertheless, of any guest and while the filter stays the same; `None` if nothing does.
    pub fn unfiltered(&self) -> Option<String> {
        if self.msr == Msr::MAX {
            return Some("no range of a filter can hold this index".to_owned());
        }
        let told = |bypass: &&Bypass| {
            bypass.guest.is_none() && bypass.passes != Passes::Use && bypass.kind != BypassKind::Kernel
        };
        let sentence = |bypass: &Bypass| match bypass.kind {
            BypassKind::Instruction => bypass.says_of(None, "it too"),
            _ => bypass.says_of(None, ""),
        };
        let says: Vec<String> = self.bypasses().filter(told).map(sentence).collect();
        Some(says.join("; ")).filter(|says| !says.is_empty())
    }

    /// Which operating systems need it, and what for.
    pub fn needs(&self) -> impl Iterator<Item = &'static Need> + use<> {
        let msr = self.msr;
        needs().iter().filter(move |need| need.msr == msr)
    }

    /// Whether the MSR is of this vendor; `None` for a vendor that the table does not follow.
    fn made_by(&self, vendor: CpuVendor) -> Option<bool> {
        let of = |vendor| self.vendors().contains(&vendor);
        match vendor {
            CpuVendor::Intel => Some(of(Vendor::Intel)),
            CpuVendor::Amd | CpuVendor::Hygon => Some(of(Vendor::Amd)),
            CpuVendor::Other => None,
        }
    }
}
