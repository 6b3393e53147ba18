//! The fewest filter ranges that realise a map of what the kernel may answer.
//!
//! A range for one direction holds that direction's bits exactly, so it is right wherever it lies and may stand before
//! all others. A range for both directions has one bit an MSR: where reads and writes differ it is right only if a
//! one-direction range before it decides one of them. So an optimal filter is a set of read ranges, a set of write
//! ranges and, after them, a set of two-direction ranges, and finding it is a walk over the MSRs that remembers no
//! more than how far the last range of each kind reaches.
//!
//! The walk keeps every choice that can still be part of a smallest filter: a state falls away only where another one
//! with no more ranges reaches at least as far in each kind. A range starts only where something needs it, since one
//! that started earlier could be moved there and would serve as much.

use alloc::vec;
use alloc::vec::Vec;

use msrgate_core::abi::{MAX_RANGE_MSRS, MAX_RANGES};
use msrgate_core::{Msr, MsrRange, Op, Verdict};

use crate::pack::{all_ways, packed};
use crate::segment::{Segment, WORD, segments};
use crate::share::{Limits, shared};
use crate::{Direction, Intervals};

/// The smallest set of ranges for one default.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct RangeSet {
    /// One-direction ranges first, since they override the two-direction ones; each kind in order of MSR.
    pub(crate) ranges: Vec<(Direction, MsrRange)>,
    /// What covering reads and writes apart would take.
    pub(crate) separate: u64,
    /// Whether as many ranges cannot take fewer bytes.
    pub(crate) bytes_proved: bool,
    /// As many accesses as there are ranges, all to be served and each too far from the others for one range to serve
    /// two of them: whoever sees it need not trust the search. `None` where it is not distance that asks for so many
    /// ranges, but reads and writes that differ.
    pub(crate) witness: Option<Vec<(Msr, Op)>>,
}

impl RangeSet {
    /// What the ranges' bitmaps take, in words of 64 bits.
    pub(crate) fn words(&self) -> u64 {
        words(&self.ranges, WORD)
    }
}

/// What the bitmaps of ranges take, in words of so many bits.
fn words(ranges: &[(Direction, MsrRange)], word: u64) -> u64 {
    ranges.iter().map(|(_, range)| range.len().div_ceil(word)).sum()
}

/// Why there is no covering within the limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TooMany {
    /// At least this many ranges are needed.
    pub at_least: u64,
    /// What covering reads and writes apart would take.
    pub separate: u64,
}

/// More windows than this are not searched for the smallest covering: reads or writes alone need more than a filter has.
const SEARCH_LIMIT: u64 = 1024;

/// How far the last range of each kind reaches: the first MSR that it does not cover; 0 where it has ended.
pub(crate) type Reach = [u64; 3];
pub(crate) const READ: usize = 0;
pub(crate) const WRITE: usize = 1;
pub(crate) const BOTH: usize = 2;

/// What may start at one place, smaller sets first. A set is taken only where no part of it would do: what is not needed
/// there starts where it is.
pub(crate) const STARTS: [[bool; 3]; 8] = [
    [false, false, false],
    [true, false, false],
    [false, true, false],
    [false, false, true],
    [true, true, false],
    [true, false, true],
    [false, true, true],
    [true, true, true],
];

#[derive(Clone, Copy, Debug)]
struct State {
    reach: Reach,
    /// Ranges used.
    cost: u64,
    /// The last step that led here, in `Search::steps`.
    step: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Start(Direction),
    /// The two-direction range ends before this MSR, ahead of its full length.
    StopBoth,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    before: Option<usize>,
    at: u64,
    change: Change,
}

/// Finds the fewest ranges, each of at most `length` MSRs, that realise `allowed` (reads, writes) under `default`.
///
/// `free` MSRs are those whose treatment no filter changes: they need nothing and forbid nothing.
pub(crate) fn cover(
    allowed: &Intervals<(bool, bool)>,
    default: bool,
    free: &[MsrRange],
    length: u64,
) -> Result<RangeSet, TooMany> {
    let segments = segments(allowed, default, free);
    let reads = alone(&segments, length, |segment| segment.need_read);
    let writes = alone(&segments, length, |segment| segment.need_write);
    let separate = reads + writes;
    if reads.max(writes) > SEARCH_LIMIT {
        return Err(TooMany {
            at_least: reads.max(writes),
            separate,
        });
    }
    let mut search = Search {
        steps: Vec::new(),
        length,
    };
    let best = search.run(&segments);
    let mut ranges = trim(&search.chosen(best), &segments);
    let mut bytes_proved = all_ways(&segments);
    if ranges.len() <= MAX_RANGES {
        ranges = packed(&ranges, &segments, length, WORD);
        if let Some(least) = shared_within(&ranges, &segments, length, WORD) {
            bytes_proved = true;
            if words(&least, WORD) < words(&ranges, WORD) {
                ranges = least;
            }
        }
    }
    let witness = Some(far_apart(&segments, length)).filter(|witness| witness.len() == ranges.len());
    Ok(RangeSet {
        ranges,
        separate,
        bytes_proved,
        witness,
    })
}

