use std::sync::Arc;

use msrgate_core::Outcome;
use msrgate_engine::{Completion, Instruction, Intercepts, Msrs, Path, Step, Vcpu, Vm};
use msrgate_plan::Plan;

/// Lets a guest of a hypervisor of your own execute RDMSR under a plan; `kernel` holds the hypervisor's own MSRs.
pub fn rdmsr(plan: &Plan, msr: u32, kernel: &mut impl Msrs) -> Option<Completion> {
    let vm = Arc::new(Vm::new());
    vm.set_reasons(plan.reasons());
    vm.install(plan.filter().clone());
    let mut vcpu = Vcpu::new(vm, Intercepts::all());
    match vcpu.execute(Instruction::Rdmsr { rcx: msr.into() }, Path::VmExit, kernel).ok()? {
        Step::Complete(completion) => Some(completion), // the kernel's answer, or #GP
        Step::Exit(_) => vcpu.answer(Outcome::Value(0x1234)), // denied: user space answers
        Step::Failed(_) | Step::EmulationFailed(_) => None,
    }
}
