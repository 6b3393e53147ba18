//! What the guest executes, and what it remembers of it.

use std::collections::BTreeMap;

use crate::msrs::{APIC_BASE, GO, MICROCODE_REVISION, NOWHERE, SYSENTER_CS};

/// One instruction.
#[derive(Clone, Copy)]
pub(crate) enum Instruction {
    Load(Register, u64),
    Move(Register, Register),
    /// Reads the MSR of ECX to EDX:EAX.
    Rdmsr,
    /// Writes EDX:EAX to the MSR of ECX.
    Wrmsr,
    /// Notes RAX.
    Note(Site),
    JumpIfZero(Register, usize),
    Halt,
}

#[derive(Clone, Copy)]
pub(crate) enum Register {
    Rax,
    Rcx,
    Rdx,
    Rbx,
}

/// A place in the program where something is noted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Site {
    Microcode,
    SysenterCs,
    Round,
}

/// What each site noted: how often each value, the last one, and how often it was another than the one before.
#[derive(Clone, Default)]
pub(crate) struct Notes(BTreeMap<Site, Note>);

#[derive(Clone, Default)]
struct Note {
    values: BTreeMap<u64, u64>,
    last: Option<u64>,
    changes: u64,
}

impl Notes {
    pub(crate) fn add(&mut self, site: Site, value: u64) {
        let note = self.0.entry(site).or_default();
        *note.values.entry(value).or_default() += 1;
        note.changes += u64::from(note.last.is_some_and(|last| last != value));
        note.last = Some(value);
    }

    /// How often each value was noted.
    pub(crate) fn values(&self, site: Site) -> BTreeMap<u64, u64> {
        self.0.get(&site).map(|note| note.values.clone()).unwrap_or_default()
    }

    pub(crate) fn changes(&self, site: Site) -> u64 {
        self.0.get(&site).map_or(0, |note| note.changes)
    }
}

/// Reads MSRs of every kind, round after round, until the hypervisor's own MSR says that it may end.
pub(crate) const PROGRAM: &[Instruction] = {
    use Instruction::{Halt, JumpIfZero, Load, Move, Note, Rdmsr, Wrmsr};
    use Register::{Rax, Rbx, Rcx, Rdx};
    &[
        Load(Rcx, MICROCODE_REVISION as u64),
        Rdmsr,
        Move(Rax, Rdx),
        Note(Site::Microcode),
        Load(Rcx, SYSENTER_CS as u64),
        Rdmsr,
        Note(Site::SysenterCs),
        // A reserved bit, which the hypervisor refuses.
        Load(Rcx, APIC_BASE as u64),
        Load(Rax, 1),
        Load(Rdx, 0),
        Wrmsr,
        Load(Rcx, NOWHERE as u64),
        Rdmsr,
        Load(Rcx, GO as u64),
        Rdmsr,
        Move(Rbx, Rax),
        Load(Rax, 0),
        Note(Site::Round),
        JumpIfZero(Rbx, 0),
        Halt,
    ]
};
