//! The fields of the mapped `kvm_run` that carry an MSR exit.
//!
//! All by raw pointer: while a handler is asked no reference to the page is alive, so what the handler does with its own
//! pointer to it is no undefined behaviour here.

#![expect(unsafe_code, reason = "the page is shared with the kernel, and its exit is a union")]

use msrgate_core::abi::{self, RawExit, kvm_run as field};
use msrgate_core::{ReadOutcome, Within, WriteOutcome};

/// The exit that waits in `run`, if it is one of an MSR.
///
/// # Safety
/// `run` is the first byte of a `kvm_run` that may be read, and nothing writes to it during the call.
pub(crate) unsafe fn read(run: *mut u8) -> Option<RawExit> {
    // SAFETY: within the `kvm_run` that the caller vouches for, at the field's own offset and so aligned.
    let exit = unsafe { run.wrapping_add(field::EXIT_REASON).cast::<u32>().read() };
    // SAFETY: bytes within the `kvm_run` that the caller vouches for.
    let msr = unsafe { run.wrapping_add(field::MSR).cast::<[u8; field::MSR_BYTES]>().read() };
    RawExit::read(exit, &msr)
}

/// Where the access was made that waits in `run`.
///
/// # Safety
/// As for [`read`].
pub(crate) unsafe fn within(run: *mut u8) -> Option<Within> {
    // SAFETY: within the `kvm_run` that the caller vouches for, at the field's own offset and so aligned.
    Within::from_flags(unsafe { run.wrapping_add(field::FLAGS).cast::<u16>().read() })
}

/// Lets the next KVM_RUN fault the guest, unless another answer follows.
///
/// # Safety
/// `run` is the first byte of a `kvm_run` that may be written, holds an MSR exit, and nothing else reads or writes it during the
/// call.
pub(crate) unsafe fn fail_closed(run: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { error(run, 1) };
}

/// Writes what a read gets.
///
/// # Safety
/// As for [`fail_closed`].
pub(crate) unsafe fn answer_read(run: *mut u8, outcome: ReadOutcome) {
    // SAFETY: within the `kvm_run` that the caller vouches for, at the field's own offset and so aligned.
    unsafe { run.wrapping_add(field::DATA).cast::<u64>().write(outcome.unwrap_or(0)) };
    // SAFETY: the caller's promise.
    unsafe { error(run, outcome.is_err().into()) };
}

/// Writes what a write gets.
///
/// # Safety
/// As for [`fail_closed`].
pub(crate) unsafe fn answer_write(run: *mut u8, outcome: WriteOutcome) {
    // SAFETY: the caller's promise.
    unsafe { error(run, outcome.is_err().into()) };
}

/// Makes the exit look like none, so that it is not answered a second time: after EINTR the kernel leaves the old
/// `exit_reason` in place, and it never reads what user space writes there.
///
/// # Safety
/// As for [`fail_closed`].
pub(crate) unsafe fn finish(run: *mut u8) {
    // SAFETY: within the `kvm_run` that the caller vouches for, at the field's own offset and so aligned.
    unsafe { run.wrapping_add(field::EXIT_REASON).cast::<u32>().write(abi::EXIT_INTR) };
}

/// # Safety
/// As for [`fail_closed`].
unsafe fn error(run: *mut u8, error: u8) {
    // SAFETY: a byte within the `kvm_run` that the caller vouches for.
    unsafe { run.wrapping_add(field::ERROR).write(error) };
}
