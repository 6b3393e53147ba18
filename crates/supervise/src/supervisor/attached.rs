//! VMs that ran already: the answerer is brought in at once, and asks through memory.
//!
//! A thread of msrgate's own stays in the process as long as the policy is on. It makes the calls that answers take, and waits in
//! between for the bell that answerers ring. Where msrgate ends so does that thread, which the kernel tells the answerers
//! (`set_tid_address(2)`).

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use msrgate_answer::layout::control;
use msrgate_answer::layout::own::LET;
use msrgate_core::abi::EnableCap;
use msrgate_core::{Filter, abi};
use nix::errno::Errno;

use super::exit::Question;
use super::{Refusal, Remark, Setup, Supervisor, Vcpu, Vm};
use crate::control::Command;
use crate::inject::{self, StopRecord};
use crate::ledger::{Ledger, Ring};
use crate::policy::{Mode, State};
use crate::region::{Bell, Entry, HandedFiles, Left, Region};
use crate::remote::RemoteCalls;
use crate::running::{
    self, AttachError, Attached, BETWEEN, On, PATIENCE, RunningVcpu, no_memory, set_all, shared, wait_until_out,
};
use crate::sandbox::{self, WAIT, WAKE};
use crate::seccomp::Cookies;
use crate::target::{self, Object};
use crate::tracee::{NO_TSC, Tracee, Tracer};

/// How often, in milliseconds, it is looked whether the VMM has made vCPUs, and whether somebody wants something.
const LOOKS: u64 = 50;
/// How often it is looked whether vCPUs have left the answerer.
const SETTLES: Duration = Duration::from_millis(1);

const CANNOT_WAIT: &str = "the sandbox of the threads that run its vCPUs lets them wait for no answer (`futex`), and the policy has what \
                           msrgate decides anew at each access: take `allow`, `deny`, `zero`, `value`, `shadow` and `ignore`, or start \
                           the VMM by `msrgate run`";

impl Supervisor {
    /// One for VMs that run already.
    pub(crate) fn of_running(
        setup: Setup,
        cookies: Cookies,
        ledger: Arc<Ledger>,
        say: Box<dyn Fn(Remark) + Send>,
    ) -> Supervisor {
        let mut supervisor = Supervisor::new(setup, cookies, ledger, say);
        supervisor.remote.tracer = Tracer::of_others(cookies.alone());
        supervisor
    }

    /// Puts the policy in force on all VMs of a process.
    ///
    /// # Errors
    /// Where it cannot be: then all is as it was, but for memory of the process.
    pub(crate) fn begin(&mut self, mut own: Tracee, on: On) -> Result<(), AttachError> {
        let begun = self.inject_answerer(&mut own, &on);
        let begun = begun.and_then(|()| self.detour(&mut own));
        let begun = begun.and_then(|()| self.put(&mut own, &on));
        self.put_own(Some(own));
        if begun.is_err() {
            // Where it cannot be undone either the process has ended.
            let _ = self.leave();
        }
        begun
    }

