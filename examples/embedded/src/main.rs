//! A VM under a plan that was compiled when this program was built.
//!
//! ```text
//! cargo run -p msrgate-example-embedded
//! ```
//!
//! A plan is proven once more when it is read, so bytes that were changed since are refused.

use std::error::Error;
use std::sync::Arc;

use kvm_ioctls::Kvm;
use msrgate::{Handlers, Plan, probe};

/// What `build.rs` made of `policy.toml`.
const PLAN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/plan"));

fn main() -> Result<(), Box<dyn Error>> {
    let plan = Plan::from_bytes(PLAN)?;
    println!("{} bytes, {} filter ranges", PLAN.len(), plan.filter().ranges().len());
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let gate = probe(&kvm)?.install(&vm, Arc::new(plan), Handlers::new())?;
    // As in the example `vmm` from here on.
    let vcpu = vm.create_vcpu(0)?;
    let _vcpu_gate = gate.vcpu(&vcpu, 0)?;
    println!("in force on a VM");
    Ok(())
}

#[cfg(test)]
mod tests {
    use msrgate::Msr;
    use msrgate::core::{Op, Verdict};

    use super::*;

    #[test]
    fn the_plan_is_the_policys_and_bytes_that_were_changed_are_none() {
        let plan = Plan::from_bytes(PLAN).expect("a plan");
        assert_eq!(plan.filter().verdict(Msr(0x10), Op::Read), Verdict::Allow);
        assert_eq!(plan.filter().verdict(Msr(0xdead), Op::Read), Verdict::Deny);
        let changed: Vec<u8> = PLAN.iter().map(|byte| byte ^ 1).collect();
        assert!(Plan::from_bytes(&changed).is_err());
    }
}
