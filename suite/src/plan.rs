//! The plan: its filter, its reasons and its action table, with a kernel in between.

use msrgate_core::{Exit, Msr, Op, Outcome, Reason, VcpuState, Verdict};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;

use crate::compiled::{compile, compile_case, cpuid};
use crate::{AccessStep, Case, Implementation, Machine, Process, Seen, Stop, Subject};

/// What a plan's filter and action table do.
#[derive(Clone, Copy, Debug)]
pub struct Planned;

impl Implementation for Planned {
    fn name(&self) -> &str {
        "plan"
    }

    fn start(&self, case: &Case, _: Process) -> Result<Box<dyn Subject + '_>, Stop> {
        let plan = compile_case(case)?.plan;
        Ok(Box::new(Guest {
            cpuid: cpuid(case)?,
            state: plan.table().vcpu_state(),
            plan,
            machine: Machine::default(),
        }))
    }
}

struct Guest {
    cpuid: Option<Cpuid>,
    plan: Plan,
    state: VcpuState,
    machine: Machine,
}

/// The action that a plan has for an access: what its table says, or the kernel's own answer.
pub(crate) fn action(plan: &Plan, msr: Msr, op: Op) -> String {
    let found = match op {
        Op::Read => {
            let entry = plan.table().reads().iter().find(|entry| entry.range.contains(msr));
            entry.map(|entry| entry.action.to_string())
        }
        Op::Write => {
            let entry = plan.table().writes().iter().find(|entry| entry.range.contains(msr));
            entry.map(|entry| entry.action.to_string())
        }
    };
    found.unwrap_or_else(|| "allow".into())
}

impl Subject for Guest {
    fn access(&mut self, step: &AccessStep) -> Result<Seen, Stop> {
        let (msr, op) = (step.msr(), step.op());
        let verdict = self.plan.filter().verdict(msr, op);
        let result = match verdict {
            Verdict::Allow => self.machine.access(step.access),
            Verdict::Deny => Err(Reason::Filter),
        };
        let exit = result.err().filter(|reason| self.plan.reasons().contains(*reason));
        let sees = match (result, exit) {
            (Ok(outcome), _) => outcome,
            (Err(_), None) => Outcome::Fault,
            (Err(_), Some(reason)) => {
                let exit = Exit::new(step.access, reason);
                self.plan
                    .table()
                    .answer(exit, &mut self.state, &mut self.machine)
                    .outcome
            }
        };
        Ok(Seen {
            action: Some(action(&self.plan, msr, op)),
            verdict: Some(verdict),
            exit: Some(exit),
            sees: Some(sees),
        })
    }

    fn replace(&mut self, policy: &str) -> Result<(), Stop> {
        let next = compile(policy, self.cpuid.as_ref())?.plan;
        self.state = self.state.carried(self.plan.table(), next.table());
        self.plan = next;
        Ok(())
    }
}
