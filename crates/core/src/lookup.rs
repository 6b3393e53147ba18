//! A filter flattened, so that a verdict costs the same few instructions however many ranges there are.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use crate::{Filter, FilterRange, Msr, MsrRange, Op, Verdict};

/// MSRs of one page.
const PAGE: u32 = 1 << PAGE_BITS;
const PAGE_BITS: u32 = 12;

/// 64-bit words that a page's verdicts take: two bits an MSR, the read's in the even one.
const PAGE_WORDS: usize = 2 * PAGE as usize / 64;

/// Slots of the directory of pages. 16 ranges touch at most 65 pages with x2APIC's, so slots without a clash are found soon.
const SLOT_BITS: u32 = 10;
const SLOTS: usize = 1 << SLOT_BITS;

/// How many multipliers are tried before the ranges are walked after all.
const TRIES: u32 = 1 << 16;

/// The verdicts of a [`Filter`], for who asks often.
///
/// Takes 10 KiB, and 1 KiB for each 4096 MSRs that a range touches. Says what the filter says of every access.
#[derive(Clone, Debug)]
pub struct Lookup {
    shape: Shape,
}

#[derive(Clone, Debug)]
enum Shape {
    /// No range matters: the default, but for x2APIC.
    Uniform(Verdict),
    /// At most one range: walking it is as cheap as it gets.
    Walk(Filter),
    /// Pages, found by a hash without clashes.
    Pages(Box<Pages>),
}

#[derive(Clone, Debug)]
struct Pages {
    /// Which page lies in each slot, and where its verdicts start in `verdicts`.
    directory: [(u32, u32); SLOTS],
    multiplier: u32,
    /// Two bits an MSR; the first page is that of the default.
    verdicts: Box<[u64]>,
}

impl Lookup {
    /// Flattens a filter. Allocates; asking does not.
    pub fn new(filter: &Filter) -> Lookup {
        let shape = match filter.ranges() {
            [] => Shape::Uniform(filter.default_verdict()),
            [_] => Shape::Walk(filter.clone()),
            _ => match Pages::new(filter) {
                Some(pages) => Shape::Pages(Box::new(pages)),
                None => Shape::Walk(filter.clone()),
            },
        };
        Lookup { shape }
    }

    /// The same as [`Filter::verdict`].
    #[inline]
    pub fn verdict(&self, msr: Msr, op: Op) -> Verdict {
        match &self.shape {
            Shape::Pages(pages) => pages.verdict(msr, op),
            Shape::Walk(filter) => filter.verdict(msr, op),
            Shape::Uniform(verdict) if !MsrRange::X2APIC.contains(msr) => *verdict,
            Shape::Uniform(_) => Verdict::Allow,
        }
    }
}

impl Pages {
    fn new(filter: &Filter) -> Option<Pages> {
        let spans = filter
            .ranges()
            .iter()
            .filter_map(FilterRange::span)
            .chain([MsrRange::X2APIC]);
        let mut pages: Vec<u32> = spans
            .flat_map(|span| span.first().0 >> PAGE_BITS..=span.last().0 >> PAGE_BITS)
            .collect();
        pages.sort_unstable();
        pages.dedup();
        let multiplier = multiplier(&pages)?;
        // Slots of no page name one that hashes elsewhere, and so match nothing.
        let mut directory = [(0, 0); SLOTS];
        for (slot, entry) in (0..).zip(&mut directory) {
            *entry = (u32::from(hash(0, multiplier) == slot), 0);
        }
        let default = match filter.default_verdict() {
            Verdict::Allow => u64::MAX,
            Verdict::Deny => 0,
        };
        let mut verdicts = vec![default; PAGE_WORDS];
        for page in pages {
            let start = u32::try_from(verdicts.len()).ok()?;
            *directory.get_mut(hash(page, multiplier))? = (page, start);
            let msrs = (0..PAGE).map(|offset| Msr(page << PAGE_BITS | offset));
            let bits = msrs.flat_map(|msr| Op::ALL.map(|op| filter.verdict(msr, op) == Verdict::Allow));
            let mut words = vec![0u64; PAGE_WORDS];
            for (bit, allowed) in bits.enumerate() {
                *words.get_mut(bit / 64)? |= u64::from(allowed) << (bit % 64);
            }
            verdicts.extend(words);
        }
        Some(Pages {
            directory,
            multiplier,
            verdicts: verdicts.into(),
        })
    }

