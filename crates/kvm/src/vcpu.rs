//! One vCPU's exits.

#![expect(unsafe_code, reason = "the mapped `kvm_run`")]

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use msrgate_core::abi::kvm_run as field;
use msrgate_core::{Access, Answer, Event, FaultCause, Nanos, Outcome, Reason, VcpuState, Within};

use crate::epoch::{Epoch, Published, Shared};
use crate::exit;
use crate::registers::Registers;
use crate::{OsError, SaveError, StateError, VcpuId, ioctl, state};

/// Answers the MSR exits of one vCPU, and keeps what its MSRs remember.
///
/// Made by [`crate::Gate::vcpu`]; used by the thread that runs the vCPU, or by another while the vCPU is stopped.
#[derive(Debug)]
pub struct VcpuGate {
    vcpu: OwnedFd,
    id: VcpuId,
    shared: Arc<Shared>,
    /// Taken while an answer is made; who finds it taken was called from inside a handler. Nobody waits for it.
    held: Mutex<AnswerState>,
}

/// What a vCPU answers by.
#[derive(Debug)]
struct AnswerState {
    generation: u64,
    published: Arc<Published>,
    epoch: Arc<Epoch>,
    state: VcpuState,
}

/// What became of a KVM_RUN exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dispatch {
    /// An MSR exit: the answer is in `kvm_run`, and the next KVM_RUN carries it out.
    Answered(Answered),
    /// Another exit; nothing was touched.
    NotAnMsrExit,
}

/// An access and its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Answered {
    /// Which vCPU.
    pub vcpu: VcpuId,
    /// What the guest tried.
    pub access: Access,
    /// Why the kernel did not answer it; `None` where it gave no reason that is known here.
    pub reason: Option<Reason>,
    /// The kernel's number for the reason.
    pub reason_bits: u32,
    /// Where it was made, if not in the vCPU's own guest.
    pub within: Option<Within>,
    /// What it got.
    pub answer: Answer,
}

impl Answered {
    /// What the guest wrote, or reads; 0 for a read that faulted.
    pub fn value(&self) -> u64 {
        match (self.access, self.answer.outcome) {
            (Access::Write { value, .. }, _) | (Access::Read { .. }, Outcome::Value(value)) => value,
            (Access::Read { .. }, _) => 0,
        }
    }

    /// The record of it.
    pub fn event(&self, t: Nanos, rip: Option<u64>) -> Event {
        Event {
            t,
            vm: self.vcpu.vm,
            vcpu: self.vcpu.index,
            op: self.access.op(),
            msr: self.access.msr(),
            value: self.value(),
            reason: self.reason,
            did: self.answer.did,
            why: self.answer.why,
            would: None,
            rule: self.answer.rule,
            rip,
            within: self.within,
            cost: None,
        }
    }
}

/// How a vCPU came to rest.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DrainStatus {
    /// No access is pending; the vCPU's state may be saved.
    Idle,
    /// Completing one exit made another, which is in `kvm_run` and has to be handled before draining again.
    Exit,
    /// An MSR exit that was not dispatched is in `kvm_run`, and the vCPU was not run: the kernel would take it as
    /// answered.
    Unanswered,
}

impl VcpuGate {
    pub(crate) fn new(vcpu: OwnedFd, id: VcpuId, shared: Arc<Shared>) -> VcpuGate {
        let generation = shared.generation();
        let published = shared.published();
        let epoch = Arc::clone(&published.newest);
        let state = epoch.table().vcpu_state();
        VcpuGate {
            vcpu,
            id,
            shared,
            held: Mutex::new(AnswerState {
                generation,
                published,
                epoch,
                state,
            }),
        }
    }

    /// Answers the exit in `run`, the vCPU's mapped `kvm_run`, if it is one of an MSR. Call it after a KVM_RUN that
    /// returned success.
    ///
    /// What cannot be answered faults the guest: an unknown reason, an MSR that no rule names, a handler that panics, a
    /// handler that comes back here. After EINTR there is nothing to answer; a call then does no harm, since an answered
    /// exit no longer looks like one. Allocates and locks only where the plan was replaced since the last call.
    ///
    /// # Safety
    /// `run` is the first byte of this vCPU's mapped `kvm_run`, and nothing but this thread reads or writes it, nor runs
    /// the vCPU, until the call returns.
    pub unsafe fn dispatch_raw(&self, run: *mut u8) -> Dispatch {
        // SAFETY: the caller's promise; nothing writes in between, since this thread is here.
        let Some(exit) = (unsafe { exit::read(run) }) else {
            return Dispatch::NotAnMsrExit;
        };
        // SAFETY: the caller's promise.
        let within = unsafe { exit::within(run) };
        // SAFETY: the caller's promise, and it holds an MSR exit.
        unsafe { exit::fail_closed(run) };
        let answered = |answer| {
            self.shared.counters.count(exit.access.op(), &answer);
            Dispatch::Answered(Answered {
                vcpu: self.id,
                access: exit.access,
                reason: Reason::from_bits(exit.reason),
                reason_bits: exit.reason,
                within,
                answer,
            })
        };
        let Some(mut held) = self.take() else {
            // A handler's own dispatch: the exit is the outer call's to finish.
            return answered(Answer::fault(FaultCause::ReEntered, None));
        };
        let answer = match Reason::from_bits(exit.reason) {
            // SAFETY: the caller's promise.
            Some(reason) => unsafe { self.answer(run, exit.access, reason, &mut held) },
            None => Answer::fault(FaultCause::UnknownReason, None),
        };
        // SAFETY: the caller's promise; no handler is being asked any more.
        unsafe { exit::finish(run) };
        answered(answer)
    }