/// The fewest ranges that cover what `needs` says, by taking the first MSR that is not covered yet as the next start.
fn alone(segments: &[Segment], length: u64, needs: impl Fn(&Segment) -> bool) -> u64 {
    let mut ranges = 0;
    let mut reach = 0;
    for segment in segments.iter().filter(|segment| needs(segment)) {
        let from = segment.first.max(reach);
        if from < segment.end {
            let more = (segment.end - from).div_ceil(length);
            ranges += more;
            reach = from + more * length;
        }
    }
    ranges
}

/// Accesses to be served, each the first that a range which serves the one before it cannot reach.
fn far_apart(segments: &[Segment], length: u64) -> Vec<(Msr, Op)> {
    let mut accesses = Vec::new();
    let mut reach = 0;
    for segment in segments.iter().filter(|segment| segment.needs()) {
        let mut from = segment.first.max(reach);
        while from < segment.end
            && let Ok(msr) = u32::try_from(from)
        {
            let op = if segment.need_read { Op::Read } else { Op::Write };
            accesses.push((Msr(msr), op));
            reach = from + length;
            from = reach;
        }
    }
    accesses
}

/// The ranges with the fewest words among as few as these; `None` where it takes too long to tell.
fn shared_within(
    ranges: &[(Direction, MsrRange)],
    segments: &[Segment],
    length: u64,
    word: u64,
) -> Option<Vec<(Direction, MsrRange)>> {
    let limits = Limits {
        most: (ranges.len() as u64, words(ranges, word)),
        length,
        word,
    };
    shared(segments, &limits)
}

struct Search {
    steps: Vec<Step>,
    length: u64,
}

impl Search {
    fn run(&mut self, segments: &[Segment]) -> State {
        let mut states = vec![State {
            reach: [0; 3],
            cost: 0,
            step: None,
        }];
        for segment in segments {
            if segment.needs() || segment.mixed() {
                states = self.cross(segment, states);
            }
            settle(&mut states, segment.end);
        }
        // States are never empty: a state may always start what a segment needs.
        states.into_iter().min_by_key(|state| state.cost).unwrap_or(State {
            reach: [0; 3],
            cost: 0,
            step: None,
        })
    }

    /// All ways on through a segment, from its first MSR to its end.
    fn cross(&mut self, segment: &Segment, states: Vec<State>) -> Vec<State> {
        let mut done = Vec::new();
        let mut now = states;
        let mut at = segment.first;
        while !now.is_empty() {
            let mut ready: Vec<State> = Vec::new();
            for state in now {
                self.choose(segment, at, state, &mut ready);
            }
            settle(&mut ready, at);
            // On to the next place where any state's range ends; a state that is not affected there chooses nothing.
            let next = ready
                .iter()
                .flat_map(|state| state.reach)
                .filter(|reach| *reach > at)
                .min()
                .unwrap_or(segment.end)
                .min(segment.end);
            if next == segment.end {
                done = ready;
                break;
            }
            at = next;
            settle(&mut ready, at);
            now = ready;
        }
        done
    }

    /// The states in which the segment is served from `at` on, reached from `state` by starting or stopping ranges.
    fn choose(&mut self, segment: &Segment, at: u64, state: State, into: &mut Vec<State>) {
        let active = state.reach.map(|reach| reach > at);
        // A two-direction range is cut short only where its one bit would be wrong for a direction.
        let wrong = active[BOTH] && segment.mixed() && !active[READ] && !active[WRITE];
        for stop_both in [false, true] {
            if stop_both && !wrong {
                continue;
            }
            let mut smallest: Vec<[bool; 3]> = Vec::new();
            for starts in STARTS {
                let again = starts.iter().zip(active).any(|(start, active)| *start && active);
                let more = smallest
                    .iter()
                    .any(|fewer| fewer.iter().zip(starts).all(|(fewer, start)| !fewer || start));
                if again || more {
                    continue;
                }
                let read = active[READ] || starts[READ];
                let write = active[WRITE] || starts[WRITE];
                let both = active[BOTH] && !stop_both || starts[BOTH];
                let served = (!segment.need_read || read || both) && (!segment.need_write || write || both);
                let right = !(both && segment.mixed()) || read || write;
                if served && right {
                    smallest.push(starts);
                    into.push(self.step(state, at, starts, stop_both));
                }
            }
        }
    }

    fn step(&mut self, mut state: State, at: u64, starts: [bool; 3], stop_both: bool) -> State {
        let mut change = |state: &mut State, change| {
            self.steps.push(Step {
                before: state.step,
                at,
                change,
            });
            state.step = Some(self.steps.len() - 1);
        };
        if stop_both {
            change(&mut state, Change::StopBoth);
            state.reach[BOTH] = 0;
        }
        let directions = [Direction::Read, Direction::Write, Direction::Both];
        for (direction, _) in directions.into_iter().zip(starts).filter(|(_, start)| *start) {
            change(&mut state, Change::Start(direction));
            state.cost += 1;
        }
        for (reach, _) in state.reach.iter_mut().zip(starts).filter(|(_, start)| *start) {
            // No range reaches the last MSR of all: its end would wrap.
            *reach = (at + self.length).min(u64::from(u32::MAX));
        }
        state
    }

