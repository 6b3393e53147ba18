//! A call's argument in numbers and in memory.

use msrgate_core::abi::{self, Layout};
use msrgate_engine::{Fault, Process, UserMemory};
use msrgate_guest::raw::{Arena, Request};

use super::{Call, Place, RawFilter, Target};

/// Pages that a call needs at most: the argument and 16 bitmaps.
pub const PAGES: usize = 1 + abi::MAX_RANGES;

/// The memory of an arena, for the engine's calls.
pub fn memory(arena: &Arena) -> impl UserMemory {
    |address: u64, to: &mut [u8]| match arena.read(address, to) {
        true => Ok(()),
        false => Err(Fault),
    }
}

impl Call {
    /// Writes the argument and its bitmaps to `arena`, each to a page of its own, as `process` does it, and says what to
    /// call. An arena of [`PAGES`] pages has room for any call.
    pub fn place(&self, process: Process, arena: &mut Arena) -> (Request, u64) {
        let (request, argument) = match &self.target {
            Target::SetMsrFilter(filter) => {
                let (request, layout) = match filter.layout.unwrap_or(process) {
                    Process::Native => (Request::SetMsrFilter, Layout::NATIVE),
                    Process::Compat => (Request::SetMsrFilterCompat, Layout::COMPAT),
                };
                let ranges = filter.ranges.iter().zip(1..);
                let bitmaps: Vec<u64> = ranges
                    .map(|(range, page)| place(arena, page, &range.bitmap, range.at))
                    .collect();
                (request, filter.bytes(layout, &bitmaps))
            }
            Target::EnableCap { cap, flags, args } => {
                // Nobody reads the rest of the structure.
                let mut bytes = vec![0xff; 104];
                put(&mut bytes, 0, &cap.to_le_bytes());
                put(&mut bytes, 4, &flags.to_le_bytes());
                for (arg, at) in args.iter().zip((8..).step_by(8)) {
                    put(&mut bytes, at, &arg.to_le_bytes());
                }
                (Request::EnableCap, bytes)
            }
        };
        (request, place(arena, 0, &argument, self.argp))
    }
}

impl RawFilter {
    fn bytes(&self, layout: Layout, bitmaps: &[u64]) -> Vec<u8> {
        let mut bytes = vec![self.pad; layout.filter_size];
        put(&mut bytes, 0, &self.flags.to_le_bytes());
        for slot in 0..abi::MAX_RANGES {
            let at = layout.ranges + slot * layout.range_size;
            let found = self.ranges.iter().zip(bitmaps).find(|(range, _)| range.slot == slot);
            let (flags, nmsrs, base, bitmap) = found.map_or((0, 0, 0, 0), |(range, bitmap)| {
                (range.flags, range.nmsrs, range.base, *bitmap)
            });
            put(&mut bytes, at, &flags.to_le_bytes());
            put(&mut bytes, at + 4, &nmsrs.to_le_bytes());
            put(&mut bytes, at + 8, &base.to_le_bytes());
            let pointer = bitmap.to_le_bytes();
            put(
                &mut bytes,
                at + layout.bitmap,
                pointer.get(..layout.pointer_size).unwrap_or(&pointer),
            );
        }
        bytes
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (byte, value) in bytes.iter_mut().skip(at).zip(value) {
        *byte = *value;
    }
}

/// Puts bytes at a place of a page, with zeros around them, and says at which address that is.
fn place(arena: &mut Arena, page: usize, bytes: &[u8], at: Place) -> u64 {
    let offset = match at {
        Place::Mapped => 0,
        Place::Unaligned => 1,
        Place::PageEnd => Arena::PAGE.saturating_sub(bytes.len()),
        Place::Short => (Arena::PAGE + 1).saturating_sub(bytes.len()),
        Place::Unmapped => Arena::PAGE,
        Place::Null => return 0,
        Place::NonCanonical => return 1 << 63,
    };
    if let Some(memory) = arena.page(page) {
        memory.fill(0);
        put(memory, offset, bytes);
    }
    arena.address(page).map_or(0, |address| address + offset as u64)
}

#[cfg(test)]
mod tests {
    use super::super::RawRange;
    use super::*;

    #[test]
    fn an_argument_lies_where_its_place_says() {
        let mut arena = Arena::new(1).unwrap();
        for (at, reads, fails) in [
            (Place::Mapped, 4, None),
            (Place::Unaligned, 4, None),
            (Place::PageEnd, 3, Some(4)),
            (Place::Short, 2, Some(3)),
            (Place::Null, 0, Some(1)),
            (Place::Unmapped, 0, Some(1)),
            (Place::NonCanonical, 0, Some(1)),
        ] {
            let address = place(&mut arena, 0, &[1, 2, 3], at);
            let mut bytes = [9; 8];
            if reads > 0 {
                assert!(arena.read(address, &mut bytes[..reads]), "{at:?}");
                assert_eq!(bytes[..2], [1, 2], "{at:?}");
            }
            if let Some(fails) = fails {
                assert!(!arena.read(address, &mut bytes[..fails]), "{at:?}");
            }
            assert_eq!(
                address % 2 == 1,
                matches!(at, Place::Unaligned | Place::PageEnd),
                "{at:?}"
            );
        }
    }

    #[test]
    fn slots_lie_where_both_layouts_have_them() {
        let filter = RawFilter {
            flags: 0x0101,
            pad: 0xee,
            layout: None,
            edited: false,
            ranges: vec![RawRange {
                slot: 15,
                flags: 3,
                nmsrs: 0x1234,
                base: 0x5678,
                bitmap: vec![],
                at: Place::Mapped,
            }],
        };
        let native = filter.bytes(Layout::NATIVE, &[0x1122_3344_5566_7788]);
        assert_eq!(native.len(), 392);
        assert_eq!(native[..8], [1, 1, 0, 0, 0xee, 0xee, 0xee, 0xee]);
        assert_eq!(native[368..380], [3, 0, 0, 0, 0x34, 0x12, 0, 0, 0x78, 0x56, 0, 0]);
        assert_eq!(
            native[380..],
            [0xee, 0xee, 0xee, 0xee, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]
        );
        let compat = filter.bytes(Layout::COMPAT, &[0x1122_3344_5566_7788]);
        assert_eq!(compat.len(), 260);
        assert_eq!(compat[..4], [1, 1, 0, 0]);
        assert_eq!(compat[256..], [0x88, 0x77, 0x66, 0x55]);
    }
}
