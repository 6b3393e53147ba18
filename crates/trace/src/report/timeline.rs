//! How many events there were, by time, in a bounded number of buckets.

use std::collections::VecDeque;

/// How many events of each of `KINDS` kinds there were in each of at most `most` stretches of time.
///
/// All buckets are equally wide, a power of two of nanoseconds, and begin at a multiple of their width. As events come
/// that are further apart, buckets are joined by twos; what was counted stays where it was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Timeline<const KINDS: usize> {
    most: usize,
    /// The logarithm of the buckets' width.
    shift: u32,
    /// The first bucket's number: its start by its width.
    first: i64,
    buckets: VecDeque<[u64; KINDS]>,
}

impl<const KINDS: usize> Timeline<KINDS> {
    /// With at most so many buckets, 2 at least: times from both sides of 0 never share one.
    pub(super) fn new(most: usize) -> Self {
        Timeline {
            most: most.max(2),
            shift: 0,
            first: 0,
            buckets: VecDeque::new(),
        }
    }

    pub(super) fn add(&mut self, t: i64, kind: usize) {
        if self.buckets.is_empty() {
            self.first = t >> self.shift;
            self.buckets.push_back([0; KINDS]);
        }
        let place = loop {
            let at = t >> self.shift;
            let (before, after) = (self.missing_before(at), self.missing_after(at));
            if before + after + self.buckets.len() as u128 > self.most as u128 {
                self.join();
                continue;
            }
            for _ in 0..before {
                self.buckets.push_front([0; KINDS]);
                self.first -= 1;
            }
            for _ in 0..after {
                self.buckets.push_back([0; KINDS]);
            }
            break at.abs_diff(self.first) as usize;
        };
        if let Some(count) = self.buckets.get_mut(place).and_then(|bucket| bucket.get_mut(kind)) {
            *count += 1;
        }
    }

    fn missing_before(&self, at: i64) -> u128 {
        if at < self.first {
            u128::from(at.abs_diff(self.first))
        } else {
            0
        }
    }

    fn missing_after(&self, at: i64) -> u128 {
        let reach = if at < self.first {
            0
        } else {
            u128::from(at.abs_diff(self.first)) + 1
        };
        reach.saturating_sub(self.buckets.len() as u128)
    }

    /// Makes buckets twice as wide.
    fn join(&mut self) {
        let mut joined: VecDeque<[u64; KINDS]> = VecDeque::with_capacity(self.buckets.len() / 2 + 1);
        let mut last = None;
        for (number, bucket) in (self.first..).zip(&self.buckets) {
            let number = number >> 1;
            match joined.back_mut() {
                Some(sum) if last == Some(number) => sum.iter_mut().zip(bucket).for_each(|(sum, count)| *sum += count),
                _ => joined.push_back(*bucket),
            }
            last = Some(number);
        }
        self.first >>= 1;
        self.shift += 1;
        self.buckets = joined;
    }

    /// How wide a bucket is, in nanoseconds.
    pub fn width(&self) -> u64 {
        1 << self.shift
    }

    /// Where the first bucket begins, in nanoseconds; below 0 where an event before the first that came is in it.
    pub(super) fn start(&self) -> i64 {
        self.first << self.shift
    }

    /// The buckets in order of time.
    pub fn buckets(&self) -> impl ExactSizeIterator<Item = &[u64; KINDS]> {
        self.buckets.iter()
    }

    /// All kinds together in `columns` equal parts of the time that another timeline spans; each bucket in the part where
    /// its middle lies.
    pub fn columns<const OTHER: usize>(&self, span: &Timeline<OTHER>, columns: usize) -> Vec<u64> {
        let mut counts = vec![0; columns];
        let from = i128::from(span.start());
        let length = i128::from(span.width()) * span.buckets.len() as i128;
        for (number, bucket) in (0i128..).zip(&self.buckets) {
            let width = i128::from(self.width());
            let middle = i128::from(self.start()) + width * number + width / 2;
            let place = ((middle - from) * columns as i128).checked_div(length).unwrap_or(0);
            let place = usize::try_from(place.max(0))
                .unwrap_or(0)
                .min(columns.saturating_sub(1));
            if let Some(count) = counts.get_mut(place) {
                *count += bucket.iter().sum::<u64>();
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(timeline: &Timeline<1>) -> u64 {
        timeline.buckets().map(|[count]| count).sum()
    }

    #[test]
    fn buckets_are_joined_as_time_goes_on_and_nothing_is_lost() {
        let mut timeline: Timeline<1> = Timeline::new(8);
        for t in 0..1000 {
            timeline.add(t, 0);
            assert!(timeline.buckets().len() <= 8);
        }
        assert_eq!((timeline.width(), timeline.start(), sum(&timeline)), (128, 0, 1000));
        assert!(timeline.buckets().take(7).all(|[count]| *count == 128));
    }

    #[test]
    fn an_event_that_comes_late_is_put_where_it_belongs() {
        let mut timeline: Timeline<1> = Timeline::new(8);
        for t in [100, 103, 101, 97] {
            timeline.add(t, 0);
        }
        assert_eq!((timeline.start(), timeline.width()), (97, 1));
        let counts: Vec<u64> = timeline.buckets().map(|[count]| *count).collect();
        assert_eq!(counts, [1, 0, 0, 1, 1, 0, 1]);
    }

    #[test]
    fn times_of_any_distance_fit() {
        let mut timeline: Timeline<1> = Timeline::new(2);
        for t in [0, i64::MAX, i64::MIN, -1] {
            timeline.add(t, 0);
        }
        assert_eq!((timeline.start(), sum(&timeline)), (i64::MIN, 4));
        assert_eq!(timeline.columns(&timeline, 2), [2, 2]);
        assert_eq!(timeline.columns(&Timeline::<3>::new(8), 4), [4, 0, 0, 0]);
    }

    #[test]
    fn columns_are_parts_of_another_timelines_span() {
        let mut whole: Timeline<1> = Timeline::new(64);
        (0..64).for_each(|t| whole.add(t, 0));
        let mut part: Timeline<1> = Timeline::new(4);
        [20, 21, 22, 50].into_iter().for_each(|t| part.add(t, 0));
        assert_eq!(part.columns(&whole, 4), [0, 3, 0, 1]);
    }
}
