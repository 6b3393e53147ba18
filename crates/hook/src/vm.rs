//! A VM with two owners: the policy and the VMM.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use msrgate_core::{ActionTable, Entry, Filter, Msr, Op, ReadAction, Reason, Reasons, Verdict, WriteAction};
use msrgate_plan::{DecisionMap, Intervals, Plan, PlanError};

use crate::board::Board;
use crate::kernel::RawExit;

/// A policy as every VM of the process gets it.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) map: DecisionMap,
    pub(crate) plan: Arc<Plan>,
    /// Where accesses are written down.
    pub(crate) board: Option<Board>,
}

impl Policy {
    /// The plan that holds for the policy and for a VMM with this filter and mask.
    pub(crate) fn composed(&self, filter: Option<&Filter>, mask: Reasons) -> Result<Plan, PlanError> {
        let plan = match filter {
            None => Plan::clone(&self.plan),
            Some(filter) => Plan::compile(&self.map.restricted_by(filter))?,
        };
        Ok(plan.handing_over(mask))
    }
}

/// Whose an exit is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    /// The policy's, or nobody's: it is answered here.
    Policy,
    /// The VMM's, which asked for it.
    Vmm,
}

/// What is known of one VM on a vCPU's thread.
#[derive(Debug)]
pub(crate) struct Vm<G> {
    pub(crate) gate: G,
    pub(crate) policy: Arc<Policy>,
    /// What events call it.
    pub(crate) number: u32,
    /// The VMM's own mask, as [`Reasons::bits`].
    mask: AtomicU32,
}

impl<G> Vm<G> {
    pub(crate) fn new(gate: G, policy: Arc<Policy>) -> Vm<G> {
        let number = policy.board.as_ref().map_or(0, Board::new_vm);
        Vm {
            gate,
            policy,
            number,
            mask: AtomicU32::new(0),
        }
    }

    pub(crate) fn mask(&self) -> Reasons {
        Reasons::from_bits(u64::from(self.mask.load(Ordering::Relaxed))).unwrap_or(Reasons::NONE)
    }

    pub(crate) fn set_mask(&self, mask: Reasons) {
        self.mask.store(mask.bits(), Ordering::Relaxed);
    }

    /// Whose an exit is. Neither locks nor allocates.
    ///
    /// What the policy decides is the policy's. The rest is there because the VMM denies it, or because the mask is
    /// wider than one of the two asked for: it is the VMM's only where the VMM asked for such exits, since a VMM may
    /// abort on one that it did not, and else gets the fault that the kernel would have given.
    pub(crate) fn owner(&self, exit: &RawExit) -> Owner {
        let Some(reason) = Reason::from_bits(exit.reason) else {
            return Owner::Policy;
        };
        let decided = decides(self.policy.plan.table(), exit.access.msr(), exit.access.op(), reason);
        if !decided && self.mask().contains(reason) {
            Owner::Vmm
        } else {
            Owner::Policy
        }
    }
}

/// Whether the table says by itself what such an exit gets.
fn decides(table: &ActionTable, msr: Msr, op: Op, reason: Reason) -> bool {
    let by = |pair: &(ReadAction, WriteAction)| match op {
        Op::Read => pair.0 != ReadAction::Deny,
        Op::Write => pair.1 != WriteAction::Deny,
    };
    match (reason, op) {
        (Reason::Filter, Op::Read) => names(table.reads(), msr),
        (Reason::Filter, Op::Write) => names(table.writes(), msr),
        (Reason::Unknown, _) => by(table.unknown()),
        (Reason::Invalid, _) => by(table.invalid()),
    }
}

fn names<A>(entries: &[Entry<A>], msr: Msr) -> bool {
    let after = entries.partition_point(|entry| entry.range.first() <= msr);
    let entry = after.checked_sub(1).and_then(|at| entries.get(at));
    entry.is_some_and(|entry| entry.range.contains(msr))
}

/// Whether `new` allows something that `old` denies.
pub(crate) fn is_weaker(old: &Filter, new: &Filter) -> bool {
    Op::ALL.into_iter().any(|op| {
        let weaker = Intervals::of_filter(old, op).zip(&Intervals::of_filter(new, op), |old, new| {
            *old == Verdict::Deny && *new == Verdict::Allow
        });
        weaker.iter().any(|(_, weaker)| *weaker)
    })
}
