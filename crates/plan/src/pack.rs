//! The fewest bytes among coverings of as few ranges.
//!
//! The search for the fewest ranges has each reach as far as it can, so that a range may span MSRs that nothing needs,
//! where another one could take what is behind them. Here the ranges of each kind are dealt out anew over what they serve:
//! as many as there were, over the pieces in order, with the fewest 64-bit words in all.

use alloc::vec;
use alloc::vec::Vec;

use msrgate_core::abi::MAX_RANGES;
use msrgate_core::{Msr, MsrRange};

use crate::Direction;
use crate::segment::Segment;

/// A kind, the first MSR and the first one after the last.
type Span = (Direction, u64, u64);

/// More pieces than these are not dealt out one by one: those with less than a word between them go together.
const MOST_PIECES: usize = 256;

/// Ranges that serve the same, as many of each kind, with no more words of `word` MSRs; each of at most `length` MSRs.
///
/// Deals out each kind in turn, while the others stay, until nothing gets smaller.
pub(crate) fn packed(
    ranges: &[(Direction, MsrRange)],
    segments: &[Segment],
    length: u64,
    word: u64,
) -> Vec<(Direction, MsrRange)> {
    let span = |(direction, range): &(Direction, MsrRange)| {
        (*direction, u64::from(range.first().0), u64::from(range.last().0) + 1)
    };
    let mut spans: Vec<Span> = ranges.iter().map(span).collect();
    let mut smaller = true;
    while core::mem::take(&mut smaller) {
        for kind in [Direction::Both, Direction::Read, Direction::Write] {
            let of = |spans: &[Span]| -> Vec<(u64, u64)> {
                let of = spans.iter().filter(|(direction, ..)| *direction == kind);
                of.map(|(_, first, end)| (*first, *end)).collect()
            };
            let words = |of: &[(u64, u64)]| -> u64 { of.iter().map(|(first, end)| (end - first).div_ceil(word)).sum() };
            let before = of(&spans);
            let needed = divided(joined(pieces(&spans, segments, kind), word), length);
            let dealt = deal(&needed, before.len(), length, word).filter(|dealt| words(dealt) < words(&before));
            if let Some(dealt) = dealt {
                spans.retain(|(direction, ..)| *direction != kind);
                spans.extend(dealt.into_iter().map(|(first, end)| (kind, first, end)));
                smaller = true;
            }
        }
    }
    let range = |(direction, first, end): &Span| {
        let last = Msr(u32::try_from(end.checked_sub(1)?).ok()?);
        Some((*direction, MsrRange::new(Msr(u32::try_from(*first).ok()?), last)?))
    };
    let mut ranges: Vec<(Direction, MsrRange)> = spans.iter().filter_map(range).collect();
    ranges.sort_unstable();
    ranges
}

/// Whether [`packed`] finds the fewest words: where reads and writes agree each range serves both, and all ways to deal these
/// out are looked at. A range's greatest length is a whole number of words, so that none is lost where two ranges meet.
pub(crate) fn all_ways(segments: &[Segment]) -> bool {
    let pieces = segments.iter().filter(|segment| segment.needs()).count();
    pieces <= MOST_PIECES && !segments.iter().any(Segment::mixed)
}

/// What would be wrong without the ranges of `kind`, cut where others begin or end, in order.
fn pieces(ranges: &[Span], segments: &[Segment], kind: Direction) -> Vec<(u64, u64)> {
    let mut pieces = Vec::new();
    for segment in segments.iter().filter(|segment| segment.needs()) {
        let mut cuts = vec![segment.first, segment.end];
        let ends = ranges.iter().flat_map(|(_, first, end)| [*first, *end]);
        cuts.extend(ends.filter(|cut| segment.first < *cut && *cut < segment.end));
        cuts.sort_unstable();
        for (first, end) in cuts.iter().zip(cuts.iter().skip(1)).filter(|(first, end)| first < end) {
            let others = [Direction::Read, Direction::Write, Direction::Both].map(|direction| {
                let mut of = ranges
                    .iter()
                    .filter(|(other, ..)| *other == direction && direction != kind);
                of.any(|(_, start, stop)| start <= first && first < stop)
            });
            if !served(segment, others) {
                pieces.push((*first, *end));
            }
        }
    }
    pieces
}

