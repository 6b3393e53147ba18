//! The fields of the mapped `kvm_run` that carry an MSR exit.
//!
//! All by raw pointer: while a handler is asked no reference to the page is alive, so what the handler does with its own
//! pointer to it is no undefined behaviour here.

#![expect(unsafe_code, reason = "the page is shared with the kernel, and its exit is a union")]

use kvm_bindings::{kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_23 as kvm_run_msr};
use msrgate_core::{Access, Msr, Op, Outcome, abi};

/// An MSR exit as the kernel gives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RawExit {
    pub(crate) access: Access,
    pub(crate) reason: u32,
}

fn exit_reason(run: *mut kvm_run) -> *mut u32 {
    run.wrapping_byte_add(std::mem::offset_of!(kvm_run, exit_reason)).cast()
}

fn msr_fields(run: *mut kvm_run) -> *mut kvm_run_msr {
    run.wrapping_byte_add(std::mem::offset_of!(kvm_run, __bindgen_anon_1))
        .cast()
}

/// The exit that waits in `run`, if it is one of an MSR.
///
/// # Safety
/// `run` points to a `kvm_run` that may be read, and nothing writes to it during the call.
pub(crate) unsafe fn read(run: *mut kvm_run) -> Option<RawExit> {
    // SAFETY: within the `kvm_run` that the caller vouches for, at the field's own offset and so aligned.
    let exit = unsafe { exit_reason(run).read() };
    let op = match exit {
        abi::EXIT_X86_RDMSR => Op::Read,
        abi::EXIT_X86_WRMSR => Op::Write,
        _ => return None,
    };
    // SAFETY: the union starts at this offset and `msr` is one of its fields, so it is within the `kvm_run` and aligned;
    // it is made of integers alone, for which all bits are values.
    let fields = unsafe { msr_fields(run).read() };
    let msr = Msr(fields.index);
    Some(RawExit {
        access: match op {
            Op::Read => Access::Read { msr },
            Op::Write => Access::Write {
                msr,
                value: fields.data,
            },
        },
        reason: fields.reason,
    })
}

/// Lets the next KVM_RUN fault the guest, unless another answer follows.
///
/// # Safety
/// `run` points to a `kvm_run` that may be written, holds an MSR exit, and nothing else reads or writes it during the
/// call.
pub(crate) unsafe fn fail_closed(run: *mut kvm_run) {
    let error = msr_fields(run)
        .wrapping_byte_add(std::mem::offset_of!(kvm_run_msr, error))
        .cast::<u8>();
    // SAFETY: a byte within the `kvm_run` that the caller vouches for.
    unsafe { error.write(1) };
}

/// Writes the answer, and makes the exit look like none, so that it is not answered a second time: after EINTR the
/// kernel leaves the old `exit_reason` in place, and it never reads what user space writes there.
///
/// An outcome that does not fit the access, such as a value for a write, faults.
///
/// # Safety
/// As for [`fail_closed`].
pub(crate) unsafe fn answer(run: *mut kvm_run, exit: RawExit, outcome: Outcome) {
    // SAFETY: as in `read`.
    let mut fields = unsafe { msr_fields(run).read() };
    fields.error = 1;
    match (exit.access, outcome) {
        (Access::Read { .. }, Outcome::Value(value)) => {
            fields.data = value;
            fields.error = 0;
        }
        (Access::Write { .. }, Outcome::Done) => fields.error = 0,
        _ => {}
    }
    // SAFETY: within the `kvm_run` that the caller vouches for, and aligned as in `read`.
    unsafe { msr_fields(run).write(fields) };
    // SAFETY: likewise.
    unsafe { exit_reason(run).write(abi::EXIT_INTR) };
}
