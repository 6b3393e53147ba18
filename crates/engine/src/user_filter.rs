//! `struct kvm_msr_filter` from user memory, checked in the kernel's order.

use alloc::boxed::Box;
use alloc::vec::Vec;

use msrgate_core::abi::{self, Layout};
use msrgate_core::{Filter, FilterRange, Ops, Verdict};

use crate::profile::{RangeFlags, Replacement, ReservedBits};
use crate::{Errno, Profile, UserMemory};

/// What KVM_X86_SET_MSR_FILTER builds from `argp` (`kvm_vm_ioctl_set_msr_filter`, `kvm_add_msr_filter`), and what the
/// call gives; where there is only an error, the filter before stays. The first fault in the kernel's order decides the
/// error.
pub(crate) fn copy_filter(
    argp: u64,
    layout: Layout,
    profile: &Profile,
    memory: &impl UserMemory,
) -> Result<(Filter, Result<(), Errno>), Errno> {
    if layout != Layout::NATIVE && layout != Layout::COMPAT {
        return Err(Errno::Efault);
    }
    let mut bytes = [0; Layout::NATIVE.filter_size];
    let bytes = bytes.get_mut(..layout.filter_size).ok_or(Errno::Efault)?;
    memory.read(argp, bytes)?;
    let flags = word(bytes, 0)?;
    if profile.reserved_bits == ReservedBits::Refused && flags & !abi::FILTER_DEFAULT_DENY != 0 {
        return Err(Errno::Einval);
    }
    let default = if flags & abi::FILTER_DEFAULT_DENY != 0 {
        Verdict::Deny
    } else {
        Verdict::Allow
    };
    let mut slots = [Slot::default(); abi::MAX_RANGES];
    for (slot, at) in slots.iter_mut().zip((layout.ranges..).step_by(layout.range_size)) {
        *slot = Slot::parse(bytes, at, layout)?;
    }
    let used = || slots.iter().filter(|slot| slot.nmsrs != 0);
    if used().count() == 0 && default == Verdict::Deny {
        return Err(Errno::Einval);
    }
    let mut ranges = Vec::new();
    ranges.try_reserve_exact(used().count()).map_err(|_| Errno::Enomem)?;
    for slot in used() {
        match slot.range(profile.range_flags, memory) {
            Ok(range) => ranges.push(range),
            Err(errno) if profile.replacement == Replacement::Piecewise => {
                // Without a range that kernel allowed everything, and there is no filter that denies everything.
                let left = Filter::new(default, ranges).unwrap_or(Filter::allow_all());
                return Ok((left, Err(errno)));
            }
            Err(errno) => return Err(errno),
        }
    }
    let filter = Filter::new(default, ranges).map_err(|_| Errno::Einval)?;
    Ok((filter, Ok(())))
}

/// One element of `ranges`. Nothing but `nmsrs` is looked at where that is 0.
#[derive(Clone, Copy, Default)]
struct Slot {
    flags: u32,
    nmsrs: u32,
    base: u32,
    bitmap: u64,
}

impl Slot {
    fn parse(bytes: &[u8], at: usize, layout: Layout) -> Result<Slot, Errno> {
        let low = word(bytes, at + layout.bitmap)?;
        let high = if layout.pointer_size == 8 {
            word(bytes, at + layout.bitmap + 4)?
        } else {
            0
        };
        Ok(Slot {
            flags: word(bytes, at)?,
            nmsrs: word(bytes, at + 4)?,
            base: word(bytes, at + 8)?,
            bitmap: u64::from(high) << 32 | u64::from(low),
        })
    }

    fn range(self, flags: RangeFlags, memory: &impl UserMemory) -> Result<FilterRange, Errno> {
        let ops = Ops::from_bits(self.flags).filter(|ops| !ops.is_empty());
        if flags == RangeFlags::First && ops.is_none() || self.nmsrs > abi::MAX_RANGE_MSRS {
            return Err(Errno::Einval);
        }
        // Whole longs are copied, whatever `nmsrs` leaves of the last.
        let words = self.nmsrs.div_ceil(64) as usize;
        let mut bitmap = Vec::new();
        bitmap.try_reserve_exact(words).map_err(|_| Errno::Enomem)?;
        let mut bytes = [0; abi::MAX_BITMAP_BYTES as usize];
        let bytes = bytes.get_mut(..words * 8).ok_or(Errno::Einval)?;
        memory.read(self.bitmap, bytes)?;
        bitmap.extend(bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)));
        let bitmap: Box<[u64]> = bitmap.into();
        FilterRange::new(self.base, self.nmsrs, ops.ok_or(Errno::Einval)?, bitmap).map_err(|_| Errno::Einval)
    }
}

/// The little-endian word at `at`. It lies within `bytes` for both layouts that exist.
pub(crate) fn word(bytes: &[u8], at: usize) -> Result<u32, Errno> {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk).ok_or(Errno::Efault)?;
    Ok(u32::from_le_bytes(*word))
}
