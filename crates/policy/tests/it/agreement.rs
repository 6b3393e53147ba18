//! Whether the oracle, the decision map and the plan of a policy say the same.

use std::collections::BTreeSet;

use msrgate_core::{Msr, MsrRange, Op, Verdict};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::{DecisionMap, Plan};
use msrgate_policy::Policy;

/// Every MSR at which a policy, its map or its plan may change its mind, and the MSRs beside it.
fn boundaries(policy: &Policy, map: &DecisionMap, plan: Option<&Plan>) -> BTreeSet<Msr> {
    let rules = policy.rules.iter().flat_map(|rule| rule.ranges());
    let reads = map.reads().iter().map(|(range, _)| range);
    let writes = map.writes().iter().map(|(range, _)| range);
    let slots = plan.into_iter().flat_map(|plan| plan.filter().ranges());
    let slots = slots.filter_map(|range| range.span());
    let ranges = rules.chain(reads).chain(writes).chain(slots);
    let mut msrs = BTreeSet::new();
    for range in ranges.chain([MsrRange::ALL, MsrRange::X2APIC]) {
        for msr in [range.first(), range.last()] {
            msrs.extend([Msr(msr.0.saturating_sub(1)), msr, Msr(msr.0.saturating_add(1))]);
        }
    }
    msrs
}

/// That the map is what the oracle says, and the plan, where there is one, what the map says.
pub(crate) fn assert_agreement(policy: &Policy, cpuid: Option<&Cpuid>, map: &DecisionMap, plan: Option<&Plan>) {
    for msr in boundaries(policy, map, plan) {
        let (read, write) = (map.reads().get(msr), map.writes().get(msr));
        let said = policy.read(msr, cpuid).expect("a CPUID where one is needed");
        assert_eq!(said, (read.action.clone(), read.rule), "rdmsr {msr}");
        let said = policy.write(msr, cpuid).expect("a CPUID where one is needed");
        assert_eq!(said, (write.action.clone(), write.rule), "wrmsr {msr}");
        let Some(plan) = plan else { continue };
        for op in Op::ALL {
            // What is spilled is allowed, and denied in the filter.
            let allows = map.allows(msr, op) && !plan.table().passes(msr, op);
            assert_eq!(plan.table().decides(msr, op), !allows, "the table at {op} {msr}");
            if !MsrRange::X2APIC.contains(msr) && msr != Msr::MAX {
                let allowed = plan.filter().verdict(msr, op) == Verdict::Allow;
                assert_eq!(allowed, allows, "the filter at {op} {msr}");
            }
        }
    }
}
