//! Compares this machine's KVM with `msrgate-engine`, call by call and access by access.
//!
//! The same calls and accesses go to a live VM and to the engine, whose own MSRs are those of a second live VM without a
//! filter. What a policy, a random filter or a raw argument comes to is compared access by access. Each kind of run is a
//! method of [`Machine`]; what it finds goes into a [`Report`].
//!
//! ```
//! use msrgate_guest::Mode;
//! use msrgate_verify::{Kernel, Machine};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # if let Err(error) = msrgate_kvm::open() {
//! #     println!("skipped: {error}");
//! #     return Ok(());
//! # }
//! let machine = Machine::open(Mode::Real, None, Kernel::running())?;
//! let report = machine.random(1, 20, 24, &|_, _| {})?;
//! assert!(report.calls >= 20 && report.disagreements.is_empty());
//! # Ok(())
//! # }
//! ```
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![forbid(unsafe_code)]

pub mod case;
mod kernel;
mod machine;
mod unfiltered;
mod engine;
mod live;
mod pair;
mod rng;
mod generate;
mod shrink;
mod random;
mod policy;
mod interception;
mod swap;
mod report;
mod error;

pub use error::VerifyError;
pub use kernel::Kernel;
pub use machine::Machine;
pub use policy::Reach;
pub use random::random_case;
pub use report::{Disagreement, Interception, Report, Swapped};

/// Is told how much of a run is done: so much, of so much.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);
