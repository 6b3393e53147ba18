//! The bytes of plans.

use msrgate_plan::Plan;

use crate::agreement::holds;

pub(crate) fn check(bytes: &[u8]) {
    let Ok(plan) = Plan::from_bytes(bytes) else {
        return;
    };
    assert_eq!(plan.to_bytes(), bytes);
    holds(&plan);
}
