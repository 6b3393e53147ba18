//! The ways in which a VMM takes a policy: msrgate's libraries, in Rust and in C.

#![expect(unsafe_code, reason = "the library in C")]

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs, process};

use msrgate_capi::{
    GateHandle, PlanHandle, VcpuHandle, msrgate_dispatch, msrgate_free, msrgate_install, msrgate_load, msrgate_replace,
    msrgate_vcpu_add,
};
use msrgate_core::{Access, Fault, Msr, Outcome};
use msrgate_guest::Pending;
use msrgate_kvm::{Capabilities, Gate, Handler, Handlers, InstallError, VcpuGate, VcpuId};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;

use crate::{Machine, Stop};

/// How a VMM takes a policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Library {
    /// The crate, with a plan that it compiles.
    Rust,
    /// The crate, with a plan that was compiled before and is embedded as bytes.
    Embedded,
    /// libmsrgate, by the calls of `msrgate.h`.
    C,
}

/// A policy as a case has it, and what it is compiled to.
pub(crate) struct Given<'a> {
    pub(crate) text: &'a str,
    pub(crate) cpuid: Option<&'a Cpuid>,
    pub(crate) plan: Arc<Plan>,
}

/// What calls are made on, all of them open.
#[derive(Clone, Copy)]
pub(crate) struct Descriptors {
    pub(crate) kvm: RawFd,
    pub(crate) vm: RawFd,
    pub(crate) vcpu: RawFd,
}

/// What holds a policy on a VM with one vCPU.
pub(crate) enum Holder {
    Rust(Library, Gate, VcpuGate),
    C(Handles),
}

/// What libmsrgate gave.
pub(crate) struct Handles {
    gate: *mut GateHandle,
    vcpu: *mut VcpuHandle,
}

impl Drop for Handles {
    fn drop(&mut self) {
        // SAFETY: both are the library's, and freed once.
        unsafe { msrgate_free(null_mut(), self.gate, self.vcpu) };
    }
}

impl Holder {
    pub(crate) fn install(
        library: Library,
        probed: Capabilities,
        fds: Descriptors,
        given: &Given<'_>,
    ) -> Result<Holder, Stop> {
        if library == Library::C {
            return c_install(fds, given).map(Holder::C);
        }
        let handlers = Handlers::new().with(Machine::HANDLER, Suite);
        let gate = probed.install(&fds.vm, plan(library, given)?, handlers).map_err(stop)?;
        let vcpu = gate.vcpu(&fds.vcpu, 0).map_err(stop)?;
        Ok(Holder::Rust(library, gate, vcpu))
    }

    pub(crate) fn replace(&self, given: &Given<'_>) -> Result<(), Stop> {
        match self {
            Holder::Rust(library, gate, _) => gate.replace(plan(*library, given)?).map_err(stop),
            Holder::C(handles) => {
                let plan = c_load(given)?;
                let mut error = [0; MESSAGE];
                // SAFETY: both are the library's, and the buffer is `struct msrgate_error`.
                let failed = unsafe { msrgate_replace(handles.gate, plan, error.as_mut_ptr().cast()) };
                // SAFETY: the plan is the library's, and freed once.
                unsafe { msrgate_free(plan, null_mut(), null_mut()) };
                done(failed, &error)
            }
        }
    }

    /// Whether it took the exit for one of an MSR.
    pub(crate) fn dispatch(&self, pending: &mut Pending<'_>) -> bool {
        match self {
            Holder::Rust(_, _, vcpu) => pending.dispatch(vcpu).is_some(),
            Holder::C(handles) => {
                let run: *mut c_void = std::ptr::from_mut(pending.fd().get_kvm_run()).cast();
                // SAFETY: the vCPU's handle and its own mapped page, on the thread that runs it.
                unsafe { msrgate_dispatch(handles.vcpu, run, null_mut()) == 1 }
            }
        }
    }
}

fn plan(library: Library, given: &Given<'_>) -> Result<Arc<Plan>, Stop> {
    match library {
        Library::Embedded => Plan::from_bytes(&given.plan.to_bytes())
            .map(Arc::new)
            .map_err(Stop::fail),
        _ => Ok(Arc::clone(&given.plan)),
    }
}

fn stop(error: InstallError) -> Stop {
    match error {
        InstallError::HostMsrs { .. } => Stop::skip(error),
        _ => Stop::fail(error),
    }
}

struct Suite;