    #[inline]
    fn verdict(&self, msr: Msr, op: Op) -> Verdict {
        let page = msr.0 >> PAGE_BITS;
        let bit = (msr.0 & (PAGE - 1)) << 1 | op as u32;
        let (there, start) = match self.directory.get(hash(page, self.multiplier)) {
            Some(entry) => *entry,
            None => (u32::MAX, 0),
        };
        // A page that is not there reads the default's; a conditional move, since guests are not predictable.
        let start = if there == page { start } else { 0 };
        let word = self.verdicts.get((start + (bit >> 6)) as usize);
        match word.is_some_and(|word| word >> (bit & 63) & 1 == 1) {
            true => Verdict::Allow,
            false => Verdict::Deny,
        }
    }
}

/// The slot of a page.
#[inline]
const fn hash(page: u32, multiplier: u32) -> usize {
    (page.wrapping_mul(multiplier) >> (32 - SLOT_BITS)) as usize
}

/// A multiplier under which no two of the pages share a slot.
fn multiplier(pages: &[u32]) -> Option<u32> {
    // Odd numbers in a fixed but scattered order, the golden ratio first.
    let candidates = (0..TRIES).map(|i| i.wrapping_mul(0x9e37_79b8).wrapping_add(0x9e37_79b1) | 1);
    let fits = |multiplier: &u32| {
        let mut taken = [false; SLOTS];
        pages.iter().all(|page| {
            taken
                .get_mut(hash(*page, *multiplier))
                .is_some_and(|slot| !core::mem::replace(slot, true))
        })
    };
    candidates.into_iter().find(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ops;

    /// A filter of ranges spread over the whole space, with overlaps, wraps and directions apart.
    fn filter(seed: u64, ranges: usize, default: Verdict) -> Filter {
        let mut state = seed;
        let mut roll = |n: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let ranges: Vec<FilterRange> = (0..ranges)
            .map(|_| {
                let windows = [0u32, 0x4000_0000, 0xc000_0000, 0xc001_0000, 0xffff_f000, 0x8000_0000];
                let base = windows[roll(6) as usize].wrapping_add(roll(0x4000) as u32);
                let nmsrs = [1, 64, 65, 12288][roll(4) as usize];
                let ops = [Ops::READ, Ops::WRITE, Ops::BOTH][roll(3) as usize];
                let words: Vec<u64> = (0..u64::from(nmsrs).div_ceil(64)).map(|_| roll(u64::MAX)).collect();
                FilterRange::new(base, nmsrs, ops, words).unwrap()
            })
            .collect();
        Filter::new(default, ranges).unwrap()
    }

    fn check(filter: &Filter, msrs: impl Iterator<Item = u32>) {
        let lookup = Lookup::new(filter);
        for msr in msrs.map(Msr) {
            for op in Op::ALL {
                assert_eq!(lookup.verdict(msr, op), filter.verdict(msr, op), "{op} {msr}");
            }
        }
    }

    #[test]
    fn a_flat_filter_says_what_the_ranges_say() {
        for ranges in [0, 1, 2, 4, 16] {
            for seed in 0..3 {
                let filter = filter(seed, ranges, Verdict::Allow);
                let windows = [0u32, 0x4000_0000, 0x8000_0000, 0xc000_0000, 0xffff_e000];
                check(
                    &filter,
                    windows
                        .into_iter()
                        .flat_map(|first| first..=first.saturating_add(0x7fff)),
                );
                // And a walk through everything else.
                check(&filter, (0..1 << 16).map(|i: u32| i.wrapping_mul(0x9e37_79b1)));
            }
        }
        check(
            &filter(9, 16, Verdict::Deny),
            (0..1 << 16).map(|i: u32| i.wrapping_mul(0x9e37_79b1)),
        );
    }

    #[test]
    #[ignore = "2^33 accesses: minutes in an optimised build, hours in another"]
    fn a_flat_filter_says_what_the_ranges_say_of_every_access() {
        check(&filter(1, 16, Verdict::Deny), 0..=u32::MAX);
    }

    #[test]
    fn slots_are_found_for_as_many_pages_as_ranges_can_touch() {
        for seed in 0..200u32 {
            let ranges: Vec<FilterRange> = (0..16u32)
                .map(|i| {
                    let base = (i * 0x0fff_1000).wrapping_add(seed.wrapping_mul(0x0123_4567)) | 0xfff;
                    FilterRange::new(base.min(0xffff_0000), 12288, Ops::BOTH, vec![u64::from(seed); 192]).unwrap()
                })
                .collect();
            let filter = Filter::new(Verdict::Deny, ranges).unwrap();
            assert!(Pages::new(&filter).is_some(), "seed {seed}");
        }
    }
}
