//! A live VM and the engine's, which get the same calls and the same accesses.

use msrgate_core::{Access, Exit, Fault, Msr, MsrRange, Op, Outcome, ReadOutcome, WriteOutcome};
use msrgate_engine::{Path, Process};
use msrgate_guest::raw::{Arena, Caller};

use crate::VerifyError;
use crate::case::{Call, CallResult, Descriptor, PAGES};
use crate::engine::Engine;
use crate::live::{AccessResult, Live};
use crate::unfiltered::Unfiltered;
use crate::{Kernel, Machine};

/// Whether the guest does not write the MSR where the kernel would carry the write out: all others get back what they hold,
/// and by the x2APIC's a guest sends interrupts.
pub(crate) fn left_alone(msr: Msr) -> bool {
    MsrRange::X2APIC.contains(msr) || msrgate_msrs::by_msr(msr).is_some_and(|entry| entry.rewrite().is_some())
}

/// What the live kernel and the engine made of the same thing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Both<T> {
    pub(crate) live: T,
    pub(crate) engine: T,
}

/// How the two relate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Relation {
    Same,
    /// A write of TSC_DEADLINE that the kernel's fast path carries out without asking the filter.
    Bypass,
    Differ,
}

/// An access that both made.
#[derive(Clone, Debug)]
pub(crate) struct Compared {
    pub(crate) access: Access,
    pub(crate) got: Both<AccessResult>,
    pub(crate) relation: Relation,
}

/// Two VMs in step.
pub(crate) struct Pair<'a> {
    kernel: &'a Kernel,
    unfiltered: &'a mut Unfiltered,
    arena: Arena,
    live: Live,
    engine: Engine,
    vm: Caller,
    vcpu: Caller,
    system: Caller,
}

impl<'a> Pair<'a> {
    pub(crate) fn new(machine: &'a Machine, unfiltered: &'a mut Unfiltered) -> Result<Pair<'a>, VerifyError> {
        let mut guest = machine.guest(1)?;
        let vm = Caller::of(guest.vm())?;
        let vcpu = guest.vcpu(0)?;
        Ok(Pair {
            kernel: &machine.kernel,
            unfiltered,
            arena: Arena::new(PAGES)?,
            vm,
            vcpu: Caller::of(vcpu.fd())?,
            system: Caller::of(machine.kvm())?,
            live: Live::new(guest),
            engine: Engine::new(machine.kernel.profile()),
        })
    }

    /// Makes the call on both.
    pub(crate) fn call(&mut self, call: &Call) -> Both<CallResult> {
        let (request, argp) = call.place(Process::Native, &mut self.arena);
        let caller = match call.on {
            Descriptor::Vm | Descriptor::AnotherProcess => &self.vm,
            Descriptor::Vcpu => &self.vcpu,
            Descriptor::System => &self.system,
        };
        let live = CallResult::from(caller.call(request, argp));
        let engine = call.on_engine(&self.engine.vm, Process::Native, (request, argp), &self.arena);
        Both {
            live,
            engine: engine.unwrap_or(live),
        }
    }

    /// The value that an access is to have. A write gets what the MSR holds where the engine's filter allows it, `other`
    /// where it does not; `None` where the MSR is to be left alone.
    pub(crate) fn value(&mut self, msr: Msr, op: Op, other: u64) -> Option<u64> {
        match (op, self.engine.allows(msr, op)) {
            (Op::Read, _) => Some(0),
            (Op::Write, false) => Some(other),
            (Op::Write, true) if left_alone(msr) => None,
            (Op::Write, true) => Some(self.unfiltered.value(msr)),
        }
    }

    /// Makes the accesses on both; those that neither can be asked for are left out.
    pub(crate) fn accesses(&mut self, accesses: &[Access]) -> Result<Vec<Compared>, VerifyError> {
        let mut made = Vec::with_capacity(accesses.len());
        let mut expected = Vec::with_capacity(accesses.len());
        let answer = &mut |exit: Exit, _: &mut Unfiltered| (answer(exit.access), None);
        for access in accesses {
            if let Some(got) = self.engine.access(*access, Path::VmExit, self.unfiltered, answer) {
                made.push(*access);
                expected.push(got);
            }
        }
        let seen = self
            .live
            .run(&made, &mut |pending| pending.answer(read, |msr, _| write(msr)))?;
        let mut all = Vec::with_capacity(made.len());
        for ((access, live), engine) in made.into_iter().zip(seen).zip(expected) {
            let got = Both { live, engine };
            let relation = relation(&got, access, self.unfiltered, |unfiltered| {
                let vendor = self.kernel.fastpath(access)?;
                self.engine.access(access, Path::Fastpath(vendor), unfiltered, answer)
            });
            all.push(Compared { access, got, relation });
        }
        Ok(all)
    }
}

/// How two results of an access relate. `bypassed` says what the engine makes of it on the kernel's fast path, if there
/// is one.
pub(crate) fn relation(
    got: &Both<AccessResult>,
    access: Access,
    unfiltered: &mut Unfiltered,
    bypassed: impl FnOnce(&mut Unfiltered) -> Option<AccessResult>,
) -> Relation {
    let Both { live, engine } = got;
    if live == engine {
        return Relation::Same;
    }
    let values = matches!((live.sees, engine.sees), (Outcome::Value(_), Outcome::Value(_)));
    let same_but_value = AccessResult {
        sees: engine.sees,
        ..live.clone()
    } == *engine;
    // Values that the kernel gives; those that user space gives are fixed.
    if values && same_but_value && live.reason == 0 && unfiltered.moves(access.msr()) {
        return Relation::Same;
    }
    match bypassed(unfiltered) {
        Some(bypassed) if bypassed == *live => Relation::Bypass,
        _ => Relation::Differ,
    }
}

/// What user space answers where no policy says so: something that each access has for its own.
pub(crate) fn answer(access: Access) -> Outcome {
    match access {
        Access::Read { msr } => read(msr).into(),
        Access::Write { msr, .. } => write(msr).into(),
    }
}

fn read(msr: Msr) -> ReadOutcome {
    let mixed = u64::from(msr.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    if mixed >> 62 == 0 { Err(Fault) } else { Ok(mixed) }
}

fn write(msr: Msr) -> WriteOutcome {
    read(msr).map(drop)
}
