//! Which rule decides what.

use std::collections::BTreeMap;

/// Things by the number of the rule that decides them; `None` for the default. So that what is known of some hundred MSRs is
/// not asked anew for each rule.
pub(super) fn by_rule<T: Clone>(things: &[T], decider: impl Fn(&T) -> Option<u32>) -> BTreeMap<Option<u32>, Vec<T>> {
    let mut of: BTreeMap<Option<u32>, Vec<T>> = BTreeMap::new();
    for thing in things {
        of.entry(decider(thing)).or_default().push(thing.clone());
    }
    of
}
