//! Exits that the answerer leaves to the supervisor.

use std::sync::Arc;

use msrgate_answer::layout::{reply, vcpu};
use msrgate_core::{Access, Answer, Disposition, Exit, FaultCause, Log, Msr, MsrBackend, Op, Outcome, Reason};
use msrgate_kvm::{Handlers, HostMsrs, VcpuId};

use super::{Refusal, Remark, Supervisor, denies, put_in_force};
use crate::policy::{Mode, Owner, Touch};
use crate::remote::RemoteCalls;
use crate::seccomp::Waiting;
use crate::target::{self, Object};
use crate::tracee::Tracee;
use crate::{table, watch};

/// What an exit comes to.
pub(super) struct Verdict {
    /// A number of [`reply`].
    pub(super) code: i64,
    /// The value of a read.
    pub(super) value: u64,
    /// `None` where it is not to be told.
    pub(super) told: Option<(Disposition, Option<FaultCause>)>,
    /// What the policy would do, where it is not in force.
    pub(super) would: Option<Disposition>,
    pub(super) rule: Option<u32>,
    pub(super) log: Log,
}

impl Verdict {
    pub(super) fn of(code: i64) -> Verdict {
        Verdict {
            code,
            value: 0,
            told: None,
            would: None,
            rule: None,
            log: Log::None,
        }
    }

    pub(super) fn answered(answer: Answer) -> Verdict {
        let (code, value) = match answer.outcome {
            Outcome::Value(value) => (reply::ANSWERED, value),
            Outcome::Done => (reply::ANSWERED, 0),
            Outcome::Fault => (reply::FAULTED, 0),
        };
        Verdict {
            code,
            value,
            told: Some((answer.did, answer.why)),
            would: None,
            rule: answer.rule,
            log: answer.log,
        }
    }
}

/// Who asks for an exit.
#[derive(Clone, Copy)]
pub(super) struct Question<'a> {
    /// The call that waits; `None` where it is asked through memory, and then a thread that makes calls is there.
    pub(super) waiting: Option<&'a Waiting<'a>>,
    pub(super) process: i32,
    /// A thread that has the VMM's descriptors, and the vCPU's.
    pub(super) thread: i32,
    pub(super) fd: u64,
    /// The CPU that runs the vCPU, where that is told.
    pub(super) cpu: Option<usize>,
}

impl Question<'_> {
    fn cpu(&self) -> Option<usize> {
        self.cpu.or_else(|| target::cpu(self.thread))
    }
}

/// What actions reach: the thread is stopped where one asks the kernel.
pub(super) struct Reach<'a> {
    remote: &'a mut RemoteCalls,
    host: Option<&'a HostMsrs>,
    /// Who answers by name, and for which vCPU.
    handlers: Option<(&'a Handlers, VcpuId)>,
    question: Question<'a>,
    tracee: &'a mut Option<Tracee>,
    refused: Option<String>,
}

impl<'a> Reach<'a> {
    pub(super) fn new(
        remote: &'a mut RemoteCalls,
        question: Question<'a>,
        tracee: &'a mut Option<Tracee>,
    ) -> Reach<'a> {
        Reach {
            remote,
            host: None,
            handlers: None,
            question,
            tracee,
            refused: None,
        }
    }

    /// With what a policy's actions may ask besides.
    pub(super) fn with(mut self, host: Option<&'a HostMsrs>, handlers: &'a Handlers, vcpu: VcpuId) -> Reach<'a> {
        self.host = host;
        self.handlers = Some((handlers, vcpu));
        self
    }

    fn thread(&mut self) -> Option<(&mut RemoteCalls, &mut Tracee)> {
        if self.tracee.is_none()
            && let Some(waiting) = self.question.waiting
        {
            match self.remote.stop(waiting, self.question.process, None, || ()) {
                Ok((tracee, ())) => *self.tracee = Some(tracee),
                Err(line) => self.refused = line,
            }
        }
        Some((self.remote, self.tracee.as_mut()?))
    }
}

