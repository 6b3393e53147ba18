//! Another policy for VMs that run.
//!
//! The kernel replaces a VM's filter as a whole, but an exit that one filter makes may be looked up by the answerer when the
//! other is in force. The answerer's table says what an exit gets by its policy alone, so an exit that both filters make is
//! answered by either. One that only the other filter makes has no entry, and is asked for as long as there may be such
//! ([`slot::UNSETTLED`]): the supervisor answers it by the policy whose filter made it. While it replaces filters it answers
//! nothing, so no vCPU that was answered by the new policy is answered by the old one afterwards.

use std::collections::{BTreeMap, HashMap};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use msrgate_answer::layout::slot;
use msrgate_core::{Access, Disposition, Exit, FaultCause, Msr, Op, ReadAction, Reason, WriteAction};
use msrgate_kvm::VcpuId;
use msrgate_plan::Plan;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::{Refusal, Supervisor, put_in_force};
use crate::control::{Before, Command, Reload, Reloaded, Resolve, Unsettled};
use crate::inject;
use crate::ledger::Leaf;
use crate::policy::{Mode, Owner, Policy};
use crate::supervisor::exit::{Question, Reach, Verdict};
use crate::target;
use crate::tracee::{StopError, Tracee};

/// What is to be in force on a VM.
struct Change {
    vm: u64,
    policy: Arc<Policy>,
    plan: Arc<Plan>,
}

/// How many policies are kept for exits that were made under their filters: a vCPU would have to stay for so many policies
/// between an exit and its answer to meet none, and then faults.
const KEPT: usize = 8;

