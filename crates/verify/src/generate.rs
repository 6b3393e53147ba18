//! Random calls, as wild as the interface allows, and the accesses that tell what they did.

use msrgate_core::abi::{CAP_X86_MSR_FILTER, MAX_RANGE_MSRS, MAX_RANGES};
use msrgate_core::{Access, Msr, Op};
use msrgate_engine::Process;

use crate::case::{Call, Descriptor, Place, RawFilter, RawRange, Target};
use crate::rng::Rng;

/// Where ranges like to start: MSRs that exist, edges of the hardware's bitmaps, of x2APIC, and of all indices.
const BASES: [u32; 40] = [
    0,
    1,
    0x10,
    0x1b,
    0x8b,
    0x174,
    0x176,
    0x1d9,
    0x277,
    0x2ff,
    0x400,
    0x480,
    0x6e0,
    0x7c0,
    0x7ff,
    0x800,
    0x8ff,
    0x900,
    0x1fff,
    0x2000,
    0x3000,
    0x4000_0000,
    0x4b56_4d00,
    0x7fff_ffff,
    0x8000_0000,
    0xbfff_ffff,
    0xc000_0080,
    0xc000_0100,
    0xc000_1fff,
    0xc000_2000,
    0xc001_0000,
    0xc001_0114,
    0xc001_1fff,
    0xc001_2000,
    0xdead_beef,
    0xffff_cfff,
    0xffff_d000,
    0xffff_fff0,
    0xffff_fffe,
    0xffff_ffff,
];

/// Places that are tried whatever a filter says.
const ODD: [u32; 18] = [
    0,
    1,
    0x174,
    0x6e0,
    0x7ff,
    0x800,
    0x830,
    0x8ff,
    0x900,
    0x1fff,
    0x2000,
    0xbfff_ffff,
    0xc000_0000,
    0xc000_0100,
    0xc000_2000,
    0xffff_fff0,
    0xffff_fffe,
    0xffff_ffff,
];

/// A call: mostly a filter, now and then a mask.
pub(crate) fn call(rng: &mut Rng) -> Call {
    if rng.chance(5) { cap(rng) } else { filter(rng) }
}

/// A mask that is accepted and hands denials to user space more often than not.
pub(crate) fn mask(rng: &mut Rng) -> Call {
    let mask = if rng.chance(80) { 4 | rng.below(4) } else { rng.below(8) };
    Call::enable_cap(mask)
}

fn cap(rng: &mut Rng) -> Call {
    let mut call = mask(rng);
    if let Target::EnableCap { cap, flags, args } = &mut call.target {
        let [mask, more @ ..] = args;
        match rng.below(8) {
            0 => *mask |= 1 << rng.below(64),
            1 => *mask = rng.next(),
            2 => *flags = 1 << rng.below(32),
            3 => *cap = CAP_X86_MSR_FILTER,
            _ => {}
        }
        if rng.chance(30) {
            *more = [rng.next(), rng.next(), rng.next()];
        }
    }
    call.argp = argument_place(rng);
    call.on = descriptor(rng);
    call
}

fn filter(rng: &mut Rng) -> Call {
    let mut ranges = good_ranges(rng);
    let mut flags = u32::from(!ranges.is_empty() && rng.chance(50));
    let mut call = Call::set_msr_filter(RawFilter {
        flags: 0,
        pad: if rng.chance(30) { rng.next() as u8 } else { 0 },
        layout: None,
        edited: false,
        ranges: Vec::new(),
    });
    // Most get something wrong, often in more than one place: which error wins is what is asked.
    if rng.chance(80) {
        for _ in 0..=rng.below(3) {
            match rng.below(16) {
                0 => flags ^= 1 << rng.below(32),
                1 => flags = rng.next() as u32,
                2 => call.argp = argument_place(rng),
                3 => call.on = descriptor(rng),
                4 => {
                    ranges.iter_mut().for_each(|range| range.nmsrs = 0);
                    flags = 1;
                }
                _ => spoil(rng, &mut ranges),
            }
        }
    } else if rng.chance(30) {
        call.argp = rng.pick([Place::Unaligned, Place::PageEnd]);
    }
    let layout = rng.chance(1).then_some(Process::Compat);
    if let Target::SetMsrFilter(filter) = &mut call.target {
        (filter.flags, filter.layout, filter.ranges) = (flags, layout, ranges);
    }
    call
}

