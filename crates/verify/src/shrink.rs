//! From a disagreement to the smallest one like it.

use std::fmt;

use msrgate_core::{Access, Reason, Verdict};
use msrgate_engine::Process;

use crate::case::{AccessStep, Call, CallResult, Case, Descriptor, Place, RawFilter, RawRange, Seen, Step, Target};
use crate::live::AccessResult;
use crate::pair::answer;

/// What came of a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum StepResult {
    Call(CallResult),
    Access(AccessResult),
}

/// For people.
impl fmt::Display for StepResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StepResult::Call(gives) => gives.fmt(f),
            StepResult::Access(got) => got.fmt(f),
        }
    }
}

/// How often a smaller one is tried.
const TRIES: usize = 2000;

/// The smallest list of steps for which `disagrees` still holds. `disagrees` is to be asked in a fresh VM.
pub(crate) fn shrink<E>(
    mut steps: Vec<Step>,
    mut disagrees: impl FnMut(&[Step]) -> Result<bool, E>,
) -> Result<Vec<Step>, E> {
    let mut tries = 0;
    loop {
        let mut smaller = None;
        for candidate in smaller_ones(&steps) {
            tries += 1;
            if tries > TRIES {
                return Ok(steps);
            }
            if disagrees(&candidate)? {
                smaller = Some(candidate);
                break;
            }
        }
        match smaller {
            Some(smaller) => steps = smaller,
            None => return Ok(steps),
        }
    }
}

/// Lists that are smaller by one thing, those that leave out most first.
fn smaller_ones(steps: &[Step]) -> Vec<Vec<Step>> {
    let mut all = Vec::new();
    for at in 0..steps.len() {
        let mut smaller = steps.to_vec();
        smaller.remove(at);
        all.push(smaller);
    }
    for (at, step) in steps.iter().enumerate() {
        let replaced = |step: Step| {
            let mut smaller = steps.to_vec();
            if let Some(place) = smaller.get_mut(at) {
                *place = step;
            }
            smaller
        };
        match step {
            Step::Call(call) => all.extend(smaller_calls(call).into_iter().map(|call| replaced(Step::Call(call)))),
            Step::Access(AccessStep {
                access: Access::Write { msr, value: 1.. },
                ..
            }) => all.push(replaced(Access::Write { msr: *msr, value: 0 }.into())),
            Step::Access(_) | Step::Replace(_) | Step::Kill => {}
        }
    }
    all
}

fn smaller_calls(call: &Call) -> Vec<Call> {
    let mut all = Vec::new();
    let mut push = |change: &dyn Fn(&mut Call)| {
        let mut smaller = call.clone();
        change(&mut smaller);
        if smaller != *call {
            all.push(smaller);
        }
    };
    push(&|call| call.argp = Place::Mapped);
    push(&|call| call.on = Descriptor::Vm);
    match &call.target {
        Target::EnableCap { .. } => {
            push(&|call| {
                if let Target::EnableCap { flags, args, .. } = &mut call.target {
                    let [_, more @ ..] = args;
                    (*flags, *more) = (0, [0; 3]);
                }
            });
            for bit in 0..64 {
                push(&|call| {
                    if let Target::EnableCap { args: [mask, ..], .. } = &mut call.target {
                        *mask &= !(1 << bit);
                    }
                });
            }
        }
        Target::SetMsrFilter(filter) => {
            for smaller in smaller_filters(filter) {
                push(&|call| call.target = Target::SetMsrFilter(smaller.clone()));
            }
        }
    }
    all
}

fn smaller_filters(filter: &RawFilter) -> Vec<RawFilter> {
    let mut all = Vec::new();
    let mut push = |change: &dyn Fn(&mut RawFilter)| {
        let mut smaller = filter.clone();
        change(&mut smaller);
        all.push(smaller);
    };
    for at in 0..filter.ranges.len() {
        push(&|filter| drop(filter.ranges.remove(at)));
    }
    push(&|filter| (filter.pad, filter.layout) = (0, None));
    push(&|filter| filter.flags = 0);
    push(&|filter| filter.flags &= 1);
    // Slots move to the front.
    push(&|filter| {
        filter
            .ranges
            .iter_mut()
            .zip(0..)
            .for_each(|(range, slot)| range.slot = slot)
    });
    for (at, range) in filter.ranges.iter().enumerate() {
        let mut push = |change: &dyn Fn(&mut RawRange)| {
            push(&|filter| {
                if let Some(range) = filter.ranges.get_mut(at) {
                    change(range);
                }
            });
        };
        push(&|range| range.at = Place::Mapped);
        push(&|range| range.flags &= 3);
        push(&|range| range.flags = 3);
        // All alike, zeros rather than ones: never from zeros back to ones.
        push(&|range| range.bitmap.fill(0));
        if range.bitmap.iter().any(|byte| *byte != 0) {
            push(&|range| range.bitmap.fill(0xff));
        }
        // Halves, then single MSRs, from either end.
        for less in [range.nmsrs / 2, 64, 1] {
            if less == 0 || less >= range.nmsrs {
                continue;
            }
            push(&|range| {
                range.nmsrs -= less;
                trim(range);
            });
            // From the front the bits must move along, which whole bytes do.
            let bytes = less as usize / 8;
            if less % 8 == 0 && bytes <= range.bitmap.len() {
                push(&|range| {
                    range.base = range.base.wrapping_add(less);
                    range.nmsrs -= less;
                    range.bitmap.drain(..bytes);
                    trim(range);
                });
            }
        }
    }
    all
}

