//! A replayed guest on the engine, with MSRs that answer as the trace says.

use std::collections::HashMap;
use std::sync::Arc;

use msrgate_core::{Access, Event, FaultCause, Msr, MsrBackend, Op, Reason, VcpuState};
use msrgate_engine::{Intercepts, Msrs, Path, Refusal, Step, Vcpu, Vm};
use msrgate_plan::Plan;

use super::machine::{AccessResult, Machine};
use crate::exit::{Exit, Failure};

/// One vCPU of the engine.
pub(crate) struct Guest {
    vcpu: Vcpu,
    /// What the plan's MSRs remember, where there is a plan.
    state: Option<VcpuState>,
    kernel: Recorded,
}

impl Guest {
    pub(crate) fn new(plan: Option<&Arc<Plan>>) -> Guest {
        let vm = Arc::new(Vm::new());
        if let Some(plan) = plan {
            vm.install(plan.filter().clone(), plan.reasons(), plan.table().clone());
        }
        Guest {
            vcpu: Vcpu::new(vm, Intercepts::all()),
            state: plan.map(|plan| plan.table().vcpu_state()),
            kernel: Recorded::default(),
        }
    }

    fn access(&mut self, event: &Event) -> Result<AccessResult, Failure> {
        self.kernel.now = Some(*event);
        let access = match event.op {
            Op::Read => Access::Read { msr: event.msr },
            Op::Write => Access::Write {
                msr: event.msr,
                value: event.value,
            },
        };
        let impossible = |what: &str| Failure::Line(Exit::Guest, format!("the engine's guest is stuck: {what}"));
        let step = self
            .vcpu
            .execute(access.into(), Path::VmExit, &mut self.kernel)
            .map_err(|pending| impossible(&pending.to_string()))?;
        let (completion, answer) = match step {
            Step::Complete(completion) => (completion, None),
            Step::Exit(exit) => {
                let (Some(table), Some(state)) = (self.vcpu.table(), &mut self.state) else {
                    return Err(impossible("an exit without a policy"));
                };
                let (completion, answer) = match exit.access {
                    Access::Read { msr } => {
                        let answer = table.read(msr, exit.reason, state, &mut self.kernel);
                        (self.vcpu.answer_read(answer.outcome), answer.seen())
                    }
                    Access::Write { msr, value } => {
                        let answer = table.write(msr, value, exit.reason, state, &mut self.kernel);
                        (self.vcpu.answer_write(answer.outcome), answer.seen())
                    }
                };
                (
                    completion.ok_or_else(|| impossible("nothing is pending"))?,
                    Some(answer),
                )
            }
            Step::Failed(errno) | Step::EmulationFailed(errno) => return Err(impossible(&format!("{errno:?}"))),
        };
        Ok(AccessResult {
            outcome: completion.outcome(),
            answer,
        })
    }
}

impl Machine for Guest {
    fn run(&mut self, events: &[Event], got: &mut Vec<AccessResult>) -> Result<(), Failure> {
        for event in events {
            got.push(self.access(event)?);
        }
        Ok(())
    }
}

/// A kernel that answers each access as the trace says that it was answered.
#[derive(Default)]
struct Recorded {
    now: Option<Event>,
    /// What each MSR held last: the host's view, for actions that ask for it.
    held: HashMap<Msr, u64>,
}

impl Recorded {
    fn answer(&mut self, msr: Msr) -> Result<u64, Refusal> {
        let Some(event) = self.now.filter(|event| event.msr == msr) else {
            return Err(Refusal::Unknown);
        };
        if event.did.is_fault() {
            return Err(match event.reason {
                Some(Reason::Invalid) => Refusal::Invalid,
                _ => Refusal::Unknown,
            });
        }
        self.held.insert(msr, event.value);
        Ok(event.value)
    }
}

impl Msrs for Recorded {
    fn read(&mut self, msr: Msr) -> Result<u64, Refusal> {
        self.answer(msr)
    }

    fn write(&mut self, msr: Msr, _: u64) -> Result<(), Refusal> {
        self.answer(msr).map(|_| ())
    }
}

impl MsrBackend for Recorded {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        match self.now {
            // A write says nothing of what was there before.
            Some(Event { op: Op::Write, .. }) => Ok(self.held.get(&msr).copied().unwrap_or(0)),
            _ => self.answer(msr).map_err(|_| FaultCause::KernelRefused),
        }
    }

    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause> {
        self.answer(msr).map_err(|_| FaultCause::KernelRefused)?;
        self.held.insert(msr, value);
        Ok(())
    }

    fn host_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::HostUnreadable)
    }

    fn handler_read(&mut self, _: &str, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::NoHandler)
    }

    fn handler_write(&mut self, _: &str, _: Msr, _: u64) -> Result<(), FaultCause> {
        Err(FaultCause::NoHandler)
    }
}

#[cfg(test)]
mod tests {
    use msrgate_core::{Disposition, Nanos, Outcome};
    use msrgate_policy::Policy;

    use super::*;

    fn event(op: Op, msr: u32, value: u64, did: Disposition) -> Event {
        Event {
            t: Nanos(0),
            vm: 0,
            vcpu: 0,
            op,
            msr: Msr(msr),
            value,
            reason: None,
            did,
            why: None,
            would: None,
            rule: None,
            rip: None,
            within: None,
            cost: None,
        }
    }

    #[test]
    fn without_a_policy_the_guest_gets_what_the_trace_says() {
        let events = [
            event(Op::Read, 0x10, 7, Disposition::Pass),
            event(Op::Read, 0x11, 0, Disposition::Fault),
            event(Op::Write, 0x10, 8, Disposition::Pass),
        ];
        let mut got = Vec::new();
        Guest::new(None).run(&events, &mut got).unwrap();
        let outcomes: Vec<Outcome> = got.iter().map(|got| got.outcome).collect();
        assert_eq!(outcomes, [Outcome::Value(7), Outcome::Fault, Outcome::Done]);
    }

    #[test]
    fn under_a_policy_the_table_answers_what_the_filter_denies() {
        let policy = Policy::parse(
            "p.toml",
            "version = 1\ndefault = \"allow\"\nunknown = \"ignore\"\n[[rule]]\nmsr = 0x10\nread = { mask = { keep = 0xf } }\nwrite = \"deny\"\n",
        )
        .unwrap();
        let plan = Arc::new(Plan::compile(&policy.decision_map(None).unwrap()).unwrap());
        let events = [
            event(Op::Read, 0x10, 0x77, Disposition::Pass),
            event(Op::Write, 0x10, 1, Disposition::Pass),
            event(Op::Read, 0x11, 0, Disposition::Fault),
        ];
        let mut got = Vec::new();
        Guest::new(Some(&plan)).run(&events, &mut got).unwrap();
        let outcomes: Vec<Outcome> = got.iter().map(|got| got.outcome).collect();
        assert_eq!(outcomes, [Outcome::Value(7), Outcome::Fault, Outcome::Value(0)]);
        assert_eq!(got[2].answer.unwrap().did, Disposition::Zero);
    }
}