    /// Brings the answerer in, with a place for each vCPU.
    fn inject_answerer(&mut self, own: &mut Tracee, on: &On) -> Result<(), AttachError> {
        let cookies = self.remote.tracer.cookies;
        let policy = Arc::clone(&self.policy);
        // This thread is as the one that made it. Of one that runs a vCPU it is not asked: where msrgate is killed while it makes a call
        // for that, KVM_RUN gives what the call gives.
        if own.scratch.is_some_and(|at| !own.may_time(at)) {
            return Err(AttachError::Refused(format!(
                "no vCPU is answered: {NO_TSC}, or take `allow` and `deny` alone"
            )));
        }
        self.open_host_msrs(&policy).map_err(line)?;
        let (control, _, fd) = shared(&mut self.remote, own, control::WORDS, true).map_err(no_memory)?;
        let stacks = !target::is_go(own.process);
        let name = cookies.first_tag();
        let control = (control, fd);
        let region = match Left::of(own.process) {
            Some(left) => Region::instead(own, control, name, &cookies, stacks, left),
            None => Region::new(own, control, name, &cookies, stacks, None),
        };
        own.close(fd);
        let region = region.map_err(no_memory)?;
        region.keep(own).map_err(no_memory)?;
        self.regions.insert(name, region);
        self.newest.insert(own.process, name);
        let vm = cookies.attached_tag();
        let mut fds = on.fds.iter().map(|fd| u64::from(fd.cast_unsigned()));
        let mut state = State::new(policy);
        state.filter = on.filter.clone();
        let object = Vm {
            number: 0,
            fd: fds.next(),
            others: (vm + 1..).zip(fds).collect(),
            process: own.process,
            state,
            mask: on.mask,
            in_force: on.filter.clone().unwrap_or_else(Filter::allow_all),
            reasons: on.mask,
            before: Vec::new(),
        };
        self.vms.insert(vm, object);
        // Behind those of the VMs.
        self.next = vm + on.fds.len() as u64;
        self.attached = Some(Attached {
            own: None,
            region: name,
            vm,
            fds: on.fds.clone(),
            vcpus: Vec::new(),
            waits: true,
            left: None,
            is_told: false,
            is_past: false,
            still: StopRecord::default(),
            longest: Arc::clone(&on.longest),
        });
        if self.setup.mode != Mode::Enforce {
            self.lay_down(own, on).map_err(no_memory)?;
        }
        on.vcpus
            .iter()
            .try_for_each(|vcpu| self.place(own, vcpu.clone()).map(drop))
    }

    /// Has the VMM's own filter in force again where msrgate is killed that only looks on; not where the thread that is to do so is
    /// in a sandbox that does not let it.
    fn lay_down(&mut self, own: &mut Tracee, on: &On) -> Result<(), Errno> {
        let mut requests = [abi::SET_MSR_FILTER, abi::ENABLE_CAP].map(u64::from).into_iter();
        let filters = sandbox::filters(own.thread().as_raw());
        if !requests.all(|request| sandbox::lets(own.thread(), filters, libc::SYS_ioctl, request)) {
            return Ok(());
        }
        let fds: Vec<u64> = on.fds.iter().map(|fd| u64::from(fd.cast_unsigned())).collect();
        let filter = on.filter.clone().unwrap_or_else(Filter::allow_all);
        let bytes = RemoteCalls::laid_down(fds.len());
        let (words, _, fd) = shared(&mut self.remote, own, bytes.div_ceil(size_of::<u64>()), true)?;
        let at = own.map(0, bytes, libc::PROT_READ, libc::MAP_SHARED, fd);
        own.close(fd);
        let at = at?;
        for (number, word) in RemoteCalls::lay_down(at, &fds, on.mask, &filter)
            .into_iter()
            .enumerate()
        {
            words.set(number, word);
        }
        own.leave_behind(at);
        if let Some(attached) = &mut self.attached {
            attached.left = Some((at, bytes as u64));
        }
        Ok(())
    }

    /// Has a vCPU answered, and gives what it is called.
    fn place(&mut self, own: &mut Tracee, vcpu: RunningVcpu) -> Result<u64, AttachError> {
        let Some((name, vm)) = self.attached.as_ref().map(|attached| (attached.region, attached.vm)) else {
            return Err(AttachError::Gone);
        };
        let Some((policy, mask)) = self.vms.get(&vm).map(|vm| (Arc::clone(&vm.state.policy), vm.mask)) else {
            return Err(AttachError::Gone);
        };
        let table = self
            .table(&policy)
            .map_err(|error| AttachError::Refused(error.to_string()))?;
        let (flags, tag) = (self.flags(), self.new_tag());
        if let Some(descriptor) = vcpu.descriptors.first() {
            target::name(own.process, *descriptor, tag).map_err(cannot_name)?;
        }
        let region = self.regions.get_mut(&name).ok_or(AttachError::Gone)?;
        region.map_table(own, &mut self.remote, &table).map_err(no_memory)?;
        let (memory, _, fd) = shared(&mut self.remote, own, Ring::words(table.cells), false).map_err(no_memory)?;
        let ring = Ring::of(memory, own.process, (0, vcpu.id));
        let mut handed = HandedFiles {
            ring: Some((Arc::clone(&ring), fd)),
            ..HandedFiles::default()
        };
        let entered = vcpu.descriptors.iter().try_for_each(|descriptor| {
            let entry = Entry {
                vcpu: tag,
                fd: u64::from(descriptor.cast_unsigned()),
                table: &table,
                mask: u64::from(mask.bits()),
                flags,
                who: u64::from(vcpu.id) << 32,
            };
            region.enter(own, &mut handed, &entry)
        });
        own.close(fd);
        entered.map_err(no_memory)?;
        self.ledger.add(ring);
        let known = Vcpu {
            vm,
            id: vcpu.id,
            registers: Vec::new(),
            ready: true,
            placed: false,
            state: None,
            cpuid: Vec::new(),
        };
        self.vcpus.insert(tag, known);
        if let Some(attached) = &mut self.attached {
            attached.vcpus.push(RunningVcpu { tag, ..vcpu });
        }
        Ok(tag)
    }

