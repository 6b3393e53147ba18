//! A filter that is replaced again and again under running vCPUs.
//!
//! Each MSR is denied by both filters, by neither, or by one of them. An access to the first two kinds must come out the
//! same every time; one to the third must come out as one of the two filters says, and as nothing else.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use msrgate_core::{Access, Fault, Msr, Ops, Outcome, Reason};
use msrgate_engine::Process;
use msrgate_guest::Vcpu;
use msrgate_guest::raw::{Arena, Caller};

use crate::VerifyError;
use crate::case::{Call, PAGES, RawFilter, RawRange};
use crate::{Disagreement, Report};
use crate::{Machine, Progress, Swapped};

/// What both filters say of an MSR: whether the first denies it, and the second.
type Treatment = (bool, bool);

/// MSRs of every treatment: some that hardware passes through, some that the kernel answers, some that it does not know.
const MSRS: [(u32, Treatment); 12] = [
    (0x174, (true, true)),
    (0xc000_0100, (true, true)),
    (0xdead_0000, (true, true)),
    (0x175, (false, false)),
    (0xc000_0101, (false, false)),
    (0x277, (false, false)),
    (0x176, (true, false)),
    (0xc000_0102, (true, false)),
    (0xdead_0001, (true, false)),
    (0xc000_0081, (false, true)),
    (0x1b, (false, true)),
    (0xdead_0002, (false, true)),
];

/// How often each MSR is read between two looks.
const ROUNDS: usize = 200;
const VCPUS: usize = 2;
const PAUSE: Duration = Duration::from_micros(200);
/// As often the filter is replaced at least, however slow the machine.
const LEAST: u64 = 64;
/// What a denied read gets.
const ANSWER: u64 = 0x6d73_7267_6174_6521;

/// What reads of one MSR came to.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Tally {
    denied: u64,
    allowed: u64,
    /// Neither: another value, another reason.
    other: u64,
}

impl Machine {
    /// Replaces a filter under running vCPUs for so long, and 64 times at least, and looks at what they read.
    pub fn swap(&self, time: Duration, progress: Progress<'_>) -> Result<Report, VerifyError> {
        let mut guest = self.guest(VCPUS)?;
        let vm = Caller::of(guest.vm())?;
        let mut arenas = [Arena::new(PAGES)?, Arena::new(PAGES)?];
        let [first, second] = &mut arenas;
        // Unknown MSRs are handed over too, and tell themselves from denied ones.
        let mask = Call::enable_cap(7);
        let (request, argp) = mask.place(Process::Native, first);
        vm.call(request, argp)?;
        let calls = [
            filter(|(denied, _)| denied).place(Process::Native, first),
            filter(|(_, denied)| denied).place(Process::Native, second),
        ];
        // What the kernel itself answers, before there is a filter.
        let plain = guest.vcpus().iter_mut().map(plain).collect::<Result<Vec<_>, _>>()?;
        let [(request, argp), _] = calls;
        vm.call(request, argp)?;

        let stop = AtomicBool::new(false);
        let (tallies, swaps) = std::thread::scope(|scope| {
            let stop = &stop;
            let threads: Vec<_> = guest
                .vcpus()
                .iter_mut()
                .zip(&plain)
                .map(|(vcpu, plain)| scope.spawn(move || loop_of(vcpu, plain, stop)))
                .collect();
            let start = Instant::now();
            let mut swaps = 0u64;
            let mut result = Ok(());
            while (start.elapsed() < time || swaps < LEAST) && result.is_ok() {
                for (request, argp) in [calls[1], calls[0]] {
                    result = result.and(vm.call(request, argp));
                    swaps += 1;
                    // Where there is one CPU, each filter gets its share of it.
                    std::thread::sleep(PAUSE);
                }
                progress(start.elapsed().as_secs(), time.as_secs());
            }
            stop.store(true, Ordering::Relaxed);
            let joined = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or(Err(VerifyError::Panicked)));
            let tallies = joined.collect::<Result<Vec<_>, VerifyError>>();
            (tallies, result.map(|()| swaps))
        });
        let swaps: u64 = swaps?;
        let mut all: BTreeMap<u32, Tally> = BTreeMap::new();
        for tally in tallies? {
            for (msr, one) in tally {
                let sum = all.entry(msr).or_default();
                sum.denied += one.denied;
                sum.allowed += one.allowed;
                sum.other += one.other;
            }
        }
        let mut report = judge(&all);
        report.filters += swaps + 1;
        Ok(report)
    }
}

