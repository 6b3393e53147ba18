//! What no filter can do, said of a plan.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use msrgate_core::{Msr, MsrRange, Op, ReadSource, WriteTarget};

use crate::{CompileOptions, DecisionMap, Preset};

/// A stable name for a kind of note.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum NoteCode {
    /// 0x800–0x8ff are never filtered.
    X2apic,
    /// Some kernels complete a write of IA32_TSC_DEADLINE before they ask the filter.
    TscDeadline,
    /// No range covers MSR 0xffffffff.
    LastMsr,
    /// An SEV-ES guest needs its GHCB MSR.
    SevEsGhcb,
    /// AMD's hardware does not intercept SEV_STATUS.
    SevStatus,
    /// Registers of this policy change without WRMSR too.
    OtherWays,
    /// Actions that go through the host's view of a register.
    HostView,
    /// Fixed answers that the kernel holds.
    Presets,
    /// Accesses that user space passes on to the kernel.
    Spilled,
}

impl NoteCode {
    /// All of them, for documentation.
    pub const ALL: [NoteCode; 9] = [
        NoteCode::X2apic,
        NoteCode::TscDeadline,
        NoteCode::LastMsr,
        NoteCode::SevEsGhcb,
        NoteCode::SevStatus,
        NoteCode::OtherWays,
        NoteCode::HostView,
        NoteCode::Presets,
        NoteCode::Spilled,
    ];

    /// The code that documents and programs use.
    pub const fn code(self) -> &'static str {
        match self {
            NoteCode::X2apic => "N001",
            NoteCode::TscDeadline => "N002",
            NoteCode::LastMsr => "N003",
            NoteCode::SevEsGhcb => "N004",
            NoteCode::SevStatus => "N005",
            NoteCode::OtherWays => "N006",
            NoteCode::HostView => "N007",
            NoteCode::Presets => "N008",
            NoteCode::Spilled => "N009",
        }
    }
}

impl fmt::Display for NoteCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.code())
    }
}

/// Something that whoever relies on a plan must know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Note {
    /// Its kind.
    pub code: NoteCode,
    /// One sentence for people.
    pub message: String,
}

/// What is to be said of a map, and of the presets and the spilled accesses that its plan has.
pub(crate) fn notes(
    map: &DecisionMap,
    options: &CompileOptions,
    presets: &[Preset],
    spilled: &[(MsrRange, Op)],
) -> Vec<Note> {
    let mut notes = Vec::new();
    let mut note = |code, message: &str| {
        notes.push(Note {
            code,
            message: message.to_string(),
        })
    };
    let closed = |msr: u32| Op::ALL.into_iter().any(|op| !map.allows(Msr(msr), op));
    let allowed = map.allowed();
    if allowed.within(MsrRange::X2APIC).any(|(_, pair)| *pair != (true, true)) {
        note(
            NoteCode::X2apic,
            "0x800..=0x8ff (x2APIC) are never filtered: the kernel answers them whatever the policy says",
        );
    }
    if !map.allows(Msr::TSC_DEADLINE, Op::Write) {
        note(
            NoteCode::TscDeadline,
            "a write of 0x6e0 (IA32_TSC_DEADLINE) may pass the filter unseen: kvm_intel completes it ahead of the \
             filter where it uses the preemption timer, and from Linux 6.18 kvm_amd too; reads are filtered",
        );
    }
    let last = *allowed.get(Msr::MAX);
    // The default of the filter is what all but a few MSRs get; those next to the last one tell which.
    if last != *allowed.get(Msr(u32::MAX - 1)) {
        note(
            NoteCode::LastMsr,
            "0xffffffff cannot be in a filter range, so it gets what MSRs without a rule get",
        );
    }
    if closed(0xc001_0130) {
        note(
            NoteCode::SevEsGhcb,
            "0xc0010130 (the GHCB MSR) is not left to the kernel: an SEV-ES guest cannot run under this policy",
        );
    }
    if !map.allows(Msr(0xc001_0131), Op::Read) {
        note(
            NoteCode::SevStatus,
            "a read of 0xc0010131 (SEV_STATUS) is not intercepted by AMD's hardware, so no filter sees it",
        );
    }
    let other_ways = [0xc000_0100, 0xc000_0101, 0xc000_0102];
    if other_ways.into_iter().any(|msr| !map.allows(Msr(msr), Op::Write)) {
        note(
            NoteCode::OtherWays,
            "FS, GS and kernel GS base also change by WRFSBASE, WRGSBASE and SWAPGS, which no filter sees",
        );
    }
    let read = map
        .reads()
        .iter()
        .any(|(_, decision)| decision.action.needs_exit() && decision.action.source() == ReadSource::Register);
    let write = map
        .writes()
        .iter()
        .any(|(_, decision)| decision.action.needs_exit() && decision.action.target() == WriteTarget::Register);
    if read || write {
        note(
            NoteCode::HostView,
            "`mask`, `only` and `once` reach the kernel's register as the host does (KVM_GET_MSRS, KVM_SET_MSRS), \
             which may differ from what the guest's own instruction would have done",
        );
    }
    if !presets.is_empty() {
        note(
            NoteCode::Presets,
            "a preset holds as long as nothing on the host writes the register: a VMM that sets it by itself \
             (KVM_SET_MSRS) gives the guest another value than the policy does",
        );
    }
    if !spilled.is_empty() {
        let accesses: u64 = spilled.iter().map(|(range, _)| range.len()).sum();
        let mut exits = spilled.iter().map(|(range, op)| options.touches(*range, *op));
        let exits: Option<u64> = exits.try_fold(0u64, |sum, exits| Some(sum.saturating_add(exits?)));
        let cost = match exits {
            None => "how often the guest makes them, a profile would tell".to_string(),
            Some(exits) => format!("that is {exits} exits in the profile"),
        };
        note(
            NoteCode::Spilled,
            &format!(
                "{accesses} accesses that are left to the kernel do not fit into 16 ranges and are passed on to it from user \
                 space, one exit each time; {cost}"
            ),
        );
    }
    notes
}
