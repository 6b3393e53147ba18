//! The VMM's `struct kvm_msr_filter`, checked in the kernel's order.

use libc::{EFAULT, EINVAL, c_int};
use msrgate_core::abi::{self, Layout};
use msrgate_core::{Filter, FilterRange, Ops, Verdict};

const LAYOUT: Layout = Layout::NATIVE;

/// What KVM_X86_SET_MSR_FILTER would build from `address` (`kvm_vm_ioctl_set_msr_filter`, `kvm_add_msr_filter`), or its
/// errno. `read` copies from the VMM's memory.
pub(crate) fn copy(address: u64, read: &mut dyn FnMut(u64, &mut [u8]) -> bool) -> Result<Filter, c_int> {
    let mut bytes = [0; LAYOUT.filter_size];
    if !read(address, &mut bytes) {
        return Err(EFAULT);
    }
    let flags = word(&bytes, 0)?;
    if flags & !abi::FILTER_DEFAULT_DENY != 0 {
        return Err(EINVAL);
    }
    let default = match flags {
        0 => Verdict::Allow,
        _ => Verdict::Deny,
    };
    let mut slots = Vec::new();
    for at in (LAYOUT.ranges..).step_by(LAYOUT.range_size).take(abi::MAX_RANGES) {
        // Nothing of a slot is looked at but `nmsrs` where that is 0.
        if word(&bytes, at + 4)? != 0 {
            slots.push(at);
        }
    }
    if slots.is_empty() && default == Verdict::Deny {
        return Err(EINVAL);
    }
    let ranges = slots.into_iter().map(|at| range(&bytes, at, read));
    let ranges = ranges.collect::<Result<Vec<FilterRange>, c_int>>()?;
    Filter::new(default, ranges).map_err(|_| EINVAL)
}

fn range(bytes: &[u8], at: usize, read: &mut dyn FnMut(u64, &mut [u8]) -> bool) -> Result<FilterRange, c_int> {
    let ops = Ops::from_bits(word(bytes, at)?).ok_or(EINVAL)?;
    let nmsrs = word(bytes, at + 4)?;
    if ops.is_empty() || nmsrs > abi::MAX_RANGE_MSRS {
        return Err(EINVAL);
    }
    let base = word(bytes, at + 8)?;
    let low = word(bytes, at + LAYOUT.bitmap)?;
    let high = word(bytes, at + LAYOUT.bitmap + 4)?;
    // Whole longs are copied, whatever `nmsrs` leaves of the last.
    let mut bitmap = vec![0; nmsrs.div_ceil(64) as usize * 8];
    if !read(u64::from(high) << 32 | u64::from(low), &mut bitmap) {
        return Err(EFAULT);
    }
    let words: Vec<u64> = bitmap
        .as_chunks()
        .0
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .collect();
    FilterRange::new(base, nmsrs, ops, words).map_err(|_| EINVAL)
}

/// The little-endian word at `at`, which lies within `bytes` for every field of the layout.
pub(crate) fn word(bytes: &[u8], at: usize) -> Result<u32, c_int> {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk).ok_or(EFAULT)?;
    Ok(u32::from_le_bytes(*word))
}