fn good_ranges(rng: &mut Rng) -> Vec<RawRange> {
    let count = match rng.below(10) {
        0 => 0,
        1..7 => rng.below(4) + 1,
        7..9 => rng.below(13) + 4,
        _ => MAX_RANGES as u64,
    };
    let mut slots: Vec<usize> = (0..MAX_RANGES).collect();
    if rng.chance(50) {
        rng.shuffle(&mut slots);
    }
    slots.truncate(count as usize);
    slots.sort_unstable();
    // Ranges near one another overlap.
    let home = rng.pick(BASES);
    slots
        .into_iter()
        .map(|slot| {
            let near = if rng.chance(60) { home } else { rng.pick(BASES) };
            range(rng, slot, near)
        })
        .collect()
}

fn range(rng: &mut Rng, slot: usize, near: u32) -> RawRange {
    let base = match rng.below(10) {
        0 => rng.next() as u32,
        1..5 => near,
        5..8 => near.wrapping_sub(rng.within(0, 70)),
        _ => near.wrapping_add(rng.within(0, 70)),
    };
    let nmsrs = match rng.below(16) {
        0..8 => rng.within(1, 140),
        8 => rng.pick([63, 64, 65, 127, 128, 129, 191, 192, 193]),
        9 => rng.pick([
            MAX_RANGE_MSRS,
            MAX_RANGE_MSRS - 1,
            MAX_RANGE_MSRS - 63,
            MAX_RANGE_MSRS - 64,
        ]),
        10 => rng.within(1, MAX_RANGE_MSRS),
        // Up to the last index, and to where the end is 0 or a little behind it.
        11..13 if base > u32::MAX - MAX_RANGE_MSRS => {
            // 1 to 12288.
            let exact = base.wrapping_neg();
            rng.within((exact - 1).max(1), (exact + 2).min(MAX_RANGE_MSRS))
        }
        _ => rng.within(1, 4),
    };
    RawRange {
        slot,
        flags: rng.pick([1, 2, 3, 3]),
        nmsrs,
        base,
        bitmap: bitmap(rng, nmsrs.div_ceil(64) as usize * 8),
        at: rng.pick([Place::Mapped, Place::Mapped, Place::Unaligned, Place::PageEnd]),
    }
}

fn bitmap(rng: &mut Rng, len: usize) -> Vec<u8> {
    match rng.below(6) {
        0 => vec![0; len],
        1 => vec![0xff; len],
        2 => vec![rng.next() as u8; len],
        3 => {
            let mut bitmap = vec![rng.pick([0, 0xff]); len];
            for _ in 0..3 {
                let at = rng.below(len as u64) as usize;
                if let Some(byte) = bitmap.get_mut(at) {
                    *byte ^= 1 << rng.below(8);
                }
            }
            bitmap
        }
        _ => std::iter::repeat_with(|| rng.next() as u8).take(len).collect(),
    }
}

/// Makes one of the ranges wrong, or one that nobody looks at.
fn spoil(rng: &mut Rng, ranges: &mut Vec<RawRange>) {
    if ranges.is_empty() {
        let slot = rng.below(MAX_RANGES as u64) as usize;
        let near = rng.pick(BASES);
        ranges.push(range(rng, slot, near));
    }
    let index = rng.below(ranges.len() as u64) as usize;
    let Some(range) = ranges.get_mut(index) else { return };
    match rng.below(9) {
        0 => range.flags = 0,
        1 => range.flags = 1 << rng.within(2, 31),
        2 => range.flags = rng.next() as u32,
        3 => {
            range.nmsrs = rng.pick([
                MAX_RANGE_MSRS + 1,
                MAX_RANGE_MSRS + 64,
                0x8000_0000,
                0xffff_ffc0,
                0xffff_ffc1,
                0xffff_ffe1,
                0xffff_ffff,
            ]);
            range.bitmap.truncate(0x600);
        }
        4..7 => {
            range.at = rng.pick([
                Place::Short,
                Place::Null,
                Place::Unmapped,
                Place::NonCanonical,
                Place::Short,
            ]);
        }
        7 => {
            // Enough bytes for the MSRs, and too few for whole longs.
            range.bitmap.truncate(range.nmsrs.div_ceil(8) as usize);
            range.at = Place::PageEnd;
        }
        _ => {
            range.nmsrs = 0;
            range.flags = rng.next() as u32;
            range.at = rng.pick([Place::Mapped, Place::NonCanonical, Place::Unmapped]);
        }
    }
}

