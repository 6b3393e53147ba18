//! Fixed answers that the kernel can give itself.

use alloc::vec::Vec;

use msrgate_core::abi::MAX_RANGES;
use msrgate_core::{Log, Msr, MsrRange, ReadAction, Verdict, WriteAction, WriteTarget};

use crate::cover::smallest;
use crate::{Decision, DecisionMap, Intervals, Preset};

impl DecisionMap {
    /// The preset that would do what the map says of reads of `msr`, if the kernel holds it: reads get one value and
    /// are not logged, and no write reaches the kernel's register, which would then hold another.
    pub fn preset(&self, msr: Msr) -> Option<Preset> {
        let read = self.reads().get(msr);
        let untouched = DecisionMap::keeps_register(self.writes().get(msr));
        let decided = !MsrRange::X2APIC.contains(msr) && msr != Msr::MAX;
        match read.action {
            ReadAction::Value(value) if read.log == Log::None && untouched && decided => Some(Preset { msr, value }),
            _ => None,
        }
    }

    /// Whether no write that gets this reaches the kernel's register.
    pub fn keeps_register(write: &Decision<WriteAction>) -> bool {
        write.action.target() == WriteTarget::Elsewhere
    }

    /// The map with reads left to the kernel where `presets` answer them, once `presets` are in its registers.
    pub fn with_presets(&self, presets: &[Preset]) -> DecisionMap {
        let preset = Intervals::first_match(false, presets.iter().map(|preset| (MsrRange::single(preset.msr), true)));
        self.clone()
            .with_reads(self.reads().zip(&preset, |decision, preset| match preset {
                true => Decision {
                    action: ReadAction::Allow,
                    ..decision.clone()
                },
                false => decision.clone(),
            }))
    }
}

/// Those of the presets which the kernel holds that fit into a filter.
///
/// A register that is read from the kernel and not written to it may take a range more, which costs nothing that can be
/// measured, where an exit costs microseconds. So all of them are taken if that fits; else one after the other, each
/// that still fits, or that takes no range more. What fits without presets fits with those that are chosen.
pub(crate) fn chosen(map: &DecisionMap, held: &[Preset]) -> Vec<Preset> {
    let wanted: Vec<Preset> = held
        .iter()
        .filter(|held| map.preset(held.msr) == Some(**held))
        .copied()
        .collect();
    if wanted.is_empty() {
        return wanted;
    }
    let ranges = |presets: &[Preset]| slots(&map.with_presets(presets));
    let room = MAX_RANGES as u64;
    if ranges(&wanted) <= room {
        return wanted;
    }
    let mut chosen = Vec::new();
    let mut needed = ranges(&[]);
    for preset in wanted {
        chosen.push(preset);
        let with = ranges(&chosen);
        if with <= needed.max(room) {
            needed = with;
        } else {
            chosen.pop();
        }
    }
    chosen
}

/// How many slots the smallest filter takes; at least so many where they are too many to search.
fn slots(map: &DecisionMap) -> u64 {
    match smallest(&map.allowed()) {
        // The kernel refuses to deny everything without a range.
        Ok((Verdict::Deny, covering)) => (covering.ranges.len() as u64).max(1),
        Ok((Verdict::Allow, covering)) => covering.ranges.len() as u64,
        Err(too_many) => too_many.at_least,
    }
}

#[cfg(test)]
mod tests;
