//! What a vCPU remembers, to be saved with it and given back.

use core::fmt;

use super::{ActionTable, VcpuState};
use crate::Msr;

/// Something that an MSR of a vCPU remembers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum EmulatedState {
    /// The guest wrote `value` to a shadow register.
    Shadow {
        /// The MSR.
        msr: Msr,
        /// What reads give.
        value: u64,
    },
    /// The one write of an MSR has been made.
    Once {
        /// The MSR.
        msr: Msr,
    },
}

impl ActionTable {
    /// All that `state`, one of this table's vCPUs, remembers: of no MSR the same twice.
    pub fn emulated_states(&self, state: &VcpuState) -> impl Iterator<Item = EmulatedState> {
        let cells = self.spans.iter().flat_map(|span| {
            let cells = state.cells.iter().skip(span.cell);
            span.range.iter().zip(cells)
        });
        let remembered = cells.flat_map(|(msr, cell)| {
            let shadow = cell.shadow.map(|value| EmulatedState::Shadow { msr, value });
            let once = cell.written.then_some(EmulatedState::Once { msr });
            shadow.into_iter().chain(once)
        });
        let spare = state.spare.iter().take(state.spare_used);
        remembered.chain(spare.map(|(msr, value)| EmulatedState::Shadow {
            msr: *msr,
            value: *value,
        }))
    }

    /// Puts what a vCPU remembered in place of what `state` does. A write that either knows to have been made stays made:
    /// no memory unlocks an MSR.
    ///
    /// On an error `state` is as it was.
    pub fn restore(
        &self,
        state: &mut VcpuState,
        memories: impl IntoIterator<Item = EmulatedState>,
    ) -> Result<(), EmulatedStateError> {
        let mut next = self.vcpu_state();
        for memory in memories {
            match memory {
                EmulatedState::Shadow { msr, value } => {
                    if self.shadow(msr, &next).is_some() {
                        return Err(EmulatedStateError::Twice { memory });
                    }
                    if self.keep(msr, value, &mut next).is_err() {
                        return Err(EmulatedStateError::NoRoom { memory });
                    }
                }
                EmulatedState::Once { msr } => {
                    let cell = self.cell(msr).and_then(|cell| next.cells.get_mut(cell));
                    let cell = cell.ok_or(EmulatedStateError::NoRoom { memory })?;
                    if cell.written {
                        return Err(EmulatedStateError::Twice { memory });
                    }
                    cell.written = true;
                }
            }
        }
        for (next, before) in next.cells.iter_mut().zip(&state.cells) {
            next.written |= before.written;
        }
        next.answering = state.answering;
        *state = next;
        Ok(())
    }
}

/// Why memories are none of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum EmulatedStateError {
    /// The table lets the MSR remember nothing of the kind, or has no room left for it.
    NoRoom {
        /// What is to be remembered.
        memory: EmulatedState,
    },
    /// The MSR remembers it already.
    Twice {
        /// What is to be remembered.
        memory: EmulatedState,
    },
}

impl fmt::Display for EmulatedStateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (memory, what) = match self {
            EmulatedStateError::NoRoom { memory } => (memory, "is not remembered under this policy"),
            EmulatedStateError::Twice { memory } => (memory, "is there twice"),
        };
        match memory {
            EmulatedState::Shadow { msr, .. } => write!(f, "the shadow of {msr} {what}"),
            EmulatedState::Once { msr } => write!(f, "the one write of {msr} {what}"),
        }
    }
}

impl core::error::Error for EmulatedStateError {}
