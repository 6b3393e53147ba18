//! A vCPU: its view of the filter and its pending access.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::{fmt, mem};

use msrgate_core::{
    Access, ActionTable, Exit, Filter, Msr, Op, Outcome, PassthroughMsr, ReadOutcome, Reason, Verdict, WriteOutcome,
    abi,
};

use crate::instruction::{Advance, Completion, Instruction, Path, Step, Written};
use crate::slot::ReaderRules;
use crate::{Intercepts, Msrs, Refusal, UnknownMsrs, Vm};

/// What KVM holds of MSR filtering for each vCPU. It keeps its VM alive.
pub struct Vcpu {
    vm: Arc<Vm>,
    seen: ReaderRules,
    intercepts: Intercepts,
    pending: Option<Pending>,
    /// The rules that the pending access met, where the vCPU has newer ones since.
    ///
    /// INVARIANT: `None` while nothing is pending.
    met: Option<ReaderRules>,
}

/// An access that user space has, and how it ends: the kernel's `complete_userspace_io`.
#[derive(Clone, Copy)]
struct Pending {
    exit: Exit,
    register: Option<u8>,
    advance: Advance,
}

/// What a vCPU enters the guest with.
#[must_use]
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct PickUp<'a> {
    /// The interception bitmap that belongs to [`Vcpu::filter`].
    pub intercepts: &'a Intercepts,
    /// Whether the bitmap was recomputed, by whatever call, since it was last picked up; so the first time too. What was
    /// made of it is stale then: a copy that the hardware uses, or a bitmap merged for L2.
    pub changed: bool,
}

/// An access waits for user space: complete or drain it first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StillPending;

impl fmt::Display for StillPending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an access of this vCPU waits for user space")
    }
}

impl core::error::Error for StillPending {}

/// What cuts a KVM_RUN short before the guest executes anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interruption {
    /// `kvm_run.immediate_exit`.
    ImmediateExit,
    /// An unmasked signal.
    Signal,
}

/// What a drained KVM_RUN leaves, which always fails with [`crate::Errno::Eintr`].
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Drained {
    /// How the pending access ended; `None` where none was pending.
    pub completion: Option<Completion>,
    /// What `kvm_run.exit_reason` becomes: KVM_EXIT_INTR after a signal. `None` leaves it as it was, possibly 29 or 30
    /// from the access that is over: whoever looks at it after EINTR handles that access twice.
    pub exit_reason: Option<u32>,
}

impl Vcpu {
    /// A vCPU of `vm`, its bitmap computed with the filter of this moment.
    pub fn new(vm: Arc<Vm>, mut intercepts: Intercepts) -> Vcpu {
        let seen = vm.slot().look();
        intercepts.recompute(seen.rules().filter());
        Vcpu {
            vm,
            seen,
            intercepts,
            pending: None,
            met: None,
        }
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The filter that was current when the vCPU last looked.
    pub fn filter(&self) -> Option<&Filter> {
        self.seen.rules().filter()
    }

    /// The table to answer the pending access by: the one that was installed with the filter that the access met,
    /// whatever was installed since. Where none is pending, that of [`Self::filter`]. `None` where the filter came
    /// without a table.
    pub fn table(&self) -> Option<&Arc<ActionTable>> {
        self.met.as_ref().unwrap_or(&self.seen).rules().table.as_ref()
    }

    /// Takes a newer filter over, if there is one, and hands the bitmap out: due before each entry to the guest, after
    /// the kick that caused it was taken note of. One load where nothing is new.
    ///
    /// [`Self::execute`], [`Self::verdict`] and [`Self::recalculate`] take a newer filter over too, and recompute the
    /// bitmap; no other call does. This call alone tells that the bitmap changed.
    #[inline]
    pub fn pick_up(&mut self) -> PickUp<'_> {
        self.refresh();
        PickUp {
            changed: self.intercepts.take_changed(),
            intercepts: &self.intercepts,
        }
    }

    /// Replaces what the hypervisor would pass through, after a change of CPUID for example, and recomputes the bitmap
    /// with the current filter.
    pub fn recalculate(&mut self, candidates: impl Into<Box<[PassthroughMsr]>>) {
        self.intercepts.set_candidates(candidates);
        self.take_over();
    }

    /// The verdict on an RDMSR or WRMSR of this vCPU at this moment.
    #[inline]
    pub fn verdict(&mut self, msr: Msr, op: Op) -> Verdict {
        self.refresh();
        self.seen.rules().verdict(msr, op)
    }

    #[inline]
    fn refresh(&mut self) {
        if !self.vm.slot().is_current(&self.seen) {
            self.take_over();
        }
    }

    #[cold]
    fn take_over(&mut self) {
        let before = mem::replace(&mut self.seen, self.vm.slot().look());
        if self.pending.is_some() {
            self.met.get_or_insert(before);
        }
        self.intercepts.recompute(self.seen.rules().filter());
    }

