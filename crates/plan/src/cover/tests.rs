use super::*;

mod simple;

/// A deterministic source of small numbers.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

/// A map over the first MSRs, uniform after them.
fn map_of(cells: &[(bool, bool)], default: bool) -> Intervals<(bool, bool)> {
    map_at(0, cells, default)
}

/// A map over the MSRs from one on, uniform around them.
fn map_at(first: u32, cells: &[(bool, bool)], default: bool) -> Intervals<(bool, bool)> {
    let cells = (first..=u32::MAX)
        .zip(cells)
        .map(|(msr, pair)| (MsrRange::single(Msr(msr)), *pair));
    Intervals::first_match((default, default), cells)
}

/// What a filter of these ranges does: bits as the plan will set them.
fn realises(ranges: &[(Direction, u64, u64)], cells: &[(bool, bool)], default: bool) -> bool {
    (0u64..).zip(cells).all(|(msr, (read, write))| {
        let covers = |direction| {
            ranges
                .iter()
                .any(|(d, first, end)| *d == direction && *first <= msr && msr < *end)
        };
        let (r, w, both) = (
            covers(Direction::Read),
            covers(Direction::Write),
            covers(Direction::Both),
        );
        let read_right = r || both || *read == default;
        let write_right = w || both || *write == default;
        // The one bit must suit every direction that no range before it decides.
        let bit_right = !both || r || w || read == write;
        read_right && write_right && bit_right
    })
}

/// The fewest ranges by trying every set of ranges of up to `length` cells, smaller sets first.
fn brute_force(cells: &[(bool, bool)], default: bool, length: u64) -> u64 {
    let n = cells.len() as u64;
    let mut all = Vec::new();
    for direction in [Direction::Read, Direction::Write, Direction::Both] {
        for first in 0..n {
            for end in first + 1..=(first + length).min(n) {
                all.push((direction, first, end));
            }
        }
    }
    type Range = (Direction, u64, u64);
    fn search(all: &[Range], picked: &mut Vec<Range>, left: usize, ok: &dyn Fn(&[Range]) -> bool) -> bool {
        if ok(picked) {
            return true;
        }
        if left == 0 {
            return false;
        }
        for (i, range) in all.iter().enumerate() {
            picked.push(*range);
            if search(&all[i + 1..], picked, left - 1, ok) {
                return true;
            }
            picked.pop();
        }
        false
    }
    (0..)
        .find(|count| {
            search(&all, &mut Vec::new(), *count as usize, &|ranges| {
                realises(ranges, cells, default)
            })
        })
        .unwrap()
}

fn check(cells: &[(bool, bool)], default: bool, length: u64) {
    check_at(0, cells, default, length);
}

/// Compares with brute force where the cells lie from `at` on.
fn check_at(at: u32, cells: &[(bool, bool)], default: bool, length: u64) {
    let covering = cover(&map_at(at, cells, default), default, &[], length).unwrap();
    let spans = covering.ranges.iter().map(|(direction, range)| {
        let (first, last) = (range.first().0 - at, range.last().0 - at);
        (*direction, u64::from(first), u64::from(last) + 1)
    });
    let ranges: Vec<_> = spans.collect();
    // No range reaches the last MSR of all.
    let cells = &cells[..cells.len().min((u32::MAX - at) as usize)];
    assert!(
        realises(&ranges, cells, default),
        "{ranges:?} does not realise {cells:?}"
    );
    assert!(
        ranges.iter().all(|(_, first, end)| end - first <= length),
        "{ranges:?} is longer than {length}"
    );
    let fewest = brute_force(cells, default, length);
    assert_eq!(ranges.len() as u64, fewest, "{ranges:?} for {cells:?}, limit {length}");
    assert!(fewest <= covering.separate);
    if let Some(witness) = covering.witness {
        assert_eq!(witness.len() as u64, fewest);
        let far = |a: Msr, b: Msr| u64::from(a.0.abs_diff(b.0)) >= length;
        assert!(witness.windows(2).all(|pair| far(pair[0].0, pair[1].0)), "{witness:?}");
        let differs = |(msr, op): &(Msr, Op)| match op {
            Op::Read => cells[(msr.0 - at) as usize].0 != default,
            Op::Write => cells[(msr.0 - at) as usize].1 != default,
        };
        assert!(witness.iter().all(differs), "{witness:?}");
    }
}

/// Every map of five MSRs, each with both defaults.
fn maps_of_five() -> impl Iterator<Item = (Vec<(bool, bool)>, bool)> {
    (0..4u32.pow(5)).flat_map(|code| {
        let bits = (0..5).map(|i| code >> (2 * i) & 3);
        let cells: Vec<(bool, bool)> = bits.map(|bits| (bits & 1 != 0, bits & 2 != 0)).collect();
        [(cells.clone(), false), (cells, true)]
    })
}