impl Supervisor {
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::Reload(reload, answer) => {
                let reloaded = self.reload(*reload);
                // Who asked may have gone.
                let _ = answer.send(reloaded);
            }
            // What the supervisor has started ends under its policy.
            Command::TakeOff(_) => {}
        }
    }

    fn reload(&mut self, reload: Reload) -> Result<Reloaded, String> {
        if self.setup.mode != Mode::Enforce {
            return Err("no policy is in force that could be replaced: --learn and --audit change nothing".to_owned());
        }
        // While filters are replaced there may be exits of which the supervisor has to be asked.
        self.is_asked()?;
        let next = Arc::new(Policy::new(reload.plan, reload.options, self.setup.mode));
        self.fits(&next, &self.policy)?;
        let mut changes = BTreeMap::<i32, Vec<Change>>::new();
        let mut resolved = Vec::new();
        for vm in self.present() {
            let policy = match &reload.resolve {
                None => Arc::clone(&next),
                Some(resolve) => self.resolved(vm, resolve, &mut resolved, &next)?,
            };
            let Some(object) = self.vms.get(&vm) else { continue };
            self.fits(&policy, &object.state.policy)?;
            let plan = policy.composed(object.state.filter.as_ref(), None).map_err(|error| {
                let with = match &object.state.filter {
                    Some(_) => "together with the VMM's own MSR filter ",
                    None => "",
                };
                format!("{with}{error}")
            })?;
            let plan = Arc::new(plan);
            let of_process = changes.entry(object.process).or_default();
            of_process.push(Change { vm, policy, plan });
        }
        let policies = resolved
            .iter()
            .map(|(_, policy): &(Vec<Leaf>, _)| policy)
            .chain([&next]);
        let policies: Vec<Arc<Policy>> = policies.map(Arc::clone).collect();
        self.make_room(&policies)?;

        let first = changes.values().flatten().next();
        let before = first
            .and_then(|change| self.vms.get(&change.vm))
            .map_or(&self.policy, |vm| &vm.state.policy);
        let mut reloaded = Reloaded {
            vms: changes.values().map(Vec::len).sum(),
            longest: Duration::ZERO,
            before: before.plan().map().clone(),
            after: first.map_or(&next, |change| &change.policy).plan().map().clone(),
        };
        let mut undo = BTreeMap::<i32, Vec<Change>>::new();
        for (process, changes) in &changes {
            let done = undo.entry(*process).or_default();
            match self.swap(*process, changes, done) {
                Ok(took) => reloaded.longest = reloaded.longest.max(took),
                Err(line) => {
                    for (process, changes) in &undo {
                        // What cannot be put back is of a process that has ended.
                        let _ = self.swap(*process, changes, &mut Vec::new());
                    }
                    self.unsettle();
                    return Err(line);
                }
            }
        }
        self.policy = next;
        self.setup.resolve = reload.resolve;
        self.setup_ready();
        self.unsettle();
        Ok(reloaded)
    }

    /// Whether a policy can take the place of another on vCPUs whose registers hold presets.
    fn fits(&self, next: &Policy, old: &Policy) -> Result<(), String> {
        let reached = |msr| Op::ALL.into_iter().any(|op| next.plan().reaches(msr, op));
        let left = self
            .presets
            .iter()
            .find(|held| !next.presets().contains(held) && reached(held.msr));
        if let Some(left) = left {
            return Err(format!(
                "the kernel's {} holds the fixed answer {:#x} that the VMM was started with, which cannot be taken back \
                 while it runs, and the new policy leaves the register to the guest: start the VMM anew for it",
                left.msr, left.value
            ));
        }
        if next.spills() != old.spills() && next.has_emulated_state() && old.has_emulated_state() {
            return Err(
                "what `shadow` and `once` remember is lost where `spill` changes: start the VMM anew for it".to_owned(),
            );
        }
        Ok(())
    }

    /// The VMs that are still there.
    fn present(&mut self) -> Vec<u64> {
        let mut alive = HashMap::new();
        let mut present: Vec<u64> = Vec::new();
        for (tag, vm) in &self.vms {
            let tags = alive.entry(vm.process).or_insert_with(|| {
                let ended = kill(Pid::from_raw(vm.process), None) == Err(Errno::ESRCH);
                // Where it cannot be said they are.
                (!ended).then(|| target::tags(vm.process).ok())
            });
            let gone = match tags {
                None => true,
                Some(None) => false,
                Some(Some(tags)) => {
                    let vcpu = |tags: &[u64]| {
                        tags.iter()
                            .any(|of| self.vcpus.get(of).is_some_and(|vcpu| vcpu.vm == *tag))
                    };
                    // Another process with the same memory may run it.
                    let elsewhere = self
                        .regions
                        .values()
                        .any(|region| region.process != vm.process && region.has(|of| vcpus_of(&self.vcpus, of, *tag)));
                    !tags.contains(tag) && !vcpu(tags) && !elsewhere
                }
            };
            if !gone {
                present.push(*tag);
            }
        }
        present.sort_unstable();
        present
    }

    /// What a policy is for a VM.
    fn resolved(
        &self,
        vm: u64,
        resolve: &Resolve,
        known: &mut Vec<(Vec<Leaf>, Arc<Policy>)>,
        unknown: &Arc<Policy>,
    ) -> Result<Arc<Policy>, String> {
        let mut policy: Option<Arc<Policy>> = None;
        for (tag, vcpu) in self.vcpus.iter().filter(|(_, vcpu)| vcpu.vm == vm) {
            if vcpu.cpuid.is_empty() {
                if self.regions.values().any(|region| region.ring(*tag).is_some()) {
                    return Err(format!(
                        "the policy depends on the CPUID, and the VMM runs vCPU {} of which it has not set it",
                        vcpu.id
                    ));
                }
                continue;
            }
            let this = match known.iter().find(|(leaves, _)| *leaves == vcpu.cpuid) {
                Some((_, policy)) => Arc::clone(policy),
                None => {
                    let (plan, options) = resolve(vcpu.cpuid.clone())?;
                    let policy = Policy::new(plan, options, self.setup.mode);
                    // The same policy is one, so that its table is too.
                    let same = known.iter().find(|(_, known)| **known == policy);
                    let policy = same.map_or_else(|| Arc::new(policy), |(_, same)| Arc::clone(same));
                    known.push((vcpu.cpuid.clone(), Arc::clone(&policy)));
                    policy
                }
            };
            if policy.as_ref().is_some_and(|other| !Arc::ptr_eq(other, &this)) {
                return Err(
                    "the policy means different things for vCPUs of one VM, and a VM has one filter".to_owned(),
                );
            }
            policy = Some(this);
        }
        Ok(policy.unwrap_or_else(|| Arc::clone(unknown)))
    }

    /// Has what policies take in this process, and in the memory of vCPUs.
    fn make_room(&mut self, policies: &[Arc<Policy>]) -> Result<(), String> {
        let mut cells = self.cells.clone();
        for policy in policies {
            cells.add(policy.plan().table());
        }
        let rooms = self.regions.values().flat_map(|region| region.rings());
        if rooms.map(|ring| ring.cells()).any(|room| room < cells.words()) {
            return Err(format!(
                "with the new policy vCPUs have remembered {} MSRs one after the other, for which there is no room: start \
                 the VMM anew for it",
                cells.words() / 2
            ));
        }
        for policy in policies {
            self.open_host_msrs(policy).map_err(|refusal| match refusal {
                Refusal::Line(line) => line,
                Refusal::Kernel(error) => error.desc().to_owned(),
            })?;
            self.forget_shadows(policy);
            self.table(policy)
                .map_err(|error| format!("there is no memory for the policy: {error}"))?;
        }
        Ok(())
    }

    /// What was shadowed by an earlier policy, and is again, begins anew.
    fn forget_shadows(&self, next: &Policy) {
        for (vcpu, of) in &self.vcpus {
            let Some(vm) = self.vms.get(&of.vm) else { continue };
            let before = vm.state.policy.plan().table();
            for (range, _) in next.plan().table().cells() {
                for (part, cell) in self.cells.parts(range) {
                    let kept = |msr: &Msr| before.cells().any(|(kept, _)| kept.contains(*msr));
                    let anew = part.iter().zip(cell..).filter(|(msr, _)| !kept(msr));
                    let anew: Vec<usize> = anew.map(|(_, cell)| cell).collect();
                    let rings = self.regions.values().filter_map(|region| region.ring(*vcpu));
                    rings.for_each(|ring| anew.iter().for_each(|cell| ring.forget(*cell)));
                }
            }
        }
    }

    /// Puts changes in force on VMs of a process, one after the other, and says how to put each back; gives how long a thread
    /// stood still.
    fn swap(&mut self, process: i32, changes: &[Change], done: &mut Vec<Change>) -> Result<Duration, String> {
        if let Some(mut own) = self.take_own() {
            let swapped = self.swap_by(&mut own, changes, done);
            self.put_own(Some(own));
            // No thread of the VMM does.
            return swapped.map(|()| Duration::ZERO);
        }
        let tracer = self.remote.tracer;
        let swapped = inject::within(&tracer, process, |mut own, stood| {
            let swapped = self.swap_by(&mut own, changes, done);
            swapped.map(|()| stood)
        });
        match swapped {
            Ok(swapped) => swapped,
            // Nothing is to be kept there.
            Err(StopError::Gone) if kill(Pid::from_raw(process), None) == Err(Errno::ESRCH) => Ok(Duration::ZERO),
            Err(StopError::Gone) => Err(format!("process {process}: none of its threads can be stopped now")),
            Err(StopError::Refused(line)) => Err(format!("process {process}: {line}")),
        }
    }

    fn swap_by(&mut self, tracee: &mut Tracee, changes: &[Change], done: &mut Vec<Change>) -> Result<(), String> {
        self.unmap_tables(tracee);
        for change in changes {
            let undo = self.swap_vm(tracee, change).map_err(|refusal| match refusal {
                Refusal::Line(line) => line,
                Refusal::Kernel(error) => format!("the kernel refuses what the policy takes: {}", error.desc()),
            })?;
            done.push(undo);
        }
        Ok(())
    }

    fn swap_vm(&mut self, tracee: &mut Tracee, change: &Change) -> Result<Change, Refusal> {
        let gone = || Refusal::Kernel(Errno::EBADF);
        let table = self
            .table(&change.policy)
            .map_err(|error| Refusal::Line(format!("there is no memory for the policy: {error}")))?;
        let process = tracee.process;
        let vcpus = &self.vcpus;
        let of_vm = |tag: u64| vcpus_of(vcpus, tag, change.vm);
        let mut places = Vec::new();
        for region in self.regions.values_mut() {
            if region.has(of_vm) && (region.process == process || target::share_memory(region.process, process)) {
                let at = region.map_table(tracee, &mut self.remote, &table)?;
                places.push((region.name, at));
            }
        }
        let vm = self.vms.get_mut(&change.vm).ok_or_else(gone)?;
        let Some(fd) = vm.descriptor(tracee.thread().as_raw(), change.vm) else {
            let line = "the VMM has no descriptor of its VM any more";
            return Err(Refusal::Line(line.to_owned()));
        };
        let flags = self.flags();
        self.tell_regions(change.vm, slot::FLAGS, flags | slot::UNSETTLED);
        let vm = self.vms.get_mut(&change.vm).ok_or_else(gone)?;
        let (filter, reasons) = (change.plan.filter(), change.plan.reasons());
        if let Err(error) = put_in_force(&mut self.remote, tracee, fd, vm, filter, reasons) {
            self.tell_regions(change.vm, slot::FLAGS, flags);
            return Err(error.into());
        }
        for (name, at) in places {
            let of_vm = |tag: u64| vcpus_of(&self.vcpus, tag, change.vm).then_some(at);
            self.regions
                .get(&name)
                .into_iter()
                .for_each(|region| region.tell(slot::TABLE, of_vm));
        }
        let vm = self.vms.get_mut(&change.vm).ok_or_else(gone)?;
        let policy = mem::replace(&mut vm.state.policy, Arc::clone(&change.policy));
        let plan = vm.state.plan.replace(Arc::clone(&change.plan)).ok_or_else(gone)?;
        // What is put back goes on where it was.
        let mut kept = match vm.before.first_mut() {
            Some(before) if Arc::ptr_eq(&before.plan, &change.plan) => mem::take(&mut before.states),
            _ => HashMap::new(),
        };
        let mut states = HashMap::new();
        for (tag, vcpu) in self.vcpus.iter_mut().filter(|(_, vcpu)| vcpu.vm == change.vm) {
            if let Some(state) = vcpu.state.take() {
                let carried = || state.carried(plan.table(), change.plan.table());
                vcpu.state = Some(kept.remove(tag).unwrap_or_else(carried));
                states.insert(*tag, state);
            }
        }
        let before = Before {
            policy: Arc::clone(&policy),
            plan: Arc::clone(&plan),
            states,
        };
        vm.before.insert(0, before);
        vm.before.truncate(KEPT);
        Ok(Change {
            vm: change.vm,
            policy,
            plan,
        })
    }

    /// vCPUs run that have a CPUID, where the policy depends on it.
    fn setup_ready(&mut self) {
        let depends = self.setup.resolve.is_some();
        for vcpu in self.vcpus.values_mut() {
            vcpu.ready = !depends || !vcpu.cpuid.is_empty();
            if let Some(vm) = self.vms.get_mut(&vcpu.vm)
                && depends
                && vcpu.ready
            {
                vm.state.resolved.insert(vcpu.id);
            }
        }
    }

    fn unsettle(&mut self) {
        let vms = &self.vms;
        let changed = |tag: u64| {
            let vm = self.vcpus.get(&tag).and_then(|vcpu| vms.get(&vcpu.vm));
            vm.is_some_and(|vm| !vm.before.is_empty())
        };
        let of_region = |region: &crate::region::Region| {
            let name = region.name;
            let runs: Vec<_> = region
                .runs(changed)
                .map(|(number, runs)| (name, number, runs))
                .collect();
            runs
        };
        self.unsettled = Some(Unsettled {
            vcpus: self.regions.values().flat_map(of_region).collect(),
            reading: true,
            since: Instant::now(),
        });
    }

    /// Looks whether each vCPU is past the tables before, and went into KVM_RUN since: then no exit is left that a filter
    /// before has made. One that takes a minute faults.
    pub(super) fn look_at_settling(&mut self) {
        let Some(unsettled) = &mut self.unsettled else { return };
        let regions = &self.regions;
        let is = |(name, number, runs): &(u64, usize, u64), progress: fn(u64) -> u64| {
            let region = regions.get(name);
            region.is_some_and(|region| region.is_before(*number, progress(*runs)))
        };
        // It reads no table in KVM_RUN, and has made no exit since it went there.
        let past_tables = |runs: u64| runs | 1;
        let again_in_run = |runs: u64| (runs + 1) | 1;
        if unsettled.reading && !unsettled.vcpus.iter().any(|vcpu| is(vcpu, past_tables)) {
            unsettled.reading = false;
            let (vms, policy) = (&self.vms, &self.policy);
            let used =
                |of: &Arc<Policy>| Arc::ptr_eq(policy, of) || vms.values().any(|vm| Arc::ptr_eq(&vm.state.policy, of));
            self.tables.retain(|(policy, _)| used(policy));
        }
        unsettled.vcpus.retain(|vcpu| is(vcpu, again_in_run));
        if !unsettled.vcpus.is_empty() && !unsettled.is_over() {
            return;
        }
        self.unsettled = None;
        let flags = self.flags();
        let mut changed = Vec::new();
        for (tag, vm) in &mut self.vms {
            if !mem::take(&mut vm.before).is_empty() {
                changed.push(*tag);
            }
        }
        changed
            .into_iter()
            .for_each(|vm| self.tell_regions(vm, slot::FLAGS, flags));
    }

    /// Takes tables out of a process that no vCPU can be at any more.
    fn unmap_tables(&mut self, tracee: &mut Tracee) {
        let (tables, process) = (&self.tables, tracee.process);
        for region in self.regions.values_mut().filter(|region| region.process == process) {
            region.unmap_tables(tracee, |table| tables.iter().any(|(_, used)| Arc::ptr_eq(used, table)));
        }
    }

    /// What an exit gets that only a filter before makes; `None` where it is none such.
    pub(super) fn verdict_before(
        &mut self,
        question: Question<'_>,
        tag: u64,
        access: Access,
        tracee: &mut Option<Tracee>,
    ) -> Option<Verdict> {
        let vcpu = self.vcpus.get(&tag)?;
        let vm = self.vms.get_mut(&vcpu.vm)?;
        let id = VcpuId::new(vcpu.id).in_vm(vm.number);
        let (msr, op) = (access.msr(), access.op());
        if super::denies(&vm.in_force, msr, op) {
            return None;
        }
        let mut before = vm.before.iter_mut();
        let before = before.find(|before| super::denies(before.plan.filter(), msr, op))?;
        let plan = Arc::clone(&before.plan);
        match before.policy.owner(access, Reason::Filter, vm.mask) {
            Owner::Vmm if !(before.policy.spills() && plan.table().passes(msr, op)) => {
                return Some(Verdict::of(msrgate_answer::layout::reply::VMM));
            }
            _ => {}
        }
        if !before.policy.spills()
            && let Some(verdict) = shadowed(&before.policy, access, |msr| {
                let cell = self.cells.parts(msrgate_core::MsrRange::single(msr)).next()?.1;
                let region = self.regions.values().find(|region| region.ring(tag).is_some())?;
                Some((Arc::clone(region.ring(tag)?), cell))
            })
        {
            return Some(verdict);
        }
        let state = before.states.entry(tag).or_insert_with(|| plan.table().vcpu_state());
        let reach = Reach::new(&mut self.remote, question, tracee);
        let mut reach = reach.with(self.host.as_ref(), &self.setup.handlers, id);
        let answer = plan
            .table()
            .answer(Exit::new(access, Reason::Filter), state, &mut reach);
        Some(Verdict::answered(answer))
    }
}

