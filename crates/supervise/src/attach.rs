//! A VMM that runs already, and what is put in force on its VMs from outside.
//!
//! What the kernel alone can carry out is a filter and no more. For all else the answerer comes into the process, before anything is
//! in force: its memory is made by a thread of msrgate's own there, the VMM's instructions that make KVM_RUN are led to it, and each
//! vCPU is seen in it. That thread stays, so that msrgate can be asked; where msrgate is killed, what takes no answer of it goes on.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use msrgate_core::{Filter, Reasons};

use crate::control::Control;
use crate::inject::{self, StopRecord};
use crate::ledger::Ledger;
use crate::remote::RemoteCalls;
use crate::running::{
    AttachError, BETWEEN, NEW_VM, On, PATIENCE, RunningVcpu, RunningVm, may_not, nanoseconds, objects, other_tracer,
    set_all, wait_until_out,
};
use crate::seccomp::Cookies;
use crate::supervisor::{Remark, Setup, Supervisor};
use crate::target;
use crate::tracee::{StopError, Tracee, Tracer};
use crate::{detour, region, running};

/// What is to be answered in the VMM's process.
pub struct Answers {
    /// The policy, which depends on no CPUID, and who answers for it.
    pub setup: Setup,
    /// The VMM's own filter, where there is one.
    pub filter: Option<Filter>,
    /// The exits that the VMM asked for.
    pub mask: Reasons,
    /// What whoever runs this is to know.
    pub say: Box<dyn Fn(Remark) + Send>,
}

impl fmt::Debug for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answers")
            .field("setup", &self.setup)
            .finish_non_exhaustive()
    }
}

/// A VMM that runs, and that no other msrgate has.
#[derive(Debug)]
pub struct Running {
    process: i32,
    vms: Vec<RunningVm>,
    vcpus: Vec<RunningVcpu>,
    cookies: Cookies,
    remote: RemoteCalls,
    /// Where what is to be answered is answered in the process: what does so, and the thread of this process that keeps it.
    answering: Option<(Control, JoinHandle<()>)>,
    /// Nanoseconds that a thread of the VMM stood still at most.
    longest: Arc<AtomicU64>,
    stops: u32,
    /// An msrgate that was killed has left its answerer there.
    is_left: bool,
    /// Whoever else attaches finds it taken; it is free where this process ends.
    _claim: UnixDatagram,
}

