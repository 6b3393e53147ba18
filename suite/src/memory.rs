//! The arguments of calls in binary, and a process's address space to put them in.

use msrgate_core::abi::{self, Layout};
use msrgate_engine::{Fault, UserMemory};

use crate::{Call, Place, Process, RawFilter, Target};

/// Bytes of a page.
pub(crate) const PAGE: usize = 0x1000;
/// An address that no process can have.
pub(crate) const NON_CANONICAL: u64 = 1 << 63;

impl Process {
    /// How it lays `struct kvm_msr_filter` out.
    pub(crate) const fn layout(self) -> Layout {
        match self {
            Process::Native => Layout::NATIVE,
            Process::Compat => Layout::COMPAT,
        }
    }
}

impl Call {
    /// The layout in which `process` makes the call.
    pub(crate) fn layout(&self, process: Process) -> Process {
        match &self.target {
            Target::SetMsrFilter(filter) => filter.layout.unwrap_or(process),
            Target::EnableCap { .. } => process,
        }
    }

    /// The number of the request.
    pub(crate) fn request(&self, process: Process) -> u32 {
        match (&self.target, self.layout(process)) {
            (Target::SetMsrFilter(_), Process::Native) => abi::SET_MSR_FILTER,
            (Target::SetMsrFilter(_), Process::Compat) => abi::SET_MSR_FILTER_COMPAT,
            (Target::EnableCap { .. }, _) => abi::ENABLE_CAP,
        }
    }

    /// The structure that the call takes; `bitmaps` says where the bitmap of each range lies.
    pub(crate) fn argument(&self, layout: Layout, bitmaps: &[u64]) -> Vec<u8> {
        match &self.target {
            Target::SetMsrFilter(filter) => filter.bytes(layout, bitmaps),
            Target::EnableCap { cap, flags, args } => {
                // `pad` of the structure is not read, so it holds what nobody should read.
                let mut bytes = vec![0xff; 104];
                put(&mut bytes, 0, &cap.to_le_bytes());
                put(&mut bytes, 4, &flags.to_le_bytes());
                for (arg, at) in args.iter().zip((8..).step_by(8)) {
                    put(&mut bytes, at, &arg.to_le_bytes());
                }
                bytes
            }
        }
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
                pointer.get(..layout.pointer_size).unwrap_or_default(),
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

/// Where in two pages, of which the second cannot be read, `len` bytes lie; `None` where they are to lie elsewhere.
pub(crate) fn offset(place: Place, len: usize) -> Option<usize> {
    match place {
        Place::Mapped => Some(0),
        Place::Unaligned => Some(1),
        Place::PageEnd => PAGE.checked_sub(len),
        Place::Short => (PAGE + 1).checked_sub(len),
        Place::Unmapped => Some(PAGE),
        Place::Null | Place::NonCanonical => None,
    }
}

/// A process's address space: single readable pages with a gap behind each.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Memory {
    pages: Vec<Vec<u8>>,
}

/// Where the first page lies; they are one apart, and all fit a 32-bit pointer.
const FIRST: u64 = 0x10_0000;

impl Memory {
    /// Puts bytes at a place, and says at which address that is.
    pub(crate) fn place(&mut self, bytes: &[u8], place: Place) -> u64 {
        let Some(offset) = offset(place, bytes.len()) else {
            return if place == Place::Null { 0 } else { NON_CANONICAL };
        };
        let mut page = vec![0; PAGE];
        put(&mut page, offset, bytes);
        let address = FIRST + (self.pages.len() * 2 * PAGE + offset) as u64;
        self.pages.push(page);
        address
    }

    /// Makes each byte its complement.
    pub(crate) fn invert(&mut self) {
        self.pages.iter_mut().flatten().for_each(|byte| *byte = !*byte);
    }
}

impl UserMemory for Memory {
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let within = address
            .checked_sub(FIRST)
            .and_then(|at| usize::try_from(at).ok())
            .ok_or(Fault)?;
        let (page, offset) = (within / PAGE, within % PAGE);
        let page = (page % 2 == 0).then(|| self.pages.get(page / 2)).flatten();
        let bytes = page.and_then(|page| page.get(offset..)?.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or(Fault)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_behind_a_page_cannot_be_read() {
        let mut memory = Memory::default();
        let at = memory.place(&[1, 2, 3], Place::PageEnd);
        assert!(memory.read(at, &mut [0; 3]).is_ok());
        assert!(memory.read(at, &mut [0; 4]).is_err());
        let at = memory.place(&[1, 2, 3], Place::Short);
        assert!(memory.read(at, &mut [0; 2]).is_ok());
        assert!(memory.read(at, &mut [0; 3]).is_err());
        for place in [Place::Null, Place::Unmapped, Place::NonCanonical] {
            let at = memory.place(&[1], place);
            assert!(memory.read(at, &mut [0; 1]).is_err(), "{place:?}");
        }
    }
}
