//! The ranges that leave the least undone where a filter has fewer than the map needs.
//!
//! The walk is that of [`crate::cover`]: up through the MSRs, remembering how far the last range of each kind reaches. In
//! place of serving everything it counts what each MSR costs that gets the wrong verdict. A further range never does
//! harm here: a two-direction range whose one bit is wrong for a direction is right for the other, and the one that it
//! serves was wrong without it. So a range starts only where it saves something at once, or where, moved there with the
//! ranges that touch it, one end of them meets the end of a stretch. A stretch is cut at all such places, so further into a
//! part than all ranges reach together none starts.

use alloc::vec;
use alloc::vec::Vec;

use msrgate_core::{Msr, MsrRange, Op};

use crate::Intervals;
use crate::cover::{BOTH, READ, Reach, STARTS, WRITE};

/// What it costs for one MSR to get the wrong verdict, for reads and writes apart.
pub(crate) type Price = (u64, u64);

/// A price that is never paid.
pub(crate) const NEVER: u64 = u64::MAX;

/// How many states are compared in all; what is left of the walk then goes on with `FEW`.
const EFFORT: u64 = 4_000_000;

/// How many states are kept at most: few first, to learn what the least can cost at most, so that many of the second
/// walk's states fall away at once.
const FEW: usize = 12;
const MANY: usize = 4096;

/// More places than these are not tried for a start within a stretch that is longer than a range.
const MOST_PLACES: usize = 4096;

/// What the ranges that a filter has room for cannot do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Shortfall {
    /// Accesses that get the wrong verdict: in order of MSR.
    pub(crate) wrong: Vec<(MsrRange, Op)>,
    /// The sum of their prices.
    pub(crate) cost: u64,
}

/// What a search found.
pub(crate) struct Found {
    /// `None` where every set of ranges that was looked at costs more than it may, or a price that is never paid.
    pub(crate) best: Option<Shortfall>,
    /// Whether no set of ranges was left out.
    pub(crate) proved: bool,
}

/// A stretch of MSRs that are treated alike and cost the same.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    first: u64,
    end: u64,
    allowed: (bool, bool),
    need: (bool, bool),
    price: Price,
}