fn argument_place(rng: &mut Rng) -> Place {
    rng.pick([
        Place::Mapped,
        Place::Mapped,
        Place::Unaligned,
        Place::PageEnd,
        Place::Short,
        Place::Null,
        Place::Unmapped,
        Place::NonCanonical,
    ])
}

fn descriptor(rng: &mut Rng) -> Descriptor {
    match rng.below(12) {
        0 => Descriptor::Vcpu,
        1 => Descriptor::System,
        _ => Descriptor::Vm,
    }
}

/// Accesses that tell `filter` from others, at most `most` of them: around every boundary, within, and at odd places.
pub(crate) fn accesses(rng: &mut Rng, filter: Option<&RawFilter>, most: usize) -> Vec<(Msr, Op)> {
    let mut msrs: Vec<u32> = Vec::new();
    for range in filter.into_iter().flat_map(RawFilter::used) {
        let end = range.base.wrapping_add(range.nmsrs);
        let inside = range.base.wrapping_add(rng.below(range.nmsrs.into()) as u32);
        msrs.extend([range.base.wrapping_sub(1), range.base, inside, end.wrapping_sub(1), end]);
    }
    let rest = most.saturating_sub(msrs.len() * 2).max(4);
    for _ in 0..rest {
        msrs.push(rng.pick(ODD));
    }
    let mut accesses: Vec<(Msr, Op)> = msrs
        .into_iter()
        .flat_map(|msr| Op::ALL.map(|op| (Msr(msr), op)))
        .collect();
    rng.shuffle(&mut accesses);
    accesses.truncate(most);
    accesses
}

/// A value that means nothing.
pub(crate) fn value(rng: &mut Rng) -> u64 {
    rng.next()
}

/// The access with its value, where it is a write.
pub(crate) fn access((msr, op): (Msr, Op), value: u64) -> Access {
    match op {
        Op::Read => Access::Read { msr },
        Op::Write => Access::Write { msr, value },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(seed: u64) -> impl Iterator<Item = (Call, RawFilter)> {
        (0..20_000).filter_map(move |item| {
            let call = call(&mut Rng::of(seed, item));
            match call.target.clone() {
                Target::SetMsrFilter(filter) => Some((call, filter)),
                Target::EnableCap { .. } => None,
            }
        })
    }

    #[test]
    fn a_seed_gives_the_same_calls_again() {
        assert!(filters(3).eq(filters(3)));
    }

    #[test]
    fn every_kind_of_oddity_comes_up() {
        let has = |what: &str, found: &dyn Fn(&Call, &RawFilter) -> bool| {
            let count = filters(1).filter(|(call, filter)| found(call, filter)).count();
            assert!(count >= 50, "{what}: {count}");
        };
        let range = |what: &str, found: &dyn Fn(&RawRange) -> bool| {
            has(what, &|_, filter| filter.ranges.iter().any(found));
        };
        has("unknown filter flags", &|_, filter| filter.flags > 1);
        has("an empty deny", &|_, filter| {
            filter.flags == 1 && filter.used().count() == 0
        });
        has("an empty allow", &|_, filter| {
            filter.flags == 0 && filter.used().count() == 0
        });
        has("16 ranges", &|_, filter| filter.used().count() == 16);
        has("padding", &|_, filter| filter.pad != 0);
        has("the compat number", &|_, filter| filter.layout.is_some());
        has("an argument that cannot be read", &|call, _| call.argp == Place::Short);
        has("another descriptor", &|call, _| call.on != Descriptor::Vm);
        range("no direction", &|range| range.flags == 0);
        range("one direction", &|range| range.flags == 1 || range.flags == 2);
        range("an unknown flag", &|range| range.flags > 3);
        range("a size too large", &|range| range.nmsrs > MAX_RANGE_MSRS);
        range("the largest size", &|range| range.nmsrs == MAX_RANGE_MSRS);
        range("an end that wraps", &|range| {
            range.nmsrs <= MAX_RANGE_MSRS && range.base.checked_add(range.nmsrs).is_none()
        });
        range("x2APIC", &|range| (0x7c0..0x940).contains(&range.base));
        range("a short bitmap", &|range| {
            range.at == Place::PageEnd && range.bitmap.len() % 8 != 0
        });
        for at in [Place::Unaligned, Place::Null, Place::Unmapped, Place::NonCanonical] {
            range("a place", &|range| range.at == at);
        }
    }
}