impl MsrBackend for Reach<'_> {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        let fd = self.question.fd;
        let (remote, tracee) = self.thread().ok_or(FaultCause::KernelRefused)?;
        remote.host_read(tracee, fd, msr).ok_or(FaultCause::KernelRefused)
    }

    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause> {
        let fd = self.question.fd;
        let (remote, tracee) = self.thread().ok_or(FaultCause::KernelRefused)?;
        remote
            .host_write(tracee, fd, msr, value)
            .ok_or(FaultCause::KernelRefused)
    }

    fn host_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        let value = |host: &HostMsrs| host.read(self.question.cpu()?, msr);
        self.host.and_then(value).ok_or(FaultCause::HostUnreadable)
    }

    fn handler_read(&mut self, name: &str, msr: Msr) -> Result<u64, FaultCause> {
        let (handlers, vcpu) = self.handlers.ok_or(FaultCause::NoHandler)?;
        handlers.read(name, vcpu, msr)
    }

    fn handler_write(&mut self, name: &str, msr: Msr, value: u64) -> Result<(), FaultCause> {
        let (handlers, vcpu) = self.handlers.ok_or(FaultCause::NoHandler)?;
        handlers.write(name, vcpu, msr, value)
    }
}

impl Supervisor {
    pub(super) fn exit(&mut self, waiting: &Waiting<'_>, region: u64) {
        let [.., code, value] = waiting.arguments;
        let known = self
            .regions
            .get(&region)
            .and_then(|region| region.vcpu((code >> 16 & 0xffff) as usize));
        let Some(tag) = known else {
            // Nobody knows what it was.
            _ = waiting.give(reply::FAULTED);
            return;
        };
        let question = Question {
            waiting: Some(waiting),
            process: self.regions.get(&region).map_or(0, |region| region.process),
            thread: waiting.thread,
            fd: waiting.arguments[0],
            cpu: None,
        };
        let mut tracee = None;
        let code = self.decide(question, region, tag, (code, value), &mut tracee);
        match tracee {
            Some(tracee) => tracee.finish(code),
            // Who no longer waits asks again.
            None => _ = waiting.give(code),
        }
    }

    /// Writes down what an exit gets ([`vcpu::REPLY`]), and gives what the answerer is to do; `asked` is the fifth and the sixth
    /// argument of the question.
    pub(super) fn decide(
        &mut self,
        question: Question<'_>,
        region: u64,
        tag: u64,
        asked: (u64, u64),
        tracee: &mut Option<Tracee>,
    ) -> i64 {
        let (code, value) = asked;
        let msr = Msr((code >> 32) as u32);
        let access = match code >> 12 & 1 {
            0 => Access::Read { msr },
            _ => Access::Write { msr, value },
        };
        let verdict = self.verdict(question, tag, access, (code >> 8 & 0xf) as u32, tracee);
        if let Some(ring) = self.regions.get(&region).and_then(|region| region.ring(tag)) {
            let rule = u64::from(verdict.rule.unwrap_or(u32::MAX));
            let (told, log) = match verdict.told {
                Some((did, why)) => {
                    let would = verdict.would.map_or(0, |would| would as u64 + 1);
                    (
                        table::told(did, why) | would << vcpu::WOULD,
                        table::log_word(verdict.log),
                    )
                }
                None => (0, u64::MAX),
            };
            ring.reply([verdict.value, told, rule, log]);
        }
        verdict.code
    }

