//! The policy itself: a loop over its rules, and the plainest reading of its actions.

use std::collections::{BTreeMap, BTreeSet};

use msrgate_core::{Access, Msr, MsrRange, OnLockedBits, Op, Outcome, ReadAction, Reason, Verdict, WriteAction};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_policy::Policy;

use crate::compiled::{compile, compile_case, cpuid};
use crate::{AccessStep, Case, Implementation, Machine, Process, Seen, Stop, Subject};

/// What the policy's text says, by [`Policy::read`] and [`Policy::write`]. Knows no filter, so it leaves open which
/// denied accesses exit.
#[derive(Clone, Copy, Debug)]
pub struct Oracle;

impl Implementation for Oracle {
    fn name(&self) -> &str {
        "oracle"
    }

    fn start(&self, case: &Case, _: Process) -> Result<Box<dyn Subject + '_>, Stop> {
        Ok(Box::new(Guest {
            policy: compile_case(case)?.policy,
            cpuid: cpuid(case)?,
            machine: Machine::default(),
            shadows: BTreeMap::new(),
            written: BTreeSet::new(),
        }))
    }
}

struct Guest {
    policy: Policy,
    cpuid: Option<Cpuid>,
    machine: Machine,
    shadows: BTreeMap<Msr, u64>,
    /// MSRs that have had their one write.
    written: BTreeSet<Msr>,
}

impl Subject for Guest {
    fn access(&mut self, step: &AccessStep) -> Result<Seen, Stop> {
        let (read, write) = actions(&self.policy, self.cpuid.as_ref(), step.msr())?;
        let (action, allowed, needs_exit) = match step.op() {
            Op::Read => (read.to_string(), read == ReadAction::Allow, read.needs_exit()),
            Op::Write => (write.to_string(), write == WriteAction::Allow, write.needs_exit()),
        };
        let mut seen = Seen {
            action: Some(action),
            ..Seen::default()
        };
        if step.msr() == Msr::MAX {
            // Gets whatever the planner took for the filter's default.
            return Ok(seen);
        }
        if !allowed && !MsrRange::X2APIC.contains(step.msr()) {
            seen.verdict = Some(Verdict::Deny);
            seen.exit = needs_exit.then_some(Some(Reason::Filter));
            seen.sees = self.carry_out(step.access, &read, &write);
            return Ok(seen);
        }
        seen.verdict = Some(Verdict::Allow);
        let reason = match self.machine.access(step.access) {
            Ok(outcome) => {
                seen.exit = Some(None);
                seen.sees = Some(outcome);
                return Ok(seen);
            }
            Err(reason) => reason,
        };
        let fallback = match reason {
            Reason::Unknown => self.policy.unknown.clone(),
            _ => self.policy.invalid.clone(),
        };
        let kernels = (ReadAction::Deny, WriteAction::Deny);
        seen.exit = Some((fallback != kernels).then_some(reason));
        seen.sees = self.carry_out(step.access, &fallback.0, &fallback.1);
        Ok(seen)
    }

    fn replace(&mut self, policy: &str) -> Result<(), Stop> {
        let next = compile(policy, self.cpuid.as_ref())?.policy;
        // An MSR goes on remembering where it remembers under both.
        let kept = |msr: Msr| {
            let (before, after) = (has_emulated_state(&self.policy, msr), has_emulated_state(&next, msr));
            before == after && (before || spare(&self.policy) && spare(&next))
        };
        self.shadows.retain(|msr, _| kept(*msr));
        self.written.retain(|msr| kept(*msr));
        self.policy = next;
        Ok(())
    }
}

fn actions(policy: &Policy, cpuid: Option<&Cpuid>, msr: Msr) -> Result<(ReadAction, WriteAction), Stop> {
    let (read, _) = policy.read(msr, cpuid).map_err(Stop::fail)?;
    let (write, _) = policy.write(msr, cpuid).map_err(Stop::fail)?;
    Ok((read, write))
}

/// Whether a rule gives the MSR a state of its own.
fn has_emulated_state(policy: &Policy, msr: Msr) -> bool {
    actions(policy, None, msr).is_ok_and(|(read, write)| {
        matches!(read, ReadAction::Shadow(_)) || matches!(write, WriteAction::Shadow | WriteAction::Once)
    })
}

/// Whether MSRs that no rule gives a state may have one.
fn spare(policy: &Policy) -> bool {
    [&policy.unknown, &policy.invalid]
        .iter()
        .any(|(read, write)| matches!(read, ReadAction::Shadow(_)) || *write == WriteAction::Shadow)
}

impl Guest {
    /// `None` where it depends on the machine.
    fn carry_out(&mut self, access: Access, read: &ReadAction, write: &WriteAction) -> Option<Outcome> {
        match access {
            Access::Read { msr } => self.read(msr, read),
            Access::Write { msr, value } => Some(self.write(msr, value, write)),
        }
    }

    fn read(&mut self, msr: Msr, action: &ReadAction) -> Option<Outcome> {
        Some(match action {
            ReadAction::Allow | ReadAction::Deny => Outcome::Fault,
            ReadAction::Value(value) => Outcome::Value(*value),
            ReadAction::Shadow(initial) => Outcome::Value(*self.shadows.get(&msr).unwrap_or(initial)),
            ReadAction::Mask { keep, set } => match self.machine.access(Access::Read { msr }) {
                Ok(Outcome::Value(value)) => Outcome::Value((value & keep) | set),
                _ => Outcome::Fault,
            },
            ReadAction::Host => return None,
            ReadAction::Handler(name) if **name == *Machine::HANDLER => Machine::handler(Access::Read { msr }),
            ReadAction::Handler(_) => Outcome::Fault,
        })
    }

    fn write(&mut self, msr: Msr, value: u64, action: &WriteAction) -> Outcome {
        match action {
            WriteAction::Allow | WriteAction::Deny => Outcome::Fault,
            WriteAction::Ignore => Outcome::Done,
            WriteAction::Shadow => {
                self.shadows.insert(msr, value);
                Outcome::Done
            }
            WriteAction::Mask { may_change, otherwise } => {
                let Ok(Outcome::Value(old)) = self.machine.access(Access::Read { msr }) else {
                    return Outcome::Fault;
                };
                let new = (old & !may_change) | (value & may_change);
                if *otherwise == OnLockedBits::Deny && new != value {
                    return Outcome::Fault;
                }
                self.kernel(msr, new)
            }
            WriteAction::Only(values) => {
                if !values.contains(&value) {
                    return Outcome::Fault;
                }
                self.kernel(msr, value)
            }
            WriteAction::Once => {
                if self.written.contains(&msr) {
                    return Outcome::Fault;
                }
                let outcome = self.kernel(msr, value);
                if outcome == Outcome::Done {
                    self.written.insert(msr);
                }
                outcome
            }
            WriteAction::Handler(name) if **name == *Machine::HANDLER => Machine::handler(Access::Write { msr, value }),
            WriteAction::Handler(_) => Outcome::Fault,
        }
    }

    fn kernel(&mut self, msr: Msr, value: u64) -> Outcome {
        self.machine
            .access(Access::Write { msr, value })
            .unwrap_or(Outcome::Fault)
    }
}