impl Running {
    /// The VMM of this process.
    ///
    /// # Errors
    /// Where the process has ended, is no VMM, may not be traced, or is another msrgate's already.
    pub fn find(process: i32, cookies: Cookies) -> Result<Running, AttachError> {
        let of = target::process(process);
        if of == 0 {
            return Err(AttachError::Gone);
        }
        if of != process {
            return Err(AttachError::NoVmm(format!("it is a thread of process {of}: name that")));
        }
        if target::program(process).is_none() {
            return Err(AttachError::Gone);
        }
        let mut start = [0; 5];
        let program = fs::File::open(format!("/proc/{process}/exe"));
        if program.is_ok_and(|file| file.read_exact_at(&mut start, 0).is_ok())
            && &start[..4] == b"\x7fELF"
            && start[4] != 2
        {
            let line = "it is a 32-bit program, whose calls are not made here: take a build of the VMM for x86-64";
            return Err(AttachError::Refused(line.to_owned()));
        }
        let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten();
        let mut statuses = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("status")).ok());
        if statuses.any(|status| target::has_shadow_stack(&status)) {
            let line = "its threads have shadow stacks, on which no other may put a signal's frame: start it by `msrgate run`, or \
                        without them (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)";
            return Err(AttachError::Refused(line.to_owned()));
        }
        let claim = claim(process)?;
        let (vms, vcpus, is_left) = objects(process)?;
        if vms.is_empty() {
            return Err(AttachError::NoVmm(no_vm(process)));
        }
        // QEMU sets its filter and asks for its exits between the VM and the first vCPU.
        if vcpus.is_empty() {
            let line = "it is still starting: its VM has no vCPU, and it may yet set a filter of its own; attach once \
                        its guest runs";
            return Err(AttachError::NoVmm(line.to_owned()));
        }
        if let Some(line) = other_tracer(process).and_then(|_| may_not(process)) {
            return Err(AttachError::Refused(line));
        }
        Ok(Running {
            process,
            vms,
            vcpus,
            cookies,
            remote: RemoteCalls::new(Tracer::of_others(cookies.alone())),
            answering: None,
            longest: Arc::default(),
            stops: 0,
            is_left,
            _claim: claim,
        })
    }

    /// The VMs of the VMM.
    pub fn vms(&self) -> &[RunningVm] {
        &self.vms
    }

    /// How many vCPUs it has, of all VMs.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// How long a thread of the VMM stood still at most, and how often one did.
    pub fn stops(&self) -> (Duration, u32) {
        (Duration::from_nanos(self.longest.load(Ordering::Relaxed)), self.stops)
    }

    /// Puts a filter in force on VMs, by their descriptors, and a mask where there is one.
    ///
    /// # Errors
    /// Where it cannot be; the line says where not all VMs have the same then.
    pub fn put(&mut self, vms: &[RawFd], mask: Option<Reasons>, filter: &Filter) -> Result<(), AttachError> {
        let vms = self.present(vms);
        self.within(|remote, own, _| set_all(remote, own, &vms, [mask, None], filter))
    }

    /// Puts a policy in force on all VMs, with what is to be answered answered in the process, or asked from there.
    ///
    /// # Errors
    /// Where it cannot be: then all is as it was, but for memory of the process.
    pub fn answer(&mut self, what: Answers, ledger: &Arc<Ledger>) -> Result<(), AttachError> {
        let refused = |error: io::Error| AttachError::Refused(error.to_string());
        let mut supervisor = Supervisor::of_running(what.setup, self.cookies, Arc::clone(ledger), what.say);
        let control = supervisor.control().map_err(refused)?;
        let on = On {
            fds: self.present(&self.vms.iter().map(|vm| vm.descriptor).collect::<Vec<RawFd>>()),
            vcpus: self.vcpus.clone(),
            filter: what.filter,
            mask: what.mask,
            longest: Arc::clone(&self.longest),
        };
        let (tell, told) = channel();
        let (process, tracer, longest) = (self.process, self.remote.tracer, Arc::clone(&self.longest));
        let keep = move || {
            let done = inject::within(&tracer, process, |own, stood| {
                longest.fetch_max(nanoseconds(stood), Ordering::Relaxed);
                let begun = supervisor.begin(own, on);
                let is_on = begun.is_ok();
                // Who asked waits for it.
                let _ = tell.send(begun);
                if is_on {
                    supervisor.stay();
                }
            });
            if let Err(error) = done {
                let _ = tell.send(Err(hindered(process, error)));
            }
        };
        let thread = thread::Builder::new().name("supervisor".to_owned()).spawn(keep);
        let thread = thread.map_err(refused)?;
        told.recv().unwrap_or(Err(AttachError::Gone))?;
        self.stops += 1;
        self.answering = Some((control, thread));
        Ok(())
    }

    /// A way to what answers in the process; `None` where the kernel alone carries the policy out.
    pub fn control(&self) -> Option<&Control> {
        self.answering.as_ref().map(|(control, _)| control)
    }

    /// Has [`Running::new_vm`] tell the VMs that are there from those that the VMM makes later.
    ///
    /// # Errors
    /// The kernel's, where it lets no VM be named.
    pub fn name_vms(&mut self) -> io::Result<()> {
        let mut tags = self.cookies.in_kernel_tag()..;
        for (vm, tag) in self.vms.iter_mut().zip(&mut tags) {
            target::name(self.process, vm.descriptor, tag)?;
            vm.tag = tag;
        }
        for (vcpu, tag) in self.vcpus.iter_mut().zip(tags) {
            if let Some(descriptor) = vcpu.descriptors.first() {
                target::name(self.process, *descriptor, tag)?;
            }
            vcpu.tag = tag;
        }
        Ok(())
    }

    /// These VMs, by the descriptors that they have now where the VMM has them still: a number may be another file's.
    fn present(&self, vms: &[RawFd]) -> Vec<RawFd> {
        let meant = self.vms.iter().filter(|vm| vms.contains(&vm.descriptor));
        let now = |vm: &RunningVm| match vm.tag & Cookies::IN_KERNEL {
            0 => Some(vm.descriptor),
            _ => target::descriptors(self.process, [vm.tag].into_iter()).pop(),
        };
        meant.filter_map(now).collect()
    }

    /// What there is to be said of a VM that the VMM has made since its VMs were named, and has still.
    pub fn new_vm(&self) -> Option<Remark> {
        let vms = objects(self.process).map(|(vms, ..)| vms).unwrap_or_default();
        let is_new = vms.iter().any(|vm| vm.tag == 0);
        is_new.then(|| Remark::Line(NEW_VM.to_owned()))
    }

    /// Has a ledger know of VMs, and of the vCPUs.
    pub fn count(&self, vms: &[RawFd], ledger: &Ledger) {
        vms.iter().for_each(|_| _ = ledger.new_vm());
        self.vcpus.iter().for_each(|_| ledger.new_vcpu());
    }

    /// Puts back what VMs had in force, or what the VMM has asked for since, and has the VMM's own instructions make KVM_RUN again.
    /// Tells whether the VMM has a filter of its own then.
    ///
    /// # Errors
    /// Where it cannot be.
    pub fn take_off(&mut self, vms: &[RawFd], filter: &Filter) -> Result<bool, AttachError> {
        let Some((control, _)) = &self.answering else {
            let now = self.present(vms);
            running::is_left(self.process, &now, self.vcpus.iter().map(|vcpu| vcpu.tag))?;
            self.within(|remote, own, _| set_all(remote, own, &now, [None; 2], filter))?;
            // What the VMM has closed since has no name any more.
            let all: Vec<RawFd> = self.vms.iter().map(|vm| vm.descriptor).collect();
            let vcpus = target::descriptors(self.process, self.vcpus.iter().map(|vcpu| vcpu.tag));
            let named = self.present(&all).into_iter().chain(vcpus);
            named.for_each(|fd| _ = target::unname(self.process, fd));
            return Ok(*filter != Filter::allow_all());
        };
        let is_filtered = control.take_off()?;
        if let Some((_, thread)) = self.answering.take() {
            // It has nothing more to do.
            let _ = thread.join();
        }
        Ok(is_filtered)
    }

    /// Ends what an msrgate has left that was killed while it answered: VMs get what they had before that.
    ///
    /// # Errors
    /// Where it cannot be ended.
    pub fn take_over(&mut self, mask: Reasons, filter: &Filter) -> Result<(), AttachError> {
        if !self.is_left {
            return Ok(());
        }
        let vms: Vec<RawFd> = self.vms.iter().map(|vm| vm.descriptor).collect();
        let called = self.vcpus.clone();
        self.within(|remote, own, still| {
            // Threads may be out of the answerer already, so that no exit may be asked for that the VMM does not know.
            set_all(remote, own, &vms, [None, Some(mask)], filter)?;
            let process = own.process;
            let refused = |error: io::Error| AttachError::Refused(error.to_string());
            for site in detour::left(process) {
                detour::remove(process, site).map_err(refused)?;
            }
            let (begin, mut between) = (Instant::now(), BETWEEN);
            loop {
                if !wait_until_out(remote, own, still, |site| region::is_some_image(process, site)) {
                    let line =
                        "an msrgate that was killed answers for its guests, and the VMM's threads do not come out of that";
                    return Err(AttachError::Refused(line.to_owned()));
                }
                // One that waits for an answer will see that there is none. A thread that was lost there stays noted for ever.
                let is_run = region::is_some_run(process);
                if !is_run || begin.elapsed() > PATIENCE {
                    break;
                }
                thread::sleep(between);
                between *= 2;
            }
            let vcpus = called.iter().flat_map(|vcpu| vcpu.descriptors.first());
            let mut named = vms.iter().chain(vcpus);
            named.try_for_each(|fd| target::unname(process, *fd)).map_err(refused)
        })?;
        self.is_left = false;
        Ok(())
    }

    /// Does `work` in a thread of msrgate's own in the process; `work` may note how long another thread stood still.
    fn within(
        &mut self,
        work: impl FnOnce(&mut RemoteCalls, &mut Tracee, &mut StopRecord) -> Result<(), AttachError> + Send,
    ) -> Result<(), AttachError> {
        let (process, tracer) = (self.process, self.remote.tracer);
        let (remote, longest) = (&mut self.remote, &self.longest);
        let done = inject::within(&tracer, process, |mut own, stood| {
            let mut still = StopRecord::default();
            let done = work(remote, &mut own, &mut still);
            longest.fetch_max(nanoseconds(stood.max(still.longest)), Ordering::Relaxed);
            done
        });
        self.stops += u32::from(done.is_ok());
        done.map_err(|error| hindered(process, error))?
    }
}

