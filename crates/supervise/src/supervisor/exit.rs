//! Exits that the answerer leaves to the supervisor.

use std::sync::Arc;

use msrgate_answer::layout::{reply, vcpu};
use msrgate_core::{Access, Answer, Disposition, Exit, FaultCause, Log, Msr, MsrBackend, Op, Outcome, Reason};
use msrgate_kvm::HostMsrs;

use super::{Refusal, Remark, Supervisor, denies, put_in_force};
use crate::hands::Hands;
use crate::policy::{Mode, Owner, Touch};
use crate::seccomp::Waiting;
use crate::stopped::Stopped;
use crate::target::{self, Object};
use crate::{table, watch};

/// What an exit comes to.
struct Verdict {
    /// A number of [`reply`].
    code: i64,
    /// The value of a read.
    value: u64,
    /// `None` where it is not to be told.
    told: Option<(Disposition, Option<FaultCause>)>,
    /// What the policy would do, where it is not in force.
    would: Option<Disposition>,
    rule: Option<u32>,
    log: Log,
}

impl Verdict {
    fn of(code: i64) -> Verdict {
        Verdict {
            code,
            value: 0,
            told: None,
            would: None,
            rule: None,
            log: Log::None,
        }
    }

    fn answered(answer: Answer) -> Verdict {
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

/// What actions reach: the thread is stopped where one asks the kernel.
struct Reach<'a, 'l> {
    hands: &'a mut Hands,
    host: Option<&'a HostMsrs>,
    waiting: &'a Waiting<'l>,
    process: i32,
    stopped: &'a mut Option<Stopped>,
    refused: Option<String>,
}

impl<'a, 'l> Reach<'a, 'l> {
    fn new(
        hands: &'a mut Hands,
        host: Option<&'a HostMsrs>,
        waiting: &'a Waiting<'l>,
        process: i32,
        stopped: &'a mut Option<Stopped>,
    ) -> Reach<'a, 'l> {
        Reach {
            hands,
            host,
            waiting,
            process,
            stopped,
            refused: None,
        }
    }

    fn thread(&mut self) -> Option<(&mut Hands, &mut Stopped)> {
        if self.stopped.is_none() {
            match self.hands.stop(self.waiting, self.process, None, || ()) {
                Ok((stopped, ())) => *self.stopped = Some(stopped),
                Err(line) => self.refused = line,
            }
        }
        Some((self.hands, self.stopped.as_mut()?))
    }
}

impl MsrBackend for Reach<'_, '_> {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        let fd = self.waiting.arguments[0];
        let (hands, stopped) = self.thread().ok_or(FaultCause::KernelRefused)?;
        hands.host_read(stopped, fd, msr).ok_or(FaultCause::KernelRefused)
    }

    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause> {
        let fd = self.waiting.arguments[0];
        let (hands, stopped) = self.thread().ok_or(FaultCause::KernelRefused)?;
        hands
            .host_write(stopped, fd, msr, value)
            .ok_or(FaultCause::KernelRefused)
    }

    fn host_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        let value = |host: &HostMsrs| host.read(target::cpu(self.waiting.thread)?, msr);
        self.host.and_then(value).ok_or(FaultCause::HostUnreadable)
    }

