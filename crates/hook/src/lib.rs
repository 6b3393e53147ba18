//! Keeps a policy in force inside a VMM that knows nothing of it.
//!
//! A VMM's calls of libc come through a [`Hook`]. It puts the policy in force where the VMM makes a VM, answers the
//! exits that are the policy's, and composes the VMM's own filter and mask with the policy's.
//!
//! ```text
//! KVM_CREATE_VM ──────────→ install the plan, or no VM
//! KVM_CREATE_VCPU ────────→ a slot for the vCPU
//! KVM_SET_CPUID2 ─────────→ what the policy is for it, where it depends on that
//! KVM_RUN ─exit 29, 30──┬─→ the policy's: answer, run again
//!                       └─→ the VMM's: as it came
//! KVM_X86_SET_MSR_FILTER ─→ VMM ∩ policy, planned anew
//! KVM_ENABLE_CAP 188 ─────→ VMM ∪ policy
//! KVM_GET_MSRS, _SET_MSRS → on the VMM's values, where presets are
//! dup, close, fork ───────→ which descriptor is which
//! ```
//!
//! A policy that depends on the guest's CPUID is the command's to resolve: it is asked over shared memory ([`Desk`]), and
//! until it has answered nothing is allowed and no vCPU runs.
//!
//! The calls themselves are behind [`Kernel`], so that all of this is tested without a VMM and without KVM.
//! `libmsrgate_preload.so` forwards libc's functions to it.
//!
//! # On a vCPU's thread
//! Between two KVM_RUNs nothing locks, allocates or makes a system call, apart from what actions themselves ask of the
//! kernel (`mask`, `only`, `once`: KVM_GET_MSRS, KVM_SET_MSRS; `host`: a read of an open device) and from the first
//! exit of each vCPU after the VMM has replaced its own filter or mask.
//!
//! # Limits
//! Descriptors from [`Descriptors::CAPACITY`] on, and more vCPUs than [`Hook::VCPUS`] in one process, are refused. A
//! VMM that makes system calls by itself, not through libc, is not seen at all; nor is a descriptor that a process
//! sends to itself over a socket. A thread that leaves KVM_RUN by `longjmp` cannot run its vCPU again.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod hook;
mod vm;
mod vcpu;
mod descriptor;
mod user_filter;
mod kernel;
mod turn;
mod handover;
mod spawn;
mod notifier;
mod board;
mod desk;
mod mapping;
mod clock;

pub use board::{Board, Missing, Mode, Reader, SLATES, Tally, Wanted};
pub use clock::{Clock, Rate};
pub use descriptor::Descriptors;
pub use desk::{Desk, Leaf};
pub use handover::{Handover, HandoverError, Received, VARIABLE};
pub use hook::{Hook, KVM_CREATE_VM, KVM_RUN, Setup};
pub use kernel::{Gate, Kernel, RawExit, Vcpu, errno, set_errno};
pub use notifier::{Asking, Expected, MARK, Notifier, notify};
pub use spawn::{Forked, bind, fork};
