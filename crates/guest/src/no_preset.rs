//! Why a fixed answer makes an exit, where another is a preset.

use std::fmt;

use msrgate_core::{Log, MsrRange, ReadAction};
use msrgate_msrs::Kept;
use msrgate_plan::{DecisionMap, Intervals, Plan, Preset};

/// Why the kernel does not give a fixed answer by itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum NoPreset {
    /// The rule logs its accesses, and what the kernel answers cannot be logged.
    Logged,
    /// The policy lets writes reach the kernel's register, which then holds another value.
    Written,
    /// KVM is not known to keep a value for this MSR that only the host changes: it is [`Kept::Not`].
    Unkept,
    /// It was tried on this kernel, and the guest did not get the value.
    Unheld,
    /// The kernel holds it, and the filter has no range left to allow the read.
    NoRoom,
}

impl NoPreset {
    /// The word that JSON uses.
    pub const fn name(self) -> &'static str {
        match self {
            NoPreset::Logged => "logged",
            NoPreset::Written => "written",
            NoPreset::Unkept => "unkept",
            NoPreset::Unheld => "unheld",
            NoPreset::NoRoom => "no-room",
        }
    }
}

/// The reason, for people.
impl fmt::Display for NoPreset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoPreset::Logged => "what the rule logs has to leave the kernel",
            NoPreset::Written => "the policy lets writes reach the kernel's register, which then holds another value",
            NoPreset::Unkept => "KVM is not known to keep a value here that only the host changes",
            NoPreset::Unheld => "this kernel has another value here and cannot be given this one",
            NoPreset::NoRoom => "the filter has no range left to allow the read",
        })
    }
}

/// The fixed answers of `plan` that are no presets, and why, in order of MSR.
///
/// `plan` is that of `map`, compiled for a kernel that holds `held` ([`crate::held()`]).
pub fn no_presets(map: &DecisionMap, held: &[Preset], plan: &Plan) -> Vec<(MsrRange, NoPreset)> {
    let kept = msrgate_msrs::all().iter().filter(|entry| entry.kept != Kept::Not);
    let tried = kept.filter_map(|entry| {
        let msr = entry.msr;
        let preset = map.preset(msr)?;
        let why = if plan.presets().contains(&preset) {
            None
        } else if held.contains(&preset) {
            Some(NoPreset::NoRoom)
        } else {
            Some(NoPreset::Unheld)
        };
        Some((MsrRange::single(msr), why))
    });
    let rest = map.reads().zip(map.writes(), |read, write| match read.action {
        ReadAction::Value(_) if read.log != Log::None => Some(NoPreset::Logged),
        ReadAction::Value(_) if DecisionMap::keeps_register(write) => Some(NoPreset::Unkept),
        ReadAction::Value(_) => Some(NoPreset::Written),
        _ => None,
    });
    let parts: Vec<_> = tried
        // No filter sees these, so they make no exit either.
        .chain([(MsrRange::X2APIC, None)])
        .chain(rest.iter().map(|(range, why)| (range, *why)))
        .collect();
    let all = Intervals::first_match(None, parts);
    all.iter().filter_map(|(range, why)| Some((range, (*why)?))).collect()
}

#[cfg(test)]
mod tests {
    use msrgate_core::{Msr, WriteAction};
    use msrgate_plan::{CompileOptions, Decision};

    use super::*;

    #[test]
    fn each_fixed_answer_is_a_preset_or_has_its_reason() {
        let zero = |log| Decision::of(ReadAction::Value(0)).logged(log);
        let range = |first, last| MsrRange::new(Msr(first), Msr(last)).unwrap();
        let map = DecisionMap::new(
            Intervals::first_match(
                Decision::of(ReadAction::Allow),
                [
                    (range(0x8b, 0x8c), zero(Log::None)),
                    (range(0x17, 0x17), zero(Log::All)),
                    (range(0x606, 0x607), zero(Log::None)),
                    (range(0x611, 0x611), zero(Log::None)),
                    (range(0x7f0, 0x80f), zero(Log::None)),
                ],
            ),
            Intervals::first_match(
                Decision::of(WriteAction::Allow),
                [(0x8b, 0x8c), (0x17, 0x17), (0x606, 0x606), (0x7f0, 0x80f)]
                    .map(|(first, last)| (range(first, last), Decision::of(WriteAction::Ignore))),
            ),
        );
        let held = vec![map.preset(Msr(0x8b)).unwrap()];
        let options = CompileOptions::default().with_presets(held.clone());
        let plan = Plan::compile_for(&map, &options).unwrap();
        let expected = [
            (range(0x17, 0x17), NoPreset::Logged),
            (range(0x8c, 0x8c), NoPreset::Unkept),
            (range(0x606, 0x606), NoPreset::Unheld),
            (range(0x607, 0x607), NoPreset::Written),
            (range(0x611, 0x611), NoPreset::Written),
            (range(0x7f0, 0x7ff), NoPreset::Unkept),
        ];
        assert_eq!(no_presets(&map, &held, &plan), expected);
    }
}
