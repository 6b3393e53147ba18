//! What whoever relies on a plan must know.

use alloc::vec::Vec;

use msrgate_core::{Msr, MsrRange, Op, ReadSource, WriteTarget};

use crate::{CompileOptions, DecisionMap, Preset};

/// Something that whoever relies on a plan must know.
///
/// What passes a filter by a property of single MSRs is not among them: the database of MSRs has it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Note {
    /// The map does not leave all of 0x800–0x8ff to the kernel, which answers them before it asks the filter.
    X2apic,
    /// The map wants something else for MSR 0xffffffff than the filter's default. No range covers it.
    LastMsr,
    /// The map has actions that reach the kernel's register as the host does, which may differ from the guest's own
    /// instruction.
    HostView,
    /// The plan has presets: they hold as long as nothing else on the host writes the registers.
    Presets,
    /// The plan has accesses that the map leaves to the kernel and that user space passes on to it.
    #[non_exhaustive]
    Spilled {
        /// How many accesses.
        accesses: u64,
        /// How many exits that is in the profile; `None` without a profile.
        exits: Option<u64>,
    },
}

/// The notes on a map, and on the presets and the spilled accesses that its plan has.
pub(crate) fn notes(
    map: &DecisionMap,
    options: &CompileOptions,
    presets: &[Preset],
    spilled: &[(MsrRange, Op)],
) -> Vec<Note> {
    let allowed = map.allowed();
    let x2apic = allowed.within(MsrRange::X2APIC).any(|(_, pair)| *pair != (true, true));
    // The default of the filter is what all but a few MSRs get; those next to the last one tell which.
    let last = allowed.get(Msr::MAX) != allowed.get(Msr(u32::MAX - 1));
    let read = map
        .reads()
        .iter()
        .any(|(_, decision)| decision.action.needs_exit() && decision.action.source() == ReadSource::Register);
    let write = map
        .writes()
        .iter()
        .any(|(_, decision)| decision.action.needs_exit() && decision.action.target() == WriteTarget::Register);
    let mut exits = spilled.iter().map(|(range, op)| options.touches(*range, *op));
    let of_spilled = Note::Spilled {
        accesses: spilled.iter().map(|(range, _)| range.len()).sum(),
        exits: exits.try_fold(0u64, |sum, exits| Some(sum.saturating_add(exits?))),
    };
    let all = [
        (x2apic, Note::X2apic),
        (last, Note::LastMsr),
        (read || write, Note::HostView),
        (!presets.is_empty(), Note::Presets),
        (!spilled.is_empty(), of_spilled),
    ];
    all.into_iter()
        .filter_map(|(holds, note)| holds.then_some(note))
        .collect()
}
