//! A rule of a policy that is made from a filter.

use msrgate_core::{ReadAction, WriteAction};

/// One rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DecompiledRule {
    /// The MSRs, as a policy spells them.
    pub msrs: Vec<String>,
    /// What reads get.
    pub read: Option<ReadAction>,
    /// What writes get.
    pub write: Option<WriteAction>,
}