    fn verdict(
        &mut self,
        question: Question<'_>,
        tag: u64,
        access: Access,
        reason: u32,
        tracee: &mut Option<Tracee>,
    ) -> Verdict {
        let nobody = Verdict::answered(Answer::fault(FaultCause::NoRule, None));
        let vm_tag = self.vcpus.get(&tag).map(|vcpu| vcpu.vm);
        let vm = vm_tag.and_then(|tag| Some((tag, self.vms.get(&tag)?)));
        let (Some((vm_tag, vm)), Some(reason)) = (vm, Reason::from_bits(reason)) else {
            return nobody;
        };
        let Some(plan) = vm.state.plan.clone() else {
            return nobody;
        };
        if reason == Reason::Filter
            && let Some(verdict) = self.verdict_before(question, tag, access, tracee)
        {
            return verdict;
        }
        let Some(vm) = self.vms.get(&vm_tag) else { return nobody };
        let policy = Arc::clone(&vm.state.policy);
        let owner = match policy.owner(access, reason, vm.mask) {
            Owner::Watch => return self.touched(question, vm_tag, access, tracee),
            // What the VMM denies is denied in the plan too; what it allows may be spilled.
            Owner::Vmm if policy.spills() && plan.table().passes(access.msr(), access.op()) => Owner::Policy,
            owner => owner,
        };
        if owner == Owner::Vmm {
            return Verdict::of(reply::VMM);
        }
        if policy.mode() != Mode::Enforce {
            return self.refused(question, vm_tag, access, tracee);
        }
        let Some(vcpu) = self.vcpus.get_mut(&tag) else {
            return nobody;
        };
        let state = vcpu.state.get_or_insert_with(|| plan.table().vcpu_state());
        let id = VcpuId::new(vcpu.id).in_vm(vm.number);
        let reach = Reach::new(&mut self.remote, question, tracee);
        let mut reach = reach.with(self.host.as_ref(), &self.setup.handlers, id);
        let answer = plan.table().answer(Exit::new(access, reason), state, &mut reach);
        if let Some(line) = reach.refused {
            self.tell(
                question.thread,
                &format!("the guest gets a fault for {}", access.msr()),
                &line,
            );
        }
        Verdict::answered(answer)
    }

    /// The guest touched what is watched: it is written down and opened, and the guest does it again.
    fn touched(&mut self, question: Question<'_>, vm_tag: u64, access: Access, tracee: &mut Option<Tracee>) -> Verdict {
        let nobody = Verdict::answered(Answer::fault(FaultCause::NoRule, None));
        let (msr, op) = (access.msr(), access.op());
        let Some(vm) = self.vms.get_mut(&vm_tag) else {
            return nobody;
        };
        let denied = vm.state.filter.as_ref().is_some_and(|filter| denies(filter, msr, op));
        let closed = |vm: &super::Vm| match Owner::of_rest(Reason::Filter, vm.mask) {
            Owner::Vmm => Verdict::of(reply::VMM),
            // As the kernel would, and what the VMM denies is not the policy's to tell of.
            _ => Verdict::of(reply::FAULTED),
        };
        let touch = vm.state.touch(msr, op);
        match touch {
            Touch::Denied => return closed(vm),
            Touch::Open if vm.cannot_open(msr, op) => return closed(vm),
            Touch::Open => return Verdict::of(reply::REDO),
            Touch::Pass | Touch::First => {}
        }
        let mut reach = Reach::new(&mut self.remote, question, tracee);
        if touch == Touch::Pass {
            let outcome = match access {
                Access::Read { msr } => reach.kernel_read(msr).map(Outcome::Value),
                Access::Write { msr, value } => reach.kernel_write(msr, value).map(|()| Outcome::Done),
            };
            return Verdict::answered(match outcome {
                Ok(outcome) => Answer::passed(outcome),
                Err(why) => Answer::fault(why, None),
            });
        }
        // What the guest gets is the kernel's; this is the host's view of it.
        let value = match op {
            Op::Read => reach.kernel_read(msr).unwrap_or(0),
            Op::Write => 0,
        };
        let Some((remote, thread)) = reach.thread() else {
            return nobody;
        };
        let vm_fd = vm.descriptor(question.thread, vm_tag);
        vm.state.open.insert((msr, op));
        let opened = match (denied, vm_fd) {
            // Nothing is to be opened.
            (true, _) => Ok(()),
            (false, None) => Err(Refusal::Line("the VMM has no descriptor of its VM any more".to_owned())),
            (false, Some(fd)) => match watch::opened(&vm.in_force, msr, op) {
                Some(filter) => {
                    let reasons = vm.reasons;
                    put_in_force(remote, thread, fd, vm, &filter, reasons).map_err(Refusal::from)
                }
                None => self.compose_watching(tracee.as_mut(), fd, vm_tag),
            },
        };
        let Some(vm) = self.vms.get_mut(&vm_tag) else {
            return nobody;
        };
        if let Err(refusal) = opened {
            vm.state.open.remove(&(msr, op));
            let line = match refusal {
                Refusal::Line(line) => line,
                Refusal::Kernel(error) => error.desc().to_owned(),
            };
            self.tell(question.thread, &format!("the guest gets a fault for {msr}"), &line);
            return nobody;
        }
        if vm.cannot_open(msr, op) {
            return nobody;
        }
        let would = vm.state.policy.would(msr, op);
        Verdict {
            code: reply::TOLD,
            value,
            told: Some((Disposition::Allow, None)),
            would: would.map(|(did, _)| did),
            rule: would.and_then(|(_, rule)| rule),
            log: Log::None,
        }
    }

