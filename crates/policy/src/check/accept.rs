//! Which findings a policy lets stand.

use crate::{Acceptance, Code, Diagnostic, Place, Policy, Rule, Severity};

/// Marks the warnings that the policy or their rule accepts, and adds one for each acceptance that accepts nothing.
///
/// What a rule accepts holds for findings about that rule; what the policy accepts, for all.
pub(super) fn settle(policy: &Policy, rules: &[(u32, &Rule)], findings: &mut Vec<Diagnostic>) {
    let mut used: Vec<&Place> = Vec::new();
    for found in findings
        .iter_mut()
        .filter(|found| found.severity() == Severity::Warning)
    {
        let rule = rules.iter().find(|(_, rule)| Some(&rule.place) == found.place.as_ref());
        let of_rule = rule.into_iter().flat_map(|(_, rule)| &rule.accept);
        if let Some(acceptance) = of_rule.chain(&policy.accept).find(|one| one.code == found.code) {
            found.accepted = Some(acceptance.reason.clone());
            used.push(&acceptance.place);
        }
    }
    // For another guest it may accept something.
    if policy.asks_cpuid() {
        return;
    }
    let depends_on_guest = |one: &Acceptance| matches!(one.code, Code::AllowsAbsent | Code::DeniesShown);
    let own = rules.iter().filter(|(_, rule)| rule.place.source == 0);
    let all = policy.accept.iter().chain(own.flat_map(|(_, rule)| &rule.accept));
    let idle = all.filter(|one| !used.contains(&&one.place) && !depends_on_guest(one));
    findings.extend(idle.map(|one| {
        let message = format!("there is no {} here to accept", one.code);
        Diagnostic::at(Code::AcceptsNothing, one.place.clone(), message)
            .help(format!("leave `{} = …` out of `accept`", one.code))
    }));
}
