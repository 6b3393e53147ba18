//! An MSR firewall for KVM guests, for VMMs in Rust.
//!
//! A policy says what a guest's RDMSR and WRMSR get. It is compiled to the filter that KVM holds and to a table of answers;
//! three calls put it into a VMM: `install`, `vcpu`, `dispatch`.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use kvm_ioctls::{Kvm, VcpuExit};
//! use msrgate::{Handlers, Plan, Policy};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let policy = Policy::parse("policy.toml", "version = 1\ndefault = \"deny\"\n")?;
//! let plan = Arc::new(Plan::compile_for(&policy.decision_map(None)?, &policy.options())?);
//!
//! let kvm = Kvm::new()?;
//! let vm = kvm.create_vm()?;
//! let gate = msrgate::probe(&kvm)?.install(&vm, plan, Handlers::new())?;
//! let mut vcpu = vm.create_vcpu(0)?;
//! let vcpu_gate = gate.vcpu(&vcpu, 0)?;
//! loop {
//!     match vcpu.run() {
//!         Ok(VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_)) => _ = vcpu_gate.dispatch_vcpu(&mut vcpu),
//!         Ok(_) => break, // The VMM's own exits.
//!         Err(error) if error.errno() == libc::EINTR => {}
//!         Err(error) => return Err(error.into()),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! `examples/vmm.rs` is a whole VMM around these calls. The documentation of [`kvm`] says what fails closed, how a vCPU is saved,
//! and what no filter can do.
//!
//! # Features
//! - `policy` (on): policies as text. Without it a VMM embeds a plan that was compiled before ([`Plan::from_bytes`]), or builds a
//!   [`DecisionMap`] in code, and has no parser in it.
//! - `kvm-ioctls` (on): calls that take that crate's `VcpuFd`. Without it a VMM hands in the address of its mapped `kvm_run`.
//! - `hash` (by `policy`): plans that are compiled here have a hash, which the state of a vCPU is saved under.
//!
//! Without features libc is the only crate of others. The crate is empty on other systems than Linux on x86-64.
#![forbid(unsafe_code)]
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

pub use msrgate_core as core;
pub use msrgate_kvm as kvm;
#[cfg(feature = "policy")]
pub use msrgate_msrs as msrs;
pub use msrgate_plan as plan;
#[cfg(feature = "policy")]
pub use msrgate_policy as policy;

pub use msrgate_core::{Access, Event, Fault, LogLimiter, Msr, Nanos};
pub use msrgate_kvm::{
    Answered, Capabilities, Counts, Dispatch, DrainStatus, Gate, Handler, Handlers, InstallError, ProbeError,
    SaveError, StateError, VcpuGate, VcpuId, probe,
};
pub use msrgate_plan::{CompileOptions, DecisionMap, Plan, PlanError};
#[cfg(feature = "policy")]
pub use msrgate_policy::{Policy, PolicyErrors};