    fn detour(&mut self, own: &mut Tracee) -> Result<(), AttachError> {
        let attached = self.attached.as_mut().ok_or(AttachError::Gone)?;
        // Whoever comes after this process is to see that there is an answerer, even if this one is killed.
        let mut named = attached.fds.iter().zip(attached.vm..);
        let named = named.try_for_each(|(fd, tag)| target::name(own.process, *fd, tag));
        named.map_err(cannot_name)?;
        let vcpus = self.vcpus.iter().map(|(tag, vcpu)| (*tag, vcpu.id)).collect();
        let region = self.regions.get_mut(&attached.region).ok_or(AttachError::Gone)?;
        let led = running::detour(&self.remote, own, region, vcpus, &mut attached.still);
        attached.stood();
        attached.waits = led?;
        if attached.waits {
            region.let_wait();
        }
        Ok(())
    }

    fn put(&mut self, own: &mut Tracee, on: &On) -> Result<(), AttachError> {
        let (tag, waits) = self
            .attached
            .as_ref()
            .map(|attached| (attached.vm, attached.waits))
            .ok_or(AttachError::Gone)?;
        let policy = Arc::clone(&self.policy);
        let table = self
            .table(&policy)
            .map_err(|error| AttachError::Refused(error.to_string()))?;
        if !waits && table.asks() {
            return Err(AttachError::Refused(CANNOT_WAIT.to_owned()));
        }
        let vm = self.vms.get_mut(&tag).ok_or(AttachError::Gone)?;
        let plan = vm.state.composed().map_err(|error| {
            let with = match &on.filter {
                Some(_) => "together with the VMM's own MSR filter ",
                None => "",
            };
            AttachError::Refused(format!("{with}{error}"))
        })?;
        // Whatever exits there are, each is answered; then none is asked for that has no place in the plan.
        let masks = [on.mask.union(plan.reasons()), plan.reasons()].map(Some);
        set_all(&mut self.remote, own, &on.fds, masks, plan.filter())?;
        vm.in_force = plan.filter().clone();
        vm.reasons = plan.reasons();
        vm.state.plan = Some(Arc::new(plan));
        on.fds.iter().for_each(|_| _ = self.ledger.new_vm());
        self.vcpus.iter().for_each(|_| self.ledger.new_vcpu());
        self.ledger.run(&[]);
        Ok(())
    }

    /// Answers until the policy is taken off or the process has ended.
    pub(crate) fn stay(mut self) {
        inject::no_hurry();
        let Some(mut commands) = self.commands.take() else {
            return;
        };
        let (mut looked, mut wanted) = (Instant::now(), 0);
        loop {
            let region = self
                .attached
                .as_ref()
                .and_then(|attached| self.regions.get(&attached.region));
            let Some(bell) = region.and_then(Region::bell) else {
                return;
            };
            let answered = self.answer_asked();
            self.answer_own();
            self.look_at_settling();
            if let Some(attached) = &mut self.attached {
                attached.still.let_go();
            }
            match commands.try_next() {
                Some(Command::TakeOff(reply)) => {
                    let taken = self.take_off();
                    let is_off = !matches!(taken, Err(AttachError::Refused(_)));
                    // Who asked may have gone.
                    let _ = reply.send(taken);
                    if is_off {
                        return;
                    }
                }
                Some(command) => self.command(command),
                None => {}
            }
            if bell.wanted != wanted {
                self.release_lost();
            }
            if bell.wanted != wanted || looked.elapsed() >= Duration::from_millis(LOOKS) {
                self.look_for_vcpus(bell.wanted);
                (looked, wanted) = (Instant::now(), bell.wanted);
            }
            if answered {
                continue;
            }
            let time = self
                .unsettled
                .as_ref()
                .map_or(LOOKS, |unsettled| u64::from(unsettled.next()).min(LOOKS));
            if self.wait(bell, time) == Err(Errno::ESRCH) {
                return;
            }
        }
    }

