//! Puts a plan in force on a Linux KVM guest, and answers the MSR accesses that the kernel hands back.
//!
//! ```text
//! /dev/kvm ─probe→ Capabilities ─install(VM, plan, handlers)→ Gate ─vcpu→ VcpuGate, one for each vCPU
//!                       ↑                          replace ↺  │
//!                       └───────────── remove ────────────────┘
//!
//! KVM_RUN ─exit 29, 30→ VcpuGate::dispatch_vcpu ─answer in kvm_run→ KVM_RUN
//! ```
//!
//! Three calls put it into a VMM. This one uses the kvm-ioctls crate; one that does not passes its descriptors to the
//! same calls, and the address of its mapped `kvm_run` to [`VcpuGate::dispatch_raw`].
//!
//! ```
//! # use std::sync::Arc;
//! # use kvm_ioctls::{Kvm, VcpuExit};
//! # use msrgate_core::{Access, Msr, MsrRange, ReadAction};
//! # use msrgate_guest::{Guest, Mode, Options};
//! # use msrgate_kvm::Handlers;
//! # use msrgate_plan::{Decision, DecisionMap, Intervals, Plan};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let Ok(kvm) = Kvm::new() else {
//! #     println!("skipped: /dev/kvm does not open");
//! #     return Ok(());
//! # };
//! # let microcode = Decision::of(ReadAction::Value(0x1234)).by(0);
//! # let reads = Intervals::first_match(Decision::of(ReadAction::Allow), [(MsrRange::single(Msr(0x8b)), microcode)]);
//! # let plan = Arc::new(Plan::compile(&DecisionMap::allow_all().with_reads(reads))?);
//! # let mut guest = Guest::new(&kvm, Mode::Real, &Options::default())?;
//! # // It keeps its list, so the loop below runs it once more.
//! # guest.run(0, &[Access::Read { msr: Msr(0x8b) }], &mut |_| {})?;
//! # let vm = guest.vm();
//! let gate = msrgate_kvm::probe(&kvm)?.install(vm, plan, Handlers::new())?;
//! # let vcpu = guest.vcpu(0)?.fd_mut();
//! let vcpu_gate = gate.vcpu(vcpu, 0)?;
//! loop {
//!     match vcpu.run() {
//!         Ok(VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_)) => _ = vcpu_gate.dispatch_vcpu(vcpu),
//!         Ok(_) => break, // The VMM's own exits.
//!         Err(error) if error.errno() == libc::EINTR => continue, // Nothing to look at.
//!         Err(error) => return Err(error.into()),
//!     }
//! }
//! # assert_eq!(vcpu.get_regs()?.rax, 0x1234);
//! # Ok(())
//! # }
//! ```
//!
//! # Words
//! The *mask* is the set of reasons for which the kernel hands an access that fails to user space
//! (`KVM_CAP_X86_USER_SPACE_MSR`); the *filter* says which accesses fail (`KVM_X86_SET_MSR_FILTER`). An *exit* is an
//! access that was handed over. Its answer is carried out by the next KVM_RUN: until then it is *pending*, and the
//! vCPU's registers are those of before the access.
//!
//! # EINTR, and saving a vCPU
//! - Dispatch after a KVM_RUN that succeeded, and only then. One that gave EINTR has completed the pending access and
//!   says nothing new, but the kernel leaves the old `exit_reason` beside it. An exit that was dispatched no longer
//!   looks like one, so that a VMM which looks all the same does not answer twice.
//! - Before registers are saved or shown, [`VcpuGate::drain_raw`]: no ioctl saves a pending access.
//! - Filter, mask and what `shadow` and `once` remember are no part of any state that KVM saves. Install the plan anew;
//!   [`VcpuGate::save`] gives what the vCPU remembers, and [`VcpuGate::restore`] takes it, under the same policy alone.
//! - A guest that is rolled back in place, to a state of the same vCPU, takes [`VcpuGate::roll_back`]: what was locked since is
//!   open then, as it was.
//! - Of KVM's own registers, a VMM saves those that the guest can reach ([`Plan::reaches`](msrgate_plan::Plan::reaches)).
//!   The others it leaves out: what one kernel holds there, another may have a preset for, or not know.
//!
//! ```
//! # use std::sync::Arc;
//! # use kvm_ioctls::Kvm;
//! # use msrgate_core::{Access, Msr, MsrRange, Outcome, ReadAction, WriteAction};
//! # use msrgate_guest::{Guest, Mode, Options};
//! # use msrgate_kvm::Handlers;
//! # use msrgate_plan::{Decision, DecisionMap, Intervals, Plan};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let Ok(kvm) = Kvm::new() else {
//! #     println!("skipped: /dev/kvm does not open");
//! #     return Ok(());
//! # };
//! # let msr = Msr(0xc001_0015);
//! # fn shadow<A: Clone + Eq>(msr: Msr, allow: A, action: A) -> Intervals<Decision<A>> {
//! #     let decision = Decision::of(action).by(0);
//! #     Intervals::first_match(Decision::of(allow), [(MsrRange::single(msr), decision)])
//! # }
//! # let plan = Arc::new(Plan::compile(&DecisionMap::new(
//! #     shadow(msr, ReadAction::Allow, ReadAction::Shadow(0)),
//! #     shadow(msr, WriteAction::Allow, WriteAction::Shadow),
//! # ))?);
//! # let probed = msrgate_kvm::probe(&kvm)?;
//! # let mut guest = Guest::new(&kvm, Mode::Real, &Options::default())?;
//! # let gate = probed.install(guest.vm(), Arc::clone(&plan), Handlers::new())?;
//! # let vcpu_gate = gate.vcpu(guest.vcpu(0)?.fd(), 0)?;
//! # let write = [Access::Write { msr, value: 0x1000_0010 }];
//! # guest.run(0, &write, &mut |pending| { pending.dispatch(&vcpu_gate); })?;
//! # let vcpu = guest.vcpu(0)?.fd_mut();
//! // Here, with the vCPU stopped: beside registers, events and MSRs.
//! let state = vcpu_gate.save_vcpu(vcpu)?;
//! # let mut guest = Guest::new(&kvm, Mode::Real, &Options::default())?;
//! # let vm = guest.vm();
//!
//! // There, before the vCPU runs.
//! let gate = probed.install(vm, plan, Handlers::new())?;
//! # let vcpu = guest.vcpu(0)?.fd();
//! let vcpu_gate = gate.vcpu(vcpu, 0)?;
//! vcpu_gate.restore(state.as_bytes())?;
//! # let seen = guest.run(0, &[Access::Read { msr }], &mut |pending| { pending.dispatch(&vcpu_gate); })?;
//! # assert_eq!(seen[0].outcome, Outcome::Value(0x1000_0010));
//! # Ok(())
//! # }
//! ```
//!
//! # Fails closed
//! The fault stands ready in `kvm_run` before a table or a handler is asked, and stays unless there is an answer. A
//! reason that is not known here, an MSR that no rule names, a register that cannot be read, a handler's panic (where
//! the program unwinds) all fault the guest; [`Answered`] says why. The answer path does not lock, allocate or panic,
//! apart from handlers and from the first exit of each vCPU after [`Gate::replace`].
//!
//! # What rules log
//! [`Answered`] has with each answer how much of it the rule wants to be told (`answer.log`). `LogLimiter::admits` of msrgate-core says
//! of [`Answered::event`] whether it is told now, since `first` and `per_second` leave most out; telling is the VMM's. [`Gate::counts`]
//! has how many accesses were answered, told or not.
//!
//! # System calls
//! [`system_calls`] gives those that a plan takes, by stage and so by thread, for the lists of a VMM's seccomp filters;
//! `msrgate plan --json` has them too. Actions that need no register of the kernel's or the physical CPU's (`value`, `ignore`,
//! `deny`, `shadow`, a handler) take none when an exit is dispatched.
//!
//! # Limits
//! - The kernel cannot be asked what filter or mask a VM holds. Whoever sets another behind the gate's back wins, and
//!   accesses that it then hands over fault.
//! - When [`Gate::replace`] returns, no access is decided by the old filter any more; but another CPU may run the guest
//!   with old hardware bits for as long as an interrupt to it takes, so an MSR that was passed through can slip by once.
//! - [`Gate`] and [`VcpuGate`] hold duplicates of the descriptors that they are given: KVM frees a VM when they are gone
//!   too.
//! - x86-64 only. KVM's calls work in the process that made the VM alone.
//!
//! # Features
//! `kvm-ioctls` (off): calls that take that crate's `VcpuFd`. Its version is a range; where cargo picks a newer one than the
//! VMM has, `cargo update -p kvm-ioctls@NEWER --precise OLDER` makes them one.
//!
//! Descriptors are taken of everything that has [`AsRawFd`](std::os::fd::AsRawFd): a `File`, a `BorrowedFd`, a `VmFd` of any
//! version. A state is saved and restored only under a plan that has a hash: the feature `hash` of `msrgate-plan` where the plan
//! is compiled.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod probe;
mod gate;
mod epoch;
mod vcpu;
mod exit;
mod handler;
mod registers;
mod host;
mod preset;
mod counts;
mod calls;
mod state;
mod ioctl;
#[cfg(test)]
mod bindings;
mod error;

pub use calls::{Stage, SystemCall, system_calls};
pub use counts::Counts;
pub use error::{InstallError, OsError, Step};
pub use gate::Gate;
pub use handler::{Handler, Handlers, VcpuId};
pub use host::HostMsrs;
pub use msrgate_core::Fault;
pub use probe::{Capabilities, Capability, ProbeError, open, probe};
pub use state::{STATE_VERSION, SaveError, StateError};
pub use vcpu::{Answered, Dispatch, DrainStatus, VcpuGate};