impl Stretch {
    /// What an MSR costs under ranges of these kinds, and which verdicts are wrong then.
    fn wrong(&self, [read, write, both]: [bool; 3]) -> (u64, (bool, bool)) {
        if self.allowed.0 == self.allowed.1 {
            let wrong = (self.need.0 && !read && !both, self.need.1 && !write && !both);
            let price = |wrong: bool, price: u64| if wrong { price } else { 0 };
            return (
                price(wrong.0, self.price.0).saturating_add(price(wrong.1, self.price.1)),
                wrong,
            );
        }
        // One direction differs from the default; where the other has a range of its own, the one bit may be its.
        let (own, others) = if self.need.0 { (read, write) } else { (write, read) };
        if own || both && others {
            return (0, (false, false));
        }
        let needed = if self.need.0 { self.price.0 } else { self.price.1 };
        let other = if self.need.0 { self.price.1 } else { self.price.0 };
        // Where it costs the same, what is closed that should be open is the smaller harm.
        let opens = !if self.need.0 { self.allowed.0 } else { self.allowed.1 };
        if both && (other < needed || other == needed && opens) {
            (other, (!self.need.0, !self.need.1))
        } else {
            (needed, self.need)
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct State {
    reach: Reach,
    used: u64,
    cost: u64,
    /// What started before, in `Search::steps`.
    step: Option<usize>,
    /// What starts here and is no step yet.
    starts: [bool; 3],
}

#[derive(Clone, Copy, Debug)]
struct Step {
    before: Option<usize>,
    at: u64,
    starts: [bool; 3],
}

struct Search {
    steps: Vec<Step>,
    length: u64,
    slots: u64,
    /// What costs more is not looked at.
    bound: u64,
    most: usize,
    /// How many states may still be compared.
    left: u64,
    /// Whether no state was left out that may be part of the best.
    complete: bool,
}

/// What `slots` ranges of at most `length` MSRs cannot do of `allowed` at the least cost, over both defaults.
///
/// `free` MSRs are those whose treatment no filter changes.
pub(crate) fn shortfall(
    allowed: &Intervals<(bool, bool)>,
    price: &Intervals<Price>,
    free: &[MsrRange],
    (length, slots): (u64, u64),
) -> Found {
    let mut tried = [false, true].map(|default| {
        let (stretches, all_places) = stretches(allowed, price, default, free, (length, slots));
        (Savings::of(&stretches, length).ahead, stretches, all_places)
    });
    // The default that wants less of the ranges first: what it costs bounds the other's search.
    tried.sort_by_key(|(ahead, ..)| *ahead);
    let mut best: Option<Shortfall> = None;
    let mut proved = true;
    for (_, stretches, all_places) in &tried {
        let mut complete = false;
        for most in [FEW, MANY] {
            let mut search = Search {
                steps: Vec::new(),
                length,
                slots,
                bound: best.as_ref().map_or(NEVER - 1, |best| best.cost),
                most,
                left: EFFORT,
                complete: true,
            };
            if let Some(state) = search.run(stretches)
                && best.as_ref().is_none_or(|best| state.cost < best.cost)
            {
                best = Some(Shortfall {
                    wrong: search.wrong(state, stretches),
                    cost: state.cost,
                });
            }
            complete = search.complete;
            if complete {
                break;
            }
        }
        proved &= complete && *all_places;
    }
    Found { best, proved }
}

/// The map as stretches, cut where a range may have to start; and whether all such places are among the cuts.
fn stretches(
    allowed: &Intervals<(bool, bool)>,
    price: &Intervals<Price>,
    default: bool,
    free: &[MsrRange],
    (length, slots): (u64, u64),
) -> (Vec<Stretch>, bool) {
    let last = MsrRange::single(Msr::MAX);
    let no_effect = Intervals::first_match(false, free.iter().chain([&last]).map(|range| (*range, true)));
    let treated = allowed.zip(&no_effect, |pair, free| if *free { (default, default) } else { *pair });
    let priced = treated.zip(price, |pair, price| (*pair, *price));
    let whole = priced.iter().map(|(range, (allowed, price))| Stretch {
        first: u64::from(range.first().0),
        end: u64::from(range.last().0) + 1,
        allowed: *allowed,
        need: (allowed.0 != default, allowed.1 != default),
        price: *price,
    });
    let whole: Vec<Stretch> = whole.filter(|stretch| stretch.need.0 || stretch.need.1).collect();
    // Ranges that touch each other move together until an end of one meets an end of a stretch: so each starts a
    // multiple of a range's length from such an end.
    let ends: Vec<u64> = whole.iter().flat_map(|stretch| [stretch.first, stretch.end]).collect();
    let mut places: Vec<u64> = Vec::new();
    for stretch in &whole {
        for times in 1..=slots {
            let distance = times * length;
            let from = ends.partition_point(|end| *end <= stretch.first + distance);
            let after = ends.iter().skip(from).map(|end| end - distance);
            places.extend(after.take_while(|place| *place < stretch.end));
            let from = ends.partition_point(|end| end + distance <= stretch.first);
            let before = ends.iter().skip(from).map(|end| end + distance);
            places.extend(before.take_while(|place| *place < stretch.end));
        }
        if places.len() > MOST_PLACES {
            break;
        }
    }
    let all = places.len() <= MOST_PLACES;
    places.sort_unstable();
    places.dedup();
    let mut cut: Vec<Stretch> = Vec::with_capacity(whole.len() + places.len());
    for stretch in whole {
        let from = places.partition_point(|place| *place <= stretch.first);
        let within = places.iter().skip(from).take_while(|place| **place < stretch.end);
        let mut first = stretch.first;
        for end in within.chain([&stretch.end]) {
            cut.push(Stretch {
                first,
                end: *end,
                ..stretch
            });
            first = *end;
        }
    }
    (cut, all)
}

/// What is still to be paid for at a place, if no range were there.
struct Savings {
    ahead: u64,
    /// The most that one range can save.
    by_range: u64,
}

impl Savings {
    /// Prices that are never paid are left out, so that less is known of them.
    fn of(stretches: &[Stretch], length: u64) -> Savings {
        let prices = stretches.iter().map(Savings::price);
        Savings {
            ahead: (stretches.iter().zip(prices.clone())).fold(0, |sum, (stretch, price)| {
                sum.saturating_add(price.saturating_mul(stretch.end - stretch.first))
            }),
            by_range: prices.max().unwrap_or(0).saturating_mul(length),
        }
    }

    fn price(stretch: &Stretch) -> u64 {
        match stretch.wrong([false; 3]) {
            (NEVER, _) => 0,
            (price, _) => price,
        }
    }

    fn pass(&mut self, stretch: &Stretch, msrs: u64) {
        // Where the sum was too large for a number it stays so, and nothing is known.
        if self.ahead < NEVER {
            self.ahead = self.ahead.saturating_sub(Savings::price(stretch).saturating_mul(msrs));
        }
    }

    /// What a state pays at the least for what is ahead.
    fn unavoidable(&self, state: &State, slots: u64) -> u64 {
        let ranges = slots - state.used + state.reach.iter().filter(|reach| **reach > 0).count() as u64;
        self.ahead.saturating_sub(self.by_range.saturating_mul(ranges))
    }
}

impl Search {
    fn run(&mut self, stretches: &[Stretch]) -> Option<State> {
        let mut states = vec![State {
            reach: [0; 3],
            used: 0,
            cost: 0,
            step: None,
            starts: [false; 3],
        }];
        let mut saved = Savings::of(stretches, self.length);
        for stretch in stretches {
            let mut at = stretch.first;
            while at < stretch.end && !states.is_empty() {
                let mut ready = Vec::with_capacity(states.len());
                for state in &states {
                    self.choose(stretch, at, *state, &mut ready);
                }
                // On to the next place where any state's range ends.
                let ends = ready.iter().flat_map(|state| state.reach).filter(|reach| *reach > at);
                let next = ends.min().unwrap_or(stretch.end).min(stretch.end);
                for state in &mut ready {
                    let (price, _) = stretch.wrong(state.reach.map(|reach| reach > at));
                    state.cost = state.cost.saturating_add(price.saturating_mul(next - at));
                }
                saved.pass(stretch, next - at);
                ready.retain(|state| state.cost.saturating_add(saved.unavoidable(state, self.slots)) <= self.bound);
                self.settle(&mut ready, next);
                for state in &mut ready {
                    if state.starts != [false; 3] {
                        self.steps.push(Step {
                            before: state.step,
                            at,
                            starts: core::mem::take(&mut state.starts),
                        });
                        state.step = Some(self.steps.len() - 1);
                    }
                }
                states = ready;
                at = next;
            }
        }
        states.into_iter().min_by_key(|state| (state.cost, state.used))
    }

    /// The state as it is, and with each set of ranges started that saves more than any part of it.
    fn choose(&self, stretch: &Stretch, at: u64, state: State, into: &mut Vec<State>) {
        if at - stretch.first > self.slots * self.length {
            into.push(state);
            return;
        }
        let active = state.reach.map(|reach| reach > at);
        let mut tried: Vec<([bool; 3], u64)> = Vec::with_capacity(STARTS.len());
        for starts in STARTS {
            let again = starts.iter().zip(active).any(|(start, active)| *start && active);
            let used = state.used + starts.iter().filter(|start| **start).count() as u64;
            if again || used > self.slots {
                continue;
            }
            let with = [READ, WRITE, BOTH].map(|kind| {
                let of = |all: &[bool; 3]| all.get(kind).copied().unwrap_or_default();
                of(&active) || of(&starts)
            });
            let (price, _) = stretch.wrong(with);
            let no_better = tried
                .iter()
                .any(|(fewer, cost)| *cost <= price && fewer.iter().zip(starts).all(|(fewer, start)| !fewer || start));
            if no_better {
                continue;
            }
            tried.push((starts, price));
            let mut next = State { used, starts, ..state };
            for (reach, _) in next.reach.iter_mut().zip(starts).filter(|(_, start)| *start) {
                *reach = (at + self.length).min(u64::from(u32::MAX));
            }
            into.push(next);
        }
    }

    /// Forgets ranges that have ended by `at`, then the states that cannot be better than another.
    fn settle(&mut self, states: &mut Vec<State>, at: u64) {
        for state in states.iter_mut() {
            for reach in &mut state.reach {
                if *reach <= at {
                    *reach = 0;
                }
            }
        }
        states.sort_unstable_by_key(|state| (state.cost, state.used, state.reach.map(core::cmp::Reverse)));
        let mut kept: Vec<State> = Vec::with_capacity(states.len().min(self.most));
        for state in states.drain(..) {
            self.left = self.left.saturating_sub(1 + kept.len() as u64);
            if self.left == 0 {
                self.most = self.most.min(FEW);
            }
            let beaten = kept.iter().any(|other| {
                other.used <= state.used
                    && other
                        .reach
                        .iter()
                        .zip(state.reach)
                        .all(|(theirs, ours)| *theirs >= ours)
            });
            if beaten {
                continue;
            }
            if kept.len() >= self.most {
                self.complete = false;
                // The cheapest of all, and what has used least, so that something is left for what follows.
                if let Some(last) = kept.last_mut().filter(|last| state.used < last.used) {
                    *last = state;
                }
                continue;
            }
            kept.push(state);
        }
        *states = kept;
    }

    /// Which accesses get the wrong verdict under the ranges of a state.
    fn wrong(&self, state: State, stretches: &[Stretch]) -> Vec<(MsrRange, Op)> {
        let mut ranges: [Vec<(u64, u64)>; 3] = [Vec::new(), Vec::new(), Vec::new()];
        let mut step = state.step;
        while let Some(Step { before, at, starts }) = step.and_then(|step| self.steps.get(step)) {
            for (ranges, _) in ranges.iter_mut().zip(starts).filter(|(_, start)| **start) {
                ranges.push((*at, (at + self.length).min(u64::from(u32::MAX))));
            }
            step = *before;
        }
        let mut wrong: [Vec<(u64, u64)>; 2] = [Vec::new(), Vec::new()];
        for stretch in stretches {
            let mut cuts = vec![stretch.first, stretch.end];
            let ends = ranges.iter().flatten().flat_map(|(first, end)| [*first, *end]);
            cuts.extend(ends.filter(|cut| stretch.first < *cut && *cut < stretch.end));
            cuts.sort_unstable();
            for (first, end) in cuts.iter().zip(cuts.iter().skip(1)) {
                let active = ranges
                    .each_ref()
                    .map(|ranges| ranges.iter().any(|(start, stop)| start <= first && first < stop));
                let (_, (read, write)) = stretch.wrong(active);
                for (parts, _) in wrong.iter_mut().zip([read, write]).filter(|(_, wrong)| *wrong) {
                    match parts.last_mut().filter(|last| last.1 == *first) {
                        Some(last) => last.1 = *end,
                        None => parts.push((*first, *end)),
                    }
                }
            }
        }
        let range = |(first, end): &(u64, u64)| {
            let last = u32::try_from(end.checked_sub(1)?).ok()?;
            MsrRange::new(Msr(u32::try_from(*first).ok()?), Msr(last))
        };
        let mut all: Vec<(MsrRange, Op)> = Vec::new();
        for (parts, op) in wrong.iter().zip(Op::ALL) {
            all.extend(parts.iter().filter_map(range).map(|range| (range, op)));
        }
        all.sort_unstable();
        all
    }
}

#[cfg(test)]
mod tests;