#[test]
fn no_smaller_filter_exists_for_any_map_of_five_msrs() {
    for length in [2, 3] {
        for (cells, default) in maps_of_five() {
            check(&cells, default, length);
        }
    }
}

#[test]
fn no_smaller_filter_exists_for_any_map_of_the_last_five_msrs() {
    for length in 1..=6 {
        for (cells, default) in maps_of_five() {
            check_at(u32::MAX - 4, &cells, default, length);
        }
    }
}

#[test]
fn no_smaller_filter_exists_for_random_maps_of_nine_msrs() {
    let mut dice = Dice(7);
    for _ in 0..150 {
        let cells: Vec<(bool, bool)> = (0..9)
            .map(|_| match dice.roll(6) {
                0 => (true, false),
                1 => (false, true),
                2 | 3 => (true, true),
                _ => (false, false),
            })
            .collect();
        check(&cells, dice.roll(2) == 0, 3 + dice.roll(2));
    }
}

#[test]
fn no_range_covers_the_last_msr() {
    let top = MsrRange::new(Msr(u32::MAX - 9), Msr::MAX).unwrap();
    let map = Intervals::first_match((true, true), [(top, (false, false))]);
    let covering = cover(&map, true, &[], 12288).unwrap();
    let last = Msr(u32::MAX - 1);
    assert_eq!(
        covering.ranges,
        [(Direction::Both, MsrRange::new(top.first(), last).unwrap())]
    );
}

#[test]
fn free_msrs_need_no_range_and_split_none() {
    let deny = |first, last| (MsrRange::new(Msr(first), Msr(last)).unwrap(), (false, false));
    let map = Intervals::first_match((true, true), [deny(0x7f0, 0x90f)]);
    let covering = cover(&map, true, &[MsrRange::X2APIC], 12288).unwrap();
    assert_eq!(covering.ranges.len(), 1);
    let alone = Intervals::first_match((true, true), [deny(0x800, 0x8ff)]);
    assert_eq!(cover(&alone, true, &[MsrRange::X2APIC], 12288).unwrap().ranges, []);
}

#[test]
fn a_map_far_over_the_limit_is_not_searched() {
    let map = Intervals::uniform((true, false));
    let TooMany { at_least, separate } = cover(&map, true, &[], 12288).unwrap_err();
    assert_eq!((at_least, separate), (349526, 349526));
}

#[test]
fn reads_and_writes_share_ranges_where_they_agree() {
    // Reads are denied in a stretch of what is otherwise allowed both ways: one read range overrides.
    let allow = |first, last, pair| (MsrRange::new(Msr(first), Msr(last)).unwrap(), pair);
    let map = Intervals::first_match(
        (false, false),
        [
            allow(0x100, 0x10f, (false, true)),
            allow(0, 0x1ff, (true, true)),
            allow(0x2000, 0x2fff, (true, true)),
        ],
    );
    let covering = cover(&map, false, &[], 12288).unwrap();
    assert_eq!(covering.ranges.len(), 2);
    assert_eq!(covering.separate, 2);
    // It is not distance that asks for two ranges.
    assert_eq!(covering.witness, None);
}

#[test]
fn msrs_too_far_apart_for_one_range_are_the_witness() {
    let deny = |msr: u32| (MsrRange::single(Msr(msr)), (true, false));
    let map = Intervals::first_match((true, true), [deny(0), deny(12287), deny(12288), deny(0x10000)]);
    let covering = cover(&map, true, &[], 12288).unwrap();
    let witness = [0, 12288, 0x10000].map(|msr| (Msr(msr), Op::Write));
    assert_eq!(covering.witness.as_deref(), Some(&witness[..]));
    assert_eq!(covering.ranges.len(), 3);
}

/// The fewest words among all filters of as few ranges.
fn fewest_words(cells: &[(bool, bool)], default: bool, length: u64, count: usize, word: u64) -> u64 {
    type Range = (Direction, u64, u64);
    let n = cells.len() as u64;
    let kinds = [Direction::Read, Direction::Write, Direction::Both];
    let all: Vec<_> = (kinds.into_iter())
        .flat_map(|kind| {
            (0..n).flat_map(move |first| (first + 1..=(first + length).min(n)).map(move |end| (kind, first, end)))
        })
        .collect();
    fn search(
        all: &[Range],
        picked: &mut Vec<Range>,
        left: usize,
        words: &dyn Fn(&[Range]) -> Option<u64>,
    ) -> Option<u64> {
        if left == 0 {
            return words(picked);
        }
        let mut best = None;
        for (i, range) in all.iter().enumerate() {
            picked.push(*range);
            let found = search(&all[i + 1..], picked, left - 1, words);
            best = best.into_iter().chain(found).min();
            picked.pop();
        }
        best
    }
    let words = |ranges: &[Range]| {
        let right = realises(ranges, cells, default);
        right.then(|| ranges.iter().map(|(_, first, end)| (end - first).div_ceil(word)).sum())
    };
    search(&all, &mut Vec::new(), count, &words).unwrap()
}

