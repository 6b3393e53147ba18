//! What the accesses of a live guest come to.

use std::fmt;

use msrgate_core::{Access, Disposition, Op, Outcome, Reason};
use msrgate_guest::{Guest, GuestError, Pending};

use crate::VerifyError;

/// What an access came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct AccessResult {
    /// The reason of its exit as the kernel numbers it; 0 where it made none.
    pub(crate) reason: u32,
    /// What the guest got.
    pub(crate) sees: Outcome,
    /// What a plan's table did; `None` where none was asked.
    pub(crate) did: Option<Disposition>,
    /// What no access should come to: a guest that broke, an exit from another place.
    pub(crate) odd: Option<String>,
}

/// For people: `exit unknown, guest sees #GP`.
impl fmt::Display for AccessResult {
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
pub(crate) struct Live {
    guest: Guest,
    /// Where the guest's RDMSR and WRMSR are.
    rip: [Option<u64>; 2],
}

impl Live {
    pub(crate) fn new(guest: Guest) -> Live {
        Live { guest, rip: [None; 2] }
    }

    pub(crate) fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    /// Lets the first vCPU make the accesses; `answer` answers the exits.
    pub(crate) fn run(
        &mut self,
        accesses: &[Access],
        answer: &mut dyn FnMut(&mut Pending<'_>),
    ) -> Result<Vec<AccessResult>, VerifyError> {
        let mut all = Vec::with_capacity(accesses.len());
        let mut rest = accesses;
        let [rdmsr, wrmsr] = &mut self.rip;
        loop {
            let vcpu = self.guest.vcpu(0)?;
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
                Err(GuestError::GuestDied { position, how, .. }) => Some((position, how)),
                Err(error) => return Err(error.into()),
            };
            let first = all.len();
            all.extend(vcpu.seen().iter().map(|seen| AccessResult {
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
            all.push(AccessResult {
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
