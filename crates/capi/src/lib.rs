//! libmsrgate: msrgate for VMMs in C.
//!
//! `include/msrgate.h` says what each call does, and is what a VMM is compiled with; `cargo xtask capi --prefix DIR` builds and
//! installs the library. This crate translates: pointers to references, errors to numbers and sentences, and a panic, which would
//! be a bug, to EIO.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![expect(unsafe_code, reason = "a C interface")]

mod error;
mod handler;

use std::ffi::{CStr, OsStr, c_char, c_int, c_long, c_uint, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, TryLockError};
use std::time::Instant;

use msrgate_core::{Access, Log, LogLimiter, Nanos, Outcome};
use msrgate_kvm::{Answered, Dispatch, DrainStatus, Gate, SaveError, VcpuGate, VcpuId, probe};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;
use msrgate_policy::Policy;

use error::{ErrorBuffer, Failed, guarded};
use handler::Handler;

/// `msrgate_plan`.
pub struct PlanHandle {
    plan: Arc<Plan>,
    /// How many rules the policy has, which its log is counted by.
    rules: usize,
}

/// `msrgate_gate`.
pub struct GateHandle {
    gate: Gate,
    told: Arc<LogState>,
}

/// `msrgate_vcpu`.
pub struct VcpuHandle {
    gate: VcpuGate,
    told: Arc<LogState>,
}

/// Which accesses the policy's `log` has told of, for all vCPUs of a VM.
struct LogState {
    since: Instant,
    limiter: Mutex<LogLimiter>,
}

impl LogState {
    /// Whether an answered access is to be told. Two vCPUs that ask at once do not wait: the second is told without being counted.
    fn admits(&self, answered: &Answered) -> bool {
        if answered.answer.log == Log::None {
            return false;
        }
        let mut limiter = match self.limiter.try_lock() {
            Ok(limiter) => limiter,
            Err(TryLockError::Poisoned(limiter)) => limiter.into_inner(),
            Err(TryLockError::WouldBlock) => return true,
        };
        let now = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        limiter.admits(&answered.event(Nanos(now), None), answered.answer.log)
    }
}

/// `struct kvm_cpuid2`, before its entries.
#[repr(C)]
pub struct CpuidHeader {
    entries: u32,
    padding: u32,
}

/// `struct kvm_cpuid_entry2`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CpuidEntry {
    function: u32,
    index: u32,
    flags: u32,
    registers: [u32; 4],
    padding: [u32; 3],
}

/// As many entries as KVM takes (`KVM_MAX_CPUID_ENTRIES`).
const MOST_ENTRIES: u32 = 256;

/// `struct msrgate_answer`.
#[repr(C)]
pub struct Answer {
    msr: u32,
    write: u8,
    faulted: u8,
    why: u8,
    log: u8,
    rule: i32,
    value: u64,
}

/// `struct msrgate_stats`.
#[repr(C)]
pub struct Stats {
    reads: u64,
    writes: u64,
    faults: u64,
    failures: u64,
}

/// `MSRGATE_ROLLBACK`.
const ROLLBACK: c_uint = 1;

/// `msrgate_load`.
///
/// # Safety
/// As `msrgate.h` says: `path` ends with NUL, `cpuid` is NULL or has as many entries as it says, `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msrgate_load(
    path: *const c_char,
    cpuid: *const CpuidHeader,
    out: *mut *mut PlanHandle,
    error: *mut ErrorBuffer,
) -> c_int {
    guarded(error, || {
        // SAFETY: the caller's promise.
        let out = unsafe { out.as_mut() }.ok_or_else(|| Failed::null("out"))?;
        if path.is_null() {
            return Err(Failed::null("path"));
        }
        // SAFETY: the caller's promise.
        let path = unsafe { CStr::from_ptr(path) };
        // SAFETY: the caller's promise.
        let cpuid = unsafe { read_cpuid(cpuid) }?;
        let policy = Policy::from_file(Path::new(OsStr::from_bytes(path.to_bytes())))?;
        let map = policy.decision_map(cpuid.as_ref())?;
        let plan = Plan::compile_for(&map, &policy.options())?;
        let handle = PlanHandle {
            plan: Arc::new(plan),
            rules: policy.rules.len(),
        };
        *out = Box::into_raw(Box::new(handle));
        Ok(0)
    })
}

