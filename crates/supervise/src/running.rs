//! What is known of a VMM that runs already, and what is done with its vCPUs and VMs as a whole.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use msrgate_core::{Filter, Reasons};
use nix::errno::Errno;

use crate::inject::{self, StopRecord};
use crate::memory::Words;
use crate::region::{self, Region};
use crate::remote::RemoteCalls;
use crate::sandbox;
use crate::seccomp::Cookies;
use crate::target::{self, Object};
use crate::tracee::{CAP_SYS_PTRACE, StopError, Tracee, has_capability};

/// How long is waited until each vCPU is seen in the answerer, or none is, and how often it is looked. A busy machine may not run a
/// thread for seconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
pub(crate) const BETWEEN: Duration = Duration::from_millis(2);

/// Looks between two attempts to find a thread in KVM_RUN.
const SELDOM: u32 = 4;

/// Why nothing is put in force.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum AttachError {
    /// The process has ended, or never was.
    Gone,
    /// The process is no VMM, or has no VM now; one line for people.
    NoVmm(String),
    /// This machine or this user cannot; one line for people.
    Refused(String),
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AttachError::Gone => f.write_str("it has ended"),
            AttachError::NoVmm(line) | AttachError::Refused(line) => f.write_str(line),
        }
    }
}

impl std::error::Error for AttachError {}

impl From<StopError> for AttachError {
    fn from(error: StopError) -> AttachError {
        match error {
            StopError::Gone => AttachError::Gone,
            StopError::Refused(line) => AttachError::Refused(line),
        }
    }
}

/// A VM of a VMM that runs.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct RunningVm {
    /// The VMM's descriptor of it; the smallest one where there are several.
    pub descriptor: i32,
    /// What it is called; 0 where nobody has called it yet.
    pub(crate) tag: u64,
}

/// A vCPU of a VMM that runs.
#[derive(Clone, Debug)]
pub(crate) struct RunningVcpu {
    pub(crate) id: u32,
    /// What it is called; 0 where nobody has called it yet.
    pub(crate) tag: u64,
    /// The VMM's descriptors of it.
    pub(crate) descriptors: Vec<RawFd>,
}

/// What is known of VMs that ran already.
pub(crate) struct Attached {
    /// The thread that makes calls there; `None` while it makes one for an exit.
    pub(crate) own: Option<Tracee>,
    pub(crate) region: u64,
    pub(crate) vm: u64,
    /// The descriptors that all VMs had at first.
    pub(crate) fds: Vec<RawFd>,
    pub(crate) vcpus: Vec<RunningVcpu>,
    /// The sandboxes of the VMM's threads let them wait for an answer.
    pub(crate) waits: bool,
    /// Where the calls are by which the thread puts back what was in force, whatever becomes of msrgate, and their bytes.
    pub(crate) left: Option<(u64, u64)>,
    /// It was said that a vCPU is not answered.
    pub(crate) is_told: bool,
    /// It was said that there is a VM without the policy.
    pub(crate) is_past: bool,
    pub(crate) still: StopRecord,
    /// Nanoseconds that a thread of the VMM stood still at most.
    pub(crate) longest: Arc<AtomicU64>,
}

/// What is to be put in force on.
pub(crate) struct On {
    pub(crate) fds: Vec<RawFd>,
    pub(crate) vcpus: Vec<RunningVcpu>,
    /// The VMM's own filter, where there is one.
    pub(crate) filter: Option<Filter>,
    /// The exits that the VMM asked for.
    pub(crate) mask: Reasons,
    /// Nanoseconds that a thread of the VMM stood still at most.
    pub(crate) longest: Arc<AtomicU64>,
}

impl Attached {
    /// The VMs that the VMM has still, by the descriptors that they have now: a number may be another file's.
    pub(crate) fn present(&self, process: i32) -> Vec<RawFd> {
        target::descriptors(process, (self.vm..).take(self.fds.len()))
    }

    /// Tells for how long a thread of the VMM stood still.
    pub(crate) fn stood(&self) {
        self.longest
            .fetch_max(nanoseconds(self.still.longest), Ordering::Relaxed);
    }
}

