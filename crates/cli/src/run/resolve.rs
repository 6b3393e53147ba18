//! What the policy is for a guest: said at the start, or resolved by the CPUID that its VMM sets.

use std::collections::BTreeMap;
use std::path::Path;

use msrgate_core::{Log, ReadAction, WriteAction};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_msrs::{Bypass, BypassKind, Linux};
use msrgate_plan::{AccessCount, CompileOptions, DecisionMap, Plan};
use msrgate_policy::{Policy, Provider};
use msrgate_supervise::{Leaf, Resolve};

use crate::args::{CpuidArgs, ProfileArgs};
use crate::exit::{Exit, Failure};
use crate::{cpuid, load, machine, trace};

/// What VMs begin with, and what becomes of them.
pub(crate) struct Resolved {
    pub(crate) map: DecisionMap,
    /// How the map is compiled.
    pub(crate) options: CompileOptions,
    /// Where the map is from, and the CPUID that it is for; `None` where it is not a policy's.
    from: Option<(Policy, Option<Cpuid>)>,
    /// Where the policy depends on a CPUID that the VMM will set: until then nothing is allowed.
    pub(crate) resolve: Option<Resolve>,
    /// Whether some rule wants its accesses told.
    pub(crate) logs: bool,
    /// Who answers for the handlers that the policy names.
    pub(crate) providers: BTreeMap<String, Provider>,
    /// How many rules the policy has.
    pub(crate) rules: usize,
}

impl Resolved {
    pub(crate) fn new(
        policy: Option<&Path>,
        cpuid: &CpuidArgs,
        profile: &ProfileArgs,
        ignore_unknown: bool,
    ) -> Result<Resolved, Failure> {
        let profile = trace::profile(profile)?;
        let Some(path) = policy else {
            return Ok(Resolved {
                map: completed(DecisionMap::allow_all(), ignore_unknown),
                options: CompileOptions::default(),
                from: None,
                resolve: None,
                logs: false,
                providers: BTreeMap::new(),
                rules: 0,
            });
        };
        let cpuid = cpuid::given(cpuid)?;
        Resolved::of(load::unresolved(path)?, cpuid, profile, ignore_unknown)
    }

    /// What a policy is, for a guest with this CPUID where it is said.
    pub(crate) fn of(
        policy: Policy,
        cpuid: Option<Cpuid>,
        profile: Vec<AccessCount>,
        ignore_unknown: bool,
    ) -> Result<Resolved, Failure> {
        let rules = policy.rules.len();
        let provider = |name: &str| {
            let provider = policy.providers.get(name).ok_or_else(|| needs_handler(name))?;
            Ok((name.to_owned(), provider.clone()))
        };
        let providers = policy.handlers().map(provider).collect::<Result<_, Failure>>()?;
        if cpuid.is_some() || !policy.asks_cpuid() {
            let map = load::map(&policy, cpuid.as_ref())?;
            let logs = map.reads().iter().any(|(_, decision)| is_told(decision.log))
                || map.writes().iter().any(|(_, decision)| is_told(decision.log));
            return Ok(Resolved {
                map: completed(map, ignore_unknown),
                options: policy.options().with_profile(profile),
                from: Some((policy, cpuid)),
                resolve: None,
                logs,
                providers,
                rules,
            });
        }
        Ok(Resolved {
            map: DecisionMap::deny_all(),
            options: CompileOptions::default(),
            from: None,
            logs: policy.rules.iter().any(|rule| is_told(rule.log)),
            resolve: Some(Box::new(move |leaves| {
                answer(&policy, ignore_unknown, &profile, leaves)
            })),
            providers,
            rules,
        })
    }

    /// Whether the policy decides every access, and leaves none to the kernel: then all of them are seen.
    pub(crate) fn is_whole(&self, plan: &Plan) -> bool {
        let reads = self
            .map
            .reads()
            .iter()
            .all(|(_, decision)| decision.action != ReadAction::Allow);
        let writes = self
            .map
            .writes()
            .iter()
            .all(|(_, decision)| decision.action != WriteAction::Allow);
        self.resolve.is_none() && plan.presets().is_empty() && reads && writes
    }

