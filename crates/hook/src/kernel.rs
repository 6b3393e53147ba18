//! The calls that a hook makes.

#![expect(unsafe_code, reason = "libc's errno")]

use std::sync::Arc;

use libc::{c_int, c_ulong};
use msrgate_core::{Access, Answer, Outcome};
use msrgate_plan::Plan;

/// The process around a hook: libc's functions behind its own, and what msrgate-kvm does with them.
pub trait Kernel: Send + Sync + 'static {
    /// A VM that holds a plan.
    type Gate: Gate;

    /// `ioctl(2)`.
    fn ioctl(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int;
    /// `close(2)`.
    fn close(&self, fd: c_int) -> c_int;
    /// Whether the descriptor is one of `/dev/kvm`.
    fn is_kvm(&self, fd: c_int) -> bool;
    /// Puts a plan in force on a VM of `kvm`; an error is one line for people.
    fn install(&self, kvm: c_int, vm: c_int, plan: Arc<Plan>) -> Result<Self::Gate, String>;
    /// Copies from the VMM's memory; false where a byte cannot be read.
    fn read(&self, address: u64, to: &mut [u8]) -> bool;
    /// Tells whoever runs the VMM.
    fn say(&self, line: &str);
}

/// A VM that holds a plan.
pub trait Gate: Send + Sync + 'static {
    /// One of its vCPUs.
    type Vcpu: Vcpu;

    /// The vCPU whose descriptor `fd` is; an error is one line for people.
    fn vcpu(&self, fd: c_int, id: u32) -> Result<Self::Vcpu, String>;
    /// Puts another plan in force; an error is an errno and one line for people, and the old plan stays.
    fn replace(&self, plan: Arc<Plan>) -> Result<(), (c_int, String)>;
}

/// One vCPU and its `kvm_run`. Used by one thread at a time, while that thread is not in KVM_RUN.
pub trait Vcpu: Send + 'static {
    /// The MSR exit that KVM_RUN left.
    fn exit(&self) -> Option<RawExit>;
    /// Whether the plan in force passes an access that its filter denies on to the kernel.
    fn passes(&self, access: Access) -> bool;
    /// Answers it; `None` where there is none.
    fn dispatch(&self) -> Option<Answer>;
    /// Answers it with this.
    fn answer(&self, outcome: Outcome);
    /// Whether it is as a reset leaves it.
    fn is_reset(&self, fd: c_int) -> bool;
    /// Forgets what its MSRs remember.
    fn forget(&self);
    /// Takes it back: what `fd`, the vCPU, does next is the same instruction again. An error is the kernel's errno.
    fn take_back(&self, fd: c_int) -> Result<(), c_int>;
}

/// An MSR exit as the kernel gives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RawExit {
    /// What the guest tried.
    pub access: Access,
    /// The kernel's number for why it did not answer.
    pub reason: u32,
}

/// The calling thread's errno.
pub fn errno() -> c_int {
    // SAFETY: gives the calling thread's own errno, which lives as long as the thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; nobody else reads or writes it.
    unsafe { errno.read() }
}

/// Sets the calling thread's errno.
pub fn set_errno(value: c_int) {
    // SAFETY: gives the calling thread's own errno, which lives as long as the thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; nobody else reads or writes it.
    unsafe { errno.write(value) }
}
