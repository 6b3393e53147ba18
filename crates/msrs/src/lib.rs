//! What is known of each MSR: names, classes, vendors, and the CPUID feature that says whether an MSR is there.
//!
//! The manual's name stands first, so `IA32_BIOS_SIGN_ID`; Linux's and AMD's names are aliases. A name is
//! found in any case, and with or without the `MSR_` that Linux puts before it.
//!
//! ```
//! use msrgate_msrs as msrs;
//!
//! let entry = msrs::by_name("msr_ia32_ucode_rev").unwrap();
//! assert_eq!((entry.name, entry.msr.0), ("IA32_BIOS_SIGN_ID", 0x8b));
//! assert_eq!(msrs::glob("IA32_SYSENTER_*").count(), 3);
//! assert_eq!(msrs::nearest("IA32_EFRE"), Some("IA32_EFER"));
//! ```

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod number;
pub mod cpuid;
mod class;
mod facts;
mod faithful;
mod need;
mod search;
pub mod spell;
mod table;

use std::collections::HashMap;
use std::fmt;
use std::sync::LazyLock;

use msrgate_core::{Msr, MsrRange, Op};

pub use self::class::{Class, UnknownClass};
pub use self::facts::{Host, State};
pub use self::faithful::{FAITHFUL, faithful, spillable};
pub use self::need::{CHANGED_IN_PLACE, Need, System, WORKED_BY, needs};
pub use self::search::{around, near, nearest, nearest_of, search};
use crate::cpuid::{CpuVendor, Cpuid};

/// One MSR.
///
/// Where one index means one thing on Intel's processors and another on AMD's, it is one entry: Intel's name
/// first, the other an alias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The index.
    pub msr: Msr,
    /// The name in the manual.
    pub name: &'static str,
    /// Other names: Linux's, AMD's, older ones.
    pub aliases: &'static [&'static str],
    /// What it is for.
    pub classes: &'static [Class],
    /// Whose it is.
    pub vendors: &'static [Vendor],
    /// When it is there.
    pub exists: Exists,
    /// What the manual lets software do with it.
    pub access: Access,
    /// How the guest's value goes along when the guest is saved or migrated.
    pub state: State,
    /// What the value tells a guest of the host.
    pub host: Host,
    /// The document and the title of the section that define it.
    pub source: &'static str,
}

/// Whose MSR it is: a maker of processors or a hypervisor.
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
    HyperV,
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
            Vendor::HyperV => "hyperv",
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
            Exists::Feature(feature) => std::slice::from_ref(feature),
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
    /// The name, then the aliases.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + use<> {
        std::iter::once(self.name).chain(self.aliases.iter().copied())
    }

    /// Whether the MSR is there on a CPU; `None` if CPUID does not tell.
    ///
    /// A feature bit goes before the maker's name: KVM gives AMD guests `IA32_ARCH_CAPABILITIES` when their CPUID
    /// says so.
    pub fn exists_on(&self, cpuid: &Cpuid) -> Option<bool> {
        match self.exists {
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

    /// Whether the value identifies the machine or tells of what others do or did on it: what a tenant must not see.
    pub fn is_secret(&self) -> bool {
        matches!(self.host, Host::Identity | Host::Activity | Host::Trace)
    }

    /// Whether KVM may let a guest read the hardware's value, where the VMM asks for it.
    ///
    /// `KVM_CAP_X86_DISABLE_EXITS` passes them through (`vmx_possible_passthrough_msrs`, `svm_recalc_msr_intercepts`). Of
    /// all others that tell of the host KVM keeps a value for the guest, or does not know them.
    pub fn hardware_reaches_guest(&self) -> bool {
        matches!(self.msr.0, 0xe7 | 0xe8 | 0x3fc..=0x3fe | 0x660)
    }

    /// Whether a KVM filter can stop every access to it, on every kernel that is known, except where
    /// [`unfiltered`](Entry::unfiltered) says otherwise.
    pub fn is_filterable(&self) -> bool {
        !(MsrRange::X2APIC.contains(self.msr) || self.msr == Msr::MAX || self.msr == SEV_STATUS)
    }

    /// What passes a KVM filter nevertheless, in a sentence; `None` if nothing does.
    pub fn unfiltered(&self) -> Option<&'static str> {
        match self.msr {
            msr if MsrRange::X2APIC.contains(msr) => Some("KVM answers 0x800..=0x8ff before it asks the filter"),
            Msr::MAX => Some("no range of a filter can hold this index"),
            SEV_STATUS => Some("AMD's processors answer reads themselves"),
            Msr(0x6e0) => Some("some kernels carry out writes before they ask the filter; reads are always filtered"),
            Msr(0xc001_0130) => Some("a guest with SEV-ES talks through it to the hypervisor without WRMSR exits"),
            Msr(0xc000_0100 | 0xc000_0101) => Some("WRFSBASE and WRGSBASE change it too"),
            Msr(0xc000_0102) => Some("SWAPGS changes it too"),
            Msr(0xc000_0103) => Some("RDTSCP and RDPID read it too"),
            Msr(0x10) => Some("RDTSC reads it too"),
            _ => None,
        }
    }

    /// Which operating systems need it, and what for.
    pub fn needs(&self) -> impl Iterator<Item = &'static Need> + use<> {
        let msr = self.msr;
        needs().iter().filter(move |need| need.msr == msr)
    }

    /// Whether the MSR is of this maker; `None` for a maker that the table does not follow.
    fn made_by(&self, vendor: CpuVendor) -> Option<bool> {
        match vendor {
            CpuVendor::Intel => Some(self.vendors.contains(&Vendor::Intel)),
            CpuVendor::Amd | CpuVendor::Hygon => Some(self.vendors.contains(&Vendor::Amd)),
            CpuVendor::Other => None,
        }
    }
}