/// # Safety
/// `cpuid` is NULL, or a `struct kvm_cpuid2` with as many entries behind it as it says.
unsafe fn read_cpuid(cpuid: *const CpuidHeader) -> Result<Option<Cpuid>, Failed> {
    // SAFETY: the caller's promise.
    let Some(header) = (unsafe { cpuid.as_ref() }) else {
        return Ok(None);
    };
    if header.entries > MOST_ENTRIES {
        return Err(Failed::new(libc::E2BIG, "the CPUID has more entries than KVM takes"));
    }
    let entry = |index: u32| {
        // The entries follow the header, with its alignment.
        let first = cpuid.wrapping_add(1).cast::<CpuidEntry>();
        // SAFETY: the caller's promise, and `index` is below the number of entries.
        unsafe { first.wrapping_add(index as usize).read() }
    };
    let entries = (0..header.entries).map(|index| {
        let entry = entry(index);
        (entry.function, entry.index, entry.registers)
    });
    Ok(Some(Cpuid::from_entries(entries)))
}

/// `msrgate_install`.
///
/// # Safety
/// As `msrgate.h` says: `plan` is a plan of this library's, there are `count` handlers, `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msrgate_install(
    plan: *const PlanHandle,
    kvm_fd: c_int,
    vm_fd: c_int,
    handlers: *const Handler,
    count: usize,
    out: *mut *mut GateHandle,
    error: *mut ErrorBuffer,
) -> c_int {
    guarded(error, || {
        // SAFETY: the caller's promise.
        let plan = unsafe { plan.as_ref() }.ok_or_else(|| Failed::null("plan"))?;
        // SAFETY: the caller's promise.
        let out = unsafe { out.as_mut() }.ok_or_else(|| Failed::null("out"))?;
        // SAFETY: the caller's promise.
        let handlers = unsafe { handler::copied(handlers, count) }?;
        let gate = probe(&kvm_fd)?.install(&vm_fd, Arc::clone(&plan.plan), handlers)?;
        let told = Arc::new(LogState {
            since: Instant::now(),
            limiter: Mutex::new(LogLimiter::new(plan.rules)),
        });
        *out = Box::into_raw(Box::new(GateHandle { gate, told }));
        Ok(0)
    })
}

/// `msrgate_replace`.
///
/// # Safety
/// As `msrgate.h` says: both are of this library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msrgate_replace(
    gate: *mut GateHandle,
    plan: *const PlanHandle,
    error: *mut ErrorBuffer,
) -> c_int {
    guarded(error, || {
        // SAFETY: the caller's promise. Shared, since other threads may use the gate.
        let gate = unsafe { gate.as_ref() }.ok_or_else(|| Failed::null("gate"))?;
        // SAFETY: the caller's promise.
        let plan = unsafe { plan.as_ref() }.ok_or_else(|| Failed::null("plan"))?;
        gate.gate.replace(Arc::clone(&plan.plan))?;
        let mut limiter = gate
            .told
            .limiter
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        *limiter = LogLimiter::new(plan.rules);
        Ok(0)
    })
}

/// `msrgate_vcpu_add`.
///
/// # Safety
/// As `msrgate.h` says: `gate` is of this library's, `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msrgate_vcpu_add(
    gate: *mut GateHandle,
    vcpu_fd: c_int,
    id: u32,
    opaque: *mut c_void,
    out: *mut *mut VcpuHandle,
    error: *mut ErrorBuffer,
) -> c_int {
    guarded(error, || {
        // SAFETY: the caller's promise.
        let gate = unsafe { gate.as_ref() }.ok_or_else(|| Failed::null("gate"))?;
        // SAFETY: the caller's promise.
        let out = unsafe { out.as_mut() }.ok_or_else(|| Failed::null("out"))?;
        let id = VcpuId::new(id).with_opaque(opaque.expose_provenance() as u64);
        let vcpu = VcpuHandle {
            gate: gate.gate.vcpu(&vcpu_fd, id)?,
            told: Arc::clone(&gate.told),
        };
        *out = Box::into_raw(Box::new(vcpu));
        Ok(0)
    })
}

/// `msrgate_dispatch`.
///
/// # Safety
/// As `msrgate.h` says: `vcpu` is of this library's and no other thread uses it, `run` is its mapped `kvm_run`, `answer` is NULL or
/// can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msrgate_dispatch(vcpu: *mut VcpuHandle, run: *mut c_void, answer: *mut Answer) -> c_int {
    guarded(std::ptr::null_mut(), || {
        // SAFETY: the caller's promise.
        let vcpu = unsafe { vcpu.as_ref() }.filter(|_| !run.is_null());
        let vcpu = vcpu.ok_or_else(|| Failed::null("vcpu or run"))?;
        // SAFETY: the caller's promise.
        let Dispatch::Answered(answered) = (unsafe { vcpu.gate.dispatch_raw(run.cast()) }) else {
            return Ok(0);
        };
        let log = vcpu.told.admits(&answered);
        // SAFETY: the caller's promise.
        if let Some(answer) = unsafe { answer.as_mut() } {
            *answer = told(&answered, log);
        }
        Ok(1)
    })
    // What is wrong with the arguments leaves the exit as it was: another's.
    .max(0)
}

