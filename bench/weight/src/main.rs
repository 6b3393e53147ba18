//! An empty VMM, under the policy in the file that it is given: a plan's bytes, a map's, or text, by feature.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fs;

use kvm_ioctls::{Kvm, VcpuExit};

fn main() -> Result<(), Box<dyn Error>> {
    // Read by each, so that what is compared is the rest.
    let policy = fs::read(std::env::args().nth(1).ok_or("the policy is missing")?)?;
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let mut vcpu = vm.create_vcpu(0)?;
    #[cfg(feature = "plan")]
    let gate = {
        let plan = std::sync::Arc::new(plan(&policy)?);
        let gate = msrgate::probe(&kvm)?.install(&vm, plan, msrgate::Handlers::new())?;
        gate.vcpu(&vcpu, 0)?
    };
    #[cfg(not(feature = "plan"))]
    println!("{} bytes", policy.len());
    loop {
        match vcpu.run()? {
            #[cfg(feature = "plan")]
            VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_) => _ = gate.dispatch_vcpu(&mut vcpu),
            VcpuExit::Hlt => return Ok(()),
            exit => println!("{exit:?}"),
        }
    }
}

#[cfg(all(feature = "plan", not(feature = "planner")))]
fn plan(bytes: &[u8]) -> Result<msrgate::Plan, Box<dyn Error>> {
    Ok(msrgate::Plan::from_bytes(bytes)?)
}

#[cfg(all(feature = "planner", not(feature = "language")))]
fn plan(bytes: &[u8]) -> Result<msrgate::Plan, Box<dyn Error>> {
    let map = msrgate::DecisionMap::from_bytes(bytes)?;
    Ok(msrgate::Plan::compile(&map)?)
}

#[cfg(feature = "language")]
fn plan(text: &[u8]) -> Result<msrgate::Plan, Box<dyn Error>> {
    let policy = msrgate::Policy::parse("policy.toml", std::str::from_utf8(text)?)?;
    Ok(msrgate::Plan::compile_for(
        &policy.decision_map(None)?,
        &policy.options(),
    )?)
}
