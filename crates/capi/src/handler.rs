//! Functions in C as handlers.

use std::ffi::{CStr, c_char, c_int, c_void};

use msrgate_core::{Fault, Msr, ReadOutcome, WriteOutcome};
use msrgate_kvm::{Handlers, VcpuId};

use crate::error::Failed;

/// What a handler does: the vCPU's opaque, the MSR, whether it is a write, and the value.
type AccessFn = unsafe extern "C" fn(*mut c_void, u32, c_int, *mut u64) -> c_int;

/// `struct msrgate_handler`.
#[repr(C)]
pub struct Handler {
    name: *const c_char,
    access: Option<AccessFn>,
}

/// The handlers of an array.
///
/// # Safety
/// There are `count` handlers, and each name is null or ends with NUL.
pub(crate) unsafe fn copied(handlers: *const Handler, count: usize) -> Result<Handlers, Failed> {
    let mut all = Handlers::new();
    if handlers.is_null() && count > 0 {
        return Err(Failed::null("handlers"));
    }
    for index in 0..count {
        // SAFETY: the caller's promise, and `index` is below `count`.
        let handler = unsafe { &*handlers.wrapping_add(index) };
        let access = handler.access.ok_or_else(|| Failed::null("a handler's function"))?;
        if handler.name.is_null() {
            return Err(Failed::null("a handler's name"));
        }
        // SAFETY: the caller's promise.
        let name = unsafe { CStr::from_ptr(handler.name) };
        let name = name
            .to_str()
            .map_err(|_| Failed::new(libc::EINVAL, "a handler's name is not UTF-8"))?;
        all = all.with(name, Function(access));
    }
    Ok(all)
}

/// The VMM's function. The VMM promises that any of its vCPUs' threads may call it.
struct Function(AccessFn);

impl Function {
    fn call(&self, vcpu: VcpuId, msr: Msr, write: bool, value: &mut u64) -> Result<(), Fault> {
        let opaque = std::ptr::with_exposed_provenance_mut(vcpu.opaque as usize);
        // SAFETY: `msrgate.h` asks for a function that may be called so, with what the VMM gave for the vCPU.
        match unsafe { (self.0)(opaque, msr.0, write.into(), value) } {
            0 => Ok(()),
            _ => Err(Fault),
        }
    }
}

impl msrgate_kvm::Handler for Function {
    fn read(&self, vcpu: VcpuId, msr: Msr) -> ReadOutcome {
        let mut value = 0;
        self.call(vcpu, msr, false, &mut value).map(|()| value)
    }

    fn write(&self, vcpu: VcpuId, msr: Msr, mut value: u64) -> WriteOutcome {
        self.call(vcpu, msr, true, &mut value)
    }
}
