use super::*;

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

/// Kind, first MSR, and the first MSR after it.
type Range = (usize, u64, u64);

type Cell = ((bool, bool), Price);

fn of_cells<V: Clone + Eq>(default: V, cells: impl Iterator<Item = V>) -> Intervals<V> {
    let cells = cells.zip(0..).map(|(value, msr)| (MsrRange::single(Msr(msr)), value));
    Intervals::first_match(default, cells)
}

/// Behind the cells everything is as `rest` says, and nothing of it may be changed.
fn of(cells: &[Cell], rest: bool, length: u64, slots: u64) -> Found {
    let allowed = of_cells((rest, rest), cells.iter().map(|(allowed, _)| *allowed));
    let price = of_cells((NEVER, NEVER), cells.iter().map(|(_, price)| *price));
    shortfall(&allowed, &price, &[], (length, slots))
}

/// The least cost by trying every filter: each set of at most `slots` ranges, and for each MSR the best bits.
fn brute_force(cells: &[Cell], default: bool, length: u64, slots: u64) -> u64 {
    let n = cells.len() as u64;
    let mut all = Vec::new();
    for kind in [READ, WRITE, BOTH] {
        for first in 0..n {
            for end in first + 1..=(first + length).min(n) {
                all.push((kind, first, end));
            }
        }
    }
    fn search(all: &[Range], picked: &mut Vec<Range>, left: u64, cost: &dyn Fn(&[Range]) -> u64) -> u64 {
        let mut best = cost(picked);
        if left > 0 {
            for (i, range) in all.iter().enumerate() {
                picked.push(*range);
                best = best.min(search(&all[i + 1..], picked, left - 1, cost));
                picked.pop();
            }
        }
        best
    }
    // What the verdicts of an MSR may be, by definition of the first match: each range has a bit of its own.
    let cost = |ranges: &[Range]| {
        (0u64..).zip(cells).fold(0u64, |sum, (msr, ((read, write), price))| {
            let covers = |kind| {
                ranges
                    .iter()
                    .any(|(k, first, end)| *k == kind && *first <= msr && msr < *end)
            };
            let bits = |covered: bool| if covered { vec![false, true] } else { vec![default] };
            let mut best = NEVER;
            for own_read in bits(covers(READ)) {
                for own_write in bits(covers(WRITE)) {
                    for both in bits(covers(BOTH)) {
                        let gets_read = if covers(READ) { own_read } else { both };
                        let gets_write = if covers(WRITE) { own_write } else { both };
                        let mut cost = 0u64;
                        if gets_read != *read {
                            cost = cost.saturating_add(price.0);
                        }
                        if gets_write != *write {
                            cost = cost.saturating_add(price.1);
                        }
                        best = best.min(cost);
                    }
                }
            }
            sum.saturating_add(best)
        })
    };
    search(&all, &mut Vec::new(), slots, &cost)
}

fn check(cells: &[Cell], default: bool, length: u64, slots: u64) {
    let least = brute_force(cells, default, length, slots);
    let found = of(cells, default, length, slots);
    assert!(found.proved, "{cells:?}, {slots} ranges of {length}");
    match found.best {
        None => assert_eq!(least, NEVER, "{cells:?}, {slots} ranges of {length}"),
        Some(found) => {
            assert_eq!(found.cost, least, "{cells:?}, {slots} ranges of {length}: {found:?}");
            let cost = found.wrong.iter().fold(0u64, |sum, (range, op)| {
                range.iter().fold(sum, |sum, msr| {
                    let (_, price) = cells[msr.0 as usize];
                    sum.saturating_add(if *op == Op::Read { price.0 } else { price.1 })
                })
            });
            assert_eq!(cost, least, "{found:?} is not what it costs");
        }
    }
}

#[test]
fn no_set_of_ranges_leaves_less_undone_for_any_map_of_four_msrs() {
    for default in [false, true] {
        for code in 0..4u32.pow(4) {
            let cells: Vec<Cell> = (0..4)
                .map(|i| code >> (2 * i) & 3)
                .map(|bits| ((bits & 1 != 0, bits & 2 != 0), (1, 1)))
                .collect();
            for slots in 0..3 {
                check(&cells, default, 2, slots);
            }
        }
    }
}

#[test]
fn no_set_of_ranges_leaves_less_undone_for_random_maps_and_prices() {
    let mut dice = Dice(11);
    for _ in 0..400 {
        let uniform = dice.roll(2) == 0;
        let cells: Vec<Cell> = (0..10)
            .map(|_| {
                let mut price = || match dice.roll(7) {
                    0 if !uniform => NEVER,
                    n if !uniform => n,
                    _ => 1,
                };
                let price = (price(), price());
                let allowed = match dice.roll(6) {
                    0 => (true, false),
                    1 => (false, true),
                    2 | 3 => (true, true),
                    _ => (false, false),
                };
                (allowed, price)
            })
            .collect();
        check(&cells, dice.roll(2) == 0, 2 + dice.roll(3), 1 + dice.roll(2));
    }
}

#[test]
fn a_range_starts_within_a_stretch_where_that_serves_more() {
    // Six MSRs, then one more behind a gap: the one range of four takes the last three of the six with it.
    let needed = ((false, false), (1, 1));
    let free = ((true, true), (1, 1));
    let cells = [needed, needed, needed, needed, needed, needed, free, needed];
    assert_eq!(of(&cells, true, 4, 2).best.unwrap().cost, 0);
    assert_eq!(of(&cells, true, 4, 1).best.unwrap().cost, 6);
}

#[test]
fn a_map_that_is_too_large_to_search_whole_says_so() {
    let mut dice = Dice(5);
    let cells: Vec<Cell> = (0..2000)
        .map(|_| {
            (
                (dice.roll(2) == 0, dice.roll(2) == 0),
                (1 + dice.roll(9), 1 + dice.roll(9)),
            )
        })
        .collect();
    let found = of(&cells, true, 100, 16);
    assert!(!found.proved);
    assert!(found.best.unwrap().cost > 0);
}

#[test]
fn a_stretch_that_is_far_longer_than_all_ranges_is_not_walked() {
    // 2^32 MSRs and ranges of two: a step for each range that the stretch has room for would take hours.
    let everything = Intervals::uniform((true, false));
    let found = shortfall(&everything, &Intervals::uniform((1, 1)), &[], (2, 3));
    assert!(found.proved);
    assert_eq!(found.best.map(|best| best.cost), Some(u64::from(u32::MAX) - 6));
}