    fn handler_read(&mut self, _: &str, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::NoHandler)
    }

    fn handler_write(&mut self, _: &str, _: Msr, _: u64) -> Result<(), FaultCause> {
        Err(FaultCause::NoHandler)
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
        let msr = Msr((code >> 32) as u32);
        let access = match code >> 12 & 1 {
            0 => Access::Read { msr },
            _ => Access::Write { msr, value },
        };
        let mut stopped = None;
        let process = self.regions.get(&region).map_or(0, |region| region.process);
        let verdict = self.verdict(waiting, process, tag, access, (code >> 8 & 0xf) as u32, &mut stopped);
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
        match stopped {
            Some(stopped) => stopped.finish(verdict.code),
            // Who no longer waits asks again.
            None => _ = waiting.give(verdict.code),
        }
    }

    fn verdict(
        &mut self,
        waiting: &Waiting<'_>,
        process: i32,
        tag: u64,
        access: Access,
        reason: u32,
        stopped: &mut Option<Stopped>,
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
        let policy = Arc::clone(&vm.state.policy);
        let owner = match policy.owner(access, reason, vm.mask) {
            Owner::Watch => return self.touched(waiting, process, vm_tag, access, stopped),
            // What the VMM denies is denied in the plan too; what it allows may be spilled.
            Owner::Vmm if policy.spills() && plan.table().passes(access.msr(), access.op()) => Owner::Policy,
            owner => owner,
        };
        if owner == Owner::Vmm {
            return Verdict::of(reply::VMM);
        }
        if policy.mode() != Mode::Enforce {
            return self.refused(waiting, process, vm_tag, access, stopped);
        }
        let Some(vcpu) = self.vcpus.get_mut(&tag) else {
            return nobody;
        };
        let state = vcpu.state.get_or_insert_with(|| plan.table().vcpu_state());
        let mut reach = Reach::new(&mut self.hands, self.host.as_ref(), waiting, process, stopped);
        let answer = plan.table().answer(Exit::new(access, reason), state, &mut reach);
        if let Some(line) = reach.refused {
            self.tell(
                waiting.thread,
                &format!("the guest gets a fault for {}", access.msr()),
                &line,
            );
        }
        Verdict::answered(answer)
    }

    /// The guest touched what is watched: it is written down and opened, and the guest does it again.
    fn touched(
        &mut self,
        waiting: &Waiting<'_>,
        process: i32,
        vm_tag: u64,
        access: Access,
        stopped: &mut Option<Stopped>,
    ) -> Verdict {
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
        let mut reach = Reach::new(&mut self.hands, None, waiting, process, stopped);
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
        let Some((hands, thread)) = reach.thread() else {
            return nobody;
        };
        let vm_fd = vm.descriptor(waiting.thread, vm_tag);
        vm.state.open.insert((msr, op));
        let opened = match (denied, vm_fd) {
            // Nothing is to be opened.
            (true, _) => Ok(()),
            (false, None) => Err(Refusal::Line("the VMM has no descriptor of its VM any more".to_owned())),
            (false, Some(fd)) => match watch::opened(&vm.in_force, msr, op) {
                Some(filter) => {
                    let reasons = vm.reasons;
                    put_in_force(hands, thread, fd, vm, &filter, reasons).map_err(Refusal::from)
                }
                None => self.compose_watching(stopped.as_mut(), fd, vm_tag),
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
            self.tell(waiting.thread, &format!("the guest gets a fault for {msr}"), &line);
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
    fn refused(
        &mut self,
        waiting: &Waiting<'_>,
        process: i32,
        vm_tag: u64,
        access: Access,
        stopped: &mut Option<Stopped>,
    ) -> Verdict {
        let verdict = Verdict::answered(Answer::fault(FaultCause::KernelRefused, None));
        let (msr, op) = (access.msr(), access.op());
        let Some(vm) = self.vms.get_mut(&vm_tag).filter(|vm| !vm.state.blind) else {
            return verdict;
        };
        if !vm.state.open.remove(&(msr, op)) {
            return verdict;
        }
        let mut reach = Reach::new(&mut self.hands, None, waiting, process, stopped);
        let Some((hands, thread)) = reach.thread() else {
            vm.state.open.insert((msr, op));
            return verdict;
        };
        let reasons = vm.reasons;
        let closed = match (
            vm.descriptor(waiting.thread, vm_tag),
            watch::closed(&vm.in_force, msr, op),
        ) {
            (None, _) => false,
            (Some(fd), Some(filter)) => put_in_force(hands, thread, fd, vm, &filter, reasons).is_ok(),
            (Some(fd), None) => stopped
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
    fn compose_watching(&mut self, thread: Option<&mut Stopped>, fd: u64, vm_tag: u64) -> Result<(), Refusal> {
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
        let is = |fd: &u64| Object::of(thread, *fd as i32).is_ok_and(|object| object == Object::Vm(tag));
        self.fd = self.fd.filter(is).or_else(|| target::descriptor(thread, tag));
        self.fd
    }

    /// Whether the kernel hands over what was opened all the same: no filter range covers the last MSR.
    fn cannot_open(&self, msr: Msr, op: Op) -> bool {
        denies(&self.in_force, msr, op) && !self.state.filter.as_ref().is_some_and(|filter| denies(filter, msr, op))
    }
}
