//! The bytes of plans.

use msrgate_plan::Plan;

use crate::agreement::holds;

pub(crate) fn check(bytes: &[u8]) {
    let Ok(plan) = Plan::from_bytes(bytes) else {
        return;
    };
    let mut written = plan.to_bytes();
    // Where there was no hash its flag is the last byte, and the plan gets one here.
    let hash = plan.hash().map_or(0, |hash| hash.len());
    if written.len() == bytes.len() + hash {
        written.truncate(bytes.len());
        written.pop();
        written.push(0);
    }
    assert_eq!(written, bytes);
    holds(&plan);
}
