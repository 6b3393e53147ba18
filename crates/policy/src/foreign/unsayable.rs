//! What a policy says that another tool has no words for.

use std::fmt;

use msrgate_core::{Msr, MsrRange, Op};
use msrgate_plan::{Decision, Intervals};

/// The most MSRs that are named one by one.
const MOST: u64 = 4096;

/// Accesses for which a tool has no words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unsupported {
    /// Which MSRs.
    pub range: MsrRange,
    /// In which direction.
    pub op: Op,
    /// What the policy gives them, in words.
    pub action: String,
    /// The rule that does; `None` for the default.
    pub rule: Option<u32>,
    /// Why the tool cannot.
    pub why: &'static str,
}

/// What a tool cannot say of one direction of a map; `say` does so, or tells why not.
pub(super) fn unsayable<A: fmt::Display + Clone + Eq>(
    op: Op,
    decisions: &Intervals<Decision<A>>,
    mut say: impl FnMut(MsrRange, &A) -> Result<(), &'static str>,
) -> Vec<Unsupported> {
    let unsaid = decisions.iter().filter_map(|(range, decision)| {
        let why = say(range, &decision.action).err()?;
        Some(Unsupported {
            range,
            op,
            action: decision.action.to_string(),
            rule: decision.rule,
            why,
        })
    });
    unsaid.collect()
}

/// Each MSR of a range, if they are few enough to be named; else why not.
pub(super) fn each(range: MsrRange) -> Result<impl Iterator<Item = Msr>, &'static str> {
    match range.len() {
        0..=MOST => Ok(range.iter()),
        _ => Err("these are too many MSRs to name each"),
    }
}