    /// Carries an instruction out as far as it goes without user space (`kvm_emulate_rdmsr`, `kvm_emulate_wrmsr`,
    /// `emulator_get_msr_with_filter`, `emulator_set_msr_with_filter`): asks the filter, then `msrs`.
    ///
    /// Gives [`StillPending`] while an earlier access is pending. The call neither allocates nor waits nor panics, if `msrs` does not.
    pub fn execute(
        &mut self,
        instruction: Instruction,
        path: Path,
        msrs: &mut impl Msrs,
    ) -> Result<Step, StillPending> {
        self.ready_to_save()?;
        let access = instruction.access();
        if let (Path::Fastpath(vendor), Access::Write { msr, value }) = (path, access)
            && self.vm.profile().tsc_deadline.bypasses(vendor, msr)
        {
            // The fast path has no way to fail: without a local APIC, say, the write is dropped.
            let _ = msrs.write(msr, value);
            return Ok(Step::Complete(done(instruction.register(), access, 0, path.advance())));
        }
        let result = match self.verdict(access.msr(), access.op()) {
            Verdict::Deny => Err(Reason::Filter),
            Verdict::Allow => match carry_out(access, msrs) {
                Ok(value) => Ok(value),
                Err(Refusal::Unknown) if self.vm.unknown_msrs() == UnknownMsrs::Ignored => Ok(0),
                Err(Refusal::Unknown) => Err(Reason::Unknown),
                Err(Refusal::Invalid) => Err(Reason::Invalid),
                Err(Refusal::Error(errno)) => match (path, access) {
                    (Path::Emulator { .. }, _) => return Ok(Step::EmulationFailed(errno)),
                    (_, Access::Write { .. }) if !self.deflects(Reason::Invalid) => return Ok(Step::Failed(errno)),
                    _ => Err(Reason::Invalid),
                },
            },
        };
        Ok(match result {
            Ok(value) => Step::Complete(done(instruction.register(), access, value, path.advance())),
            Err(reason) if self.deflects(reason) => {
                let exit = Exit::new(access, reason);
                self.pending = Some(Pending {
                    exit,
                    register: instruction.register(),
                    advance: path.advance(),
                });
                Step::Exit(exit)
            }
            Err(_) => Step::Complete(Completion::Fault),
        })
    }

    fn deflects(&self, reason: Reason) -> bool {
        self.seen.rules().reasons.contains(reason)
    }

    /// The access that waits for user space. No state ioctl shows it.
    pub fn pending(&self) -> Option<Exit> {
        self.pending.map(|pending| pending.exit)
    }

    /// Whether the vCPU's state may be saved, or be overwritten by a saved one: not while an access is pending, which
    /// would be lost. An idle vCPU has nothing of its own to save; filter and mask are the VMM's to recreate.
    pub fn ready_to_save(&self) -> Result<(), StillPending> {
        match self.pending {
            None => Ok(()),
            Some(_) => Err(StillPending),
        }
    }

    /// Ends the pending access with what user space left in `kvm_run.msr` (`complete_fast_rdmsr` and its kin): any
    /// `error` but 0 is #GP(0), `data` is what a read gets and means nothing for a write. `None` where none is pending.
    ///
    /// The next KVM_RUN does this first. Neither a new filter nor a new mask cancels a pending access.
    pub fn complete(&mut self, error: u8, data: u64) -> Option<Completion> {
        let pending = self.pending.take()?;
        self.met = None;
        Some(if error == 0 {
            done(pending.register, pending.exit.access, data, pending.advance)
        } else {
            Completion::Fault
        })
    }

    /// Ends the pending read. `None` where none is pending.
    pub fn answer_read(&mut self, outcome: ReadOutcome) -> Option<Completion> {
        match self.pending?.exit.access {
            Access::Read { .. } => self.complete(outcome.is_err().into(), outcome.unwrap_or(0)),
            Access::Write { .. } => None,
        }
    }

    /// Ends the pending write. `None` where none is pending.
    pub fn answer_write(&mut self, outcome: WriteOutcome) -> Option<Completion> {
        match self.pending?.exit.access {
            Access::Read { .. } => None,
            Access::Write { .. } => self.complete(outcome.is_err().into(), 0),
        }
    }

    /// Ends the pending access; one that is given the other direction's outcome faults. `None` where none is pending.
    pub fn answer(&mut self, outcome: Outcome) -> Option<Completion> {
        match (self.pending?.exit.access, outcome) {
            (Access::Read { .. }, Outcome::Value(value)) => self.complete(0, value),
            (Access::Write { .. }, Outcome::Done) => self.complete(0, 0),
            _ => self.complete(1, 0),
        }
    }

    /// A KVM_RUN that is cut short: ends the pending access, if there is one, and executes nothing. After it the
    /// vCPU's state may be saved.
    pub fn drain(&mut self, error: u8, data: u64, interruption: Interruption) -> Drained {
        Drained {
            completion: self.complete(error, data),
            exit_reason: match interruption {
                Interruption::ImmediateExit => None,
                Interruption::Signal => Some(abi::EXIT_INTR),
            },
        }
    }
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("filter", &self.filter())
            .field("pending", &self.pending())
            .finish_non_exhaustive()
    }
}

