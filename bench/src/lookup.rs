//! `lookup`: a verdict, beside the kernel's walk over the ranges.

use std::convert::Infallible;
use std::hint::black_box;

use msrgate_core::{Filter, FilterRange, FlatFilter, Msr, Op, Ops, Verdict};

use crate::figure::{Aim, Figure};
use crate::rounds::{nanoseconds, rounds};
use crate::{Effort, Measured};

/// MSRs of each range.
const NMSRS: u32 = 0x1000;
/// Nanoseconds below which nothing is told apart from the loop around it.
const MEASURABLE: f64 = 0.01;

pub(crate) fn measure(effort: Effort) -> Measured {
    let count = effort.of(1 << 16, 1 << 10);
    let mut figures = Vec::new();
    for ranges in [1, 4, 16] {
        let filter = filter(ranges).map_err(|error| error.to_string())?;
        let (lookup, linear) = (FlatFilter::new(filter.clone()), Linear::new(&filter));
        for pattern in Pattern::ALL {
            let accesses = pattern.accesses(&filter, count);
            let ours = |_: &mut ()| nanoseconds(count, || ask(&accesses, |msr, op| lookup.verdict(msr, op)));
            let theirs = |_: &mut ()| nanoseconds(count, || ask(&accesses, |msr, op| linear.verdict(msr, op)));
            // What the loop costs by itself is taken off both.
            let nothing = |_: &mut ()| nanoseconds(count, || ask(&accesses, |_, _| Verdict::Allow));
            let [ours, theirs, nothing] = rounds(effort.of(60, 2), &mut (), [&ours, &theirs, &nothing])?;
            let [ours, theirs] = [ours, theirs].map(|costs| (costs.least() - nothing.least()).max(MEASURABLE));
            let what = format!(
                "{ranges} range{}, {}",
                if ranges == 1 { "" } else { "s" },
                pattern.name()
            );
            let figure = Figure::new(what, "ns", ours).beside("walk over the ranges", theirs);
            figures.push(match (ranges, pattern) {
                (1, _) => figure.aim(Aim::Ratio(1.0)),
                // The walk ends where a range matches, so that nothing is five times as fast where that is the first.
                (16, Pattern::Last | Pattern::None | Pattern::Random) => figure.aim(Aim::Ratio(0.2)),
                _ => figure,
            });
        }
    }
    Ok(figures)
}

fn ask(accesses: &[(Msr, Op)], verdict: impl Fn(Msr, Op) -> Verdict) -> Result<(), Infallible> {
    let mut allowed = 0u32;
    for access in accesses {
        let (msr, op) = black_box(*access);
        allowed += u32::from(verdict(msr, op) == Verdict::Allow);
    }
    black_box(allowed);
    Ok(())
}

/// Ranges over the whole space, both directions, with bits of either kind.
pub(crate) fn filter(ranges: u32) -> Result<Filter, msrgate_core::FilterError> {
    let mut random = Random(ranges.into());
    let ranges = (0..ranges).map(|slot| {
        let words: Vec<u64> = (0..NMSRS / 64).map(|_| random.next() << 32 | random.next()).collect();
        FilterRange::new(base(slot), NMSRS, Ops::BOTH, words)
    });
    Filter::new(Verdict::Deny, ranges.collect::<Result<Vec<_>, _>>()?)
}

/// An MSR of the last of so many ranges.
pub(crate) fn last_of(ranges: u32) -> Msr {
    Msr(base(ranges.saturating_sub(1)) + NMSRS / 2)
}

fn base(slot: u32) -> u32 {
    0x1000_0000 * slot + 0x1080
}

/// Which accesses are asked about.
#[derive(Clone, Copy)]
enum Pattern {
    First,
    Last,
    None,
    Random,
    Hot,
}

impl Pattern {
    const ALL: [Pattern; 5] = [
        Pattern::First,
        Pattern::Last,
        Pattern::None,
        Pattern::Random,
        Pattern::Hot,
    ];

    fn name(self) -> &'static str {
        match self {
            Pattern::First => "the first matches",
            Pattern::Last => "the last matches",
            Pattern::None => "none matches",
            Pattern::Random => "at random",
            Pattern::Hot => "few MSRs again and again",
        }
    }

    fn accesses(self, filter: &Filter, count: usize) -> Vec<(Msr, Op)> {
        let mut random = Random(7);
        let ranges = filter.ranges().len() as u64;
        // One of the ranges, or a place that none covers.
        let anywhere = |random: &mut Random| {
            let slot = random.below(ranges + 1);
            within(if slot == ranges { None } else { Some(slot) }, random)
        };
        let hot: Vec<Msr> = (0..8).map(|_| anywhere(&mut random)).collect();
        let mut access = |place: usize| {
            let msr = match self {
                Pattern::First => within(Some(0), &mut random),
                Pattern::Last => within(Some(ranges - 1), &mut random),
                Pattern::None => within(None, &mut random),
                Pattern::Random => anywhere(&mut random),
                Pattern::Hot if random.below(10) == 0 => anywhere(&mut random),
                Pattern::Hot => hot.get(place % hot.len()).copied().unwrap_or(Msr::MIN),
            };
            let op = if random.below(2) == 0 { Op::Read } else { Op::Write };
            (msr, op)
        };
        (0..count).map(&mut access).collect()
    }
}

/// Some MSR of a range, or of none.
fn within(slot: Option<u64>, random: &mut Random) -> Msr {
    let offset = random.below(NMSRS.into()) as u32;
    match slot {
        Some(slot) => Msr(base(slot as u32) + offset),
        None => Msr(0x0800_0000 + offset),
    }
}

/// Numbers that are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0 >> 32
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// The kernel's way (`kvm_msr_allowed`; in its documentation under KVM_X86_SET_MSR_FILTER): x2APIC first, then the ranges
/// in order, a bit of the first that matches, else the default.
pub(crate) struct Linear {
    default_allow: bool,
    count: usize,
    ranges: [LinearRange; 16],
}

#[derive(Default)]
struct LinearRange {
    flags: u32,
    nmsrs: u32,
    base: u32,
    bitmap: Box<[u64]>,
}

impl Linear {
    pub(crate) fn new(filter: &Filter) -> Linear {
        let mut ranges: [LinearRange; 16] = Default::default();
        for (to, from) in ranges.iter_mut().zip(filter.ranges()) {
            *to = LinearRange {
                flags: from.ops().bits(),
                nmsrs: from.nmsrs(),
                base: from.base(),
                bitmap: from.bitmap().into(),
            };
        }
        Linear {
            default_allow: filter.default_verdict() == Verdict::Allow,
            count: filter.ranges().len(),
            ranges,
        }
    }

    #[inline]
    pub(crate) fn verdict(&self, msr: Msr, op: Op) -> Verdict {
        let index = msr.0;
        if (0x800..=0x8ff).contains(&index) {
            return Verdict::Allow;
        }
        let flag = Ops::of(op).bits();
        let mut allowed = self.default_allow;
        for range in self.ranges.iter().take(self.count) {
            let (start, end) = (range.base, range.base.wrapping_add(range.nmsrs));
            if index >= start && index < end && range.flags & flag != 0 {
                let bit = index - start;
                allowed = range
                    .bitmap
                    .get((bit / 64) as usize)
                    .is_some_and(|word| word >> (bit % 64) & 1 == 1);
                break;
            }
        }
        if allowed { Verdict::Allow } else { Verdict::Deny }
    }
}