    /// The kernel refuses the value of a first touch: the next one is the first one again, since the kernel may carry it out.
    fn refused(&mut self, question: Question<'_>, vm_tag: u64, access: Access, tracee: &mut Option<Tracee>) -> Verdict {
        let verdict = Verdict::answered(Answer::fault(FaultCause::KernelRefused, None));
        let (msr, op) = (access.msr(), access.op());
        let Some(vm) = self.vms.get_mut(&vm_tag).filter(|vm| !vm.state.blind) else {
            return verdict;
        };
        if !vm.state.open.remove(&(msr, op)) {
            return verdict;
        }
        let mut reach = Reach::new(&mut self.remote, question, tracee);
        let Some((remote, thread)) = reach.thread() else {
            vm.state.open.insert((msr, op));
            return verdict;
        };
        let reasons = vm.reasons;
        let closed = match (
            vm.descriptor(question.thread, vm_tag),
            watch::closed(&vm.in_force, msr, op),
        ) {
            (None, _) => false,
            (Some(fd), Some(filter)) => put_in_force(remote, thread, fd, vm, &filter, reasons).is_ok(),
            (Some(fd), None) => tracee
                .as_mut()
                .is_some_and(|thread| self.compose(thread, fd, vm_tag).is_ok()),
        };
        if !closed && let Some(vm) = self.vms.get_mut(&vm_tag) {
            vm.state.open.insert((msr, op));
        }
        verdict
    }

    /// A plan for all that was touched; where there is no room for it nothing is watched any more: rather that than a
    /// change for the guest.
    fn compose_watching(&mut self, thread: Option<&mut Tracee>, fd: u64, vm_tag: u64) -> Result<(), Refusal> {
        let thread = thread.ok_or(Refusal::Kernel(nix::errno::Errno::ESRCH))?;
        let Err(refusal) = self.compose(thread, fd, vm_tag) else {
            return Ok(());
        };
        if let Refusal::Line(line) = &refusal {
            (self.say)(Remark::Line(format!(
                "what the guests touch from here on is not told: {line}"
            )));
        }
        if let Some(vm) = self.vms.get_mut(&vm_tag) {
            vm.state.blind = true;
        }
        let blind = self.compose(thread, fd, vm_tag);
        if blind.is_err()
            && let Some(vm) = self.vms.get_mut(&vm_tag)
        {
            vm.state.blind = false;
        }
        blind
    }
}

impl super::Vm {
    /// A descriptor of it that the thread has.
    pub(super) fn descriptor(&mut self, thread: i32, tag: u64) -> Option<u64> {
        let found = |tag: u64, fd: Option<u64>| {
            let is = |fd: &u64| Object::of(thread, *fd as i32).is_ok_and(|object| object == Object::Vm(tag));
            fd.filter(is).or_else(|| target::descriptor(thread, tag))
        };
        // One that the VMM has closed has no filter to be set.
        let others = self.others.iter();
        self.others = others
            .filter_map(|(tag, fd)| Some((*tag, found(*tag, Some(*fd))?)))
            .collect();
        self.fd = found(tag, self.fd);
        self.fd
    }

    /// Whether the kernel hands over what was opened all the same: no filter range covers the last MSR.
    fn cannot_open(&self, msr: Msr, op: Op) -> bool {
        denies(&self.in_force, msr, op) && !self.state.filter.as_ref().is_some_and(|filter| denies(filter, msr, op))
    }
}
