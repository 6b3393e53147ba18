//! A total map from MSRs to values, as intervals.

use alloc::collections::BinaryHeap;
use alloc::vec;
use alloc::vec::Vec;
use core::cmp::Reverse;

use msrgate_core::{Msr, MsrRange};

/// A value for each of the 2^32 MSRs.
///
/// INVARIANT: `starts` is sorted, begins with MSR 0, and neighbours hold different values; so two maps are equal exactly
/// where their lists are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Intervals<V> {
    starts: Vec<(Msr, V)>,
}

impl<V: Clone + Eq> Intervals<V> {
    /// One value for the whole space.
    pub fn uniform(value: V) -> Intervals<V> {
        Intervals {
            starts: vec![(Msr::MIN, value)],
        }
    }

    /// For each MSR the value of the first of `ranges` that holds it, else `default`.
    ///
    /// Takes n log n steps for n ranges.
    pub fn first_match(default: V, ranges: impl IntoIterator<Item = (MsrRange, V)>) -> Intervals<V> {
        let ranges: Vec<(MsrRange, V)> = ranges.into_iter().collect();
        // Where the deciding range may change, and which begins there. For all values of one type, so that a program has this
        // sort once.
        let mut cuts: Vec<(Msr, Option<usize>)> = vec![(Msr::MIN, None)];
        for (i, (range, _)) in ranges.iter().enumerate() {
            cuts.push((range.first(), Some(i)));
            cuts.extend(range.last().0.checked_add(1).map(|after| (Msr(after), None)));
        }
        cuts.sort_unstable();

        let mut map = Intervals { starts: Vec::new() };
        let mut open: BinaryHeap<Reverse<usize>> = BinaryHeap::new();
        let mut cuts = cuts.into_iter().peekable();
        while let Some((msr, begins)) = cuts.next() {
            open.extend(begins.map(Reverse));
            if cuts.peek().is_some_and(|(next, _)| *next == msr) {
                continue;
            }
            let value = loop {
                let Some(Reverse(i)) = open.peek() else {
                    break &default;
                };
                match ranges.get(*i) {
                    Some((range, value)) if range.last() >= msr => break value,
                    _ => open.pop(),
                };
            };
            map.push(msr, value.clone());
        }
        map
    }

    /// Adds a value from `msr` on, which lies after all that is there.
    fn push(&mut self, msr: Msr, value: V) {
        if self.starts.last().is_none_or(|(_, last)| *last != value) {
            self.starts.push((msr, value));
        }
    }

    /// The value of `msr`.
    pub fn get(&self, msr: Msr) -> &V {
        let after = self.starts.partition_point(|(start, _)| *start <= msr);
        match self.starts.get(after.saturating_sub(1)) {
            Some((_, value)) => value,
            None => unreachable!("the first interval starts at MSR 0"),
        }
    }

    /// The intervals in order; neighbours hold different values.
    pub fn iter(&self) -> impl Iterator<Item = (MsrRange, &V)> {
        self.within(MsrRange::ALL)
    }

    /// The intervals that overlap `range`, cut to it.
    pub fn within(&self, range: MsrRange) -> impl Iterator<Item = (MsrRange, &V)> {
        let from = self
            .starts
            .partition_point(|(start, _)| *start <= range.first())
            .saturating_sub(1);
        let starts = self.starts.get(from..).unwrap_or_default();
        let ends = starts.iter().skip(1).map(|(next, _)| Msr(next.0 - 1)).chain([Msr::MAX]);
        starts.iter().zip(ends).map_while(move |((first, value), last)| {
            let part = MsrRange::new(*first, last)?.intersection(range)?;
            Some((part, value))
        })
    }

    /// How many intervals there are.
    #[expect(clippy::len_without_is_empty, reason = "a total map is never empty")]
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// The map with each value replaced; equal neighbours join.
    pub fn map<W: Clone + Eq>(&self, mut f: impl FnMut(&V) -> W) -> Intervals<W> {
        let mut map = Intervals {
            starts: Vec::with_capacity(self.starts.len()),
        };
        for (msr, value) in &self.starts {
            map.push(*msr, f(value));
        }
        map
    }

    /// The map of what `f` makes of the values of both.
    pub fn zip<W: Clone + Eq, X: Clone + Eq>(
        &self,
        other: &Intervals<W>,
        mut f: impl FnMut(&V, &W) -> X,
    ) -> Intervals<X> {
        let mut map = Intervals {
            starts: Vec::with_capacity(self.starts.len().max(other.starts.len())),
        };
        let (mut ours, mut theirs) = (self.starts.iter().peekable(), other.starts.iter().peekable());
        let (mut a, mut b) = (None, None);
        loop {
            let msr = match (ours.peek(), theirs.peek()) {
                (Some((x, _)), Some((y, _))) => *x.min(y),
                (Some((x, _)), None) => *x,
                (None, Some((y, _))) => *y,
                (None, None) => return map,
            };
            a = ours.next_if(|(start, _)| *start == msr).map(|(_, value)| value).or(a);
            b = theirs.next_if(|(start, _)| *start == msr).map(|(_, value)| value).or(b);
            if let (Some(a), Some(b)) = (a, b) {
                map.push(msr, f(a, b));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u32, last: u32) -> MsrRange {
        MsrRange::new(Msr(first), Msr(last)).unwrap()
    }

    fn parts(map: &Intervals<char>) -> Vec<(u32, u32, char)> {
        map.iter()
            .map(|(range, value)| (range.first().0, range.last().0, *value))
            .collect()
    }

    #[test]
    fn the_first_range_that_holds_an_msr_decides() {
        let map = Intervals::first_match('-', [(range(5, 9), 'a'), (range(0, 6), 'b'), (range(8, u32::MAX), 'c')]);
        assert_eq!(parts(&map), [(0, 4, 'b'), (5, 9, 'a'), (10, u32::MAX, 'c')]);
    }

    #[test]
    fn neighbours_of_one_value_join() {
        let map = Intervals::first_match('-', [(range(1, 2), 'a'), (range(3, 4), 'a'), (range(9, 9), '-')]);
        assert_eq!(parts(&map), [(0, 0, '-'), (1, 4, 'a'), (5, u32::MAX, '-')]);
    }

    #[test]
    fn a_map_is_what_a_loop_over_the_ranges_says() {
        // A small space, walked whole, over many arrangements of ranges.
        let mut seed = 1u64;
        let mut next = |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        for _ in 0..500 {
            let ranges: Vec<(MsrRange, char)> = (0..next(8))
                .map(|_| {
                    let first = next(20) as u32;
                    (range(first, first + next(6) as u32), ['a', 'b', 'c'][next(3) as usize])
                })
                .collect();
            let map = Intervals::first_match('-', ranges.clone());
            for msr in (0..32).map(Msr) {
                let expected = ranges
                    .iter()
                    .find(|(range, _)| range.contains(msr))
                    .map_or('-', |(_, value)| *value);
                assert_eq!(*map.get(msr), expected, "{msr} of {ranges:?}");
            }
            assert!(
                map.starts
                    .windows(2)
                    .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 != pair[1].1)
            );
        }
    }

    #[test]
    fn zipping_asks_both_maps_everywhere() {
        let a = Intervals::first_match('a', [(range(4, 7), 'A')]);
        let b = Intervals::first_match('b', [(range(6, 9), 'B')]);
        let both = a.zip(&b, |a, b| (*a, *b));
        for msr in (0..12).map(Msr) {
            assert_eq!(*both.get(msr), (*a.get(msr), *b.get(msr)));
        }
        assert_eq!(both.len(), 5);
    }
}