    /// Waits until an answerer rings, for so many milliseconds at most.
    fn wait(&mut self, bell: Bell, time: u64) -> Result<(), Errno> {
        let mut own = self.take_own().ok_or(Errno::ESRCH)?;
        let time: Vec<u8> = [0, time * 1_000_000].into_iter().flat_map(u64::to_le_bytes).collect();
        let waited = self.remote.lay_out(&mut own, &time).and_then(|time| {
            let arguments = [bell.at, WAIT, u64::from(bell.rung), time, 0, 0];
            own.call(libc::SYS_futex, arguments).map(drop)
        });
        self.put_own(Some(own));
        waited
    }

    /// Answers what is asked; tells whether there was something.
    fn answer_asked(&mut self) -> bool {
        let Some(name) = self.attached.as_ref().map(|attached| attached.region) else {
            return false;
        };
        let asked = self.regions.get(&name).map(Region::asked).unwrap_or_default();
        let mut own = self.take_own();
        for asked in &asked {
            let Some((process, thread)) = own.as_ref().map(|own| (own.process, own.thread().as_raw())) else {
                break;
            };
            let question = Question {
                waiting: None,
                process,
                thread,
                fd: asked.fd,
                cpu: Some(asked.cpu),
            };
            let code = self.decide(question, name, asked.vcpu, asked.question, &mut own);
            if let (Some(own), Some(region)) = (&mut own, self.regions.get(&name)) {
                let at = region.answer(asked, code);
                // It looks by itself after a while too.
                let _ = own.call(libc::SYS_futex, [at, WAKE, 1, 0, 0, 0]);
            }
        }
        self.put_own(own);
        !asked.is_empty()
    }

    /// Makes a call of the VMM's own that would take the policy's place, so that both are in force.
    fn answer_own(&mut self) {
        let region = self
            .attached
            .as_ref()
            .and_then(|attached| self.regions.get(&attached.region));
        let Some((call, name)) = region.and_then(|region| Some((region.own_call()?, region.name))) else {
            return;
        };
        let Some(mut own) = self.take_own() else { return };
        let result = self.made(&mut own, call);
        self.put_own(Some(own));
        if let Some(region) = self.regions.get(&name) {
            region.give_own(result);
        }
    }

    /// What such a call gives.
    fn made(&mut self, own: &mut Tracee, [fd, request, argument]: [u64; 3]) -> i64 {
        let Some(attached) = &self.attached else { return LET };
        let (tag, all) = (attached.vm, attached.fds.len() as u64);
        let of_vm = match Object::of(own.process, fd as i32) {
            Ok(Object::Vm(of)) => of.wrapping_sub(tag),
            _ => return LET,
        };
        // Of another VM, or what is none of this.
        let is_filter = request as u32 == abi::SET_MSR_FILTER;
        if of_vm >= all || !is_filter && !is_mask(own.process, argument) {
            return LET;
        }
        if all > 1 {
            let line = format!(
                "the VMM changes the filter of its VM of descriptor {fd}, which cannot be put in force together with the policy where there are \
                 several: there the VMM's own is in force alone now"
            );
            (self.say)(Remark::Line(line));
            return LET;
        }
        let done = match is_filter {
            true => self.take_filter(own, fd, tag, argument),
            false => self.take_mask(own.process, tag, argument).map_err(Refusal::Kernel),
        };
        match done {
            Ok(()) => 0,
            Err(Refusal::Kernel(error)) => -(error as i64),
            Err(Refusal::Line(line)) => {
                (self.say)(Remark::Line(format!("the VMM's call fails: {line}")));
                i64::from(-libc::EACCES)
            }
        }
    }

