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

#[cfg(test)]
mod tests {
    use msrgate_core::{Msr, Op};
    use msrgate_engine::{Fault, Origin};
    use proptest::prelude::*;

    use super::*;

    /// The VMM's structure and bitmaps, from address 0 on; a bitmap may be shorter than the kernel reads.
    fn laid_out(flags: u32, ranges: &[(u32, u32, u32, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0; LAYOUT.filter_size];
        bytes[..4].copy_from_slice(&flags.to_le_bytes());
        for (slot, (ops, base, nmsrs, bitmap)) in ranges.iter().enumerate() {
            let at = LAYOUT.ranges + slot * LAYOUT.range_size;
            let address = bytes.len() as u64;
            for (field, value) in [(0, ops), (4, nmsrs), (8, base)] {
                bytes[at + field..][..4].copy_from_slice(&value.to_le_bytes());
            }
            bytes[at + LAYOUT.bitmap..][..8].copy_from_slice(&address.to_le_bytes());
            bytes.extend(bitmap);
        }
        bytes
    }

    proptest! {
        /// Differs from the engine's reading of the same bytes in nothing.
        #[test]
        fn a_filter_is_read_as_the_engine_reads_it(
            flags in prop_oneof![9 => 0..2_u32, 1 => any::<u32>()],
            ranges in prop::collection::vec((
                prop_oneof![9 => 1..4_u32, 1 => any::<u32>()],
                prop_oneof![0..0x100_u32, any::<u32>()],
                prop_oneof![8 => 0..200_u32, 1 => 12280..12300_u32, 1 => any::<u32>()],
                prop::collection::vec(any::<u8>(), 0..40),
            ), 0..5),
            probes in prop::collection::vec(0..0x180_u32, 20),
            cut in prop_oneof![4 => Just(0_usize), 1 => 0..400_usize],
        ) {
            let mut memory = laid_out(flags, &ranges);
            memory.truncate(memory.len().saturating_sub(cut));
            let read = |at: u64, to: &mut [u8]| {
                let from = memory.get(at as usize..).and_then(|rest| rest.get(..to.len()));
                from.inspect(|from| to.copy_from_slice(from)).is_some()
            };
            let engine = msrgate_engine::Vm::new();
            let theirs = engine.set_msr_filter(0, LAYOUT, &|at, to: &mut [u8]| {
                if read(at, to) { Ok(()) } else { Err(Fault) }
            });
            match (copy(0, &mut { read }), theirs) {
                (Ok(filter), Ok(())) => {
                    let bases = ranges.iter().map(|range| range.1);
                    for msr in probes.into_iter().chain(bases).map(Msr) {
                        for op in Op::ALL {
                            let theirs = engine.allows(Origin::Instruction, msr, op);
                            prop_assert_eq!(filter.verdict(msr, op), theirs, "{} {}", op, msr);
                        }
                    }
                }
                (Err(ours), Err(theirs)) => prop_assert_eq!(ours, theirs as c_int),
                (ours, theirs) => prop_assert!(false, "{ours:?} {theirs:?}"),
            }
        }
    }
}
