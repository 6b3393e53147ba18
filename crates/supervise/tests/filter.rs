//! What a VMM's own filter is, by the checks that the supervisor makes and by the engine's.

use msrgate_core::abi::{Errno, Layout, RawFilter};
use msrgate_core::{Msr, Op};
use msrgate_engine::{Fault, Origin};
use proptest::prelude::*;

const LAYOUT: Layout = Layout::NATIVE;

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
        let mut structure = [0; LAYOUT.filter_size];
        let ours = match read(0, &mut structure) {
            true => RawFilter::from_bytes(&structure, LAYOUT).unwrap().filter(read),
            false => Err(Errno::Efault),
        };
        match (ours, theirs) {
            (Ok(filter), Ok(())) => {
                let bases = ranges.iter().map(|range| range.1);
                for msr in probes.into_iter().chain(bases).map(Msr) {
                    for op in Op::ALL {
                        let theirs = engine.allows(Origin::Instruction, msr, op);
                        prop_assert_eq!(filter.verdict(msr, op), theirs, "{} {}", op, msr);
                    }
                }
            }
            (Err(ours), Err(theirs)) => prop_assert_eq!(ours, theirs),
            (ours, theirs) => prop_assert!(false, "{ours:?} {theirs:?}"),
        }
    }
}