/// Whether ranges of these kinds do what a segment needs. What needs nothing none of them can spoil: where reads and
/// writes differ, one of them needs something.
fn served(segment: &Segment, [read, write, both]: [bool; 3]) -> bool {
    match (segment.mixed(), segment.need_read) {
        (false, _) => (!segment.need_read || read || both) && (!segment.need_write || write || both),
        (true, true) => read || both && write,
        (true, false) => write || both && read,
    }
}

/// Where there are many pieces, those with less than a word between them as one.
fn joined(pieces: Vec<(u64, u64)>, word: u64) -> Vec<(u64, u64)> {
    if pieces.len() <= MOST_PIECES {
        return pieces;
    }
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (first, end) in pieces {
        match joined.last_mut().filter(|last| first < last.1 + word) {
            Some(last) => last.1 = end,
            None => joined.push((first, end)),
        }
    }
    joined
}

/// The pieces cut where ranges that touch each other may meet: a multiple of a range's length from an end of a piece.
fn divided(pieces: Vec<(u64, u64)>, length: u64) -> Vec<(u64, u64)> {
    if pieces.len() > MOST_PIECES {
        return pieces;
    }
    let mut cuts: Vec<u64> = Vec::new();
    for (first, end) in &pieces {
        for times in 1..=MAX_RANGES as u64 {
            cuts.push(first + times * length);
            cuts.extend(end.checked_sub(times * length));
        }
    }
    cuts.sort_unstable();
    cuts.dedup();
    let mut divided = Vec::with_capacity(pieces.len());
    for (mut first, end) in pieces {
        let from = cuts.partition_point(|cut| *cut <= first);
        for cut in cuts.iter().skip(from).take_while(|cut| **cut < end) {
            divided.push((first, *cut));
            first = *cut;
        }
        divided.push((first, end));
    }
    divided
}

/// At most `count` spans over the pieces, in order, with the fewest words; `None` where there is no way.
fn deal(pieces: &[(u64, u64)], count: usize, length: u64, word: u64) -> Option<Vec<(u64, u64)>> {
    // For the pieces up to each: the fewest words with so many spans, and with which piece the last span begins.
    let mut best: Vec<Vec<Option<(u64, usize)>>> = vec![vec![None; count + 1]; pieces.len() + 1];
    *best.first_mut()?.first_mut()? = Some((0, 0));
    for (last, (_, end)) in pieces.iter().enumerate() {
        for (begin, (first, _)) in pieces.iter().enumerate().take(last + 1).rev() {
            if end - first > length {
                break;
            }
            for spans in 1..=count {
                let Some((words, _)) = best.get(begin)?.get(spans - 1).copied().flatten() else {
                    continue;
                };
                let words = words + (end - first).div_ceil(word);
                let known = best.get_mut(last + 1)?.get_mut(spans)?;
                if known.is_none_or(|(known, _)| words < known) {
                    *known = Some((words, begin));
                }
            }
        }
    }
    let spans = (0..=count).filter(|spans| best.last().and_then(|by| by.get(*spans)).is_some_and(Option::is_some));
    let mut spans = spans.min_by_key(|spans| best.last().and_then(|by| by.get(*spans)).copied().flatten())?;
    let mut upto = pieces.len();
    let mut dealt = Vec::with_capacity(spans);
    while upto > 0 {
        let (_, begin) = best.get(upto)?.get(spans).copied().flatten()?;
        dealt.push((pieces.get(begin)?.0, pieces.get(upto - 1)?.1));
        (upto, spans) = (begin, spans.checked_sub(1)?);
    }
    dealt.reverse();
    Some(dealt)
}