/// A length of time as [`Attached::longest`] has it.
pub(crate) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Has KVM_RUN give EINTR wherever the instruction is one of these, until none is and no thread is late; tells whether it came to
/// that.
pub(crate) fn wait_until_out(
    remote: &RemoteCalls,
    own: &Tracee,
    still: &mut StopRecord,
    is_in: impl Fn(u64) -> bool,
) -> bool {
    let (begin, mut between) = (Instant::now(), BETWEEN);
    loop {
        let sites = inject::interrupt_runs(&remote.tracer, own, still, inject::PATIENCE_WITH_RUN, |site, _, _| {
            !is_in(site)
        });
        match sites.into_iter().any(&is_in) || !still.late.is_empty() {
            false => return true,
            // What is stopped by a signal comes out once it goes on.
            true if begin.elapsed() > PATIENCE || target::is_stopped(own.process) => return false,
            // Those that were stopped need a while until they run again.
            true => std::thread::sleep(between),
        }
        between *= 2;
    }
}

/// Whether something can be taken off VMs of which these are left, by their vCPUs' tags: not where the VMM has closed them all and runs
/// one on.
pub(crate) fn is_left(process: i32, vms: &[RawFd], vcpus: impl Iterator<Item = u64>) -> Result<(), AttachError> {
    match vms.is_empty() && !target::descriptors(process, vcpus.filter(|tag| *tag != 0)).is_empty() {
        false => Ok(()),
        true => Err(AttachError::Refused(
            "the VMM has closed its VM and runs its vCPUs on, so that nothing can be taken off it any more".to_owned(),
        )),
    }
}

/// Sets the filter of each VM, and a mask before and after it where there is one.
pub(crate) fn set_all(
    remote: &mut RemoteCalls,
    own: &mut Tracee,
    vms: &[RawFd],
    [before, after]: [Option<Reasons>; 2],
    filter: &Filter,
) -> Result<(), AttachError> {
    for (count, fd) in vms.iter().enumerate() {
        let refused = |error: Errno| match error {
            Errno::ESRCH => AttachError::Gone,
            error if count > 0 => {
                let of = vms.len();
                AttachError::Refused(format!(
                    "the kernel refuses the filter, after {count} of {of} VMs have it: {}",
                    error.desc()
                ))
            }
            error => AttachError::Refused(format!("the kernel refuses the filter: {}", error.desc())),
        };
        let vm = u64::from(fd.cast_unsigned());
        // Whose it is comes first, before what is asked for (`kvm_vm_ioctl`).
        if own.ioctl(vm, 0, 0) == Err(Errno::EIO) {
            let line =
                "the VM was made by another process, and only that one can change it: name the process that made it";
            return Err(AttachError::NoVmm(line.to_owned()));
        }
        if let Some(before) = before {
            remote.set_mask(own, vm, before).map_err(refused)?;
        }
        remote.set_filter(own, vm, filter).map_err(refused)?;
        if let Some(after) = after.filter(|after| before != Some(*after)) {
            remote.set_mask(own, vm, after).map_err(refused)?;
        }
    }
    Ok(())
}

/// What the kernel refuses in the process while the answerer comes in.
pub(crate) fn no_memory(error: Errno) -> AttachError {
    match error {
        Errno::ESRCH => AttachError::Gone,
        error => AttachError::Refused(format!("the VMM gets no memory for its answers: {}", error.desc())),
    }
}