fn judge(all: &BTreeMap<u32, Tally>) -> Report {
    let mut report = Report::default();
    for (msr, treatment) in MSRS {
        let tally = all.get(&msr).copied().unwrap_or_default();
        report.accesses += tally.denied + tally.allowed + tally.other;
        let (may_deny, may_allow) = match treatment {
            (true, true) => (true, false),
            (false, false) => (false, true),
            _ => (true, true),
        };
        let wrong = tally.other > 0 || tally.denied > 0 && !may_deny || tally.allowed > 0 && !may_allow;
        let word = |denied: bool| if denied { "deny" } else { "allow" };
        let filters = format!("{}, {}", word(treatment.0), word(treatment.1));
        if wrong {
            report.disagreements.push(Disagreement::new(
                format!("rdmsr {} while filters change: {filters}", Msr(msr)),
                format!(
                    "denied {}, allowed {}, neither {}",
                    tally.denied, tally.allowed, tally.other
                ),
                "what one of the two filters says".into(),
            ));
        }
        report.swapped.push(Swapped {
            msr: Msr(msr),
            denied_by: [treatment.0, treatment.1],
            denied: tally.denied,
            allowed: tally.allowed,
            neither: tally.other,
        });
    }
    report
}

/// Reads all MSRs, once at least, until it is told to stop.
fn loop_of(
    vcpu: &mut Vcpu,
    plain: &BTreeMap<u32, Plain>,
    stop: &AtomicBool,
) -> Result<BTreeMap<u32, Tally>, VerifyError> {
    let round = MSRS.map(|(msr, _)| Access::Read { msr: Msr(msr) });
    let accesses = round.repeat(ROUNDS);
    let mut tallies: BTreeMap<u32, Tally> = BTreeMap::new();
    loop {
        let ran = vcpu.run(&accesses, &mut |pending| {
            if Reason::from_bits(pending.reason_bits()) == Some(Reason::Filter) {
                pending.answer(|_| Ok(ANSWER), |_, _| Err(Fault));
            }
        });
        let seen = ran?;
        for (access, seen) in accesses.iter().zip(seen) {
            let msr = access.msr().0;
            let got = (seen.exit.map(|exit| exit.reason_bits), seen.outcome);
            let tally = tallies.entry(msr).or_default();
            if got == (Some(Reason::Filter as u32), Outcome::Value(ANSWER)) {
                tally.denied += 1;
            } else if plain.get(&msr) == Some(&got) {
                tally.allowed += 1;
            } else {
                tally.other += 1;
            }
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(tallies);
        }
    }
}

/// Reason and outcome.
type Plain = (Option<u32>, Outcome);

/// What each MSR gives on a vCPU that has no filter.
fn plain(vcpu: &mut Vcpu) -> Result<BTreeMap<u32, Plain>, VerifyError> {
    let accesses = MSRS.map(|(msr, _)| Access::Read { msr: Msr(msr) });
    let seen = vcpu.run(&accesses, &mut |_| {})?;
    let plain = seen
        .iter()
        .map(|seen| (seen.exit.map(|exit| exit.reason_bits), seen.outcome));
    Ok(MSRS.into_iter().map(|(msr, _)| msr).zip(plain).collect())
}

/// Allows everything but the MSRs for which `denies` holds.
fn filter(denies: impl Fn(Treatment) -> bool) -> Call {
    let denied = MSRS.into_iter().filter(|(_, treatment)| denies(*treatment));
    let ranges = denied
        .zip(0..)
        .map(|((msr, _), slot)| RawRange::denying(slot, Msr(msr), Ops::BOTH));
    Call::set_msr_filter(RawFilter::allowing(ranges.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(change: impl Fn(&mut BTreeMap<u32, Tally>)) -> usize {
        let mut all: BTreeMap<u32, Tally> = MSRS
            .into_iter()
            .map(|(msr, treatment)| {
                let tally = match treatment {
                    (true, true) => Tally {
                        denied: 9,
                        ..Tally::default()
                    },
                    (false, false) => Tally {
                        allowed: 9,
                        ..Tally::default()
                    },
                    _ => Tally {
                        denied: 4,
                        allowed: 5,
                        other: 0,
                    },
                };
                (msr, tally)
            })
            .collect();
        change(&mut all);
        judge(&all).disagreements.len()
    }

    #[test]
    fn an_msr_that_both_filters_treat_alike_must_never_show_another_treatment() {
        assert_eq!(judged(|_| {}), 0);
        assert_eq!(judged(|all| all.entry(0x174).or_default().allowed = 1), 1);
        assert_eq!(judged(|all| all.entry(0x277).or_default().denied = 1), 1);
    }

    #[test]
    fn an_msr_that_they_treat_differently_must_show_one_of_the_two() {
        assert_eq!(judged(|all| all.entry(0x176).or_default().other = 1), 1);
    }
}