    /// What the kernel that runs here lets a guest do past the policy. A guest whose CPUID is not known yet may have all that
    /// KVM offers.
    pub(crate) fn gaps(&self) -> Vec<String> {
        let closes = self.map.allowed().iter().any(|(_, both)| *both != (true, true));
        let Some(kernel) = machine::linux().filter(|_| closes) else {
            return Vec::new();
        };
        let offered = || cpuid::host().unwrap_or_default();
        match &self.from {
            Some((_, Some(cpuid))) => gaps(kernel, || cpuid.clone()),
            _ => gaps(kernel, offered),
        }
    }

    /// The plan of the map, if `run` can carry it out; what is wrong with the policy is printed. Whether there is KVM is
    /// not asked: the VMM may not need it.
    pub(crate) fn plan(&self) -> Result<Plan, Failure> {
        match &self.from {
            Some((policy, cpuid)) => load::plan(policy, &self.map, &self.options, cpuid.as_ref()),
            None => compiled(&self.map, &self.options),
        }
    }
}

/// The gaps of a kernel that a guest with some feature can use.
fn gaps(kernel: Linux, guest: impl FnOnce() -> Cpuid) -> Vec<String> {
    let of_guests =
        |bypass: &&Bypass| bypass.kind == BypassKind::Kernel && bypass.guest.is_some() && bypass.is_of(kernel);
    let mut gaps = msrgate_msrs::bypasses().iter().filter(of_guests).peekable();
    if gaps.peek().is_none() {
        return Vec::new();
    }
    let guest = guest();
    let open = gaps.filter(|bypass| bypass.is_open_to(&guest));
    open.map(|bypass| format!("on Linux {kernel} {}", bypass.says))
        .collect()
}

fn compiled(map: &DecisionMap, options: &CompileOptions) -> Result<Plan, Failure> {
    Plan::compile_for(map, options).map_err(|error| Failure::Line(Exit::No, error.to_string()))
}

fn needs_handler(name: &str) -> Failure {
    Failure::input(format!(
        "the policy names the handler `{name}`, which is code of a VMM that links msrgate; for `run` say in the policy \
         which program answers: `[handlers]`, `{name} = {{ command = [\"PROGRAM\"] }}`"
    ))
}

fn completed(map: DecisionMap, ignore_unknown: bool) -> DecisionMap {
    match ignore_unknown {
        true => map.with_unknown((ReadAction::Value(0), WriteAction::Ignore)),
        false => map,
    }
}

/// What the policy is for a guest with these leaves; an error is one line for people.
fn answer(
    policy: &Policy,
    ignore_unknown: bool,
    profile: &[AccessCount],
    leaves: Vec<Leaf>,
) -> Result<(Plan, CompileOptions), String> {
    let map = policy.decision_map(Some(&Cpuid::from_entries(leaves)));
    let map = completed(map.map_err(|needed| needed.diagnostic().message)?, ignore_unknown);
    let options = policy.options().with_profile(profile.to_vec());
    Ok((
        compiled(&map, &options).map_err(|failure| failure.to_string())?,
        options,
    ))
}

/// Whether something is to be told of such accesses.
fn is_told(log: Log) -> bool {
    log != Log::None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_with_vmx_has_a_gap_on_some_kernels() {
        let guest = |vmx: u32| move || Cpuid::from_entries([(1, 0, [0, 0, vmx << 5, 0])]);
        assert_eq!(gaps(Linux(6, 1), guest(1)).len(), 1);
        assert!(gaps(Linux(6, 1), guest(1))[0].starts_with("on Linux 6.1 a guest with VMX"));
        assert!(gaps(Linux(6, 1), guest(0)).is_empty(), "it has no VMX");
        assert!(gaps(Linux(6, 12), || panic!("nobody is asked")).is_empty());
    }
}
