//! A filter flattened, so that a verdict costs the same few instructions however many ranges there are.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::hint::select_unpredictable;

use crate::{Filter, FilterRange, Msr, MsrRange, Op, Verdict};

/// MSRs of one page.
const PAGE: u32 = 1 << PAGE_BITS;
const PAGE_BITS: u32 = 12;

/// Slots of the directory of pages. 16 ranges touch at most 65 pages with x2APIC's, so slots without a clash are found soon.
const SLOT_BITS: u32 = 10;
const SLOTS: usize = 1 << SLOT_BITS;

/// How many multipliers are tried before the ranges are walked after all.
const TRIES: u32 = 1 << 16;

/// Ranges that lie within so many MSRs share one window.
const WINDOW: u64 = 1 << 15;

/// The verdicts of a [`Filter`], for who asks often.
///
/// Says what the filter says of every access. Beside the filter it takes 16 bytes for each 64 MSRs from the first to the
/// last that a range names where these are no more than 32768, and otherwise 8 KiB and 1 KiB for each 4096 MSRs that a
/// range touches. VMs of one filter share it in an [`Arc`].
#[derive(Clone, Debug)]
pub struct FlatFilter {
    filter: Filter,
    shape: Shape,
}

#[derive(Clone, Debug)]
enum Shape {
    /// Pages, found by a hash without clashes.
    Pages(Pages),
    /// All ranges lie close together.
    Window(Window),
    /// No such hash was found.
    Walk,
}

/// Verdicts of consecutive MSRs: for each 64 of them a word of the reads' bits and then one of the writes'.
type Words = Vec<u64>;

#[derive(Clone, Debug)]
struct Window {
    first: u32,
    msrs: u32,
    words: Words,
    /// What lies outside gets, but for x2APIC.
    beyond: Verdict,
}

#[derive(Clone, Debug)]
struct Pages {
    /// For each slot the page that lies there, and what its first MSR's place in `words` is ahead of where it would be if
    /// the words of MSR 0 stood first.
    directory: Box<[(u32, u32); SLOTS]>,
    multiplier: u32,
    /// The default's two words, then those of the pages.
    words: Words,
}

impl FlatFilter {
    /// Flattens a filter. Allocates; asking does not.
    pub fn new(filter: Filter) -> FlatFilter {
        let shape = match Window::new(&filter) {
            Some(window) => Shape::Window(window),
            None => Pages::new(&filter).map_or(Shape::Walk, Shape::Pages),
        };
        FlatFilter { filter, shape }
    }

    /// The filter.
    pub fn filter(&self) -> &Filter {
        &self.filter
    }

    /// The same as [`Filter::verdict`].
    // A call would cost as much as the rest.
    #[inline(always)]
    pub fn verdict(&self, msr: Msr, op: Op) -> Verdict {
        match &self.shape {
            Shape::Pages(pages) => pages.verdict(msr, op),
            Shape::Window(window) => window.verdict(msr, op),
            Shape::Walk => self.filter.verdict(msr, op),
        }
    }
}

impl From<Filter> for FlatFilter {
    fn from(filter: Filter) -> FlatFilter {
        FlatFilter::new(filter)
    }
}

impl From<Filter> for Arc<FlatFilter> {
    fn from(filter: Filter) -> Arc<FlatFilter> {
        Arc::new(FlatFilter::new(filter))
    }
}

impl Window {
    fn new(filter: &Filter) -> Option<Window> {
        let spans = || filter.ranges().iter().filter_map(FilterRange::span);
        let first = spans().map(MsrRange::first).min();
        let last = spans().map(MsrRange::last).max();
        let hull = first.zip(last).and_then(|(first, last)| MsrRange::new(first, last));
        let (first, msrs) = match hull {
            Some(hull) if hull.len() > WINDOW => return None,
            Some(hull) => (hull.first(), u32::try_from(hull.len()).ok()?),
            None => (Msr::MIN, 0),
        };
        let mut words = Words::new();
        flatten(filter, first, msrs, &mut words);
        Some(Window {
            first: first.0,
            msrs,
            words,
            beyond: filter.default_verdict(),
        })
    }