impl Handler for Suite {
    fn read(&self, _: VcpuId, msr: Msr) -> Result<u64, Fault> {
        match Machine::handler(Access::Read { msr }) {
            Outcome::Value(value) => Ok(value),
            _ => Err(Fault),
        }
    }

    fn write(&self, _: VcpuId, msr: Msr, value: u64) -> Result<(), Fault> {
        match Machine::handler(Access::Write { msr, value }) {
            Outcome::Done => Ok(()),
            _ => Err(Fault),
        }
    }
}

/// The bytes of `struct msrgate_error`.
const MESSAGE: usize = 1024;

/// `struct msrgate_handler`.
#[repr(C)]
struct CHandler {
    name: *const c_char,
    access: unsafe extern "C" fn(*mut c_void, u32, c_int, *mut u64) -> c_int,
}

/// # Safety
/// `value` can be read and written.
unsafe extern "C" fn handler(_: *mut c_void, msr: u32, write: c_int, value: *mut u64) -> c_int {
    // SAFETY: the caller's promise.
    let value = unsafe { &mut *value };
    let access = match write {
        0 => Access::Read { msr: Msr(msr) },
        _ => Access::Write {
            msr: Msr(msr),
            value: *value,
        },
    };
    match Machine::handler(access) {
        Outcome::Value(read) => *value = read,
        Outcome::Done => {}
        Outcome::Fault => return -1,
    }
    0
}

/// What a call's number and sentence come to.
fn done(number: c_int, error: &[u8; MESSAGE]) -> Result<(), Stop> {
    if number == 0 {
        return Ok(());
    }
    let sentence = String::from_utf8_lossy(error.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
    Err(match sentence.contains("/dev/cpu/") {
        true => Stop::skip(sentence),
        false => Stop::fail(format!("{number}: {sentence}")),
    })
}

/// `struct kvm_cpuid2` with its entries, in words.
fn kvm_cpuid(cpuid: &Cpuid) -> Vec<u32> {
    let entries: Vec<[u32; 10]> = cpuid
        .entries()
        .map(|(leaf, subleaf, [eax, ebx, ecx, edx])| [leaf, subleaf, 1, eax, ebx, ecx, edx, 0, 0, 0])
        .collect();
    let mut words = vec![c_uint::try_from(entries.len()).unwrap_or(c_uint::MAX), 0];
    words.extend(entries.into_iter().flatten());
    words
}

fn c_load(given: &Given<'_>) -> Result<*mut PlanHandle, Stop> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "msrgate-suite-{}-{}.toml",
        process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let path = env::temp_dir().join(name);
    fs::write(&path, given.text).map_err(Stop::fail)?;
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(Stop::fail)?;
    let cpuid = given.cpuid.map(kvm_cpuid);
    let mut error = [0; MESSAGE];
    let mut plan = null_mut();
    let cpuid = cpuid.as_ref().map_or(null(), |words| words.as_ptr().cast());
    // SAFETY: a path with its NUL, a `struct kvm_cpuid2` with as many entries as it says, and buffers that may be written.
    let failed = unsafe { msrgate_load(c_path.as_ptr(), cpuid, &raw mut plan, error.as_mut_ptr().cast()) };
    let _ = fs::remove_file(&path);
    done(failed, &error).map(|()| plan)
}

fn c_install(fds: Descriptors, given: &Given<'_>) -> Result<Handles, Stop> {
    let plan = c_load(given)?;
    let name = CString::new(Machine::HANDLER).map_err(Stop::fail)?;
    let handlers = CHandler {
        name: name.as_ptr(),
        access: handler,
    };
    let mut error = [0; MESSAGE];
    let mut handles = Handles {
        gate: null_mut(),
        vcpu: null_mut(),
    };
    // SAFETY: a plan of the library's, one handler, and buffers that may be written.
    let installed = unsafe {
        msrgate_install(
            plan,
            fds.kvm,
            fds.vm,
            (&raw const handlers).cast(),
            1,
            &raw mut handles.gate,
            error.as_mut_ptr().cast(),
        )
    };
    // SAFETY: the plan is the library's, and freed once.
    unsafe { msrgate_free(plan, null_mut(), null_mut()) };
    done(installed, &error)?;
    // SAFETY: a gate of the library's, and buffers that may be written.
    let added = unsafe {
        msrgate_vcpu_add(
            handles.gate,
            fds.vcpu,
            0,
            null_mut(),
            &raw mut handles.vcpu,
            error.as_mut_ptr().cast(),
        )
    };
    done(added, &error).map(|()| handles)
}
