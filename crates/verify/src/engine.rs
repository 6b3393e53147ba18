//! The engine's VM, beside the live one.

use std::sync::Arc;

use msrgate_core::{Access, Did, Exit, Msr, Op, Outcome, Verdict};
use msrgate_engine::{
    Caller, Completion, Descriptor, Errno, Fault, Instruction, Intercepts, Path, Process, Profile, Step, Vcpu, Vm,
    Written,
};
use msrgate_guest::raw::{Arena, Request};

use crate::live::Got;
use crate::unfiltered::Unfiltered;

/// What user space answers to an exit, and what a plan's table did, where one was asked.
pub(crate) type Answered = (Outcome, Option<Did>);

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
    ) -> Option<Got> {
        unfiltered.take_unsayable();
        // The upper halves do not count.
        let rcx = 0xdead_beef << 32 | u64::from(access.msr().0);
        let instruction = match access {
            Access::Read { .. } => Instruction::Rdmsr { rcx },
            Access::Write { value, .. } => Instruction::Wrmsr {
                rcx,
                rax: value & 0xffff_ffff,
                rdx: value >> 32,
            },
        };
        let step = self.vcpu.execute(instruction, path, unfiltered).ok()?;
        if unfiltered.take_unsayable() {
            self.vcpu.complete(1, 0);
            return None;
        }
        let (reason, did, completion) = match step {
            Step::Complete(completion) => (0, None, completion),
            Step::Exit(exit) => {
                let (outcome, did) = answer(exit, unfiltered);
                let completion = match outcome {
                    Outcome::Value(value) => self.vcpu.answer_read(Ok(value)),
                    Outcome::Done => self.vcpu.answer_write(Ok(())),
                    Outcome::Fault => self.vcpu.complete(1, 0),
                };
                (exit.reason as u32, did, completion?)
            }
            Step::Failed(_) | Step::EmulationFailed(_) => return None,
        };
        Some(Got {
            reason,
            sees: outcome(completion),
            did,
            odd: None,
        })
    }
}

fn outcome(completion: Completion) -> Outcome {
    match completion {
        Completion::Fault => Outcome::Fault,
        Completion::Done { written, .. } => match written {
            Written::Nothing => Outcome::Done,
            Written::RaxRdx { rax, rdx } => Outcome::Value(rdx << 32 | rax),
            Written::Register { value, .. } => Outcome::Value(value),
        },
    }
}

/// Makes a call with an argument in `arena`.
pub(crate) fn call(vm: &Vm, arena: &Arena, on: Descriptor, request: Request, argp: u64) -> Result<(), Errno> {
    let memory = |address: u64, to: &mut [u8]| match arena.read(address, to) {
        true => Ok(()),
        false => Err(Fault),
    };
    let caller = Caller {
        process: Process::Native,
        descriptor: on,
    };
    vm.ioctl(request.number(), argp, &memory, caller).map(drop)
}
