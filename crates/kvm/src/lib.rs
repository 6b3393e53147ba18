//! Puts a plan in force on a Linux KVM guest, and answers the MSR accesses that the kernel hands back.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod error;
mod exit;
mod gate;
mod handler;
mod ioctl;
mod probe;
mod registers;
mod vcpu;

pub use error::{InstallError, Step};
pub use gate::Gate;
pub use handler::{Fault, Handler, Handlers};
pub use probe::{Capability, ProbeError, Probed, open, probe};
pub use vcpu::{Answered, Dispatch, Drained, VcpuGate};
