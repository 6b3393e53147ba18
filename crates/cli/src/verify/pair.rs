//! A live VM and the engine's, which get the same calls and the same accesses.

use std::fmt;
use std::io;

use msrgate_core::{Access, Exit, Fault, Msr, MsrRange, Op, Outcome, ReadOutcome, WriteOutcome};
use msrgate_engine::{Caller as EngineCaller, Descriptor, Fault as Unreadable, Path, Process};
use msrgate_guest::raw::{Arena, Caller};

use super::call::{Call, PAGES};
use super::engine::Engine;
use super::host::Host;
use super::live::{Got, Live, Machine};
use super::twin::Twin;
use crate::exit::{Exit as ExitCode, Failure};

/// MSRs that the guest does not write where the kernel would carry the write out, and why. All others get back what
/// they hold.
const LEFT_ALONE: [(MsrRange, &str); 6] = [
    (MsrRange::single(Msr(0x10)), "sets the guest's clock back"),
    (MsrRange::single(Msr(0x3b)), "moves the guest's clock"),
    (
        MsrRange::single(Msr(0x1b)),
        "can turn the local APIC off, and cannot turn it on again",
    ),
    (MsrRange::X2APIC, "sends interrupts where the APIC is in x2APIC mode"),
    (
        MsrRange::single(Msr(0x4000_0003)),
        "resets a guest of Hyper-V's interface",
    ),
    (
        MsrRange::single(Msr(0x4000_0105)),
        "reports a crash of a guest of Hyper-V's interface",
    ),
];

/// Whether the guest leaves the MSR alone where its write would be carried out.
pub(super) fn left_alone(msr: Msr) -> bool {
    LEFT_ALONE.iter().any(|(range, _)| range.contains(msr))
}

/// An error number, 0 for none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Gives(pub(super) i32);

/// As a case file writes it.
impl fmt::Display for Gives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            0 => "ok",
            4 => "EINTR",
            5 => "EIO",
            12 => "ENOMEM",
            14 => "EFAULT",
            22 => "EINVAL",
            25 => "ENOTTY",
            number => return write!(f, "error {number}"),
        };
        f.pad(name)
    }
}

/// What the live kernel and the engine made of the same thing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Both<T> {
    pub(super) live: T,
    pub(super) engine: T,
}

/// How the two relate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Relation {
    Same,
    /// A write of TSC_DEADLINE that the kernel's fast path carries out without asking the filter.
    Bypass,
    Differ,
}

/// An access that both made.
#[derive(Clone, Debug)]
pub(super) struct Compared {
    pub(super) access: Access,
    pub(super) got: Both<Got>,
    pub(super) relation: Relation,
}

/// Two VMs in step.
pub(super) struct Pair<'a> {
    host: &'a Host,
    twin: &'a mut Twin,
    arena: Arena,
    live: Live,
    engine: Engine,
    vm: Caller,
    vcpu: Caller,
    system: Caller,
}

impl<'a> Pair<'a> {
    pub(super) fn new(machine: &Machine, host: &'a Host, twin: &'a mut Twin) -> Result<Pair<'a>, Failure> {
        let failed = |error: io::Error| Failure::Line(ExitCode::Machine, format!("setting a VM up failed: {error}"));
        let mut guest = machine.guest(1)?;
        let vm = Caller::of(guest.vm()).map_err(failed)?;
        let vcpu = guest.vcpu(0).map_err(|error| super::guest_failed(&error))?;
        Ok(Pair {
            host,
            twin,
            arena: Arena::new(PAGES).map_err(failed)?,
            vm,
            vcpu: Caller::of(vcpu.fd()).map_err(failed)?,
            system: Caller::of(machine.kvm()).map_err(failed)?,
            live: Live::new(guest),
            engine: Engine::new(host.profile),
        })
    }

    /// Makes the call on both.
    pub(super) fn call(&mut self, call: &Call) -> Both<Gives> {
        let (request, argp) = call.place(&mut self.arena);
        let caller = match call.on {
            Descriptor::Vm => &self.vm,
            Descriptor::Vcpu => &self.vcpu,
            Descriptor::System => &self.system,
        };
        let live = match caller.call(request, argp) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(-1),
        };
        let memory = |address: u64, to: &mut [u8]| match self.arena.read(address, to) {
            true => Ok(()),
            false => Err(Unreadable),
        };
        let caller = EngineCaller {
            process: Process::Native,
            descriptor: call.on,
        };
        let engine = match self.engine.vm.ioctl(request.number(), argp, &memory, caller) {
            Ok(_) => 0,
            Err(errno) => errno as i32,
        };
        Both {
            live: Gives(live),
            engine: Gives(engine),
        }
    }

    /// The value that an access is to have. A write gets what the MSR holds where the engine's filter allows it, `other`
    /// where it does not; `None` where the MSR is to be left alone.
    pub(super) fn value(&mut self, msr: Msr, op: Op, other: u64) -> Option<u64> {
        match (op, self.engine.allows(msr, op)) {
            (Op::Read, _) => Some(0),
            (Op::Write, false) => Some(other),
            (Op::Write, true) if left_alone(msr) => None,
            (Op::Write, true) => Some(self.twin.value(msr)),
        }
    }

    /// Makes the accesses on both; those that neither can be asked for are left out.
    pub(super) fn accesses(&mut self, accesses: &[Access]) -> Result<Vec<Compared>, Failure> {
        let mut made = Vec::with_capacity(accesses.len());
        let mut expected = Vec::with_capacity(accesses.len());
        let answer = &mut |exit: Exit, _: &mut Twin| (answer(exit.access), None);
        for access in accesses {
            if let Some(got) = self.engine.access(*access, Path::VmExit, self.twin, answer) {
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
            let relation = relation(&got, access, self.twin, |twin| {
                let vendor = self.host.fastpath(access)?;
                self.engine.access(access, Path::Fastpath(vendor), twin, answer)
            });
            all.push(Compared { access, got, relation });
        }
        Ok(all)
    }
}

/// How two results of an access relate. `bypassed` says what the engine makes of it on the kernel's fast path, if there
/// is one.
pub(super) fn relation(
    got: &Both<Got>,
    access: Access,
    twin: &mut Twin,
    bypassed: impl FnOnce(&mut Twin) -> Option<Got>,
) -> Relation {
    let Both { live, engine } = got;
    if live == engine {
        return Relation::Same;
    }
    let values = matches!((live.sees, engine.sees), (Outcome::Value(_), Outcome::Value(_)));
    let same_but_value = Got {
        sees: engine.sees,
        ..live.clone()
    } == *engine;
    // Values that the kernel gives; those that user space gives are fixed.
    if values && same_but_value && live.reason == 0 && twin.moves(access.msr()) {
        return Relation::Same;
    }
    match bypassed(twin) {
        Some(bypassed) if bypassed == *live => Relation::Bypass,
        _ => Relation::Differ,
    }
}

/// What user space answers where no policy says so: something that each access has for its own.
pub(super) fn answer(access: Access) -> Outcome {
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