    #[inline]
    fn verdict(&self, msr: Msr, op: Op) -> Verdict {
        let distance = msr.0.wrapping_sub(self.first);
        if distance < self.msrs {
            return verdict(&self.words, 2 * (distance >> 6) + op as u32, distance);
        }
        match self.beyond {
            Verdict::Deny if !MsrRange::X2APIC.contains(msr) => Verdict::Deny,
            _ => Verdict::Allow,
        }
    }
}

impl Pages {
    fn new(filter: &Filter) -> Option<Pages> {
        let spans = filter.ranges().iter().filter_map(FilterRange::span);
        let mut pages: Vec<u32> = spans
            .chain([MsrRange::X2APIC])
            .flat_map(|span| span.first().0 >> PAGE_BITS..=span.last().0 >> PAGE_BITS)
            .collect();
        pages.sort_unstable();
        pages.dedup();
        let multiplier = multiplier(&pages)?;
        // Slots of no page name page 0, which is in slot 0, so that they match nothing.
        let mut directory = vec![(0, 0); SLOTS];
        let mut words = vec![fill(filter.default_verdict()); 2];
        for page in pages {
            let first = page << PAGE_BITS;
            let ahead = u32::try_from(words.len()).ok()?.wrapping_sub(2 * (first >> 6));
            *directory.get_mut(hash(page, multiplier))? = (page, ahead);
            flatten(filter, Msr(first), PAGE, &mut words);
        }
        Some(Pages {
            directory: directory.try_into().ok()?,
            multiplier,
            words,
        })
    }

    #[inline]
    fn verdict(&self, msr: Msr, op: Op) -> Verdict {
        let page = msr.0 >> PAGE_BITS;
        let Some((there, ahead)) = self.directory.get(hash(page, self.multiplier)) else {
            // The hash has no more values than there are slots.
            return Verdict::Deny;
        };
        // An MSR of no page reads the default's words. A branch would depend on what the guest asks for.
        let place = select_unpredictable(*there == page, (2 * (msr.0 >> 6)).wrapping_add(*ahead), 0);
        verdict(&self.words, place + op as u32, msr.0)
    }
}

/// The verdict of a bit of a word; the number of the bit is taken modulo 64.
#[inline]
fn verdict(words: &[u64], place: u32, bit: u32) -> Verdict {
    match words.get(place as usize) {
        Some(word) if word >> (bit & 63) & 1 == 1 => Verdict::Allow,
        _ => Verdict::Deny,
    }
}

/// The word of 64 equal verdicts.
const fn fill(verdict: Verdict) -> u64 {
    match verdict {
        Verdict::Allow => u64::MAX,
        Verdict::Deny => 0,
    }
}

