//! From one access back to the rule that decides it.

use msrgate_core::{DecidedBy, Msr, MsrRange, Op, Reason, Verdict};
use msrgate_plan::{CompileOptions, DecisionMap, Plan};

use crate::{Policy, Rule};

/// Why an access gets what it gets.
#[derive(Clone, PartialEq, Debug)]
pub struct Explanation<'a> {
    /// The register.
    pub msr: Msr,
    /// The direction.
    pub op: Op,
    /// The action's word.
    pub action: &'static str,
    /// The action with what it is given, for people.
    pub action_text: String,
    /// The rule that decides and its number, or `None` for the default.
    pub rule: Option<(u32, &'a Rule)>,
    /// The filter's word.
    pub verdict: Verdict,
    /// What gave it.
    pub decider: DecidedBy,
    /// What the guest gets, in a sentence.
    pub sees: String,
    /// Whether the access leaves the kernel for user space.
    pub exits: bool,
    /// How often the profile has the access; `None` where there is no profile.
    pub touches: Option<u64>,
}

/// Explains one access under a policy, its decision map and the plan that it was compiled to so.
pub fn explain<'a>(
    policy: &'a Policy,
    map: &DecisionMap,
    options: &CompileOptions,
    plan: &Plan,
    (msr, op): (Msr, Op),
) -> Explanation<'a> {
    let (verdict, decider) = plan.filter().decide(msr, op);
    let (action, action_text, rule) = match op {
        Op::Read => {
            let decision = map.reads().get(msr);
            (decision.action.name(), decision.action.to_string(), decision.rule)
        }
        Op::Write => {
            let decision = map.writes().get(msr);
            (decision.action.name(), decision.action.to_string(), decision.rule)
        }
    };
    let exits = verdict == Verdict::Deny && plan.reasons().contains(Reason::Filter);
    let by_number = |number: u32| Some((number, policy.rules.get(usize::try_from(number).ok()?)?));
    Explanation {
        msr,
        op,
        action,
        sees: match plan.presets().iter().find(|preset| preset.msr == msr && op == Op::Read) {
            Some(preset) => format!("{:#x}, which the kernel holds: a preset", preset.value),
            None => sees(plan, (msr, op), verdict, decider, action, &action_text),
        },
        action_text,
        rule: rule.and_then(by_number),
        verdict,
        decider,
        exits,
        touches: options.touches(MsrRange::single(msr), op),
    }
}

fn sees(
    plan: &Plan,
    (msr, op): (Msr, Op),
    verdict: Verdict,
    decider: DecidedBy,
    action: &str,
    action_text: &str,
) -> String {
    if verdict == Verdict::Allow {
        let kernel = match op {
            Op::Read => "the kernel's own answer",
            Op::Write => "the kernel carries the write out",
        };
        if decider == DecidedBy::X2apic && action != "allow" {
            return format!("{kernel}: no filter stops x2APIC, whatever the policy says");
        }
        let reasons = [
            (Reason::Unknown, plan.table().unknown(), "does not know it"),
            (Reason::Invalid, plan.table().invalid(), "refuses it"),
        ];
        let mut sentence = kernel.to_owned();
        for (reason, (read, write), when) in reasons {
            if plan.reasons().contains(reason) {
                let then = match op {
                    Op::Read => read.to_string(),
                    Op::Write => write.to_string(),
                };
                sentence.push_str(&format!("; `{then}` where the kernel {when}"));
            }
        }
        return sentence;
    }
    let passed = plan.table().passes(msr, op);
    let text = match (action, op) {
        ("allow", _) if passed => "the kernel's own answer, which user space passes on: the filter has no room for it",
        ("allow", _) => "#GP(0): no range can cover this MSR, so the filter's default denies it",
        ("deny", _) => "#GP(0)",
        ("zero", _) => "0x0",
        ("value", _) => return action_text.trim_start_matches("value ").to_owned(),
        ("ignore", _) => "the write goes nowhere, and the guest goes on",
        ("shadow", Op::Read) => "what this vCPU last wrote",
        ("shadow", Op::Write) => "kept for this vCPU's reads; the hardware never sees it",
        ("mask", Op::Read) => "the kernel's value through a mask",
        ("mask", Op::Write) => "only the bits of the mask reach the kernel's register",
        ("host", _) => "the physical CPU's value",
        ("only", _) => "the listed values reach the kernel's register; another is #GP(0)",
        ("once", _) => "the first write of each vCPU reaches the kernel's register; later ones are #GP(0)",
        _ => "what the named handler answers",
    };
    text.to_owned()
}
