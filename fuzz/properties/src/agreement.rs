//! Whether a decision map and its plan say the same.

use std::collections::BTreeSet;

use msrgate_core::{Msr, MsrRange, Op, Verdict};
use msrgate_plan::{CompileOptions, DecisionMap, Plan, PlanError};

/// The MSRs at and beside the ends of these ranges, and of those where every filter behaves in its own way.
pub(crate) fn around(ranges: impl IntoIterator<Item = MsrRange>) -> BTreeSet<Msr> {
    let ranges = ranges.into_iter().chain([MsrRange::ALL, MsrRange::X2APIC]);
    ranges
        .flat_map(|range| [range.first().0, range.last().0])
        .flat_map(|msr| [msr.saturating_sub(1), msr, msr.saturating_add(1)])
        .map(Msr)
        .collect()
}

/// Compiles the map and holds the plan against it. A map that fits no filter has no plan.
pub(crate) fn plan_is_map(map: &DecisionMap, options: &CompileOptions) {
    let plan = match Plan::compile_for(map, options) {
        Ok(plan) => plan,
        Err(PlanError::TooManyRanges { .. } | PlanError::Spill { .. } | PlanError::Table(_)) => return,
        Err(error) => panic!("{error}"),
    };
    assert_eq!(plan.hash(), Some(map.hash()));
    assert_eq!(plan.map(), map);
    holds(&plan);
    assert_eq!(Plan::from_bytes(&plan.to_bytes()), Ok(plan));
}

/// Holds the plan against its map.
pub(crate) fn holds(plan: &Plan) {
    let map = plan.map().with_presets(plan.presets());
    let reads = map.reads().iter().map(|(range, _)| range);
    let writes = map.writes().iter().map(|(range, _)| range);
    let slots = plan.filter().ranges().iter().filter_map(|range| range.span());
    for msr in around(reads.chain(writes).chain(slots)) {
        for op in Op::ALL {
            // What is spilled is allowed, and denied in the filter.
            let allows = map.allows(msr, op) && !plan.table().passes(msr, op);
            assert_eq!(plan.table().decides(msr, op), !allows, "the table at {op} {msr}");
            // No filter decides x2APIC's registers, and no range covers the last MSR.
            if !MsrRange::X2APIC.contains(msr) && msr != Msr::MAX {
                let allowed = plan.filter().verdict(msr, op) == Verdict::Allow;
                assert_eq!(allowed, allows, "the filter at {op} {msr}");
            }
        }
    }
}
