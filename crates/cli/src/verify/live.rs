//! A VM of this machine's kernel, and what its guest's accesses come to.

use std::fmt;

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use msrgate_core::{Access, Did, Op, Outcome, Reason};
use msrgate_guest::{Guest, GuestError, Mode, Options, Pending};
use msrgate_kvm::Probed;
use msrgate_msrs::cpuid::Cpuid;

use super::guest_failed;
use crate::exit::{Exit, Failure};
use crate::replay::kvm::to_kvm;
use crate::replay::with_source;

/// KVM, and how guests on it are made.
pub(super) struct Machine {
    kvm: Kvm,
    pub(super) probed: Probed,
    pub(super) mode: Mode,
    cpuid: Option<CpuId>,
}

impl Machine {
    pub(super) fn open(mode: Mode, cpuid: Option<&Cpuid>) -> Result<Machine, Failure> {
        let machine = |error: &dyn std::error::Error| Failure::Line(Exit::Machine, with_source(error));
        let device = msrgate_kvm::open().map_err(|error| machine(&error))?;
        let probed = msrgate_kvm::probe(&device).map_err(|error| machine(&error))?;
        let kvm = Kvm::new().map_err(|error| machine(&error))?;
        Ok(Machine {
            kvm,
            probed,
            mode,
            cpuid: cpuid.map(to_kvm).transpose()?,
        })
    }

    /// `/dev/kvm`.
    pub(super) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// A new VM. It has interrupt controllers, without which TSC_DEADLINE does nothing.
    pub(super) fn guest(&self, vcpus: usize) -> Result<Guest, Failure> {
        let options = Options {
            cpuid: self.cpuid.clone(),
            vcpus,
            irqchip: true,
        };
        Guest::new(&self.kvm, self.mode, &options).map_err(|error| guest_failed(&error))
    }
}

/// What an access came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Got {
    /// The reason of its exit as the kernel numbers it; 0 where it made none.
    pub(super) reason: u32,
    /// What the guest got.
    pub(super) sees: Outcome,
    /// What a plan's table did; `None` where none was asked.
    pub(super) did: Option<Did>,
    /// What no access should come to: a guest that broke, an exit from another place.
    pub(super) odd: Option<String>,
}

/// For people: `exit unknown, guest sees #GP`.
impl fmt::Display for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(odd) = &self.odd {
            return f.write_str(odd);
        }
        match (self.reason, Reason::from_bits(self.reason)) {
            (0, _) => f.write_str("no exit")?,
            (_, Some(reason)) => write!(f, "exit {reason}")?,
            (bits, None) => write!(f, "exit for reason {bits:#x}")?,
        }
        if let Some(did) = self.did {
            write!(f, ", answered by {did}")?;
        }
        match self.sees {
            Outcome::Value(value) => write!(f, ", guest sees {value:#x}"),
            Outcome::Done => f.write_str(", write done"),
            Outcome::Fault => f.write_str(", guest sees #GP"),
        }
    }
}

/// A VM whose accesses are looked at.
pub(super) struct Live {
    guest: Guest,
    /// Where the guest's RDMSR and WRMSR are.
    rip: [Option<u64>; 2],
}

impl Live {
    pub(super) fn new(guest: Guest) -> Live {
        Live { guest, rip: [None; 2] }
    }

    pub(super) fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    /// Lets the first vCPU make the accesses; `answer` answers the exits.
    pub(super) fn run(
        &mut self,
        accesses: &[Access],
        answer: &mut dyn FnMut(&mut Pending<'_>),
    ) -> Result<Vec<Got>, Failure> {
        let mut all = Vec::with_capacity(accesses.len());
        let mut rest = accesses;
        let [rdmsr, wrmsr] = &mut self.rip;
        loop {
            let vcpu = self.guest.vcpu(0).map_err(|error| guest_failed(&error))?;
            let mut odd: Vec<(usize, String)> = Vec::new();
            let mut before = None;
            let ran = vcpu.run(rest, &mut |pending| {
                let position = pending.position();
                let mut wrong = |what: String| odd.push((position, what));
                if before.replace(position) == Some(position) {
                    wrong("it exits twice".into());
                }
                let access = pending.access();
                if rest.get(position) != Some(&access) {
                    wrong(format!("it exits as {access:?}"));
                }
                let rip = pending.rip();
                let place = match access.op() {
                    Op::Read => &mut *rdmsr,
                    Op::Write => &mut *wrmsr,
                };
                if *place.get_or_insert(rip) != rip {
                    wrong(format!("it exits at {rip:#x}, not at the instruction"));
                }
                answer(pending);
            });
            let broke = match ran {
                Ok(_) => None,
                Err(GuestError::Broke { position, how, .. }) => Some((position, how)),
                Err(error) => return Err(guest_failed(&error)),
            };
            let first = all.len();
            all.extend(vcpu.seen().iter().map(|seen| Got {
                reason: seen.exit.map_or(0, |exit| exit.reason_bits),
                sees: seen.outcome,
                did: seen.exit.and_then(|exit| exit.answer).map(|answer| answer.did),
                odd: None,
            }));
            for (position, what) in odd {
                if let Some(got) = all.get_mut(first + position) {
                    got.odd.get_or_insert(what);
                }
            }
            let Some((position, how)) = broke else {
                return Ok(all);
            };
            all.push(Got {
                reason: 0,
                sees: Outcome::Fault,
                did: None,
                odd: Some(format!("the guest broke: {how}")),
            });
            rest = rest.get(position + 1..).unwrap_or_default();
            if rest.is_empty() {
                return Ok(all);
            }
        }
    }
}
