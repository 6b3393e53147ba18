//! Keeps a policy in force on the VMs of a VMM that knows nothing of it, from outside.
//!
//! The kernel lets the VMM's calls that matter wait (seccomp), and the supervisor makes them in the VMM's own thread
//! (ptrace), with what the policy takes besides. Nothing is traced in between, and what a descriptor is, is asked of the
//! kernel at that moment.
//!
//! ```text
//! KVM_CREATE_VM ──────────→ made, and the plan installed, or no VM
//! KVM_CREATE_VCPU ────────→ made, and presets put in
//! KVM_X86_SET_MSR_FILTER ─→ VMM ∩ policy, planned anew
//! KVM_ENABLE_CAP 188 ─────→ VMM ∪ policy
//! KVM_SET_CPUID2 ─────────→ what the policy is for it, where it depends on that
//! KVM_GET_MSRS, _SET_MSRS → on the VMM's values, where presets are
//! KVM_RUN without cookie ──→ led to the answerer, where the policy denies or answers
//! ```
//!
//! The answerer is `msrgate-answer`'s image in the process (`region.rs`). It makes KVM_RUN with a cookie, answers from a table
//! that only the supervisor can write, and asks the supervisor where an answer takes the kernel's register or a change of the
//! filter. A policy that only denies has it too: a VMM may ask for exits of its own at any time, and what the policy denies is
//! an exit too then.
//!
//! A VMM that runs already ([`Running`]) cannot be made to wait. Its answerers ask through memory, and the supervisor's calls are made by a
//! thread of its own there.
//!
//! A [`Capture`] has no policy: it lets calls wait to see what they ask for and what they get, and makes each as it is. Of a VMM that
//! runs already no call can be made to wait, so it is [`Followed`]: traced throughout.
//!
//! # Limits
//! A VMM is trusted: it can read the cookies, and change what it is told. Calls of 32-bit programs get no VM.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod supervisor;
mod capture;
mod follow;
mod attach;
mod running;
mod sandbox;
mod inject;
mod policy;
mod watch;
mod table;
mod cells;
mod control;
mod detour;
mod region;
mod remote;
mod tracee;
mod target;
mod seccomp;
mod ledger;
mod memory;
mod frame;
mod spawn;

pub use attach::{Answers, Running};
pub use capture::{Call, Capture, Filter, Request};
pub use control::{Control, Reload, Reloaded, Resolve};
pub use follow::Followed;
pub use ledger::{Counters, Done, Entry, Faults, Leaf, Ledger, Reader};
pub use policy::Mode;
pub use running::{AttachError, RunningVm};
pub use seccomp::{Cookies, Expected, Listener, notify};
pub use spawn::{Forked, bind, fork, no_signal_for_stops};
pub use supervisor::{Claim, Remark, Setup, Supervisor};
pub use tracee::may_administer;
