//! A process that makes ioctls: its memory, and raw structures to put there.

use std::cell::RefCell;

use msrgate_core::abi::Layout;
use msrgate_engine::{Errno, Fault, UserMemory, Vm};

pub(crate) const LAYOUTS: [Layout; 2] = [Layout::NATIVE, Layout::COMPAT];
/// Where [`Process::set_msr_filter`] puts the structure.
pub(crate) const ARGP: u64 = 0x1000;
/// Mapped by [`Process::new`]: 1536 bytes of ones. Fits in a compat pointer.
pub(crate) const ONES: u64 = 0x10_0000;
/// Mapped by [`Process::new`]: 1536 bytes of zeros.
pub(crate) const ZEROS: u64 = 0x20_0000;
/// Not mapped.
pub(crate) const WILD: u64 = 0xdead_0000;

pub(crate) const DENY: u32 = 1;
pub(crate) const READ: u32 = 1;
pub(crate) const WRITE: u32 = 2;
pub(crate) const BOTH: u32 = 3;

/// One `struct kvm_msr_filter_range`.
#[derive(Clone, Copy, Default)]
pub(crate) struct RawRange {
    pub(crate) flags: u32,
    pub(crate) nmsrs: u32,
    pub(crate) base: u32,
    pub(crate) bitmap: u64,
}

pub(crate) fn range(flags: u32, base: u32, nmsrs: u32, bitmap: u64) -> RawRange {
    RawRange {
        flags,
        nmsrs,
        base,
        bitmap,
    }
}

/// One `struct kvm_msr_filter`.
#[derive(Clone, Copy, Default)]
pub(crate) struct RawFilter {
    pub(crate) flags: u32,
    pub(crate) ranges: [RawRange; 16],
    /// What every padding byte holds.
    pub(crate) padding: u8,
}

impl RawFilter {
    pub(crate) fn new(flags: u32, ranges: &[RawRange]) -> RawFilter {
        let mut filter = RawFilter {
            flags,
            ..RawFilter::default()
        };
        filter.ranges[..ranges.len()].copy_from_slice(ranges);
        filter
    }

    pub(crate) fn to_bytes(self, layout: Layout) -> Vec<u8> {
        let mut bytes = vec![self.padding; layout.filter_size];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.flags.to_le_bytes());
        for (slot, range) in self.ranges.iter().enumerate() {
            let at = layout.ranges + slot * layout.range_size;
            put(at, &range.flags.to_le_bytes());
            put(at + 4, &range.nmsrs.to_le_bytes());
            put(at + 8, &range.base.to_le_bytes());
            put(at + layout.bitmap, &range.bitmap.to_le_bytes()[..layout.pointer_size]);
        }
        bytes
    }
}

/// Mappings, and a record of what was read.
pub(crate) struct Process {
    maps: Vec<(u64, Vec<u8>)>,
    pub(crate) reads: RefCell<Vec<(u64, usize)>>,
}

impl Process {
    pub(crate) fn new() -> Process {
        Process {
            maps: vec![(ONES, vec![0xff; 1536]), (ZEROS, vec![0; 1536])],
            reads: RefCell::default(),
        }
    }

    pub(crate) fn map(mut self, address: u64, bytes: impl Into<Vec<u8>>) -> Process {
        self.maps.insert(0, (address, bytes.into()));
        self
    }

    /// Puts the structure at [`ARGP`] and makes the call.
    pub(crate) fn set_msr_filter(self, vm: &Vm, layout: Layout, filter: RawFilter) -> Result<(), Errno> {
        let process = self.map(ARGP, filter.to_bytes(layout));
        vm.set_msr_filter(ARGP, layout, &process)
    }
}

impl UserMemory for Process {
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), Fault> {
        self.reads.borrow_mut().push((address, buf.len()));
        let found = self.maps.iter().find_map(|(start, bytes)| {
            let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(offset..)?.get(..buf.len())
        });
        buf.copy_from_slice(found.ok_or(Fault)?);
        Ok(())
    }
}
