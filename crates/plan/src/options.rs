//! What a plan is compiled for, beside what its map means.

use alloc::vec::Vec;

use msrgate_core::{Msr, MsrRange, Op};

/// A value that is put into the kernel's own MSR before the guest runs, so that a fixed answer costs no exit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub struct Preset {
    /// The register.
    pub msr: Msr,
    /// The value that the register gets before the guest runs.
    pub value: u64,
}

impl Preset {
    /// The preset of a register.
    pub const fn new(msr: Msr, value: u64) -> Preset {
        Preset { msr, value }
    }
}

/// An access that may be passed through.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub struct Spillable {
    /// The register.
    pub msr: Msr,
    /// The direction.
    pub op: Op,
    /// How dear it is beside others, where a profile does not tell them apart.
    pub weight: u16,
}

impl Spillable {
    /// An access that may be passed through, and how dear it is.
    pub const fn new(msr: Msr, op: Op, weight: u16) -> Spillable {
        Spillable { msr, op, weight }
    }
}

/// How often a guest touches a register.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub struct AccessCount {
    /// The register.
    pub msr: Msr,
    /// The direction.
    pub op: Op,
    /// How often.
    pub count: u64,
}

impl AccessCount {
    /// An access, and how often a guest makes it.
    pub const fn new(msr: Msr, op: Op, count: u64) -> AccessCount {
        AccessCount { msr, op, count }
    }
}

/// What a plan is compiled for: a kernel, a guest's habits, and what may be done where 16 ranges do not hold it all. Without
/// any of them ([`CompileOptions::default`]) a plan is right everywhere.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct CompileOptions {
    held: Vec<Preset>,
    spill: Option<Vec<Spillable>>,
    profile: Vec<AccessCount>,
}

impl CompileOptions {
    /// What a kernel was found to hold itself once it is put there: fixed answers that then cost no exit.
    #[must_use]
    pub fn with_presets(self, mut held: Vec<Preset>) -> CompileOptions {
        held.sort_unstable();
        held.dedup_by_key(|preset| preset.msr);
        CompileOptions { held, ..self }
    }

    /// What may be passed through from user space where 16 ranges do not hold it all; such a map is refused otherwise.
    #[must_use]
    pub fn spilling(self, spill: Vec<Spillable>) -> CompileOptions {
        CompileOptions {
            spill: Some(spill),
            ..self
        }
    }

    /// How often the guest touches what: what is spilled, and the order of ranges, follow from it.
    #[must_use]
    pub fn with_profile(self, mut profile: Vec<AccessCount>) -> CompileOptions {
        profile.sort_unstable();
        CompileOptions { profile, ..self }
    }

    /// [`CompileOptions::with_presets`], in order of MSR; empty where no kernel was asked.
    pub fn held(&self) -> &[Preset] {
        &self.held
    }

    /// [`CompileOptions::spilling`]; `None` where what does not fit is refused.
    pub fn spillable(&self) -> Option<&[Spillable]> {
        self.spill.as_deref()
    }

    /// [`CompileOptions::with_profile`], in order of MSR; empty where nothing is known.
    pub fn profile(&self) -> &[AccessCount] {
        &self.profile
    }

    /// How often the profile has one of these accesses; `None` without a profile.
    pub fn touches(&self, range: MsrRange, op: Op) -> Option<u64> {
        let touched = self.profile.iter();
        let touched = touched.filter(|touched| touched.op == op && range.contains(touched.msr));
        let count = touched.fold(0u64, |sum, touched| sum.saturating_add(touched.count));
        (!self.profile.is_empty()).then_some(count)
    }
}