fn hindered(process: i32, error: StopError) -> AttachError {
    match error {
        StopError::Refused(line) => AttachError::Refused(may_not(process).unwrap_or(line)),
        error => error.into(),
    }
}

/// Has nobody else attach to a process as long as this one lives.
fn claim(process: i32) -> Result<UnixDatagram, AttachError> {
    let name = format!("msrgate/attach/{process}");
    let claim = SocketAddr::from_abstract_name(name).and_then(|address| UnixDatagram::bind_addr(&address));
    claim.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => AttachError::Refused(
            "another `msrgate attach` has it: end that one first (SIGINT), since a policy takes the place of another only as a whole"
                .to_owned(),
        ),
        _ => AttachError::Refused(format!("it cannot be claimed: {error}")),
    })
}

/// What is said of a process without a VM.
fn no_vm(process: i32) -> String {
    let program = target::program(process).unwrap_or_default();
    let mut others = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(other) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let links = fs::read_dir(format!("/proc/{other}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        let is_vm =
            |link: fs::DirEntry| fs::read_link(link.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:kvm-vm");
        if links.into_iter().any(is_vm) {
            others.push(format!("{other} (`{}`)", target::program(other).unwrap_or_default()));
        }
    }
    match others.is_empty() {
        true => format!("`{program}` has no VM, and no process that can be seen here has one"),
        false => format!("`{program}` has no VM; these have: {}", others.join(", ")),
    }
}