    /// Lets go of vCPUs whose thread was lost while it ran them.
    fn release_lost(&self) {
        let region = self.attached.as_ref().map(|attached| attached.region);
        let Some(region) = region.and_then(|region| self.regions.get(&region)) else {
            return;
        };
        let busy = region.busy_vcpus();
        busy.into_iter().for_each(|tag| _ = self.release(region, 0, tag));
    }

    /// Has vCPUs answered too that the VMM has made since, and lets go of those that it has not any more; whoever waits for that
    /// goes on.
    fn look_for_vcpus(&mut self, wanted: u64) {
        let Some(mut own) = self.take_own() else { return };
        let mut is_past = false;
        let placed = running::objects(own.process).and_then(|(vms, vcpus, _)| {
            is_past = vms.iter().any(|vm| vm.tag == 0);
            let mut there: Vec<u64> = vcpus.iter().map(|vcpu| vcpu.tag).collect();
            // In other slots than those that are let go of: by that a thread knows that its descriptor is another vCPU's.
            for vcpu in vcpus {
                if !self.vcpus.contains_key(&vcpu.tag) {
                    there.push(self.place(&mut own, vcpu)?);
                    self.ledger.new_vcpu();
                    continue;
                }
                // Since then it may have been called otherwise (`dup(2)`).
                if let Some(attached) = &mut self.attached {
                    let region = self.regions.get(&attached.region);
                    region
                        .into_iter()
                        .for_each(|region| region.called(vcpu.tag, &vcpu.descriptors));
                    let mut known = attached.vcpus.iter_mut();
                    known
                        .find(|known| known.tag == vcpu.tag)
                        .into_iter()
                        .for_each(|known| *known = vcpu.clone());
                }
            }
            let region = self.attached.as_ref().map(|attached| attached.region);
            if let Some(region) = region.and_then(|region| self.regions.get_mut(&region)) {
                region.collect(&mut own, &there);
                let is_known = |tag: u64| there.contains(&tag) || region.has(|vcpu| vcpu == tag);
                self.vcpus.retain(|tag, _| is_known(*tag));
                if let Some(attached) = &mut self.attached {
                    attached.vcpus.retain(|vcpu| is_known(vcpu.tag));
                }
            }
            Ok(())
        });
        let region = self.attached.as_ref().map(|attached| attached.region);
        if let Some(region) = region.and_then(|region| self.regions.get(&region)) {
            let at = region.looked(wanted);
            // They look by themselves after a while too.
            let _ = own.call(libc::SYS_futex, [at, WAKE, u64::from(u32::MAX >> 1), 0, 0, 0]);
        }
        self.put_own(Some(own));
        if let Some(attached) = self.attached.as_mut().filter(|attached| is_past && !attached.is_past) {
            attached.is_past = true;
            (self.say)(Remark::Line(running::NEW_VM.to_owned()));
        }
        // A VMM that has ended is seen to have the next time.
        if let Err(AttachError::Refused(line)) = placed
            && let Some(attached) = &mut self.attached
            && !std::mem::replace(&mut attached.is_told, true)
        {
            (self.say)(Remark::Line(format!("a vCPU that was added is not answered: {line}")));
        }
    }

    /// Puts back what VMs had in force, and has the VMM's own instructions make KVM_RUN again.
    fn take_off(&mut self) -> Result<bool, AttachError> {
        let attached = self.attached.as_ref().ok_or(AttachError::Gone)?;
        let vm = self.vms.get(&attached.vm).ok_or(AttachError::Gone)?;
        let fds = attached.present(vm.process);
        running::is_left(vm.process, &fds, attached.vcpus.iter().map(|vcpu| vcpu.tag))?;
        let (mask, filter) = (vm.mask, vm.state.filter.clone().unwrap_or_else(Filter::allow_all));
        let mut own = self.take_own().ok_or(AttachError::Gone)?;
        // An exit that is under way is answered, since the answerer stays where it is being run.
        let set = set_all(&mut self.remote, &mut own, &fds, [None, Some(mask)], &filter);
        self.put_own(Some(own));
        set?;
        self.leave()?;
        Ok(filter != Filter::allow_all())
    }

