//! The text of policies.

use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::{DecisionMap, Plan};
use msrgate_policy::{Policy, PolicyErrors, Severity, check as findings, explain};

use crate::agreement::{around, plan_is_map};

pub(crate) fn check(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match Policy::parse("policy.toml", &text) {
        Ok(policy) => means_the_same_in_every_form(&policy),
        Err(rejected) => is_well_formed(&rejected),
    }
}

/// A refusal names errors, and places that are there.
fn is_well_formed(rejected: &PolicyErrors) {
    assert!(!rejected.diagnostics.is_empty(), "refused for no reason");
    for found in &rejected.diagnostics {
        assert_eq!(found.severity(), Severity::Error, "{found:?}");
        let second = found.second.as_ref().map(|(place, _)| place);
        for place in found.place.iter().chain(second) {
            let text = rejected.sources.get(place.source).map(|source| source.text());
            assert!(
                text.is_some_and(|text| text.get(place.span.clone()).is_some()),
                "{found:?} has no place in {text:?}"
            );
        }
    }
}

fn means_the_same_in_every_form(policy: &Policy) {
    let printed = policy.to_string();
    let again = match Policy::parse("printed.toml", &printed) {
        Ok(again) => again,
        Err(rejected) => panic!("{printed}\ndoes not read back: {:?}", rejected.diagnostics),
    };
    assert_eq!(again, *policy, "{printed}");
    for cpuid in guests() {
        let cpuid = policy.asks_cpuid().then_some(&cpuid);
        let map = policy
            .decision_map(cpuid)
            .expect("a CPUID is there where one is needed");
        assert_eq!(
            again.decision_map(cpuid).map(|map| map.hash()),
            Ok(map.hash()),
            "{printed}"
        );
        map_is_oracle(policy, &map, cpuid);
        plan_is_map(&map, &policy.options());
        let _ = findings(policy, &map, cpuid);
        if let Ok(plan) = Plan::compile_for(&map, &policy.options()) {
            for op in msrgate_core::Op::ALL {
                let _ = explain(policy, cpuid, &policy.options(), &plan, (msrgate_core::Msr(0x8b), op));
            }
        }
        if cpuid.is_none() {
            break;
        }
    }
}

/// A map gives each access what a loop over the rules gives it.
fn map_is_oracle(policy: &Policy, map: &DecisionMap, cpuid: Option<&Cpuid>) {
    let rules = policy.rules.iter().flat_map(|rule| rule.ranges());
    let reads = map.reads().iter().map(|(range, _)| range);
    let writes = map.writes().iter().map(|(range, _)| range);
    for msr in around(rules.chain(reads).chain(writes)) {
        let (read, write) = (map.reads().get(msr), map.writes().get(msr));
        let said = policy.read(msr, cpuid).expect("a CPUID is there where one is needed");
        assert_eq!(said, (read.action.clone(), read.rule), "rdmsr {msr}");
        let said = policy.write(msr, cpuid).expect("a CPUID is there where one is needed");
        assert_eq!(said, (write.action.clone(), write.rule), "wrmsr {msr}");
    }
}

/// A guest of Intel's with much, and one of AMD's with little.
fn guests() -> [Cpuid; 2] {
    let guest = |[ebx, ecx, edx]: [u32; 3], version, features| {
        Cpuid::from_entries([
            (0, 0, [0x16, ebx, ecx, edx]),
            (1, 0, [version, 0, features, features]),
            (7, 0, [0, features, features, features]),
            (0x8000_0001, 0, [0, 0, features, features]),
        ])
    };
    [
        guest([0x756e_6547, 0x6c65_746e, 0x4965_6e69], 0x806f8, u32::MAX),
        guest([0x6874_7541, 0x444d_4163, 0x6974_6e65], 0xa00f11, 0x20),
    ]
}
