//! A tiny guest, assembled from a list of MSR accesses, that runs on live KVM.
//!
//! Its program is a loop over a table in its memory: it makes one access after another, in real mode or in 64-bit mode,
//! and writes down what each got. What replays a trace, compares the kernel with a plan or looks for readable MSRs stands
//! on it.
//!
//! ```
//! # use kvm_ioctls::Kvm;
//! use msrgate_core::{Access, Msr, Outcome};
//! use msrgate_guest::{Guest, Mode, Options};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let Ok(kvm) = Kvm::new() else {
//! #     println!("skipped: /dev/kvm does not open");
//! #     return Ok(());
//! # };
//! let mut guest = Guest::new(&kvm, Mode::Real, &Options::default())?;
//! let sysenter_cs = Msr(0x174);
//! let accesses = [Access::Write { msr: sysenter_cs, value: 8 }, Access::Read { msr: sysenter_cs }];
//! // No plan is installed, so no access is handed to the closure.
//! let seen = guest.run(0, &accesses, &mut |_| {})?;
//! assert_eq!(seen[0].outcome, Outcome::Done);
//! assert_eq!(seen[1].outcome, Outcome::Value(8));
//! # Ok(())
//! # }
//! ```
//!
//! With a plan in force the closure passes each exit on to the vCPU's gate, or answers by itself:
//!
//! ```no_run
//! # fn f(guest: &mut msrgate_guest::Guest, gate: &msrgate_kvm::VcpuGate, accesses: &[msrgate_core::Access]) {
//! let seen = guest.run(0, accesses, &mut |pending| {
//!     pending.dispatch(gate);
//! });
//! # }
//! ```
//!
//! [`scan`] has such a guest read every MSR, and tells what another kernel, processor or plan changed.
//!
//! # What it stands
//! Up to 4095 accesses are made for one return from KVM_RUN, those apart that are handed over. Most of what a recorded
//! guest writes does no harm: registers that make KVM write to guest memory (clock, steal time) find memory that
//! nobody uses, interrupts are off, no memory type, segment base or system-call entry is used. What does end it (INIT, a
//! triple fault) is an error that names the access, and the guest starts over with the next list. The access named is
//! the first that was not finished: where KVM acts on a write at a later entry, the write is before it.
//!
//! # Limits
//! - A guest that never comes back, since an access put it into system-management mode without code for it, is not
//!   noticed.
//! - Code of real mode lies in the page at 0x10f000, which the guest cannot change; everything else of the guest's own
//!   lies from 0xd0000000 on. An access that points KVM there, or moves the local APIC there, breaks the guest.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod guest;
mod mode;
mod vcpu;
mod code;
mod memory;
mod stats;
mod held;
mod no_preset;
mod passthrough;
pub mod scan;
pub mod raw;
mod error;

pub use error::{GuestDied, GuestError};
pub use guest::{Guest, Options};
pub use held::held;
pub use mode::Mode;
pub use no_preset::{NoPreset, no_presets};
pub use passthrough::passthrough_safe;
pub use vcpu::{Pending, Seen, SeenExit, Vcpu};
