//! Which findings a policy lets stand.

use std::collections::{HashMap, HashSet};

use crate::{Acceptance, Code, Diagnostic, Place, Policy, Rule, Severity};

/// Marks the warnings that the policy or their rule accepts, and adds one for each acceptance that accepts nothing.
///
/// What a rule accepts holds for findings about that rule; what the policy accepts, for all.
pub(super) fn settle(policy: &Policy, rules: &[(u32, &Rule)], findings: &mut Vec<Diagnostic>) {
    // A rule's place: in which source, and where it begins.
    let at = |place: &Place| (place.source, place.span.start);
    let by_place: HashMap<_, &Rule> = rules.iter().map(|(_, rule)| (at(&rule.place), *rule)).collect();
    let mut used: HashSet<(usize, usize)> = HashSet::new();
    for found in findings
        .iter_mut()
        .filter(|found| found.severity() == Severity::Warning)
    {
        let rule = found.place.as_ref().and_then(|place| by_place.get(&at(place)));
        let of_rule = rule.into_iter().flat_map(|rule| &rule.accept);
        if let Some(acceptance) = of_rule.chain(&policy.accept).find(|one| one.code == found.code) {
            found.accepted = Some(acceptance.reason.clone());
            used.insert(at(&acceptance.place));
        }
    }
    // For another guest it may accept something.
    if policy.asks_cpuid() {
        return;
    }
    let depends_on_guest = |one: &Acceptance| matches!(one.code, Code::AllowsAbsent | Code::DeniesShown);
    let own = rules.iter().filter(|(_, rule)| rule.place.source == 0);
    let all = policy.accept.iter().chain(own.flat_map(|(_, rule)| &rule.accept));
    let idle = all.filter(|one| !used.contains(&at(&one.place)) && !depends_on_guest(one));
    findings.extend(idle.map(|one| {
        let message = format!("there is no {} here to accept", one.code);
        Diagnostic::at(Code::AcceptsNothing, one.place.clone(), message)
            .help(format!("leave `{} = …` out of `accept`", one.code))
    }));
}
