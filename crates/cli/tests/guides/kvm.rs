use std::error::Error;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use msrgate::{Handlers, Plan, Policy, probe};

/// Runs a vCPU of `vm` under a policy until it makes an exit that is not of an MSR.
pub fn run(kvm: &Kvm, vm: &impl AsRawFd, vcpu: &mut VcpuFd, policy: &str) -> Result<(), Box<dyn Error>> {
    let policy = Policy::parse("policy.toml", policy)?;
    let plan = Arc::new(Plan::compile_for(&policy.decision_map(None)?, &policy.options())?);
    let gate = probe(kvm)?.install(vm, plan, Handlers::new())?;
    let vcpu_gate = gate.vcpu(vcpu, 0)?;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_)) => _ = vcpu_gate.dispatch_vcpu(vcpu),
            Ok(_) => return Ok(()), // the VMM's own exits
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error.into()),
        }
    }
}