fn told(answered: &Answered, log: bool) -> Answer {
    let rule = answered.answer.rule.and_then(|rule| i32::try_from(rule).ok());
    Answer {
        msr: answered.access.msr().0,
        write: matches!(answered.access, Access::Write { .. }).into(),
        faulted: (answered.answer.outcome == Outcome::Fault).into(),
        why: answered.answer.why.map_or(0, |why| why as u8 + 1),
        log: log.into(),
        rule: rule.unwrap_or(-1),
        value: answered.value(),
    }
}

/// `msrgate_save`.
///
/// # Safety
/// As `msrgate.h` says: `vcpu` is of this library's and stopped, `run` is NULL or its mapped `kvm_run`, `buffer` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msrgate_save(
    vcpu: *mut VcpuHandle,
    run: *mut c_void,
    buffer: *mut c_char,
    length: usize,
    error: *mut ErrorBuffer,
) -> c_long {
    let mut needed = 0;
    let status = guarded(error, || {
        // SAFETY: the caller's promise.
        let vcpu = unsafe { vcpu.as_ref() }.ok_or_else(|| Failed::null("vcpu"))?;
        if buffer.is_null() && length > 0 {
            return Err(Failed::null("buf"));
        }
        if !run.is_null() {
            // SAFETY: the caller's promise.
            match unsafe { vcpu.gate.drain_raw(run.cast()) }.map_err(SaveError::Run)? {
                DrainStatus::Idle => {}
                DrainStatus::Exit => return Err(SaveError::Exit.into()),
                DrainStatus::Unanswered => return Err(SaveError::Unanswered.into()),
            }
        }
        let state = vcpu.gate.save()?;
        if state.len() <= length {
            // SAFETY: the caller's promise: the buffer has at least as many bytes, and is not the library's.
            unsafe {
                buffer
                    .cast::<u8>()
                    .copy_from_nonoverlapping(state.as_ptr(), state.len())
            };
        }
        needed = c_long::try_from(state.len()).unwrap_or(c_long::MAX);
        Ok(0)
    });
    match status {
        0 => needed,
        failed => failed.into(),
    }
}

/// `msrgate_restore`.
///
/// # Safety
/// As `msrgate.h` says: `vcpu` is of this library's and stopped, `buffer` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msrgate_restore(
    vcpu: *mut VcpuHandle,
    buffer: *const c_char,
    length: usize,
    flags: c_uint,
    error: *mut ErrorBuffer,
) -> c_int {
    guarded(error, || {
        // SAFETY: the caller's promise.
        let vcpu = unsafe { vcpu.as_ref() }.ok_or_else(|| Failed::null("vcpu"))?;
        if buffer.is_null() {
            return Err(Failed::null("buf"));
        }
        // SAFETY: the caller's promise.
        let state = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), length) };
        match flags {
            0 => vcpu.gate.restore(state)?,
            ROLLBACK => vcpu.gate.roll_back(state)?,
            _ => {
                return Err(Failed::new(
                    libc::EINVAL,
                    "a flag is not known: MSRGATE_ROLLBACK is the only one",
                ));
            }
        }
        Ok(0)
    })
}

/// `msrgate_stats`.
///
/// # Safety
/// As `msrgate.h` says: `gate` is of this library's, `stats` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msrgate_stats(gate: *const GateHandle, stats: *mut Stats) {
    // SAFETY: the caller's promise.
    let gate = unsafe { gate.as_ref() };
    // SAFETY: likewise.
    let stats = unsafe { stats.as_mut() };
    if let (Some(gate), Some(stats)) = (gate, stats) {
        let counts = gate.gate.counts();
        *stats = Stats {
            reads: counts.reads,
            writes: counts.writes,
            faults: counts.faults,
            failures: counts.failures,
        };
    }
}

/// `msrgate_free`.
///
/// # Safety
/// As `msrgate.h` says: each is NULL or of this library's, and not freed yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msrgate_free(plan: *mut PlanHandle, gate: *mut GateHandle, vcpu: *mut VcpuHandle) {
    guarded(std::ptr::null_mut(), || {
        // SAFETY: the caller's promise; the handle came from `Box::into_raw`.
        drop((!vcpu.is_null()).then(|| unsafe { Box::from_raw(vcpu) }));
        // SAFETY: likewise.
        drop((!gate.is_null()).then(|| unsafe { Box::from_raw(gate) }));
        // SAFETY: likewise.
        drop((!plan.is_null()).then(|| unsafe { Box::from_raw(plan) }));
        Ok(0)
    });
}
