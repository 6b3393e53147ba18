//! `struct kvm_msr_filter`, and what KVM makes of it.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::{Errno, FILTER_DEFAULT_DENY, MAX_BITMAP_BYTES, MAX_RANGE_MSRS, MAX_RANGES, long, put, word};
use crate::{Filter, FilterRange, Ops, Verdict};

/// The two layouts of `struct kvm_msr_filter`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Bytes of the whole structure.
    pub filter_size: usize,
    /// Offset of the first range.
    pub ranges: usize,
    /// Bytes of one range.
    pub range_size: usize,
    /// Offset of the bitmap pointer in a range; `flags`, `nmsrs` and `base` lie at 0, 4 and 8 in both layouts.
    pub bitmap: usize,
    /// Bytes of the bitmap pointer.
    pub pointer_size: usize,
}

impl Layout {
    /// A 64-bit process: 392 bytes.
    pub const NATIVE: Layout = Layout {
        filter_size: 392,
        ranges: 8,
        range_size: 24,
        bitmap: 16,
        pointer_size: 8,
    };
    /// A 32-bit process: 260 bytes.
    pub const COMPAT: Layout = Layout {
        filter_size: 260,
        ranges: 4,
        range_size: 16,
        bitmap: 12,
        pointer_size: 4,
    };
}

const _: () = assert!(Layout::NATIVE.ranges + MAX_RANGES * Layout::NATIVE.range_size == Layout::NATIVE.filter_size);
const _: () = assert!(Layout::COMPAT.ranges + MAX_RANGES * Layout::COMPAT.range_size == Layout::COMPAT.filter_size);

/// `struct kvm_msr_filter`: numbers that nobody has checked.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RawFilter {
    /// `KVM_MSR_FILTER_DEFAULT_DENY`, or 0.
    pub flags: u32,
    /// All slots; one whose `nmsrs` is 0 is not used, and nothing else of it is looked at.
    pub ranges: [RawRange; MAX_RANGES],
}

/// `struct kvm_msr_filter_range`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RawRange {
    /// The directions, as [`Ops::bits`].
    pub flags: u32,
    /// How many MSRs.
    pub nmsrs: u32,
    /// The first.
    pub base: u32,
    /// The address of the bitmap.
    pub bitmap: u64,
}

impl RawFilter {
    /// A filter whose bitmaps lie where `address` says of each range.
    pub fn of(filter: &Filter, mut address: impl FnMut(&FilterRange) -> u64) -> RawFilter {
        let mut raw = RawFilter {
            flags: match filter.default_verdict() {
                Verdict::Allow => 0,
                Verdict::Deny => FILTER_DEFAULT_DENY,
            },
            ..RawFilter::default()
        };
        for (slot, range) in raw.ranges.iter_mut().zip(filter.ranges()) {
            *slot = RawRange {
                flags: range.ops().bits(),
                nmsrs: range.nmsrs(),
                base: range.base(),
                bitmap: address(range),
            };
        }
        raw
    }

    /// Reads the structure; `None` where there are not as many bytes as it has.
    pub fn from_bytes(bytes: &[u8], layout: Layout) -> Option<RawFilter> {
        let bytes = bytes.get(..layout.filter_size)?;
        let mut raw = RawFilter {
            flags: word(bytes, 0),
            ..RawFilter::default()
        };
        for (slot, at) in raw.ranges.iter_mut().zip((layout.ranges..).step_by(layout.range_size)) {
            *slot = RawRange {
                flags: word(bytes, at),
                nmsrs: word(bytes, at + 4),
                base: word(bytes, at + 8),
                bitmap: match layout.pointer_size {
                    8 => long(bytes, at + layout.bitmap),
                    _ => word(bytes, at + layout.bitmap).into(),
                },
            };
        }
        Some(raw)
    }

    /// The structure of a 64-bit process.
    pub fn to_bytes(&self) -> [u8; Layout::NATIVE.filter_size] {
        const LAYOUT: Layout = Layout::NATIVE;
        let mut bytes = [0; LAYOUT.filter_size];
        put(&mut bytes, 0, &self.flags.to_le_bytes());
        for (range, at) in self.ranges.iter().zip((LAYOUT.ranges..).step_by(LAYOUT.range_size)) {
            put(&mut bytes, at, &range.flags.to_le_bytes());
            put(&mut bytes, at + 4, &range.nmsrs.to_le_bytes());
            put(&mut bytes, at + 8, &range.base.to_le_bytes());
            put(&mut bytes, at + LAYOUT.bitmap, &range.bitmap.to_le_bytes());
        }
        bytes
    }

    /// The ranges that are used, in their order.
    pub fn used(&self) -> impl Iterator<Item = &RawRange> {
        self.ranges.iter().filter(|range| range.nmsrs != 0)
    }

    /// The default, as `kvm_vm_ioctl_set_msr_filter` checks it before it looks at a range.
    pub fn default_verdict(&self) -> Result<Verdict, Errno> {
        match self.flags {
            0 => Ok(Verdict::Allow),
            FILTER_DEFAULT_DENY if self.used().next().is_some() => Ok(Verdict::Deny),
            _ => Err(Errno::Einval),
        }
    }

    /// What KVM_X86_SET_MSR_FILTER of Linux 5.19 and newer makes of the structure, or its error: the first in the kernel's
    /// order (`kvm_vm_ioctl_set_msr_filter`, `kvm_add_msr_filter`). `read` copies from the caller's memory, all or nothing.
    pub fn filter(&self, mut read: impl FnMut(u64, &mut [u8]) -> bool) -> Result<Filter, Errno> {
        let default = self.default_verdict()?;
        let ranges = self.used().map(|range| range.range(&mut read));
        Filter::new(default, ranges.collect::<Result<Vec<_>, _>>()?).map_err(|_| Errno::Einval)
    }
}

impl RawRange {
    /// The range: its flags are checked first, then the length, and the bitmap is copied last.
    pub fn range(&self, read: impl FnMut(u64, &mut [u8]) -> bool) -> Result<FilterRange, Errno> {
        self.ops()?;
        self.holding(self.words(read)?)
    }

    /// The range of a bitmap that was copied already.
    pub fn holding(&self, words: Box<[u64]>) -> Result<FilterRange, Errno> {
        FilterRange::new(self.base, self.nmsrs, self.ops()?, words).map_err(|_| Errno::Einval)
    }

    fn ops(&self) -> Result<Ops, Errno> {
        let ops = Ops::from_bits(self.flags).filter(|ops| !ops.is_empty());
        ops.ok_or(Errno::Einval)
    }

    /// The bitmap: whole longs are copied, whatever `nmsrs` leaves of the last.
    pub fn words(&self, mut read: impl FnMut(u64, &mut [u8]) -> bool) -> Result<Box<[u64]>, Errno> {
        if self.nmsrs > MAX_RANGE_MSRS {
            return Err(Errno::Einval);
        }
        let count = self.nmsrs.div_ceil(64) as usize;
        let mut words = Vec::new();
        words.try_reserve_exact(count).map_err(|_| Errno::Enomem)?;
        let mut bytes = [0; MAX_BITMAP_BYTES as usize];
        let bytes = bytes.get_mut(..count * 8).ok_or(Errno::Einval)?;
        if !read(self.bitmap, bytes) {
            return Err(Errno::Efault);
        }
        words.extend(bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)));
        Ok(words.into())
    }
}
