//! KVM's in-kernel half of MSR filtering, for hypervisors in Rust and for machines without KVM.
//!
//! A [`Vm`] takes the filter in KVM's own binary layout and holds it; a [`Vcpu`] asks it for every RDMSR and WRMSR, hands
//! denied ones to user space and ends them when user space has answered. The hypervisor plugs its own MSRs in through
//! [`Msrs`] and its callers' memory through [`UserMemory`].
//!
//! ```text
//! VMM ──ioctl──→ Vm { filter, exit reasons, table }      any thread, any time
//!                     │ picked up at the next access or entry
//! guest ─VM exit─→ Vcpu::execute ─┬ denied ───────────────┬─→ Step::Exit ─→ VMM ─→ Vcpu::complete ─┐
//!                                 └ allowed → Msrs ─┬ refused ┴─→ #GP(0)                           │
//!                                                   └ done ─→ registers, RIP ←─────────────────────┘
//! ```
//!
//! ```
//! extern crate alloc;
//! use alloc::sync::Arc;
//! use msrgate_core::{Filter, FilterRange, Msr, Ops, Reason, Reasons, Verdict};
//! use msrgate_engine::{Instruction, Intercepts, Msrs, Path, Refusal, Step, Vcpu, Vm};
//!
//! struct NoMsrs;
//! impl Msrs for NoMsrs {
//!     fn read(&mut self, _: Msr) -> Result<u64, Refusal> { Err(Refusal::Unknown) }
//!     fn write(&mut self, _: Msr, _: u64) -> Result<(), Refusal> { Err(Refusal::Unknown) }
//! }
//!
//! let vm = Arc::new(Vm::new());
//! vm.set_reasons(Reasons::of(Reason::Filter));
//! vm.set_filter(Filter::new(Verdict::Allow, [FilterRange::new(0x8b, 1, Ops::READ, [0])?])?);
//! let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
//! let step = vcpu.execute(Instruction::Rdmsr { rcx: 0x8b }, Path::VmExit, &mut NoMsrs);
//! assert!(matches!(step, Ok(Step::Exit(exit)) if exit.reason == Reason::Filter));
//! let _registers_and_rip = vcpu.answer_read(Ok(1));
//! # Ok::<(), msrgate_core::FilterError>(())
//! ```
//!
//! # Words
//! An *access* is one RDMSR or WRMSR. The *filter* allows or denies it. An *exit* hands it to user space, for one of the
//! *reasons* in the VM's mask. Until its *completion* it is *pending*. A *candidate* is an MSR that the hypervisor lets the
//! guest reach in hardware where the filter allows it. A *profile* says after which kernel a VM takes.
//!
//! # Replacing a filter under running vCPUs
//! [`Vm::install`] replaces three things as one: the filter, the mask of exit reasons, and the table of what an exit gets.
//! An access is decided by one whole filter, leaves by the mask that came with that filter, and [`Vcpu::table`] is the
//! table that did, however late it is asked. KVM's own interface replaces filter and mask apart, and so do
//! [`Vm::set_msr_filter`] and [`Vm::enable_cap`]; a VMM that uses these widens the mask first and narrows it last.
//!
//! Once one of them has returned, every access that starts later is decided by the new filter or a later one, and no
//! access is decided by an older filter than an access that ended before it. A vCPU never waits for a writer; writers
//! wait for each other, and for a vCPU in the midst of taking a filter over. What the hardware does by itself follows when
//! the vCPU next picks the filter up, so the caller kicks vCPUs that are in the guest.
//!
//! # The bitmap
//! [`Vcpu::pick_up`] is due before each entry to the guest. It alone hands the bitmap out, and says whether it was
//! recomputed since it was last handed out, by itself or by one of the calls that take a newer filter over on their way:
//! [`Vcpu::execute`], [`Vcpu::verdict`], [`Vcpu::recalculate`]. The hardware can use the bitmap where it lies
//! ([`Intercepts`]); whoever copies it, or merges it for L2, does so again when it is told.
//!
//! # What it does not do
//! It runs no guest, decodes no instruction, checks no privilege level, and merges no bitmap for L2. It knows no MSR by
//! itself and no other capability. TSC_DEADLINE is filtered unless the profile says otherwise, x2APIC never is.
//!
//! Nothing on the access path allocates, frees, waits or panics. What was replaced is freed by the call that replaces it,
//! or, where a vCPU still has it then, by a later one ([`Vm::install`]).
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

extern crate alloc;

mod vm;
mod ioctl;
mod user_memory;
mod user_filter;
mod slot;
mod vcpu;
mod instruction;
mod msrs;
mod intercepts;
mod profile;

pub use instruction::{Advance, Completion, Instruction, Path, Step, Written};
pub use intercepts::Intercepts;
pub use ioctl::{Caller, Descriptor, Process};
pub use msrgate_core::abi::{Errno, KvmRunMsr};
pub use msrs::{Msrs, Refusal};
pub use profile::{Compat, Coverage, Profile, RangeFlags, Replacement, ReservedBits, TscDeadline, Vendor};
pub use user_memory::{Fault, UserMemory};
pub use vcpu::{Drained, Interruption, PickUp, StillPending, Vcpu};
pub use vm::{Origin, UnknownMsrs, Vm};
