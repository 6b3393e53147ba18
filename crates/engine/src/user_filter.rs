//! `struct kvm_msr_filter` from user memory, checked in the kernel's order.

use alloc::vec::Vec;

use msrgate_core::Filter;
use msrgate_core::abi::{FILTER_DEFAULT_DENY, Layout, MAX_RANGES, RawFilter};

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
    let mut raw = RawFilter::from_bytes(bytes, layout).ok_or(Errno::Efault)?;
    if profile.reserved_bits == ReservedBits::Ignored {
        raw.flags &= FILTER_DEFAULT_DENY;
    }
    let default = raw.default_verdict()?;
    let mut read = |address, to: &mut [u8]| memory.read(address, to).is_ok();
    let mut ranges = Vec::new();
    ranges.try_reserve_exact(MAX_RANGES).map_err(|_| Errno::Enomem)?;
    for range in raw.used() {
        // Each bitmap is read once: its owner may change it in between.
        let built = match profile.range_flags {
            RangeFlags::First => range.range(&mut read),
            RangeFlags::Last => range.words(&mut read).and_then(|words| range.holding(words)),
        };
        match built {
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