/// Leaves the bytes of whole longs.
fn trim(range: &mut RawRange) {
    if range.nmsrs <= msrgate_core::abi::MAX_RANGE_MSRS {
        range.bitmap.resize(range.nmsrs.div_ceil(64) as usize * 8, 0);
    }
}

/// The case whose expectations are what the live kernel did.
pub(crate) fn case(name: String, mut steps: Vec<Step>, live: &[StepResult]) -> Case {
    // Without that reason a denial looks like any other fault.
    let mut told = false;
    for (step, came) in steps.iter_mut().zip(live) {
        match (step, came) {
            (Step::Call(call), StepResult::Call(gives)) => {
                call.gives = Some(*gives);
                if let (Target::EnableCap { args: [mask, ..], .. }, CallResult::OK) = (&call.target, *gives) {
                    told = mask & Reason::Filter as u64 != 0;
                }
            }
            (Step::Access(step), StepResult::Access(got)) => {
                step.answer = answer(step.access);
                let denied = got.reason == Reason::Filter as u32;
                let verdict = if denied { Verdict::Deny } else { Verdict::Allow };
                step.expect = Seen {
                    action: None,
                    verdict: told.then_some(verdict),
                    // What the kernel itself makes of an access is this machine's, and no case's to say.
                    exit: denied.then_some(Some(Reason::Filter)),
                    sees: denied.then_some(got.sees),
                };
            }
            _ => {}
        }
    }
    steps.truncate(live.len());
    Case {
        name,
        policy: None,
        cpuid: None,
        process: Some(Process::Native),
        ignore_msrs: false,
        steps,
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use msrgate_core::{Msr, Outcome};

    use super::*;
    use crate::generate;
    use crate::rng::Rng;

    fn random_steps(item: u64) -> Vec<Step> {
        let mut rng = Rng::of(9, item);
        let mut steps: Vec<Step> = (0..3).map(|_| Step::Call(generate::call(&mut rng))).collect();
        for access in generate::accesses(&mut rng, None, 6) {
            steps.push(generate::access(access, generate::value(&mut rng)).into());
        }
        steps
    }

    #[test]
    fn the_suite_reads_what_is_printed_and_prints_the_same() {
        for item in 0..500 {
            let steps = random_steps(item);
            let got = AccessResult {
                reason: 4,
                sees: Outcome::Value(7),
                did: None,
                odd: None,
            };
            let came = |step: &Step| match step {
                Step::Call(_) => StepResult::Call(CallResult(14)),
                _ => StepResult::Access(got.clone()),
            };
            let live: Vec<StepResult> = steps.iter().map(came).collect();
            let text = case("as printed".into(), steps, &live).to_string();
            let read = msrgate_suite::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
            assert_eq!(read.len(), 1);
            assert_eq!(read[0].to_string(), text);
        }
    }

    #[test]
    fn what_is_left_is_what_the_disagreement_takes() {
        // As if the engine took the range for one of reads too.
        let wrong = |filter: &RawFilter| {
            let hit = |range: &RawRange| {
                range.flags == 2 && range.nmsrs <= 12288 && (range.base..range.base + range.nmsrs).contains(&0x174)
            };
            filter.used().any(hit)
        };
        let mut rng = Rng::of(4, 4);
        let mut ranges: Vec<RawRange> = Vec::new();
        while ranges.len() < 5 {
            if let Target::SetMsrFilter(filter) = generate::call(&mut rng).target {
                ranges.extend(filter.ranges.into_iter().take(1));
            }
        }
        ranges.push(RawRange {
            slot: 0,
            flags: 2,
            nmsrs: 0x200,
            base: 0x100,
            bitmap: vec![0x5a; 64],
            at: Place::PageEnd,
        });
        ranges.iter_mut().zip(0..).for_each(|(range, slot)| range.slot = slot);
        let filter = RawFilter {
            flags: 1,
            pad: 7,
            layout: None,
            edited: false,
            ranges,
        };
        let read = Step::from(Access::Read { msr: Msr(0x174) });
        let mut mask = Call::enable_cap(7);
        mask.argp = Place::Unaligned;
        let steps = vec![
            Step::Call(mask),
            Step::Call(Call::set_msr_filter(filter)),
            Access::Read { msr: Msr(1) }.into(),
            read.clone(),
        ];
        let disagrees = |steps: &[Step]| {
            let filter = steps.iter().find_map(|step| match step {
                Step::Call(Call {
                    target: Target::SetMsrFilter(filter),
                    ..
                }) => Some(filter),
                _ => None,
            });
            Ok::<bool, Infallible>(filter.is_some_and(wrong) && steps.contains(&read))
        };
        let Ok(small) = shrink(steps, disagrees);
        let [Step::Call(call), last] = small.as_slice() else {
            panic!("{small:?}");
        };
        assert_eq!(*last, read);
        let Target::SetMsrFilter(filter) = &call.target else {
            panic!("{call:?}");
        };
        assert_eq!((filter.flags, filter.pad, filter.ranges.len()), (0, 0, 1));
        let range = &filter.ranges[0];
        assert_eq!((range.slot, range.flags, range.at), (0, 2, Place::Mapped));
        assert!(range.nmsrs <= 8, "{range:?}");
        assert!(range.bitmap.iter().all(|byte| *byte == 0));
    }
}
