//! Arguments of calls, in binary, in memory.

use msrgate_core::{Filter, Verdict, abi};
use msrgate_guest::raw::Arena;
use msrgate_suite::{Call, Place, Process, RawFilter, RawRange};
use msrgate_verify::case::PAGES;

/// The call that puts this filter in force.
pub(crate) fn setting(filter: &Filter) -> Call {
    let flags = match filter.default_verdict() {
        Verdict::Allow => 0,
        Verdict::Deny => abi::FILTER_DEFAULT_DENY,
    };
    let ranges = filter.ranges().iter().map(|range| {
        self::range(
            range.ops().bits(),
            range.nmsrs(),
            range.base(),
            range.bitmap_bytes().to_vec(),
        )
    });
    set_filter(flags, ranges)
}

/// KVM_X86_SET_MSR_FILTER with these slots from the first on.
pub(crate) fn set_filter(flags: u32, ranges: impl IntoIterator<Item = RawRange>) -> Call {
    let slots = ranges.into_iter().enumerate();
    let ranges = slots.map(|(slot, range)| RawRange { slot, ..range });
    Call::set_msr_filter(RawFilter {
        flags,
        ..RawFilter::allowing(ranges.collect())
    })
}

/// A slot.
pub(crate) fn range(flags: u32, nmsrs: u32, base: u32, bitmap: Vec<u8>) -> RawRange {
    RawRange {
        slot: 0,
        flags,
        nmsrs,
        base,
        bitmap,
        at: Place::Mapped,
    }
}

/// A call's argument in memory, and where.
pub(crate) fn placed(call: &Call) -> (Arena, u64) {
    let mut arena = Arena::new(PAGES).unwrap();
    let (_, argp) = call.place(Process::Native, &mut arena);
    (arena, argp)
}