/// What a shadow in a vCPU's own memory gives.
fn shadowed(
    policy: &Policy,
    access: Access,
    place: impl Fn(Msr) -> Option<(Arc<crate::ledger::Ring>, usize)>,
) -> Option<Verdict> {
    let map = policy.plan().map();
    let (ring, cell) = match access {
        Access::Read { msr } if matches!(map.reads().get(msr).action, ReadAction::Shadow(_)) => place(msr)?,
        Access::Write { msr, .. } if map.writes().get(msr).action == WriteAction::Shadow => place(msr)?,
        _ => return None,
    };
    let (value, did, rule, log): (u64, Disposition, _, _) = match access {
        Access::Read { msr } => {
            let decision = map.reads().get(msr);
            let ReadAction::Shadow(initial) = decision.action else {
                return None;
            };
            let value = ring.load(cell).unwrap_or(initial);
            (value, decision.action.did(), decision.rule, decision.log)
        }
        Access::Write { msr, value } => {
            let decision = map.writes().get(msr);
            ring.store(cell, value);
            (0, decision.action.did(), decision.rule, decision.log)
        }
    };
    Some(Verdict {
        value,
        told: Some((did, None::<FaultCause>)),
        rule,
        log,
        ..Verdict::of(msrgate_answer::layout::reply::ANSWERED)
    })
}

fn vcpus_of(vcpus: &HashMap<u64, super::Vcpu>, tag: u64, vm: u64) -> bool {
    vcpus.get(&tag).is_some_and(|vcpu| vcpu.vm == vm)
}
