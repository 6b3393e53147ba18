//! A raw call: its argument in numbers, in memory, and as a case file writes it.

use std::fmt;

use msrgate_core::abi::{self, Layout};
use msrgate_core::{Msr, Ops};
use msrgate_engine::Descriptor;
use msrgate_guest::raw::{Arena, Request};

/// A system call on one of KVM's descriptors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Call {
    pub(crate) target: Target,
    pub(crate) on: Descriptor,
    /// Where the argument lies.
    pub(crate) argp: Place,
}

/// A call and its argument.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    Filter(RawFilter),
    Cap { cap: u32, flags: u32, args: [u64; 4] },
}

/// `struct kvm_msr_filter`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct RawFilter {
    pub(crate) flags: u32,
    /// What each byte of padding holds.
    pub(crate) pad: u8,
    /// Whether it has the layout and the number of a 32-bit process.
    pub(crate) compat: bool,
    /// The slots that are not all zeros, in order.
    pub(crate) ranges: Vec<RawRange>,
}

/// `struct kvm_msr_filter_range`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct RawRange {
    pub(crate) slot: usize,
    pub(crate) flags: u32,
    pub(crate) nmsrs: u32,
    pub(crate) base: u32,
    /// What lies where `bitmap` points; zeros follow.
    pub(crate) bitmap: Vec<u8>,
    pub(crate) at: Place,
}

/// Where something lies in the caller's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// Aligned.
    Mapped,
    /// At an odd address.
    Unaligned,
    /// Its last byte is the last that can be read.
    PageEnd,
    /// Its last byte cannot be read.
    Short,
    /// At address 0.
    Null,
    /// At an address that cannot be read.
    Unmapped,
    /// At an address that no process can have.
    NonCanonical,
}

/// Pages that a call needs at most: the argument and 16 bitmaps.
pub(crate) const PAGES: usize = 1 + abi::MAX_RANGES;

impl Call {
    /// KVM_X86_SET_MSR_FILTER on the VM.
    pub(crate) fn filter(filter: RawFilter) -> Call {
        Call {
            target: Target::Filter(filter),
            on: Descriptor::Vm,
            argp: Place::Mapped,
        }
    }

    /// KVM_ENABLE_CAP of a mask of exit reasons on the VM.
    pub(crate) fn mask(mask: u64, argp: Place) -> Call {
        Call {
            target: Target::Cap {
                cap: abi::CAP_X86_USER_SPACE_MSR,
                flags: 0,
                args: [mask, 0, 0, 0],
            },
            on: Descriptor::Vm,
            argp,
        }
    }

    /// Writes the argument and its bitmaps to `arena`, each to a page of its own, and says what to call.
    pub(crate) fn place(&self, arena: &mut Arena) -> (Request, u64) {
        let (request, argument) = match &self.target {
            Target::Filter(filter) => {
                let (request, layout) = if filter.compat {
                    (Request::SetMsrFilterCompat, Layout::COMPAT)
                } else {
                    (Request::SetMsrFilter, Layout::NATIVE)
                };
                let bitmaps: Vec<u64> = filter
                    .ranges
                    .iter()
                    .zip(1..)
                    .map(|(range, page)| place(arena, page, &range.bitmap, range.at))
                    .collect();
                (request, filter.bytes(layout, &bitmaps))
            }
            Target::Cap { cap, flags, args } => {
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

    /// Allows what no range denies.
    pub(crate) fn allowing(ranges: Vec<RawRange>) -> RawFilter {
        RawFilter {
            flags: 0,
            pad: 0,
            compat: false,
            ranges,
        }
    }

    /// The ranges that the kernel looks at.
    pub(crate) fn used(&self) -> impl Iterator<Item = &RawRange> {
        self.ranges.iter().filter(|range| range.nmsrs != 0)
    }
}

impl RawRange {
    /// One MSR, denied in these directions.
    pub(crate) fn denying(slot: usize, msr: Msr, ops: Ops) -> RawRange {
        RawRange {
            slot,
            flags: ops.bits(),
            nmsrs: 1,
            base: msr.0,
            bitmap: vec![0; 8],
            at: Place::Mapped,
        }
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

/// As a step of a case file, without its braces and without what is expected.
impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Filter(filter) => write!(f, "set_msr_filter = {{ {filter} }}")?,
            Target::Cap { cap, flags, args } => {
                let [mask, more @ ..] = args;
                write!(f, "enable_cap = \"{mask:#x}\"")?;
                if *cap != abi::CAP_X86_USER_SPACE_MSR {
                    write!(f, ", cap = {cap}")?;
                }
                if *flags != 0 {
                    write!(f, ", flags = {flags:#x}")?;
                }
                if *more != [0; 3] {
                    let [a, b, c] = more;
                    write!(f, ", more_args = [\"{a:#x}\", \"{b:#x}\", \"{c:#x}\"]")?;
                }
            }
        }
        match self.on {
            Descriptor::Vm => {}
            Descriptor::Vcpu => f.write_str(", on = \"vcpu\"")?,
            Descriptor::System => f.write_str(", on = \"system\"")?,
        }
        if self.argp != Place::Mapped {
            write!(f, ", argp = \"{}\"", self.argp.name())?;
        }
        Ok(())
    }
}

impl fmt::Display for RawFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "flags = {:#x}", self.flags)?;
        if self.pad != 0 {
            write!(f, ", pad = {:#x}", self.pad)?;
        }
        if self.compat {
            f.write_str(", layout = \"compat\"")?;
        }
        if self.ranges.is_empty() {
            return Ok(());
        }
        f.write_str(", ranges = [")?;
        for range in &self.ranges {
            write!(
                f,
                "\n    {{ slot = {}, flags = {:#x}, nmsrs = {:#x}, base = {:#x}",
                range.slot, range.flags, range.nmsrs, range.base
            )?;
            if !range.bitmap.is_empty() {
                write!(f, ", bitmap = \"{}\"", hex(&range.bitmap))?;
            }
            if range.at != Place::Mapped {
                write!(f, ", at = \"{}\"", range.at.name())?;
            }
            f.write_str(" },")?;
        }
        f.write_str(" ]")
    }
}

impl Place {
    const fn name(self) -> &'static str {
        match self {
            Place::Mapped => "mapped",
            Place::Unaligned => "unaligned",
            Place::PageEnd => "page-end",
            Place::Short => "short",
            Place::Null => "null",
            Place::Unmapped => "unmapped",
            Place::NonCanonical => "non-canonical",
        }
    }
}

/// Bytes in hexadecimal; of equal ones one, with how often.
fn hex(bytes: &[u8]) -> String {
    let runs: Vec<String> = bytes
        .chunk_by(|a, b| a == b)
        .map(|run| match run {
            [byte] => format!("{byte:02x}"),
            [byte, ..] => format!("{byte:02x}*{}", run.len()),
            [] => String::new(),
        })
        .collect();
    runs.join(" ")
}

#[cfg(test)]
mod tests {
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
            compat: false,
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