/// Adds the words of `msrs` MSRs from `first` on.
fn flatten(filter: &Filter, first: Msr, msrs: u32, words: &mut Words) {
    let x2apic = FilterRange::x2apic();
    for start in (u64::from(first.0)..).step_by(64).take(msrs.div_ceil(64) as usize) {
        for op in Op::ALL {
            // The first range that matches decides, so it is put over those behind it; x2APIC is asked before all.
            let ranges = filter.ranges().iter().rev().chain([&x2apic]);
            let word = ranges.fold(fill(filter.default_verdict()), |behind, range| {
                let (decided, allowed) = range.verdicts(start, op);
                behind & !decided | allowed & decided
            });
            words.push(word);
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
    extern crate std;

    use super::*;
    use crate::{DecidedBy, Ops};

    /// A filter of ranges spread over `windows`, with overlaps, wraps and directions apart.
    fn filter(seed: u64, ranges: usize, default: Verdict, windows: &[u32]) -> Filter {
        let mut state = seed;
        let mut roll = |n: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let ranges: Vec<FilterRange> = (0..ranges)
            .map(|_| {
                let window = windows[roll(windows.len() as u64) as usize];
                let base = window.wrapping_add(roll(0x4000) as u32);
                let nmsrs = [1, 64, 65, 12288][roll(4) as usize];
                let ops = [Ops::READ, Ops::WRITE, Ops::BOTH][roll(3) as usize];
                let words: Vec<u64> = (0..u64::from(nmsrs).div_ceil(64))
                    .map(|_| roll(1 << 31) << 33 ^ roll(1 << 31) << 16 ^ roll(1 << 31))
                    .collect();
                FilterRange::new(base, nmsrs, ops, words).unwrap()
            })
            .collect();
        Filter::new(default, ranges).unwrap()
    }

    const FAR: [u32; 6] = [0, 0x4000_0000, 0xc000_0000, 0xc001_0000, 0xffff_f000, 0x8000_0000];

    fn check(filter: &Filter, msrs: impl Iterator<Item = u32>) {
        let lookup = FlatFilter::new(filter.clone());
        for msr in msrs.map(Msr) {
            for op in Op::ALL {
                assert_eq!(lookup.verdict(msr, op), filter.verdict(msr, op), "{op} {msr}");
            }
        }
    }

    #[test]
    fn a_flat_filter_says_what_the_ranges_say() {
        for windows in [&FAR[..], &FAR[..1], &FAR[2..3], &FAR[4..5]] {
            for (ranges, default) in [0, 1, 2, 4, 16]
                .into_iter()
                .flat_map(|n| [(n, Verdict::Allow), (n.max(1), Verdict::Deny)])
            {
                for seed in 0..4 {
                    let filter = filter(seed, ranges, default, windows);
                    let around = windows
                        .iter()
                        .flat_map(|first| first.saturating_sub(128)..=first.saturating_add(0x7fff));
                    check(&filter, around.chain(0..0x1000));
                    // And a walk through everything else.
                    check(&filter, (0..1 << 14).map(|i: u32| i.wrapping_mul(0x9e37_79b1)));
                }
            }
        }
    }

    /// What the definition says between two places where another range may come to decide.
    fn by_definition(filter: &Filter, at: Msr, op: Op) -> impl Fn(u32) -> Verdict {
        let (verdict, decider) = filter.decide(at, op);
        let range = match decider {
            DecidedBy::Range { slot, .. } => filter.ranges().get(usize::from(slot)),
            DecidedBy::X2apic | DecidedBy::Default => None,
        };
        move |msr| match range {
            Some(range) => {
                let bit = msr - range.base();
                match range.bitmap()[bit as usize / 64] >> (bit % 64) & 1 {
                    1 => Verdict::Allow,
                    _ => Verdict::Deny,
                }
            }
            None => verdict,
        }
    }

    #[test]
    fn a_flat_filter_says_what_the_ranges_say_of_every_access() {
        let filter = filter(1, 16, Verdict::Deny, &FAR);
        let lookup = FlatFilter::new(filter.clone());
        let Shape::Pages(pages) = &lookup.shape else {
            panic!("the ranges lie far apart")
        };
        let spans = filter
            .ranges()
            .iter()
            .filter_map(FilterRange::span)
            .chain([MsrRange::X2APIC]);
        let ends = spans.flat_map(|span| [u64::from(span.first().0), u64::from(span.last().0) + 1]);
        let mut cuts: Vec<u64> = ends.chain([0, 1 << 32]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let parts = cuts.windows(2).map(|part| (part[0] as u32, (part[1] - 1) as u32));
        for ((first, last), op) in parts.flat_map(|part| Op::ALL.map(|op| (part, op))) {
            let definition = by_definition(&filter, Msr(first), op);
            let msrs = (first >> PAGE_BITS..=last >> PAGE_BITS).flat_map(|page| telling(pages, page));
            let wrong = msrs
                .filter(|msr| (first..=last).contains(msr))
                .find(|msr| lookup.verdict(Msr(*msr), op) != definition(*msr));
            assert_eq!(wrong, None, "{op}");
        }
    }

    /// The MSRs of a page that tell what is said of all of them. Where the page has no slot a verdict depends on the last
    /// six bits of the MSR alone, so three of its 64 words stand for all: 2^33 look-ups take a minute.
    fn telling(pages: &Pages, page: u32) -> impl Iterator<Item = u32> {
        const WORDS: u32 = PAGE / 64;
        let has_slot = pages.directory[hash(page, pages.multiplier)].0 == page;
        (0..WORDS)
            .filter(move |word| has_slot || [0, page % WORDS, WORDS - 1].contains(word))
            .flat_map(move |word| (0..64).map(move |bit| (page << PAGE_BITS) + 64 * word + bit))
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