/// The words of the covering of cells, packed for bitmaps that grow by `word` bits.
fn packed_words(cells: &[(bool, bool)], default: bool, length: u64, word: u64) -> (usize, u64) {
    let covering = cover(&map_of(cells, default), default, &[], length).unwrap();
    let segments = segments(&map_of(cells, default), default, &[]);
    let ranges = packed(&covering.ranges, &segments, length, word);
    let spans: Vec<_> = (ranges.iter())
        .map(|(direction, range)| (*direction, u64::from(range.first().0), u64::from(range.last().0) + 1))
        .collect();
    assert!(realises(&spans, cells, default), "{spans:?} does not realise {cells:?}");
    assert!(spans.iter().all(|(_, first, end)| end - first <= length), "{spans:?}");
    assert_eq!(ranges.len(), covering.ranges.len());
    let words = spans.iter().map(|(_, first, end)| (end - first).div_ceil(word)).sum();
    (ranges.len(), words)
}

#[test]
fn no_covering_of_as_few_ranges_takes_fewer_bytes_where_reads_and_writes_agree() {
    for (length, word) in [(3, 1), (4, 1), (4, 2), (3, 3)] {
        for code in 0..2u32.pow(8) {
            let cells: Vec<(bool, bool)> = (0..8).map(|i| code >> i & 1 != 0).map(|bit| (bit, bit)).collect();
            let (count, words) = packed_words(&cells, false, length, word);
            assert_eq!(words, fewest_words(&cells, false, length, count, word), "{cells:?}");
            assert!(cover(&map_of(&cells, false), false, &[], length).unwrap().bytes_proved);
        }
    }
}

#[test]
fn no_filter_of_as_few_ranges_takes_fewer_bytes_for_random_maps() {
    let mut dice = Dice(3);
    let mut fewer = 0;
    for (length, word) in [(3, 1), (4, 2), (3, 3)] {
        for _ in 0..80 {
            let cells: Vec<(bool, bool)> = (0..7).map(|_| (dice.roll(2) == 0, dice.roll(2) == 0)).collect();
            let segments = segments(&map_of(&cells, false), false, &[]);
            let covering = cover(&map_of(&cells, false), false, &[], length).unwrap();
            let before = packed(&covering.ranges, &segments, length, word);
            let least = shared_within(&before, &segments, length, word).unwrap();
            let spans: Vec<_> = (least.iter())
                .map(|(direction, range)| (*direction, u64::from(range.first().0), u64::from(range.last().0) + 1))
                .collect();
            assert!(realises(&spans, &cells, false), "{spans:?} does not realise {cells:?}");
            assert!(spans.iter().all(|(_, first, end)| end - first <= length), "{spans:?}");
            let fewest = fewest_words(&cells, false, length, covering.ranges.len(), word);
            assert_eq!(
                (least.len(), words(&least, word)),
                (covering.ranges.len(), fewest),
                "{least:?} for {cells:?}"
            );
            fewer += u32::from(words(&before, word) > fewest);
        }
    }
    assert!(fewer > 0, "packing alone finds the fewest");
}

#[test]
fn a_map_that_is_too_large_to_try_all_ways_does_not_call_its_bytes_the_fewest() {
    let mut dice = Dice(5);
    let cells: Vec<(bool, bool)> = (0..200).map(|_| (dice.roll(2) == 0, dice.roll(2) == 0)).collect();
    assert!(!cover(&map_of(&cells, false), false, &[], 12288).unwrap().bytes_proved);
}

#[test]
fn packing_takes_no_more_bytes_where_reads_and_writes_differ() {
    let mut dice = Dice(3);
    for _ in 0..300 {
        let cells: Vec<(bool, bool)> = (0..9).map(|_| (dice.roll(2) == 0, dice.roll(2) == 0)).collect();
        let covering = cover(&map_of(&cells, false), false, &[], 3).unwrap();
        let before: u64 = covering.ranges.iter().map(|(_, range)| range.len()).sum();
        let (_, words) = packed_words(&cells, false, 3, 1);
        assert!(words <= before, "{cells:?}");
    }
}