/// The value that a read gives; 0 for a write.
fn carry_out(access: Access, msrs: &mut impl Msrs) -> Result<u64, Refusal> {
    match access {
        Access::Read { msr } => msrs.read(msr),
        Access::Write { msr, value } => msrs.write(msr, value).map(|()| 0),
    }
}

fn done(register: Option<u8>, access: Access, value: u64, advance: Advance) -> Completion {
    let written = match (access, register) {
        (Access::Write { .. }, _) => Written::Nothing,
        (Access::Read { .. }, Some(register)) => Written::Register { register, value },
        (Access::Read { .. }, None) => Written::RaxRdx {
            rax: value & 0xffff_ffff,
            rdx: value >> 32,
        },
    };
    Completion::Done { written, advance }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use msrgate_core::{FilterRange, MsrRange, Ops};

    use super::*;
    use crate::Errno;

    struct NoMsrs;

    impl Msrs for NoMsrs {
        fn read(&mut self, _: Msr) -> Result<u64, Refusal> {
            Err(Refusal::Error(Errno::Eio))
        }
        fn write(&mut self, _: Msr, _: u64) -> Result<(), Refusal> {
            Err(Refusal::Unknown)
        }
    }

    fn candidates() -> [PassthroughMsr; 1] {
        [PassthroughMsr::new(MsrRange::single(Msr(0x174)), Ops::BOTH)]
    }

    /// Denies 0x174 and all that is no candidate anyway, or allows it.
    fn filter(verdict: Verdict) -> Filter {
        let bits = u64::from(verdict == Verdict::Allow);
        let range = FilterRange::new(0x174, 1, Ops::BOTH, [bits]).unwrap();
        Filter::new(Verdict::Deny, [range]).unwrap()
    }

    fn open(vcpu: &Vcpu) -> bool {
        !vcpu.intercepts.intercepts(Msr(0x174), Op::Read)
    }

    #[test]
    fn a_bitmap_changes_in_the_named_calls_only_and_stays_where_it_is() {
        let vm = Arc::new(Vm::new());
        vm.set_reasons(msrgate_core::Reasons::ALL);
        for intercepts in [Intercepts::vmx(candidates()), Intercepts::svm(candidates())] {
            let mut vcpu = Vcpu::new(Arc::clone(&vm), intercepts);
            let address = |vcpu: &Vcpu| match (vcpu.intercepts.vmx_bitmap(), vcpu.intercepts.svm_permission_map()) {
                (Some(bitmap), None) => &raw const *bitmap as usize,
                (None, Some(map)) => &raw const *map as usize,
                _ => panic!("no bitmap"),
            };
            let start = address(&vcpu);
            assert_eq!(start % 4096, 0);
            let rdmsr = Instruction::Rdmsr { rcx: 0x10 };
            let changing: [fn(&mut Vcpu); 4] = [
                |vcpu| _ = vcpu.pick_up(),
                |vcpu| _ = vcpu.execute(Instruction::Rdmsr { rcx: 0x10 }, Path::VmExit, &mut NoMsrs),
                |vcpu| _ = vcpu.verdict(Msr(0x10), Op::Read),
                |vcpu| vcpu.recalculate(candidates()),
            ];
            for (change, to) in changing.iter().zip([Verdict::Deny, Verdict::Allow].into_iter().cycle()) {
                vcpu.complete(0, 0);
                let _ = vcpu.execute(rdmsr, Path::VmExit, &mut NoMsrs);
                let before = open(&vcpu);
                vm.set_filter(filter(to));
                vm.set_reasons(msrgate_core::Reasons::ALL);
                // All that is not to change it, while the access that waits is ended in the three ways.
                let _ = (
                    vcpu.filter(),
                    vcpu.table(),
                    vcpu.vm(),
                    vcpu.pending(),
                    vcpu.ready_to_save(),
                );
                vcpu.answer_read(Ok(0));
                vcpu.complete(0, 0);
                let _ = vcpu.drain(0, 0, Interruption::Signal);
                assert_eq!(open(&vcpu), before, "another call changed it");
                change(&mut vcpu);
                assert_eq!(open(&vcpu), to == Verdict::Allow);
                assert_eq!(address(&vcpu), start);
                // A vCPU may move; its bitmap does not.
                let elsewhere = Box::new(vcpu);
                assert_eq!(address(&elsewhere), start);
                vcpu = *elsewhere;
            }
        }
    }

    #[test]
    fn each_vcpu_recomputes_its_own_bitmap_when_it_picks_a_filter_up() {
        let vm = Arc::new(Vm::new());
        let [mut first, mut second] = [0; 2].map(|_| Vcpu::new(vm.clone(), Intercepts::svm(candidates())));
        vm.set_filter(filter(Verdict::Deny));
        assert!(open(&first), "nothing changes before it is picked up");
        let _ = first.pick_up();
        assert!(!open(&first));
        assert!(open(&second));
        assert_eq!(
            second.verdict(Msr(0x174), Op::Read),
            Verdict::Deny,
            "an access picks it up too"
        );
        assert!(!open(&second));
        vm.set_filter(filter(Verdict::Allow));
        let _ = first.pick_up();
        assert!(open(&first), "an MSR that is allowed again is passed through again");
    }
}