/// AMD's processors do not intercept reads of it.
const SEV_STATUS: Msr = Msr(0xc001_0131);

/// Every MSR of the database, by index.
pub fn all() -> &'static [Entry] {
    table::TABLE
}

/// The MSR of this index.
pub fn by_msr(msr: Msr) -> Option<&'static Entry> {
    let place = all().binary_search_by_key(&msr.0, |entry| entry.msr.0).ok()?;
    all().get(place)
}

/// The MSRs of a range, by index.
pub fn within(range: MsrRange) -> &'static [Entry] {
    let from = all().partition_point(|entry| entry.msr < range.first());
    let to = all().partition_point(|entry| entry.msr <= range.last());
    all().get(from..to).unwrap_or_default()
}

/// The MSR of this name or alias: in any case, with or without `MSR_` before it.
///
/// Where Linux gives a name of the manual to another MSR, the manual counts: `IA32_PMC0` and `MSR_IA32_PMC0` are
/// 0xc1, though Linux calls 0x4c1 so.
pub fn by_name(name: &str) -> Option<&'static Entry> {
    static NAMES: LazyLock<HashMap<String, &Entry>> = LazyLock::new(|| {
        let mut names = HashMap::new();
        for (entry, name) in all()
            .iter()
            .flat_map(|entry| entry.names().map(move |name| (entry, name)))
        {
            // Of several with a name the first.
            names.entry(bare(name).to_ascii_uppercase()).or_insert(entry);
        }
        names
    });
    NAMES.get(&bare(name).to_ascii_uppercase()).copied()
}

/// The MSRs with a name or alias that a pattern matches, by index.
///
/// `*` stands for any characters, `?` for one; case does not matter. A name matches as the table spells it and
/// without its `MSR_`; `MSR_IA32_*`, as Linux writes it, means `IA32_*`.
pub fn glob(pattern: &str) -> impl Iterator<Item = &'static Entry> + use<> {
    let linux = pattern
        .get(..9)
        .is_some_and(|start| start.eq_ignore_ascii_case("MSR_IA32_"));
    let mut pattern = if linux { bare(pattern) } else { pattern }.as_bytes().to_vec();
    // Several in a row mean what one does.
    pattern.dedup_by(|a, b| (*a, *b) == (b'*', b'*'));
    all().iter().filter(move |entry| {
        entry
            .names()
            .any(|name| matches(&pattern, name.as_bytes()) || matches(&pattern, bare(name).as_bytes()))
    })
}

/// The MSRs of a class, by index; the class by its name without the `@`. `None` if there is no such class.
pub fn class(name: &str) -> Option<impl Iterator<Item = &'static Entry> + use<>> {
    let class: Class = name.parse().ok()?;
    Some(all().iter().filter(move |entry| entry.classes.contains(&class)))
}

/// The names of all classes, in alphabetical order, without the `@`.
pub fn classes() -> impl Iterator<Item = &'static str> {
    Class::ALL.iter().map(|class| class.name())
}

/// A name without Linux's `MSR_`.
fn bare(name: &str) -> &str {
    match name.split_at_checked(4) {
        Some((prefix, rest)) if prefix.eq_ignore_ascii_case("MSR_") => rest,
        _ => name,
    }
}

/// Whether a pattern of `*` and `?` matches the whole of a text.
fn matches(mut pattern: &[u8], mut text: &[u8]) -> bool {
    // What to go on with if the rest fails: the pattern after the last `*`, and the text that it may yet swallow.
    // Only the last `*` needs it: an earlier one that swallows more leaves less for the later ones.
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        match (pattern, text) {
            ([], []) => return true,
            ([b'*', rest @ ..], _) => {
                pattern = rest;
                retry = Some((rest, text));
                continue;
            }
            ([wanted, rest @ ..], [byte, text_rest @ ..]) if *wanted == b'?' || wanted.eq_ignore_ascii_case(byte) => {
                (pattern, text) = (rest, text_rest);
                continue;
            }
            _ => {}
        }
        let Some((after, [_, swallowed @ ..])) = retry else {
            return false;
        };
        retry = Some((after, swallowed));
        (pattern, text) = (after, swallowed);
    }
}

#[cfg(test)]
mod tests;