    /// Has the VMM's own instructions make KVM_RUN, and waits until all threads are there.
    fn leave(&mut self) -> Result<(), AttachError> {
        let regions = &self.regions;
        let named = |attached: &Attached| {
            let process = regions.get(&attached.region).map_or(0, |region| region.process);
            let vcpus = attached.vcpus.iter().flat_map(|vcpu| vcpu.descriptors.first());
            let fds: Vec<RawFd> = vcpus.copied().chain(attached.present(process)).collect();
            (process, attached.region, fds)
        };
        let Some((process, name, fds)) = self.attached.as_ref().map(named) else {
            // Nothing was brought in.
            return Ok(());
        };
        if let Some(region) = self.regions.get_mut(&name) {
            let unled = region.trampolines.remove();
            unled.map_err(|error| AttachError::Refused(error.to_string()))?;
        }
        let (begin, mut next, mut between) = (Instant::now(), Instant::now(), BETWEEN);
        loop {
            // As there, those that were stopped need a while until they run again.
            if Instant::now() >= next {
                let own = self.take_own().ok_or(AttachError::Gone)?;
                if let (Some(region), Some(attached)) = (self.regions.get(&name), &mut self.attached) {
                    wait_until_out(&self.remote, &own, &mut attached.still, |site| region.is_image(site));
                    attached.stood();
                }
                self.put_own(Some(own));
                next = Instant::now() + between;
                between *= 2;
            }
            // What was asked before is answered.
            self.answer_asked();
            if let Some(region) = self.regions.get(&name)
                && region.own_call().is_some()
            {
                region.give_own(LET);
            }
            let is_run = self.regions.get(&name).is_some_and(Region::is_any_run);
            if !is_run || begin.elapsed() > PATIENCE || target::is_stopped(process) {
                break;
            }
            std::thread::sleep(SETTLES);
        }
        let mut own = self.take_own().ok_or(AttachError::Gone)?;
        // What is being run all the same stays mapped.
        if let Some(region) = self.regions.get_mut(&name) {
            region.collect(&mut own, &[]);
            if region.len() == 0 {
                region.unmap_tables(&mut own, |_| false);
            }
        }
        own.leave_behind(0);
        if let Some((at, bytes)) = self.attached.as_ref().and_then(|attached| attached.left) {
            // What stays is taken by the next policy.
            let _ = own.call(libc::SYS_munmap, [at, bytes, 0, 0, 0, 0]);
        }
        fds.iter().for_each(|fd| _ = target::unname(process, *fd));
        Ok(())
    }

    /// Whether threads can ask where VMs ran already; an error is one line for people.
    pub(super) fn is_asked(&self) -> Result<(), String> {
        match self.attached.as_ref().is_none_or(|attached| attached.waits) {
            true => Ok(()),
            false => Err("the sandbox of the threads that run its vCPUs lets them wait for no answer (`futex`), which it takes while one \
                          policy takes the place of another: `msrgate detach`, and attach with the other policy"
                .to_owned()),
        }
    }

    /// Whether nothing is kept from guests where msrgate is killed.
    pub(super) fn lets_go(&self) -> bool {
        self.attached.as_ref().is_some_and(|attached| attached.left.is_some())
    }

    pub(super) fn take_own(&mut self) -> Option<Tracee> {
        self.attached.as_mut()?.own.take()
    }

    pub(super) fn put_own(&mut self, own: Option<Tracee>) {
        if let Some(attached) = &mut self.attached {
            attached.own = own;
        }
    }
}

/// Whether this is the argument of a KVM_ENABLE_CAP that changes which exits there are.
fn is_mask(process: i32, argument: u64) -> bool {
    let mut bytes = [0; EnableCap::BYTES];
    target::read(process, argument, &mut bytes) && EnableCap::from_bytes(&bytes).cap == abi::CAP_X86_USER_SPACE_MSR
}

fn cannot_name(error: io::Error) -> AttachError {
    AttachError::Refused(format!("its VMs and vCPUs cannot be named: {error}"))
}

fn line(refusal: Refusal) -> AttachError {
    match refusal {
        Refusal::Line(line) => AttachError::Refused(line),
        Refusal::Kernel(error) => AttachError::Refused(error.desc().to_owned()),
    }
}
