use std::sync::Arc;

use msrgate_core::{MsrBackend, Msr};
use msrgate_engine::{Completion, Instruction, Intercepts, Msrs, Path, Step, Vcpu, Vm};
use msrgate_plan::Plan;

/// Lets a guest of a hypervisor of your own execute RDMSR under a plan; `kernel` holds the hypervisor's own MSRs.
pub fn rdmsr(plan: &Plan, msr: u32, kernel: &mut (impl Msrs + MsrBackend)) -> Option<Completion> {
    let vm = Arc::new(Vm::new());
    vm.install(plan.filter().clone(), plan.reasons(), plan.table().clone());
    let mut memory = plan.table().vcpu_state(); // of shadow registers
    let mut vcpu = Vcpu::new(vm, Intercepts::all());
    match vcpu.execute(Instruction::Rdmsr { rcx: msr.into() }, Path::VmExit, kernel).ok()? {
        Step::Complete(completion) => Some(completion), // the kernel's answer, or #GP
        Step::Exit(exit) => {
            // Denied: the table answers that came with the filter which denies it, whatever was installed since.
            let answer = vcpu.table()?.read(Msr(msr), exit.reason, &mut memory, kernel);
            vcpu.answer_read(answer.outcome)
        }
        Step::Failed(_) | Step::EmulationFailed(_) => None,
    }
}
