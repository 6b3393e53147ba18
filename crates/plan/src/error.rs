//! Why a decision map has no plan.

use alloc::vec::Vec;
use core::fmt;

use msrgate_core::abi::{MAX_RANGE_MSRS, MAX_RANGES};
use msrgate_core::{FilterError, Msr, MsrRange, Op, TableError};

use crate::Direction;

/// Why a decision map has no plan.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum PlanError {
    /// 16 ranges of 12288 MSRs do not suffice.
    TooManyRanges {
        /// How many are needed, or at least how many.
        needed: u64,
        /// Whether `needed` is the exact number.
        exact: bool,
        /// What planning reads and writes apart would take.
        separate: u64,
        /// As [`Minimum::witness`](crate::Minimum::witness).
        witness: Option<Vec<(Msr, Op)>>,
        /// The ranges that would be needed; empty where they are too many to search.
        groups: Vec<Group>,
    },
    /// 16 ranges do not suffice, and what does not fit cannot be passed through from user space.
    Spill {
        /// How many ranges are needed, or at least how many.
        needed: u64,
        /// Why.
        why: SpillError,
    },
    /// More MSRs are to keep a state for each vCPU than a filter can cover.
    Table(TableError),
    /// The planner made something that the kernel would refuse: a bug of the planner, and nothing was installed.
    Filter(FilterError),
    /// The plan does not do what the map says: a bug of the planner, and nothing was installed.
    NotProven {
        /// Where.
        msr: Msr,
        /// In which direction.
        op: Op,
    },
}

/// One range of a filter that would have too many, and who asks for it.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Group {
    /// Which directions it would serve.
    pub direction: Direction,
    /// The MSRs that it would span.
    pub range: MsrRange,
    /// The rules that differ from the default there, each once.
    pub rules: Vec<u32>,
    /// How many accesses there differ from the default.
    pub accesses: u64,
}

/// Why nothing can be spilled.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum SpillError {
    /// These accesses would have to be passed through, and may not be: in order of MSR.
    NotFaithful(Vec<(MsrRange, Op)>),
    /// The kernel does not tell user space whether it does not know a register or refuses an access, and the map gives
    /// the two different answers.
    Fallbacks,
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlanError::TooManyRanges { needed, exact, .. } => write!(
                f,
                "the policy needs {}{needed} filter ranges of at most {MAX_RANGE_MSRS} MSRs, and the kernel holds {MAX_RANGES}",
                if *exact { "" } else { "at least " }
            ),
            PlanError::Spill {
                needed,
                why: SpillError::NotFaithful(_),
            } => write!(
                f,
                "the policy needs at least {needed} filter ranges, the kernel holds {MAX_RANGES}, and what does not fit is not known \
                 to be the same for the guest when user space passes it through"
            ),
            PlanError::Spill {
                needed,
                why: SpillError::Fallbacks,
            } => write!(
                f,
                "the policy needs at least {needed} filter ranges, the kernel holds {MAX_RANGES}, and what user space passes through \
                 cannot get `unknown` and `invalid` apart"
            ),
            PlanError::Table(error) => error.fmt(f),
            PlanError::Filter(error) => write!(f, "bug in the planner: {error}"),
            PlanError::NotProven { msr, op } => {
                write!(f, "bug in the planner: the plan differs from the policy at {op} {msr}")
            }
        }
    }
}

impl core::error::Error for PlanError {}

impl From<FilterError> for PlanError {
    fn from(error: FilterError) -> PlanError {
        PlanError::Filter(error)
    }
}

impl From<TableError> for PlanError {
    fn from(error: TableError) -> PlanError {
        PlanError::Table(error)
    }
}
