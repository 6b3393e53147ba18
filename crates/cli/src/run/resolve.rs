//! What the policy is for a guest: said at the start, or asked for by its VMM's CPUID.

use std::io;

use msrgate_core::{Log, ReadAction, WriteAction};
use msrgate_hook::{Board, Leaf};
use msrgate_plan::{DecisionMap, Plan, Touched};
use msrgate_policy::Policy;
use msrgate_policy::cpuid::Cpuid;
use nix::sys::signal::{SigSet, SigmaskHow};

use crate::args::RunArgs;
use crate::exit::{Exit, Failure};
use crate::load;

/// What VMs begin with, and what becomes of them.
pub(crate) struct Resolved {
    pub(crate) map: DecisionMap,
    /// The policy, where it depends on a CPUID that the VMM will set: until then nothing is allowed.
    pub(crate) by_cpuid: Option<Policy>,
    ignore_unknown: bool,
    profile: Vec<Touched>,
}

impl Resolved {
    pub(crate) fn new(args: &RunArgs) -> Result<Resolved, Failure> {
        let ignore_unknown = args.ignore_unknown;
        let profile = load::profile(&args.profile)?;
        let known = |map| Resolved {
            map: completed(map, ignore_unknown),
            by_cpuid: None,
            ignore_unknown,
            profile: Vec::new(),
        };
        let Some(path) = &args.policy else {
            return Ok(known(DecisionMap::allow_all()));
        };
        let cpuid = load::cpuid(&args.cpuid)?;
        let policy = load::unresolved(path)?;
        if cpuid.is_some() || !policy.asks_cpuid() {
            return Ok(known(load::policy_or_report(path, cpuid.as_ref(), &profile)?.map));
        }
        if let Some(name) = policy.handlers().next() {
            return Err(needs_handler(name));
        }
        Ok(Resolved {
            map: DecisionMap::deny_all(),
            by_cpuid: Some(policy),
            ignore_unknown,
            profile,
        })
    }

    /// Whether some rule wants its accesses told.
    pub(crate) fn logs(&self) -> bool {
        match &self.by_cpuid {
            Some(policy) => policy.rules.iter().any(|rule| rule.log != Log::None),
            None => {
                let mut reads = self.map.reads.iter().map(|(_, decision)| decision.log);
                let mut writes = self.map.writes.iter().map(|(_, decision)| decision.log);
                reads.any(|log| log != Log::None) || writes.any(|log| log != Log::None)
            }
        }
    }

    /// Has a thread answer what the policy is for each guest's CPUID, as long as this process lives.
    pub(crate) fn serve(self, board: &Board) -> io::Result<()> {
        let Some(policy) = self.by_cpuid else { return Ok(()) };
        let desk = board.desk()?;
        // Signals are for the thread that waits for them.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let serving = move || desk.serve(&|leaves| answer(&policy, self.ignore_unknown, &self.profile, leaves));
        let started = std::thread::Builder::new().name("policy".to_owned()).spawn(serving);
        before.thread_set_mask()?;
        started.map(drop)
    }
}

/// The plan, if `run` can carry it out. Whether there is KVM is not asked: the VMM may not need it.
pub(crate) fn plan(map: &DecisionMap) -> Result<Plan, Failure> {
    let plan = Plan::compile(map).map_err(|error| Failure::Line(Exit::No, error.to_string()))?;
    let refused = plan.table().handlers().next().map(needs_handler);
    refused.map_or(Ok(plan), Err)
}

fn needs_handler(name: &str) -> Failure {
    Failure::input(format!(
        "the policy names the handler `{name}`, which is code of a VMM: one that links msrgate can have it, `run` \
         cannot; give the rule another action"
    ))
}

fn completed(mut map: DecisionMap, ignore_unknown: bool) -> DecisionMap {
    if ignore_unknown {
        map.unknown = (ReadAction::Value(0), WriteAction::Ignore);
    }
    map
}

/// What the policy is for a guest with these leaves, for the library; an error is one line for people.
fn answer(policy: &Policy, ignore_unknown: bool, profile: &[Touched], leaves: Vec<Leaf>) -> Result<Vec<u8>, String> {
    let map = policy.decision_map(Some(&Cpuid::from_entries(leaves)));
    let map = completed(map.map_err(|needed| needed.diagnostic().message)?, ignore_unknown);
    let map = map.with_profile(profile.to_vec());
    plan(&map).map_err(|failure| failure.to_string())?;
    Ok(map.to_bytes())
}
