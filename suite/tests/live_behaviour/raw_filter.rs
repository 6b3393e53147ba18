//! Arguments of calls, in binary, in memory.

use msrgate_core::abi::{self, Layout};
use msrgate_core::{Filter, Verdict};
use msrgate_guest::raw::Arena;

/// A slot of `struct kvm_msr_filter`.
#[derive(Clone, Debug)]
pub(crate) struct Range {
    pub(crate) flags: u32,
    pub(crate) nmsrs: u32,
    pub(crate) base: u32,
    pub(crate) bitmap: Vec<u8>,
}

impl Range {
    /// The filter's flags and slots.
    pub(crate) fn all_of(filter: &Filter) -> (u32, Vec<Range>) {
        let flags = match filter.default_verdict() {
            Verdict::Allow => 0,
            Verdict::Deny => abi::FILTER_DEFAULT_DENY,
        };
        let ranges = filter.ranges().iter().map(|range| Range {
            flags: range.ops().bits(),
            nmsrs: range.nmsrs(),
            base: range.base(),
            bitmap: range.bitmap_bytes().to_vec(),
        });
        (flags, ranges.collect())
    }
}

/// A `struct kvm_msr_filter` in memory, and where.
pub(crate) fn filter(flags: u32, ranges: &[Range]) -> (Arena, u64) {
    let bitmaps: Vec<&[u8]> = ranges.iter().map(|range| range.bitmap.as_slice()).collect();
    let (mut arena, argp) = placed(&[], &bitmaps);
    let addresses: Vec<u64> = (1..=ranges.len()).map(|page| arena.address(page).unwrap()).collect();
    let page = arena.page(0).unwrap();
    page[..4].copy_from_slice(&flags.to_le_bytes());
    let layout = Layout::NATIVE;
    for ((range, address), slot) in ranges.iter().zip(addresses).zip(0..) {
        let slot = &mut page[layout.ranges + slot * layout.range_size..];
        slot[..4].copy_from_slice(&range.flags.to_le_bytes());
        slot[4..8].copy_from_slice(&range.nmsrs.to_le_bytes());
        slot[8..12].copy_from_slice(&range.base.to_le_bytes());
        slot[16..24].copy_from_slice(&address.to_le_bytes());
    }
    (arena, argp)
}

/// A `struct kvm_enable_cap`.
pub(crate) fn capability(cap: u32, flags: u32, mask: u64) -> Vec<u8> {
    let mut bytes = vec![0; 104];
    bytes[..4].copy_from_slice(&cap.to_le_bytes());
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..16].copy_from_slice(&mask.to_le_bytes());
    bytes
}

/// Bytes on the first page, the others on those behind it, and where the first lie.
pub(crate) fn placed(bytes: &[u8], others: &[&[u8]]) -> (Arena, u64) {
    let mut arena = Arena::new(1 + others.len()).unwrap();
    for (page, bytes) in [bytes].iter().chain(others).enumerate() {
        arena.page(page).unwrap()[..bytes.len()].copy_from_slice(bytes);
    }
    let argp = arena.address(0).unwrap();
    (arena, argp)
}