/// Memory of the process, as words here, and its descriptor there.
pub(crate) fn shared(
    remote: &mut RemoteCalls,
    own: &mut Tracee,
    count: usize,
    alone: bool,
) -> Result<(Words, fs::File, i32), Errno> {
    let name = remote.lay_out(own, b"msrgate\0")?;
    let flags = u64::from(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
    let fd = own.call(libc::SYS_memfd_create, [name, flags, 0, 0, 0, 0])? as i32;
    let words = target::file(own.process, fd).and_then(|file| Ok((Words::of(&file, count, alone)?, file)));
    match words {
        Ok((words, file)) => Ok((words, file, fd)),
        Err(error) => {
            own.close(fd);
            Err(target::errno(error))
        }
    }
}

/// Leads the VMM's instructions to the answerer, until each vCPU is seen there, by what it and its VMM call it. Tells whether the
/// sandbox of each thread that runs one lets the thread wait for an answer.
pub(crate) fn detour(
    remote: &RemoteCalls,
    own: &mut Tracee,
    region: &mut Region,
    mut missing: Vec<(u64, u32)>,
    still: &mut StopRecord,
) -> Result<bool, AttachError> {
    let (tracer, process) = (remote.tracer, own.process);
    if target::is_stopped(process) {
        let line = "it is stopped, as by SIGSTOP, so that no vCPU comes to the answerer: let it go on, and attach then";
        return Err(AttachError::Refused(line.to_owned()));
    }
    let begin = Instant::now();
    let (mut looks, mut next, mut waits) = (0_u32, 0, true);
    // How many looks later threads are stopped again: until the VMM's instruction is known by chance only, since its threads may seldom
    // be in KVM_RUN. What is in the guest then needs a while until it is back, and longer each time: who is stopped again before it runs
    // gets nowhere.
    let mut gap = SELDOM;
    while !missing.is_empty() {
        if looks == next {
            // What an earlier policy has left there is come out of: by that nobody is led.
            let is_left = |site: u64| !region.is_image(site) && region::is_some_image(process, site);
            let mut sites = inject::interrupt_runs(&tracer, own, still, inject::PATIENCE, |site, thread, filters| {
                waits &= sandbox::lets_wait(thread, filters);
                !is_left(site)
            });
            gap = match (gap, sites.is_empty()) {
                (SELDOM, true) => SELDOM,
                _ => (2 * gap).max(16),
            };
            next = looks + gap;
            // Those that run vCPUs, most likely.
            if let Some(line) = still.refused.take().filter(|_| sites.is_empty()) {
                return Err(AttachError::Refused(line));
            }
            sites.retain(|site| !region.is_image(*site) && !is_left(*site));
            for site in &sites {
                let (_, slow) = region.trampolines.detour(own, *site).map_err(no_memory)?;
                if slow {
                    let line = "its KVM_RUN has no room for a jump beside it, so that what the guest accesses cannot be answered there: \
                                start it by `msrgate run`";
                    return Err(AttachError::Refused(line.to_owned()));
                }
            }
            if !sites.is_empty() {
                inject::interrupt_runs(&tracer, own, still, inject::PATIENCE, |_, _, _| true);
            }
        } else {
            std::thread::sleep(BETWEEN);
        }
        looks += 1;
        missing.retain(|(vcpu, _)| !region.is_run(*vcpu));
        if target::program(process).is_none() {
            return Err(AttachError::Gone);
        }
        if begin.elapsed() > PATIENCE && !missing.is_empty() {
            let ids: Vec<String> = missing.iter().map(|(_, id)| id.to_string()).collect();
            let line = format!(
                "vCPU {} is in no KVM_RUN, so that it is not known by which of the VMM's instructions it will be: let the guest \
                 run, and attach then",
                ids.join(", ")
            );
            return Err(AttachError::Refused(line));
        }
    }
    Ok(waits)
}

/// What is said of a VM that the VMM has made since.
pub(crate) const NEW_VM: &str = "the VMM has made a VM, as some do for a guest that reboots, which is not under the policy: \
                                 `msrgate detach`, and attach again";

/// The VMs and the vCPUs of a process.
pub(crate) fn objects(process: i32) -> Result<(Vec<RunningVm>, Vec<RunningVcpu>, bool), AttachError> {
    let mut is_left = false;
    let mut vms: Vec<RunningVm> = Vec::new();
    let mut vcpus: Vec<RunningVcpu> = Vec::new();
    let mut fds: Vec<RawFd> = Vec::new();
    let cannot = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => AttachError::Gone,
        _ => {
            AttachError::Refused(may_not(process).unwrap_or_else(|| format!("its descriptors cannot be seen: {error}")))
        }
    };
    for entry in fs::read_dir(format!("/proc/{process}/fd")).map_err(cannot)? {
        fds.extend(
            entry
                .map_err(cannot)?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<RawFd>().ok()),
        );
    }
    fds.sort_unstable();
    for fd in fds {
        let (is_vm, tag) = match Object::of(process, fd).map_err(cannot)? {
            Object::Vm(tag) => (true, tag),
            Object::Vcpu(tag) => (false, tag),
            _ => continue,
        };
        // Another `attach` that lives would have claimed the process.
        is_left |= tag & Cookies::ATTACHED != 0;
        if tag != 0 && tag & (Cookies::ATTACHED | Cookies::IN_KERNEL) == 0 {
            let line = "its VMs are under `msrgate run`, which keeps a policy on them already: change that one";
            return Err(AttachError::Refused(line.to_owned()));
        }
        let is_same = |other: RawFd| target::is_same_file(process, other, fd);
        if is_vm {
            if !vms.iter().any(|vm| is_same(vm.descriptor)) {
                vms.push(RunningVm { descriptor: fd, tag });
            }
            continue;
        }
        let same = vcpus
            .iter_mut()
            .find(|vcpu| vcpu.descriptors.first().is_some_and(|other| is_same(*other)));
        match same {
            Some(vcpu) => vcpu.descriptors.push(fd),
            None => vcpus.push(RunningVcpu {
                id: vcpu_id(process, fd),
                tag,
                descriptors: vec![fd],
            }),
        }
    }
    Ok((vms, vcpus, is_left))
}

