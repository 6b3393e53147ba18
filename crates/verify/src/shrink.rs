//! From a disagreement to the smallest one like it.

use std::fmt;

use msrgate_core::{Access, Outcome, Reason};
use msrgate_engine::Descriptor;

use crate::call::{Call, Place, RawFilter, Target};
use crate::live::Got;
use crate::pair::{Gives, answer};

/// What happens to a VM from its start on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Scenario {
    pub(crate) steps: Vec<Step>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    Call(Call),
    Access(Access),
}

/// What came of a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Came {
    Gives(Gives),
    Got(Got),
}

/// For people.
impl fmt::Display for Came {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Came::Gives(gives) => gives.fmt(f),
            Came::Got(got) => got.fmt(f),
        }
    }
}

/// How often a smaller one is tried.
const TRIES: usize = 2000;

/// The smallest scenario for which `disagrees` still holds. `disagrees` is to be asked in a fresh VM.
pub(crate) fn shrink<E>(
    mut scenario: Scenario,
    mut disagrees: impl FnMut(&Scenario) -> Result<bool, E>,
) -> Result<Scenario, E> {
    let mut tries = 0;
    loop {
        let mut smaller = None;
        for candidate in smaller_ones(&scenario) {
            tries += 1;
            if tries > TRIES {
                return Ok(scenario);
            }
            if disagrees(&candidate)? {
                smaller = Some(candidate);
                break;
            }
        }
        match smaller {
            Some(smaller) => scenario = smaller,
            None => return Ok(scenario),
        }
    }
}

