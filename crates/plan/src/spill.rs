//! What is passed through from user space where 16 ranges do not hold it all.
//!
//! An access that a map leaves to the kernel may be denied in the filter all the same, if user space then asks the kernel
//! for the guest. It costs an exit, and is only right for registers of which it is known that the host gets what the guest
//! would. So it is done where the map asks for it ([`CompileOptions::spilling`]), for the accesses that it names, at the least
//! cost.

use alloc::vec::Vec;

use msrgate_core::abi::{MAX_RANGE_MSRS, MAX_RANGES};
use msrgate_core::{ActionTable, Entry, MsrRange, Op, ReadAction, WriteAction};

use crate::shortfall::{NEVER, shortfall};
use crate::{CompileOptions, DecisionMap, Intervals, PlanError, SpillError, Spillable};

/// What a denial costs that is not to be: more than all that may be.
const NOT_FAITHFUL: u64 = 1 << 42;

impl DecisionMap {
    /// With what is spilled no longer left to the kernel.
    pub(crate) fn without_spilled(
        allowed: &Intervals<(bool, bool)>,
        spilled: &[(MsrRange, Op)],
    ) -> Intervals<(bool, bool)> {
        let of = |op| spilled_of(spilled, op);
        let reads = allowed.zip(&of(Op::Read), |(read, write), spilled| (*read && !spilled, *write));
        reads.zip(&of(Op::Write), |(read, write), spilled| (*read, *write && !spilled))
    }

    /// The accesses that cost the fewest exits, of those that may be spilled, with which the rest fits; `error` is why
    /// all of it does not.
    pub(crate) fn chosen_to_spill(
        &self,
        options: &CompileOptions,
        error: PlanError,
    ) -> Result<Vec<(MsrRange, Op)>, PlanError> {
        let Some(spillable) = options.spillable() else {
            return Err(error);
        };
        let PlanError::TooManyRanges { needed, .. } = error else {
            return Err(error);
        };
        if self.unknown() != self.invalid() {
            return Err(PlanError::Spill {
                needed,
                why: SpillError::Fallbacks,
            });
        }
        let allowed = self.allowed();
        let price = |op| {
            let prices = spillable.iter().filter(move |spillable| spillable.op == op);
            let prices = prices.map(|spillable| (MsrRange::single(spillable.msr), Some(price_of(options, spillable))));
            Intervals::first_match(None, prices)
        };
        let of = |allowed: bool, price: Option<u64>| match allowed {
            true => price.unwrap_or(NOT_FAITHFUL),
            // What is denied stays so.
            false => NEVER,
        };
        let prices = price(Op::Read).zip(&price(Op::Write), |read, write| (*read, *write));
        let prices = allowed.zip(&prices, |allowed, price| {
            (of(allowed.0, price.0), of(allowed.1, price.1))
        });
        let limits = (u64::from(MAX_RANGE_MSRS), MAX_RANGES as u64);
        let Some(found) = shortfall(&allowed, &prices, &[MsrRange::X2APIC], limits).best else {
            return Err(error);
        };
        if found.cost < NOT_FAITHFUL {
            return Ok(found.wrong);
        }
        let mut unfaithful = Vec::new();
        for (range, op) in found.wrong {
            for (part, price) in prices.within(range) {
                let price = match op {
                    Op::Read => price.0,
                    Op::Write => price.1,
                };
                if price == NOT_FAITHFUL {
                    unfaithful.push((part, op));
                }
            }
        }
        Err(PlanError::Spill {
            needed,
            why: SpillError::NotFaithful(unfaithful),
        })
    }
}

/// What it costs to pass an access through: exits first.
fn price_of(options: &CompileOptions, spillable: &Spillable) -> u64 {
    let exits = options.touches(MsrRange::single(spillable.msr), spillable.op);
    let exits = exits.unwrap_or(0).min(NOT_FAITHFUL >> 24 >> 1);
    exits << 12 | u64::from(spillable.weight.min(0xfff))
}

/// What a table passes on to the kernel: reads first.
pub(crate) fn spilled_in(table: &ActionTable) -> impl Iterator<Item = (MsrRange, Op)> {
    fn of<A: PartialEq>(entries: &[Entry<A>], allow: A, op: Op) -> impl Iterator<Item = (MsrRange, Op)> {
        let passed = entries.iter().filter(move |entry| entry.action == allow);
        passed.map(move |entry| (entry.range, op))
    }
    let writes = of(table.writes(), WriteAction::Allow, Op::Write);
    of(table.reads(), ReadAction::Allow, Op::Read).chain(writes)
}

/// Where accesses of one direction are spilled.
pub(crate) fn spilled_of(spilled: &[(MsrRange, Op)], op: Op) -> Intervals<bool> {
    let of = spilled.iter().filter(|(_, spilled)| *spilled == op);
    Intervals::first_match(false, of.map(|(range, _)| (*range, true)))
}

#[cfg(test)]
mod tests;
