//! A case's policy, as far as each implementation needs it compiled.

use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::{DecisionMap, Plan};
use msrgate_policy::Policy;

use crate::{Case, Stop};

/// The policy of a case with all that comes of it.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    pub(crate) policy: Policy,
    pub(crate) map: DecisionMap,
    pub(crate) plan: Plan,
}

/// A case's CPUID.
pub(crate) fn cpuid(case: &Case) -> Result<Option<Cpuid>, Stop> {
    let text = case.cpuid.as_deref();
    text.map(Cpuid::parse_raw).transpose().map_err(Stop::fail)
}

/// The case's policy, or a skip where it has none.
pub(crate) fn compile_case(case: &Case) -> Result<Compiled, Stop> {
    match &case.policy {
        Some(text) => compile(text, cpuid(case)?.as_ref()),
        None => Err(Stop::skip("the case has no policy")),
    }
}

/// A policy that must compile.
pub(crate) fn compile(text: &str, cpuid: Option<&Cpuid>) -> Result<Compiled, Stop> {
    let policy = Policy::parse("case.toml", text).map_err(|rejected| {
        let messages: Vec<String> = rejected.diagnostics.into_iter().map(|found| found.message).collect();
        Stop::fail(format!("the policy is refused: {}", messages.join("; ")))
    })?;
    let map = policy.decision_map(cpuid).map_err(Stop::fail)?;
    let plan = Plan::compile_for(&map, &policy.options())
        .map_err(|error| Stop::fail(format!("the plan is refused: {error}")))?;
    Ok(Compiled { policy, map, plan })
}
