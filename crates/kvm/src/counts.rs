//! How many accesses a VM's vCPUs had answered.

use std::sync::atomic::{AtomicU64, Ordering};

use msrgate_core::{Answer, Op, Outcome};

/// How many accesses of a VM's vCPUs user space has answered since the plan was installed. Accesses that the kernel answers by
/// itself are in none of them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub struct Counts {
    /// RDMSR.
    pub reads: u64,
    /// WRMSR.
    pub writes: u64,
    /// Accesses in either direction that got #GP(0).
    pub faults: u64,
    /// Faults that the policy does not ask for by `deny`, so that there is a [`FaultCause`](msrgate_core::FaultCause).
    pub failures: u64,
}

/// Each is added to alone, so a reader may see one ahead of another.
#[derive(Default, Debug)]
pub(crate) struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    faults: AtomicU64,
    failures: AtomicU64,
}

impl Counters {
    pub(crate) fn count(&self, op: Op, answer: &Answer) {
        let add = |counter: &AtomicU64| _ = counter.fetch_add(1, Ordering::Relaxed);
        add(match op {
            Op::Read => &self.reads,
            Op::Write => &self.writes,
        });
        if answer.outcome == Outcome::Fault {
            add(&self.faults);
        }
        if answer.why.is_some() {
            add(&self.failures);
        }
    }

    pub(crate) fn now(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            reads: get(&self.reads),
            writes: get(&self.writes),
            faults: get(&self.faults),
            failures: get(&self.failures),
        }
    }
}