    /// The ranges of a state, with the ends that the search gave them.
    fn chosen(&self, state: State) -> Vec<(Direction, u64, u64)> {
        let mut ranges = Vec::new();
        let mut stopped = None;
        let mut step = state.step;
        while let Some(Step { before, at, change }) = step.and_then(|step| self.steps.get(step)) {
            match change {
                Change::StopBoth => stopped = Some(*at),
                Change::Start(direction) => {
                    let full = (at + self.length).min(u64::from(u32::MAX));
                    let end = match direction {
                        Direction::Both => stopped.take().unwrap_or(full),
                        _ => full,
                    };
                    ranges.push((*direction, *at, end));
                }
            }
            step = *before;
        }
        ranges.reverse();
        ranges
    }
}

/// Forgets ranges that have ended by `at`, then the states that cannot be better than another.
fn settle(states: &mut Vec<State>, at: u64) {
    for state in states.iter_mut() {
        for reach in &mut state.reach {
            if *reach <= at {
                *reach = 0;
            }
        }
    }
    // Cheapest and farthest first, so that a state is only ever beaten by one that stands before it.
    states.sort_by_key(|state| (state.cost, state.reach.map(core::cmp::Reverse)));
    let mut kept: Vec<State> = Vec::with_capacity(states.len());
    for state in states.drain(..) {
        let beaten = kept.iter().any(|other| {
            // Three more ranges would let the other reach as far as any can.
            other.cost + 3 <= state.cost
                || other.cost <= state.cost
                    && other
                        .reach
                        .iter()
                        .zip(state.reach)
                        .all(|(theirs, ours)| *theirs >= ours)
        });
        if !beaten {
            kept.push(state);
        }
    }
    *states = kept;
}

/// Cuts each range to the MSRs that it serves, and puts the ranges in slot order.
fn trim(chosen: &[(Direction, u64, u64)], segments: &[Segment]) -> Vec<(Direction, MsrRange)> {
    let covers = |direction: Direction, first: u64, end: u64| {
        chosen
            .iter()
            .any(|(other, start, stop)| *other == direction && *start < end && first < *stop)
    };
    let mut ranges = Vec::new();
    for (direction, start, stop) in chosen {
        let mut served: Option<(u64, u64)> = None;
        let from = segments.partition_point(|segment| segment.end <= *start);
        for segment in segments.iter().skip(from).take_while(|segment| segment.first < *stop) {
            // Within a segment, coverage of another kind may begin or end; cut there.
            let mut cuts = vec![segment.first.max(*start), segment.end.min(*stop)];
            cuts.extend(
                chosen
                    .iter()
                    .flat_map(|(_, start, stop)| [*start, *stop])
                    .filter(|cut| segment.first.max(*start) < *cut && *cut < segment.end.min(*stop)),
            );
            cuts.sort_unstable();
            for (first, end) in cuts.iter().zip(cuts.iter().skip(1)) {
                let read = covers(Direction::Read, *first, *end);
                let write = covers(Direction::Write, *first, *end);
                let both = covers(Direction::Both, *first, *end);
                let overridden = both && segment.mixed();
                let serves = match direction {
                    Direction::Read => segment.need_read || overridden,
                    Direction::Write => segment.need_write || overridden,
                    Direction::Both => segment.need_read && !read || segment.need_write && !write,
                };
                if serves && first < end {
                    served = Some((served.map_or(*first, |(first, _)| first), *end));
                }
            }
        }
        let range = served.and_then(|(first, end)| {
            MsrRange::new(
                Msr(u32::try_from(first).ok()?),
                Msr(u32::try_from(end.checked_sub(1)?).ok()?),
            )
        });
        ranges.extend(range.map(|range| (*direction, range)));
    }
    ranges.sort_unstable();
    ranges
}

/// The covering under the default that takes fewer ranges, or as many and fewer bytes.
pub(crate) fn smallest(allowed: &Intervals<(bool, bool)>) -> Result<(Verdict, RangeSet), TooMany> {
    let free = [MsrRange::X2APIC];
    let of = |default: Verdict| cover(allowed, default == Verdict::Allow, &free, u64::from(MAX_RANGE_MSRS));
    match (of(Verdict::Deny), of(Verdict::Allow)) {
        (Ok(deny), Ok(allow)) => {
            let size = |set: &RangeSet| (set.ranges.len(), set.words());
            let (default, mut set, other) = match size(&allow) < size(&deny) {
                true => (Verdict::Allow, allow, deny),
                false => (Verdict::Deny, deny, allow),
            };
            set.bytes_proved &= other.bytes_proved || other.ranges.len() > set.ranges.len();
            Ok((default, set))
        }
        (Ok(deny), Err(_)) => Ok((Verdict::Deny, deny)),
        (Err(_), Ok(allow)) => Ok((Verdict::Allow, allow)),
        (Err(deny), Err(allow)) => Err(if allow.at_least < deny.at_least { allow } else { deny }),
    }
}

#[cfg(test)]
mod tests;
