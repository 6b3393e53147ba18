//! The fewest bytes where reads and writes differ, over all ways in which they can share ranges.
//!
//! Ranges of one kind that touch each other are a chain, which takes as many ranges and words as its length asks for, wherever
//! they meet. A chain begins and ends at MSRs that need something. So the walk goes up through these and remembers where the
//! chain of each kind began. A state falls away where another one, whose open chains began no earlier, has closed no more.

use alloc::vec;
use alloc::vec::Vec;

use msrgate_core::{Msr, MsrRange};

use crate::Direction;
use crate::segment::Segment;

/// More MSRs than these that need something are not walked through.
const MOST_MSRS: u64 = 64;

/// Nor are more states kept.
const MOST_STATES: usize = 200;

/// Which kinds of range there are at a place: read, write, both.
type Kinds = [bool; 3];

const KINDS: [Direction; 3] = [Direction::Read, Direction::Write, Direction::Both];

#[derive(Clone, Copy, PartialEq, Eq)]
struct State {
    /// Where the open chain of each kind began.
    open: [Option<u64>; 3],
    /// The ranges, words and MSRs of chains that have ended.
    closed: [u64; 3],
    /// The last of `steps`.
    step: usize,
}

/// What the ranges of a filter may take.
pub(crate) struct Limits {
    /// How many ranges there are at most, and how many words they take.
    pub(crate) most: (u64, u64),
    /// The MSRs of a range, a multiple of those of a word.
    pub(crate) length: u64,
    /// The MSRs of a word.
    pub(crate) word: u64,
}

impl Limits {
    /// What is taken, with a chain more.
    fn with(&self, [ranges, words, msrs]: [u64; 3], first: u64, end: u64) -> [u64; 3] {
        let more = end - first;
        [
            ranges + more.div_ceil(self.length),
            words + more.div_ceil(self.word),
            msrs + more,
        ]
    }

    /// Whether what a state takes at a place is within the limits.
    fn hold(&self, state: &State, at: u64) -> bool {
        let open = state.open.into_iter().flatten();
        let [ranges, words, _] = open.fold(state.closed, |taken, first| self.with(taken, first, at));
        ranges <= self.most.0 && words <= self.most.1
    }
}

/// The ranges with the fewest words within the limits; `None` where it takes too long to tell.
pub(crate) fn shared(segments: &[Segment], limits: &Limits) -> Option<Vec<(Direction, MsrRange)>> {
    let needing = segments.iter().filter(|segment| segment.needs());
    if needing.map(|segment| segment.end - segment.first).sum::<u64>() > MOST_MSRS {
        return None;
    }
    let last = segments
        .iter()
        .rfind(|segment| segment.needs())
        .map_or(0, |last| last.end);
    let mut cells: Vec<(u64, u64, Segment)> = Vec::new();
    for segment in segments.iter().take_while(|segment| segment.first < last) {
        match segment.needs() {
            true => cells.extend((segment.first..segment.end).map(|msr| (msr, msr + 1, *segment))),
            false => cells.push((segment.first, segment.end, *segment)),
        }
    }
    // For each step: the one before, and the kinds that are there.
    let mut steps: Vec<(usize, Kinds)> = vec![(0, [false; 3])];
    let mut states = vec![State {
        open: [None; 3],
        closed: [0; 3],
        step: 0,
    }];
    for (first, end, segment) in &cells {
        let mut next: Vec<State> = Vec::new();
        for state in &states {
            for bits in 0..8u8 {
                let kinds: Kinds = [bits & 1 != 0, bits & 2 != 0, bits & 4 != 0];
                let state = moved(state, kinds, *first, limits);
                // Where nothing is needed, a chain that is there may go on to what is.
                let useful = segment.needs() || !state.open.contains(&Some(*first));
                if useful && right(segment, kinds) && limits.hold(&state, *end) {
                    steps.push((state.step, kinds));
                    next.push(State {
                        step: steps.len() - 1,
                        ..state
                    });
                }
            }
        }
        states = best(next)?;
    }
    let ended = states.iter().map(|state| moved(state, [false; 3], last, limits));
    let best = ended.min_by_key(
        |State {
             closed: [ranges, words, msrs],
             ..
         }| (*words, *ranges, *msrs),
    )?;
    Some(ranges(&cells, &steps, best.step, limits.length))
}

/// The state with these kinds from a place on.
fn moved(state: &State, kinds: Kinds, at: u64, limits: &Limits) -> State {
    let mut state = *state;
    for (open, there) in state.open.iter_mut().zip(kinds) {
        *open = match (*open, there) {
            (Some(first), false) => {
                state.closed = limits.with(state.closed, first, at);
                None
            }
            (None, true) => Some(at),
            (open, _) => open,
        };
    }
    state
}

/// Whether these kinds do what a segment needs, and no bit is wrong.
fn right(segment: &Segment, [read, write, both]: Kinds) -> bool {
    let served = (!segment.need_read || read || both) && (!segment.need_write || write || both);
    served && (!segment.mixed() || !both || read || write)
}

/// The states that are not beaten; `None` where they are too many.
fn best(mut states: Vec<State>) -> Option<Vec<State>> {
    states.sort_unstable_by_key(|state| (state.closed, state.open.map(core::cmp::Reverse)));
    let mut kept: Vec<State> = Vec::new();
    for state in states {
        let beaten = kept.iter().any(|other| {
            let later = (other.open.iter().zip(&state.open))
                .all(|(theirs, ours)| theirs.is_some() == ours.is_some() && theirs >= ours);
            let ([ranges, words, _], [our_ranges, our_words, _]) = (other.closed, state.closed);
            later && ranges <= our_ranges && words <= our_words
        });
        if !beaten {
            kept.push(state);
        }
        if kept.len() > MOST_STATES {
            return None;
        }
    }
    Some(kept)
}

/// The ranges of the steps that lead to one, in slot order.
fn ranges(
    cells: &[(u64, u64, Segment)],
    steps: &[(usize, Kinds)],
    mut step: usize,
    length: u64,
) -> Vec<(Direction, MsrRange)> {
    let mut chains: [Vec<(u64, u64)>; 3] = [const { Vec::new() }; 3];
    for (first, end, _) in cells.iter().rev() {
        let Some((before, kinds)) = steps.get(step) else { break };
        for (chains, _) in chains.iter_mut().zip(kinds).filter(|(_, there)| **there) {
            match chains.last_mut().filter(|later| later.0 == *end) {
                Some(later) => later.0 = *first,
                None => chains.push((*first, *end)),
            }
        }
        step = *before;
    }
    let mut ranges = Vec::new();
    for (kind, chains) in KINDS.into_iter().zip(chains) {
        for (mut first, end) in chains {
            while first < end {
                let next = end.min(first + length);
                let last = u32::try_from(next - 1).ok();
                let first_msr = u32::try_from(first).ok();
                let range = first_msr
                    .zip(last)
                    .and_then(|(first, last)| MsrRange::new(Msr(first), Msr(last)));
                ranges.extend(range.map(|range| (kind, range)));
                first = next;
            }
        }
    }
    ranges.sort_unstable();
    ranges
}
