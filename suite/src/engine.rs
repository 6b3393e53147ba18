//! `msrgate-engine`, with a plan's action table where the case has a policy.

use std::sync::Arc;

use msrgate_core::{
    Access, Exit, Msr, MsrRange, Op, Ops, Outcome, PassthroughMsr, Reason, SvmPermissionMap, VcpuState, VmxBitmap,
};
use msrgate_engine::{
    Advance, Completion, Instruction, Intercepts, KvmRunMsr, Path, Step, UnknownMsrs, Vcpu, Vm, Written,
};
use msrgate_guest::raw::Arena;
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;
use msrgate_verify::case::PAGES;

use crate::compiled::{compile, cpuid};
use crate::plan::action;
use crate::{
    AccessStep, Call, CallResult, Case, Implementation, Machine, Process, Seen, Stop, Subject, Target, perform,
};

/// The engine, its accesses coming by one of KVM's two ways.
#[derive(Clone, Copy, Debug)]
pub struct Engine {
    name: &'static str,
    path: Path,
}

impl Engine {
    /// Accesses that the processor hands over.
    pub const VM_EXIT: Engine = Engine {
        name: "engine, by VM exit",
        path: Path::VmExit,
    };
    /// Accesses that the emulator decodes.
    pub const EMULATOR: Engine = Engine {
        name: "engine, by emulator",
        path: Path::Emulator { next_rip: NEXT_RIP },
    };
}

const NEXT_RIP: u64 = 0x1002;

impl Implementation for Engine {
    fn name(&self) -> &str {
        self.name
    }

    fn start(&self, case: &Case, process: Process) -> Result<Box<dyn Subject + '_>, Stop> {
        let unknown = match case.ignore_msrs {
            true => UnknownMsrs::Ignored,
            false => UnknownMsrs::Refused,
        };
        let vm = Arc::new(Vm::new().with_unknown_msrs(unknown));
        let candidates: Vec<PassthroughMsr> = case
            .steps
            .iter()
            .filter_map(|step| match step {
                crate::Step::Access(step) => {
                    Some(PassthroughMsr::new(MsrRange::single(step.msr()), Ops::of(step.op())))
                }
                _ => None,
            })
            .collect();
        let intercepts = match process {
            Process::Native => Intercepts::vmx(candidates),
            Process::Compat => Intercepts::svm(candidates),
        };
        let mut guest = Guest {
            path: self.path,
            process,
            vcpu: Vcpu::new(Arc::clone(&vm), intercepts),
            vm,
            cpuid: cpuid(case)?,
            plan: None,
            machine: Machine::default(),
        };
        if let Some(policy) = &case.policy {
            guest.replace(policy)?;
        }
        Ok(Box::new(guest))
    }
}

struct Guest {
    path: Path,
    process: Process,
    vm: Arc<Vm>,
    vcpu: Vcpu,
    cpuid: Option<Cpuid>,
    /// What is in force where the case has a policy, and what its MSRs remember.
    plan: Option<(Plan, VcpuState)>,
    machine: Machine,
}

impl Subject for Guest {
    fn access(&mut self, step: &AccessStep) -> Result<Seen, Stop> {
        let (msr, op) = (step.msr(), step.op());
        let verdict = self.vcpu.verdict(msr, op);
        self.bitmap_follows(msr, op)?;
        let instruction = instruction(step.access);
        let happened = self
            .vcpu
            .execute(instruction, self.path, &mut self.machine)
            .map_err(Stop::fail)?;
        let (exit, completion) = match happened {
            Step::Complete(completion) => (None, completion),
            Step::Exit(exit) => {
                self.same_exit(step, exit)?;
                for call in &step.meanwhile {
                    perform(call, |call| make(&self.vm, self.process, call))?;
                }
                let outcome = match &mut self.plan {
                    Some((_, state)) => {
                        let table = self.vcpu.table().ok_or(Stop::fail("the filter came without a table"))?;
                        table.answer(exit, state, &mut self.machine).outcome
                    }
                    None => step.answer,
                };
                let completion = self.vcpu.answer(outcome);
                (
                    Some(exit.reason),
                    completion.ok_or(Stop::fail("nothing is pending after an exit"))?,
                )
            }
            Step::Failed(errno) => return Err(Stop::fail(format!("KVM_RUN fails: {errno}"))),
            Step::EmulationFailed(errno) => return Err(Stop::fail(format!("emulation fails: {errno}"))),
        };
        Ok(Seen {
            action: self.plan.as_ref().map(|(plan, _)| action(plan, msr, op)),
            verdict: Some(verdict),
            exit: Some(exit),
            sees: Some(self.outcome(step.access, completion)?),
        })
    }

