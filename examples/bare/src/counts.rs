//! What a processor counts, and the summary of it.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use msrgate_core::{Msr, Op};

use crate::processor::Exit;
use crate::say;

/// One processor's counts, which it alone adds to.
pub(crate) struct Counts {
    exits: AtomicU64,
    cpuid: AtomicU64,
    /// Those that were some processor's kick.
    pub(crate) kicks: AtomicU64,
    /// Accesses that came to user space's side: the policy's actions.
    pub(crate) deflected: AtomicU64,
    /// Accesses that ended with #GP.
    pub(crate) faults: AtomicU64,
    /// How often the bitmap changed.
    pub(crate) bitmaps: AtomicU64,
    msrs: [Accesses; 160],
}

/// An MSR, and how often it left the guest; all 0 where the place is free.
struct Accesses {
    msr: AtomicU32,
    ops: [AtomicU64; 2],
}

/// Counts one.
pub(crate) fn add(count: &AtomicU64) {
    count.fetch_add(1, Relaxed);
}

impl Counts {
    pub(crate) fn new() -> Counts {
        Counts {
            exits: AtomicU64::new(0),
            cpuid: AtomicU64::new(0),
            kicks: AtomicU64::new(0),
            deflected: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            bitmaps: AtomicU64::new(0),
            msrs: [const {
                Accesses {
                    msr: AtomicU32::new(0),
                    ops: [AtomicU64::new(0), AtomicU64::new(0)],
                }
            }; 160],
        }
    }

    /// Adds an exit; `rcx` names the MSR where it is an access of one.
    pub(crate) fn exit(&self, exit: Exit, rcx: u64) {
        add(&self.exits);
        match exit {
            Exit::Cpuid => add(&self.cpuid),
            Exit::Msr(op) => {
                let msr = rcx as u32;
                let place = self
                    .msrs
                    .iter()
                    .find(|place| place.msr.load(Relaxed) == msr && place.used() || !place.used());
                if let Some(place) = place {
                    place.msr.store(msr, Relaxed);
                    add(&place.ops[op as usize]);
                }
            }
            _ => {}
        }
    }

    /// One line for the processor and one for each MSR: names and numbers.
    pub(crate) fn report(&self, number: usize) {
        let [exits, cpuid, kicks] = [&self.exits, &self.cpuid, &self.kicks].map(|count| count.load(Relaxed));
        let [deflected, faults, bitmaps] =
            [&self.deflected, &self.faults, &self.bitmaps].map(|count| count.load(Relaxed));
        say!(
            "cpu {number} exits {exits} cpuid {cpuid} kicks {kicks} deflected {deflected} faults {faults} bitmaps {bitmaps}"
        );
        for place in self.msrs.iter().filter(|place| place.used()) {
            let [reads, writes] = [Op::Read, Op::Write].map(|op| place.ops[op as usize].load(Relaxed));
            say!(
                "cpu {number} msr {} reads {reads} writes {writes}",
                Msr(place.msr.load(Relaxed))
            );
        }
    }
}

impl Accesses {
    fn used(&self) -> bool {
        self.ops.iter().any(|op| op.load(Relaxed) > 0)
    }
}