/// The number of a vCPU, which is part of what its descriptor is called (`create_vcpu_fd`).
fn vcpu_id(process: i32, fd: RawFd) -> u32 {
    let link = fs::read_link(format!("/proc/{process}/fd/{fd}")).unwrap_or_default();
    let name = link.to_string_lossy().into_owned();
    name.rsplit(':').next().and_then(|id| id.parse().ok()).unwrap_or(0)
}

/// Another process that traces a thread of a process: a debugger, or an msrgate whose claim is not seen in this network namespace.
pub(crate) fn other_tracer(process: i32) -> Option<i32> {
    let threads = fs::read_dir(format!("/proc/{process}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let mut tracers = threads.filter_map(|thread| target::tracer(thread.file_name().to_str()?.parse().ok()?));
    tracers.find(|tracer| *tracer != std::process::id().cast_signed())
}

/// Why this user may not look into a process or trace it; `None` where none of the usual reasons holds.
pub(crate) fn may_not(process: i32) -> Option<String> {
    if let Some(tracer) = other_tracer(process) {
        return Some(format!(
            "process {tracer} traces it, and one process can do so at a time: end that one's tracing first"
        ));
    }
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let scope = scoped(scope.trim(), has_capability(CAP_SYS_PTRACE));
    if nix::unistd::geteuid().is_root() {
        return scope;
    }
    let owner = fs::metadata(format!("/proc/{process}")).ok()?.uid();
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let id = |field: &str| {
        let ids = status.lines().find_map(|line| line.strip_prefix(field))?;
        ids.split_whitespace().next()?.parse::<u32>().ok()
    };
    let (user, group) = (id("Uid:")?, id("Gid:")?);
    if user != nix::unistd::getuid().as_raw() {
        return Some(format!("it is user {user}'s: run msrgate as root"));
    }
    // Whose groups differ may not (`__ptrace_may_access`).
    if group != nix::unistd::getgid().as_raw() {
        return Some(format!(
            "its group is {group}, and msrgate's is another: run msrgate as root, or in that group (`sg`, `newgrp`)"
        ));
    }
    // The kernel gives what cannot be dumped to root.
    if owner != user {
        return Some(
            "it cannot be traced, since it or a security module says so (PR_SET_DUMPABLE): run msrgate as root"
                .to_owned(),
        );
    }
    scope
}

/// What Yama does not let a user do, by its `ptrace_scope` (`yama_ptrace_access_check`).
fn scoped(scope: &str, may_trace: bool) -> Option<String> {
    match scope {
        "1" | "2" if !may_trace => Some(format!(
            "kernel.yama.ptrace_scope is {scope}: run msrgate as root, or give it CAP_SYS_PTRACE"
        )),
        "3" => Some("kernel.yama.ptrace_scope is 3, so that nobody may trace until the next boot".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yama_hinders_those_without_the_capability_and_in_the_end_everybody() {
        let hinders = |scope| [false, true].map(|may_trace| scoped(scope, may_trace).is_some());
        assert_eq!(
            ["", "0", "1", "2", "3"].map(hinders),
            [
                [false, false],
                [false, false],
                [true, false],
                [true, false],
                [true, true]
            ]
        );
    }
}