    /// Whether the plan that answers for such an access, which a filter denied, passes it on to the kernel. As cheap as
    /// [`VcpuGate::dispatch_raw`].
    pub fn passes(&self, access: Access) -> bool {
        let Some(mut held) = self.take() else {
            return false;
        };
        self.catch_up(&mut held);
        let epoch = held.published.deciding(&held.epoch, access, Reason::Filter);
        epoch.table().passes(access.msr(), access.op())
    }

    /// What the vCPU answers by, unless it is answering: one atomic exchange, which never waits.
    fn take(&self) -> Option<MutexGuard<'_, AnswerState>> {
        match self.held.try_lock() {
            Ok(held) => Some(held),
            // What panicked was a caller's code between two whole states.
            Err(TryLockError::Poisoned(held)) => Some(held.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn catch_up(&self, held: &mut AnswerState) {
        let generation = self.shared.generation();
        if generation != held.generation {
            held.published = self.shared.published();
            held.generation = generation;
        }
    }

    /// # Safety
    /// As for [`exit::fail_closed`].
    unsafe fn answer(&self, run: *mut u8, access: Access, reason: Reason, held: &mut AnswerState) -> Answer {
        self.catch_up(held);
        let epoch = held.published.deciding(&held.epoch, access, reason);
        if !Arc::ptr_eq(epoch, &held.epoch) {
            held.state = held.state.carried(held.epoch.table(), epoch.table());
            held.epoch = Arc::clone(epoch);
        }
        let mut registers = Registers {
            vcpu: &self.vcpu,
            id: self.id,
            host: held.epoch.host.as_ref(),
            handlers: &self.shared.handlers,
        };
        let (table, state) = (held.epoch.table(), &mut held.state);
        match access {
            Access::Read { msr } => {
                let answer = table.read(msr, reason, state, &mut registers);
                // SAFETY: the caller's promise; no handler is being asked any more.
                unsafe { exit::answer_read(run, answer.outcome) };
                answer.seen()
            }
            Access::Write { msr, value } => {
                let answer = table.write(msr, value, reason, state, &mut registers);
                // SAFETY: likewise.
                unsafe { exit::answer_write(run, answer.outcome) };
                answer.seen()
            }
        }
    }

    /// Forgets what MSRs remember (`shadow`, `once`): call it where the processor is reset, which ends such locks on
    /// hardware too. INIT does not.
    ///
    /// From within a handler it does nothing.
    pub fn reset(&self) {
        if let Some(mut held) = self.take() {
            held.state = held.epoch.table().vcpu_state();
        }
    }

    /// Completes the access that was answered last without executing a guest instruction, so that the vCPU's registers
    /// are whole: for saving its state, migrating it or showing it to a debugger.
    ///
    /// Runs the vCPU with `immediate_exit` set, and leaves that as it was. Fails with the kernel's error where KVM_RUN
    /// fails otherwise than with EINTR.
    ///
    /// # Safety
    /// As for [`VcpuGate::dispatch_raw`].
    pub unsafe fn drain_raw(&self, run: *mut u8) -> Result<DrainStatus, OsError> {
        // SAFETY: the caller's promise; nothing writes in between, since this thread is here.
        if unsafe { exit::read(run) }.is_some() {
            return Ok(DrainStatus::Unanswered);
        }
        let immediate_exit = run.wrapping_add(field::IMMEDIATE_EXIT);
        // SAFETY: a byte within the `kvm_run` that the caller vouches for.
        let before = unsafe { immediate_exit.read() };
        // Volatile, since it is the kernel that reads it, in a call that does not name the page.
        // SAFETY: as above.
        unsafe { immediate_exit.write_volatile(1) };
        let result = ioctl::run(&self.vcpu);
        // SAFETY: as above.
        unsafe { immediate_exit.write_volatile(before) };
        match result {
            Ok(()) => Ok(DrainStatus::Exit),
            Err(error) if error.errno() == libc::EINTR => Ok(DrainStatus::Idle),
            Err(error) => Err(error),
        }
    }

    /// What MSRs remember (`shadow`, `once`), as text to be saved with the vCPU, with the hash of the policy.
    ///
    /// Call it while the vCPU is stopped and drained ([`VcpuGate::drain_raw`]): the registers of one that is not drained
    /// are those of before its last access, and the text is that of after it. The text is as valuable as the rest of a
    /// saved guest: who can change it can open an MSR again that is locked.
    pub fn save(&self) -> Result<String, SaveError> {
        let mut held = self.take().ok_or(SaveError::InHandler)?;
        self.settle(&mut held);
        let hash = held.epoch.plan.hash().ok_or(SaveError::NoHash)?;
        Ok(state::write(&hash, held.epoch.table(), &held.state))
    }

    /// Puts what a saved vCPU remembered in place of what this one does: call it after [`crate::Gate::vcpu`] and before
    /// the vCPU runs.
    ///
    /// The plan in force must mean what the one meant under which the state was saved ([`msrgate_plan::Plan::hash`]). An
    /// MSR that is locked here stays locked, whatever the state says. On an error nothing has changed; the vCPU must not
    /// run then, since what it had locked is open.
    pub fn restore(&self, state: &[u8]) -> Result<(), StateError> {
        self.remember(state, |held| held.state.clone())
    }

    /// [`VcpuGate::reset`] and [`VcpuGate::restore`] in one step: for a vCPU that is rolled back in place, to a state that it
    /// had before. What was locked since is open then, as it was.
    ///
    /// On an error nothing has changed: what the vCPU had locked stays locked.
    pub fn roll_back(&self, state: &[u8]) -> Result<(), StateError> {
        self.remember(state, |held| held.epoch.table().vcpu_state())
    }

    /// Puts a saved state over the one that `under` gives.
    fn remember(&self, saved: &[u8], under: impl FnOnce(&AnswerState) -> VcpuState) -> Result<(), StateError> {
        let mut held = self.take().ok_or(StateError::InHandler)?;
        self.settle(&mut held);
        let hash = held.epoch.plan.hash().ok_or(StateError::NoHash)?;
        let memories = state::read(saved, &hash)?;
        let mut state = under(&held);
        let table = held.epoch.table();
        table.restore(&mut state, memories).map_err(StateError::EmulatedState)?;
        held.state = state;
        Ok(())
    }

    /// Goes on to the plan in force: no exit is pending that an older one made.
    fn settle(&self, held: &mut AnswerState) {
        held.generation = self.shared.generation();
        held.published = self.shared.published();
        let newest = &held.published.newest;
        if !Arc::ptr_eq(newest, &held.epoch) {
            held.state = held.state.carried(held.epoch.table(), newest.table());
            held.epoch = Arc::clone(newest);
        }
    }

    /// [`VcpuGate::dispatch_raw`] with the vCPU of the kvm-ioctls crate.
    #[cfg(feature = "kvm-ioctls")]
    pub fn dispatch_vcpu(&self, vcpu: &mut kvm_ioctls::VcpuFd) -> Dispatch {
        // SAFETY: `page` is a vCPU's, and its exclusive borrow lasts for the call.
        unsafe { self.dispatch_raw(page(vcpu)) }
    }

    /// [`VcpuGate::drain_raw`] with the vCPU of the kvm-ioctls crate.
    #[cfg(feature = "kvm-ioctls")]
    pub fn drain_vcpu(&self, vcpu: &mut kvm_ioctls::VcpuFd) -> Result<DrainStatus, OsError> {
        // SAFETY: likewise.
        unsafe { self.drain_raw(page(vcpu)) }
    }

    /// [`VcpuGate::drain_vcpu`], and [`VcpuGate::save`] where that leaves the vCPU at rest.
    #[cfg(feature = "kvm-ioctls")]
    pub fn save_vcpu(&self, vcpu: &mut kvm_ioctls::VcpuFd) -> Result<String, SaveError> {
        match self.drain_vcpu(vcpu).map_err(SaveError::Run)? {
            DrainStatus::Idle => self.save(),
            DrainStatus::Exit => Err(SaveError::Exit),
            DrainStatus::Unanswered => Err(SaveError::Unanswered),
        }
    }
}

/// The vCPU's mapped `kvm_run`, for as long as `vcpu` is borrowed.
#[cfg(feature = "kvm-ioctls")]
fn page(vcpu: &mut kvm_ioctls::VcpuFd) -> *mut u8 {
    std::ptr::from_mut(vcpu.get_kvm_run()).cast()
}

/// VMMs keep what runs a vCPU in a type that threads share (`trait Vcpu: Send + Sync` in Cloud Hypervisor).
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<VcpuGate>();
};
