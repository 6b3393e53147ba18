//! A tiny guest, assembled from a list of MSR accesses, that runs on live KVM.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod code;
mod error;
mod guest;
mod memory;
mod stats;
mod vcpu;

pub use error::{Broke, GuestError};
pub use guest::{Guest, Mode, Options};
pub use vcpu::{Pending, Seen, SeenExit, Vcpu};