/// Scenarios that are smaller by one thing, those that leave out most first.
fn smaller_ones(scenario: &Scenario) -> Vec<Scenario> {
    let mut all = Vec::new();
    for at in 0..scenario.steps.len() {
        let mut smaller = scenario.clone();
        smaller.steps.remove(at);
        all.push(smaller);
    }
    for (at, step) in scenario.steps.iter().enumerate() {
        let replaced = |step: Step| {
            let mut smaller = scenario.clone();
            if let Some(place) = smaller.steps.get_mut(at) {
                *place = step;
            }
            smaller
        };
        match step {
            Step::Call(call) => all.extend(smaller_calls(call).into_iter().map(|call| replaced(Step::Call(call)))),
            Step::Access(Access::Write { msr, value }) if *value != 0 => {
                all.push(replaced(Step::Access(Access::Write { msr: *msr, value: 0 })));
            }
            Step::Access(_) => {}
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
        Target::Cap { .. } => {
            push(&|call| {
                if let Target::Cap { flags, args, .. } = &mut call.target {
                    let [_, more @ ..] = args;
                    (*flags, *more) = (0, [0; 3]);
                }
            });
            for bit in 0..64 {
                push(&|call| {
                    if let Target::Cap { args: [mask, ..], .. } = &mut call.target {
                        *mask &= !(1 << bit);
                    }
                });
            }
        }
        Target::Filter(filter) => {
            for smaller in smaller_filters(filter) {
                push(&|call| call.target = Target::Filter(smaller.clone()));
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
    push(&|filter| (filter.pad, filter.compat) = (0, false));
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
        let mut push = |change: &dyn Fn(&mut crate::call::RawRange)| {
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
fn trim(range: &mut crate::call::RawRange) {
    if range.nmsrs <= msrgate_core::abi::MAX_RANGE_MSRS {
        range.bitmap.resize(range.nmsrs.div_ceil(64) as usize * 8, 0);
    }
}

/// A case file with what the live kernel did as what is expected.
pub(crate) struct CaseFile<'a> {
    pub(crate) name: &'a str,
    pub(crate) scenario: &'a Scenario,
    pub(crate) live: &'a [Came],
}

impl fmt::Display for CaseFile<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "[[case]]\nname = \"{}\"\nprocess = \"native\"\nsteps = [", self.name)?;
        // Without that reason a denial looks like any other fault.
        let mut told = false;
        for (step, came) in self.scenario.steps.iter().zip(self.live) {
            match (step, came) {
                (Step::Call(call), Came::Gives(gives)) => {
                    writeln!(f, "  {{ {call}, gives = \"{gives}\" }},")?;
                    if let (Target::Cap { args: [mask, ..], .. }, Gives(0)) = (&call.target, gives) {
                        told = mask & Reason::Filter as u64 != 0;
                    }
                }
                (Step::Access(access), Came::Got(got)) => {
                    writeln!(
                        f,
                        "  {{ {} }},",
                        AccessStep {
                            access: *access,
                            got,
                            told
                        }
                    )?;
                }
                _ => {}
            }
        }
        writeln!(f, "]")
    }
}

struct AccessStep<'a> {
    access: Access,
    got: &'a Got,
    told: bool,
}

impl fmt::Display for AccessStep<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.access {
            Access::Read { msr } => write!(f, "rdmsr = {msr}")?,
            Access::Write { msr, value } => write!(f, "wrmsr = {msr}, value = \"{value:#x}\"")?,
        }
        let word = |outcome: Outcome| match outcome {
            Outcome::Value(value) => format!("{value:#x}"),
            Outcome::Done => "done".into(),
            Outcome::Fault => "fault".into(),
        };
        let answer = answer(self.access);
        if answer != Outcome::Fault {
            write!(f, ", answer = \"{}\"", word(answer))?;
        }
        let denied = self.got.reason == Reason::Filter as u32;
        if self.told {
            write!(f, ", verdict = \"{}\"", if denied { "deny" } else { "allow" })?;
        }
        // What the kernel itself makes of an access is this machine's, and no case's to say.
        if denied {
            write!(f, ", exit = \"filter\", sees = \"{}\"", word(self.got.sees))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use msrgate_core::Msr;
    use msrgate_suite::Case;
    use serde::Deserialize;

    use super::*;
    use crate::call::RawRange;
    use crate::generate;
    use crate::rng::Rng;

    #[derive(Deserialize)]
    struct File {
        case: Vec<Case>,
    }

    fn random_scenario(item: u64) -> Scenario {
        let mut rng = Rng::of(9, item);
        let mut steps: Vec<Step> = (0..3).map(|_| Step::Call(generate::call(&mut rng))).collect();
        for access in generate::accesses(&mut rng, None, 6) {
            steps.push(Step::Access(generate::access(access, generate::value(&mut rng))));
        }
        Scenario { steps }
    }

    #[test]
    fn the_suite_reads_what_is_printed_and_prints_the_same() {
        for item in 0..500 {
            let scenario = random_scenario(item);
            let got = Got {
                reason: 4,
                sees: Outcome::Value(7),
                did: None,
                odd: None,
            };
            let came = |step: &Step| match step {
                Step::Call(_) => Came::Gives(Gives(14)),
                Step::Access(_) => Came::Got(got.clone()),
            };
            let live: Vec<Came> = scenario.steps.iter().map(came).collect();
            let text = CaseFile {
                name: "as printed",
                scenario: &scenario,
                live: &live,
            }
            .to_string();
            let file: File = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
            assert_eq!(file.case.len(), 1);
            assert_eq!(file.case[0].to_string(), text);
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
            if let Target::Filter(filter) = generate::call(&mut rng).target {
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
            compat: false,
            ranges,
        };
        let read = Step::Access(Access::Read { msr: Msr(0x174) });
        let scenario = Scenario {
            steps: vec![
                Step::Call(Call::mask(7, Place::Unaligned)),
                Step::Call(Call::filter(filter)),
                Step::Access(Access::Read { msr: Msr(1) }),
                read.clone(),
            ],
        };
        let disagrees = |scenario: &Scenario| {
            let filter = scenario.steps.iter().find_map(|step| match step {
                Step::Call(Call {
                    target: Target::Filter(filter),
                    ..
                }) => Some(filter),
                _ => None,
            });
            Ok::<bool, Infallible>(filter.is_some_and(wrong) && scenario.steps.contains(&read))
        };
        let Ok(small) = shrink(scenario, disagrees);
        let [Step::Call(call), last] = small.steps.as_slice() else {
            panic!("{small:?}");
        };
        assert_eq!(*last, read);
        let Target::Filter(filter) = &call.target else {
            panic!("{call:?}");
        };
        assert_eq!((filter.flags, filter.pad, filter.ranges.len()), (0, 0, 1));
        let range = &filter.ranges[0];
        assert_eq!((range.slot, range.flags, range.at), (0, 2, Place::Mapped));
        assert!(range.nmsrs <= 8, "{range:?}");
        assert!(range.bitmap.iter().all(|byte| *byte == 0));
    }
}
