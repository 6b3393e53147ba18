//! KVM_RUN: whose each exit is, and what becomes of it.

use libc::{EINTR, c_int, c_ulong};
use msrgate_core::{Access, Answer, Did, Event, Log, Outcome, Reason, Why};

use super::{BodyOf, Hook, KVM_SET_MSRS, failed};
use crate::board::Mode;
use crate::clock::ticks;
use crate::descriptor::Object;
use crate::hook::stray::Stray;
use crate::kernel::{Kernel, RawExit, Vcpu, errno, set_errno};
use crate::turn::Inside;
use crate::vcpu::Entered;
use crate::vm::{Owner, Touch};

/// `_IOR(KVMIO, 0x81, struct kvm_regs)`.
const KVM_GET_REGS: u32 = 0x8090_ae81;

impl<K: Kernel> Hook<K> {
    /// KVM_RUN until something is the VMM's. Not inlined, so that what it reaches can be read off the library's text.
    #[inline(never)]
    pub(super) fn run(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int {
        let object = self.descriptors.object(fd);
        let Some(Object::Vcpu(slot)) = object else {
            return self.unknown(fd, request, argument, Stray::Vcpu);
        };
        let entered = self.vcpus.enter(slot);
        let body = entered.as_ref().and_then(|entered| entered.body());
        let Some(body) = body.filter(|_| self.descriptors.object(fd) == object) else {
            // Another thread runs this vCPU. The kernel would let this one wait; it may as well be interrupted.
            set_errno(EINTR);
            return -1;
        };
        let policy = body.policy.try_borrow().ok().filter(|_| body.ready.get());
        let Some(policy) = policy else {
            return self.not_ready(body);
        };
        let before = errno();
        // Looked at here, since a VMM resets a vCPU before it loads a saved state too, which undoes no lock.
        if entered.as_ref().is_some_and(Entered::was_placed) && policy.remembers() && body.vcpu.is_reset(fd) {
            body.vcpu.forget();
        }
        loop {
            let result = self.kernel.ioctl(fd, request, argument);
            if result < 0 {
                // EINTR among others: the exit that is in `kvm_run` was answered before.
                return result;
            }
            let Some(exit) = body.vcpu.exit() else {
                return result;
            };
            let began = ticks();
            let owner = match policy.owner(&exit, body.vm.mask()) {
                Owner::Watch => match self.touched(fd, body, &exit, began) {
                    Ok(None) => {
                        set_errno(before);
                        continue;
                    }
                    Ok(Some(owner)) => owner,
                    Err(error) => return failed(error),
                },
                // What the VMM denies is denied in the plan too; what it allows may be spilled.
                Owner::Vmm if policy.spills() && body.vcpu.passes(exit.access) => Owner::Policy,
                owner => owner,
            };
            if owner == Owner::Vmm {
                return result;
            }
            let Some(answer) = body.vcpu.dispatch() else {
                return result;
            };
            self.write_down(fd, body, &exit, &answer, began);
            set_errno(before);
        }
    }

    /// The guest touched what is watched: it is written down and opened, and the guest does it again. Gives whose the
    /// exit is where it is to be answered after all. Locks and allocates.
    #[cold]
    #[inline(never)]
    fn touched(&self, fd: c_int, body: &BodyOf<K>, exit: &RawExit, began: u64) -> Result<Option<Owner>, c_int> {
        let _inside = Inside::enter();
        let (msr, op) = (exit.access.msr(), exit.access.op());
        let mut state = body.vm.state();
        match state.touch(msr, op) {
            Touch::Denied => return Ok(Some(Owner::of_rest(Reason::Filter, body.vm.mask()))),
            Touch::Open => {}
            Touch::Pass => {
                drop(state);
                let answer = self.pass(fd, exit.access);
                body.vcpu.answer(answer.outcome);
                self.write_down(fd, body, exit, &answer, began);
                return Ok(None);
            }
            Touch::First => {
                state.open.insert((msr, op));
                let mask = body.vm.mask();
                let so = "what the guests touch from here on is not told";
                if self.compose(&body.vm, &mut state, mask, so).is_err() {
                    // Rather that than a change for the guest.
                    state.blind = true;
                    if self
                        .compose(&body.vm, &mut state, mask, "the guest gets a fault")
                        .is_err()
                    {
                        state.blind = false;
                        state.open.remove(&(msr, op));
                        return Ok(Some(Owner::Policy));
                    }
                }
                let (did, rule) = state.policy.would(msr, op);
                let answer = Answer {
                    outcome: match exit.access {
                        Access::Read { .. } => Outcome::Value(self.host_read(fd, msr).unwrap_or(0)),
                        Access::Write { .. } => Outcome::Done,
                    },
                    did,
                    why: None,
                    rule,
                    log: Log::None,
                };
                self.write_down(fd, body, exit, &answer, began);
            }
        }
        if state.cannot_open(msr, op) {
            return Ok(Some(Owner::Policy));
        }
        drop(state);
        body.vcpu.take_back(fd).map(|()| None)
    }

    /// Does as the host what the guest wants done.
    fn pass(&self, vcpu: c_int, access: Access) -> Answer {
        let outcome = match access {
            Access::Read { msr } => self.host_read(vcpu, msr).map(Outcome::Value),
            Access::Write { msr, value } => self.one_msr(vcpu, KVM_SET_MSRS, msr, value).map(|_| Outcome::Done),
        };
        match outcome {
            Some(outcome) => Answer {
                outcome,
                did: Did::Pass,
                why: None,
                rule: None,
                log: Log::None,
            },
            None => Answer::fault(Why::KernelRefused, None),
        }
    }

    /// Neither locks nor allocates, and makes a system call only where the guest's RIP is wanted. `began` is when the
    /// guest had left.
    fn write_down(&self, fd: c_int, body: &BodyOf<K>, exit: &RawExit, answer: &Answer, began: u64) {
        let Some(slate) = &body.slate else {
            body.vm.shared.board.as_ref().inspect(|board| board.without_slate());
            return;
        };
        let wanted = body.wanted.events || answer.log != Log::None;
        let now = ticks();
        let took = now.saturating_sub(began);
        // Where nothing is answered it is what watching costs, and not what the access does.
        let answered = matches!(body.wanted.mode, Mode::Enforce | Mode::LearnAll);
        // In ticks, as on all of the board.
        let event = Event {
            t: now,
            vm: body.vm.number,
            vcpu: body.id,
            op: exit.access.op(),
            msr: exit.access.msr(),
            value: match (exit.access, answer.outcome) {
                (Access::Write { value, .. }, _) | (_, Outcome::Value(value)) => value,
                _ => 0,
            },
            reason: Reason::from_bits(exit.reason),
            did: answer.did,
            why: answer.why,
            rule: answer.rule,
            rip: if wanted && body.wanted.rip { self.rip(fd) } else { None },
            cost: answered.then_some(took),
        };
        slate.count(&event, took);
        if wanted {
            slate.push(&event, answer.log);
        }
    }

    /// Where the guest is: at the instruction, until KVM_RUN completes it.
    fn rip(&self, vcpu: c_int) -> Option<u64> {
        // `struct kvm_regs`: sixteen general registers, RIP, RFLAGS.
        let mut registers = [0_u64; 18];
        let address = registers.as_mut_ptr().expose_provenance();
        let result = self.kernel.ioctl(vcpu, c_ulong::from(KVM_GET_REGS), address);
        (result == 0).then_some(registers[16])
    }
}
