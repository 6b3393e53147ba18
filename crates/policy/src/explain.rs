//! From one access back to the rule that decides it.

use std::fmt;

use msrgate_core::{Action, DecidedBy, Msr, MsrRange, Op, ReadAction, Reason, Verdict};
use msrgate_msrs::Entry;
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::{CompileOptions, Plan};

use crate::{Policy, Rule};

/// Why an access gets what it gets.
#[derive(Clone, PartialEq, Debug)]
pub struct Explanation<'a> {
    /// The register.
    pub msr: Msr,
    /// The direction.
    pub op: Op,
    /// What the policy says.
    pub action: Action,
    /// What of the policy says so.
    pub cause: Cause<'a>,
    /// The filter's word.
    pub verdict: Verdict,
    /// What gave it.
    pub decider: DecidedBy,
    /// What the guest gets.
    pub sees: Sees,
    /// Whether the access leaves the kernel for user space.
    pub exits: bool,
    /// How often the profile has the access; `None` where there is no profile.
    pub touches: Option<u64>,
}

/// What of a policy decides an access.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub enum Cause<'a> {
    /// This rule, and its number.
    Rule(u32, &'a Rule),
    /// `valid = "cpu-model"`: by the guest's CPUID this MSR is not there.
    Valid(&'static Entry),
    /// The default.
    Default,
}

impl<'a> Cause<'a> {
    /// The rule and its number, if it is one.
    pub fn rule(self) -> Option<(u32, &'a Rule)> {
        match self {
            Cause::Rule(number, rule) => Some((number, rule)),
            Cause::Valid(_) | Cause::Default => None,
        }
    }
}

/// What the guest gets; as a sentence for people.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Sees {
    /// This value, which is put into the kernel's register before the guest runs.
    Preset(u64),
    /// What the kernel answers to the direction, whatever the policy says: no filter stops x2APIC.
    Unfiltered(Op),
    /// What the kernel answers to the direction, and what user space answers for each reason why the kernel would not.
    Kernel(Op, Vec<(Reason, Action)>),
    /// What the kernel answers, from user space: the filter has no room for it.
    PassedOn,
    /// #GP(0), where the policy allows: no range can cover the MSR.
    Uncovered,
    /// What the action gives.
    Action(Action),
}

impl fmt::Display for Sees {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernels = |op: &Op| match op {
            Op::Read => "the kernel's own answer",
            Op::Write => "the kernel carries the write out",
        };
        match self {
            Sees::Preset(value) => write!(f, "{value:#x}, which the kernel holds: a preset"),
            Sees::Unfiltered(op) => write!(f, "{}: no filter stops x2APIC, whatever the policy says", kernels(op)),
            Sees::Kernel(op, declined) => {
                f.write_str(kernels(op))?;
                for (reason, action) in declined {
                    let when = match reason {
                        Reason::Unknown => "does not know it",
                        Reason::Invalid | Reason::Filter => "refuses it",
                    };
                    write!(f, "; `{action}` where the kernel {when}")?;
                }
                Ok(())
            }
            Sees::PassedOn => {
                f.write_str("the kernel's own answer, which user space passes on: the filter has no room for it")
            }
            Sees::Uncovered => f.write_str("#GP(0): no range can cover this MSR, so the filter's default denies it"),
            Sees::Action(Action::Read(ReadAction::Value(value))) => write!(f, "{value:#x}"),
            Sees::Action(action) => f.write_str(action.meaning()),
        }
    }
}

/// Explains one access under a policy and the plan that it was compiled to, so, for a guest with this CPUID.
pub fn explain<'a>(
    policy: &'a Policy,
    cpuid: Option<&Cpuid>,
    options: &CompileOptions,
    plan: &Plan,
    (msr, op): (Msr, Op),
) -> Explanation<'a> {
    let map = plan.map();
    let (verdict, decider) = plan.filter().decide(msr, op);
    let (action, rule) = match op {
        Op::Read => {
            let decision = map.reads().get(msr);
            (Action::Read(decision.action.clone()), decision.rule)
        }
        Op::Write => {
            let decision = map.writes().get(msr);
            (Action::Write(decision.action.clone()), decision.rule)
        }
    };
    let exits = verdict == Verdict::Deny && plan.reasons().contains(Reason::Filter);
    let by_number = |number: u32| Some(Cause::Rule(number, policy.rules.get(usize::try_from(number).ok()?)?));
    let lacking = || msrgate_msrs::by_msr(msr).filter(|_| policy.lacks(msr, cpuid));
    let preset = plan.presets().iter().find(|preset| preset.msr == msr && op == Op::Read);
    let is_allowed = action.did().is_kernels();
    let sees = match (preset, verdict) {
        (Some(preset), _) => Sees::Preset(preset.value),
        (None, Verdict::Allow) if decider == DecidedBy::X2apic && !is_allowed => Sees::Unfiltered(op),
        (None, Verdict::Allow) => Sees::Kernel(op, declined(plan, op)),
        (None, Verdict::Deny) if !is_allowed => Sees::Action(action.clone()),
        (None, Verdict::Deny) if plan.table().passes(msr, op) => Sees::PassedOn,
        (None, Verdict::Deny) => Sees::Uncovered,
    };
    Explanation {
        msr,
        op,
        action,
        cause: rule
            .and_then(by_number)
            .or_else(|| lacking().map(Cause::Valid))
            .unwrap_or(Cause::Default),
        verdict,
        decider,
        sees,
        exits,
        touches: options.touches(MsrRange::single(msr), op),
    }
}

/// What user space answers where the kernel does not know an MSR or refuses an access.
fn declined(plan: &Plan, op: Op) -> Vec<(Reason, Action)> {
    let reasons = [
        (Reason::Unknown, plan.table().unknown()),
        (Reason::Invalid, plan.table().invalid()),
    ];
    let asked = reasons
        .into_iter()
        .filter(|(reason, _)| plan.reasons().contains(*reason));
    asked.map(|(reason, pair)| (reason, Action::either(pair, op))).collect()
}