    fn call(&mut self, call: &Call) -> Result<Option<CallResult>, Stop> {
        make(&self.vm, self.process, call)
    }

    fn replace(&mut self, policy: &str) -> Result<(), Stop> {
        let next = compile(policy, self.cpuid.as_ref())?.plan;
        let state = match &self.plan {
            Some((plan, state)) => state.carried(plan.table(), next.table()),
            None => next.table().vcpu_state(),
        };
        self.vm
            .install(next.filter().clone(), next.reasons(), next.table().clone());
        self.plan = Some((next, state));
        Ok(())
    }

    fn kill(&mut self) -> Result<(), Stop> {
        self.vm.kill();
        Ok(())
    }
}

impl Guest {
    /// The vCPU's bitmap is that of its filter.
    fn bitmap_follows(&mut self, msr: Msr, op: Op) -> Result<(), Stop> {
        let open = msrgate_core::Filter::allow_all();
        let filter = self.vcpu.filter().unwrap_or(&open);
        let candidates = [PassthroughMsr::new(MsrRange::single(msr), Ops::of(op))];
        let derived = match self.process {
            Process::Native => VmxBitmap::derive(filter, &candidates).intercepts(msr, op),
            Process::Compat => SvmPermissionMap::derive(filter, &candidates).intercepts(msr, op),
        };
        if derived != self.vcpu.pick_up().intercepts.intercepts(msr, op) {
            return Err(Stop::fail("the vCPU's bitmap is not its filter's"));
        }
        Ok(())
    }

    /// An exit tells what the guest tried, in the fields of `kvm_run` too.
    fn same_exit(&self, step: &AccessStep, exit: Exit) -> Result<(), Stop> {
        let fields = KvmRunMsr::from(exit);
        let expected = match step.access {
            Access::Read { .. } => (29, 0),
            Access::Write { value, .. } => (30, value),
        };
        let one_reason = Reason::from_bits(fields.reason) == Some(exit.reason);
        if exit.access != step.access
            || (fields.exit_reason, fields.data) != expected
            || !one_reason
            || fields.error != 0
        {
            return Err(Stop::fail(format!("it exits with {fields:?}")));
        }
        Ok(())
    }

    /// What the guest got, by its registers.
    fn outcome(&self, access: Access, completion: Completion) -> Result<Outcome, Stop> {
        let Completion::Done { written, advance } = completion else {
            return Ok(Outcome::Fault);
        };
        let expected = match self.path {
            Path::Emulator { next_rip } => Advance::To(next_rip),
            _ => Advance::Skip,
        };
        match (access, written) {
            _ if advance != expected => Err(Stop::fail(format!("RIP goes to {advance:?}"))),
            (Access::Read { .. }, Written::RaxRdx { rax, rdx }) if rax >> 32 == 0 && rdx >> 32 == 0 => {
                Ok(Outcome::Value(rdx << 32 | rax))
            }
            (Access::Write { .. }, Written::Nothing) => Ok(Outcome::Done),
            _ => Err(Stop::fail(format!("the registers get {written:?}"))),
        }
    }
}

/// The instruction, with upper halves of registers that must not count.
fn instruction(access: Access) -> Instruction {
    const JUNK: u64 = 0xdead_beef << 32;
    let rcx = JUNK | u64::from(access.msr().0);
    match access {
        Access::Read { .. } => Instruction::Rdmsr { rcx },
        Access::Write { value, .. } => Instruction::Wrmsr {
            rcx,
            rax: JUNK | (value & 0xffff_ffff),
            rdx: JUNK | (value >> 32),
        },
    }
}

fn make(vm: &Vm, process: Process, call: &Call) -> Result<Option<CallResult>, Stop> {
    let mut arena = Arena::new(PAGES).map_err(Stop::fail)?;
    let placed = call.place(process, &mut arena);
    let gives = call.on_engine(vm, process, placed, &arena);
    edit(call, &mut arena);
    gives
        .map(Some)
        .ok_or(Stop::skip("it does not know which process made a VM"))
}

/// What the caller does to its bitmaps after the call, where the case says so.
pub(crate) fn edit(call: &Call, arena: &mut Arena) {
    if matches!(&call.target, Target::SetMsrFilter(filter) if filter.edited) {
        for page in 1..PAGES {
            let bytes = arena.page(page).into_iter().flatten();
            bytes.for_each(|byte| *byte = !*byte);
        }
    }
}
