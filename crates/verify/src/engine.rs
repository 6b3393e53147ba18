//! The engine's VM, beside the live one.

use std::sync::Arc;

use msrgate_core::{Access, Disposition, Exit, Msr, Op, Outcome, Verdict};
use msrgate_engine::{Intercepts, Path, Profile, Step, Vcpu, Vm};

use crate::live::AccessResult;
use crate::unfiltered::Unfiltered;

/// What user space answers to an exit, and what a plan's table did, where one was asked.
pub(crate) type Answered = (Outcome, Option<Disposition>);

/// A VM of the engine with one vCPU.
pub(crate) struct Engine {
    pub(crate) vm: Arc<Vm>,
    vcpu: Vcpu,
}

impl Engine {
    pub(crate) fn new(profile: Profile) -> Engine {
        let vm = Arc::new(Vm::new().with_profile(profile));
        Engine {
            vcpu: Vcpu::new(Arc::clone(&vm), Intercepts::all()),
            vm,
        }
    }

    /// Whether the filter lets the kernel see the access.
    pub(crate) fn allows(&mut self, msr: Msr, op: Op) -> bool {
        self.vcpu.verdict(msr, op) == Verdict::Allow
    }

    /// What the access comes to; `None` where the MSRs behind the filter do what the engine has no word for.
    pub(crate) fn access(
        &mut self,
        access: Access,
        path: Path,
        unfiltered: &mut Unfiltered,
        answer: &mut dyn FnMut(Exit, &mut Unfiltered) -> Answered,
    ) -> Option<AccessResult> {
        unfiltered.take_unsayable();
        let step = self.vcpu.execute(access.into(), path, unfiltered).ok()?;
        if unfiltered.take_unsayable() {
            self.vcpu.complete(1, 0);
            return None;
        }
        let (reason, did, completion) = match step {
            Step::Complete(completion) => (0, None, completion),
            Step::Exit(exit) => {
                let (outcome, did) = answer(exit, unfiltered);
                (exit.reason as u32, did, self.vcpu.answer(outcome)?)
            }
            Step::Failed(_) | Step::EmulationFailed(_) => return None,
        };
        Some(AccessResult {
            reason,
            sees: completion.outcome(),
            did,
            odd: None,
        })
    }
}
