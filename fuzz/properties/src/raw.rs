//! Filters in other forms, and other tools' words.

use msrgate_core::abi::Layout;
use msrgate_core::{Filter, Verdict};
use msrgate_engine::{Fault, Vm};
use msrgate_policy::foreign::{Format, import};
use msrgate_policy::raw::{self, RawFilter, RawRange};

use crate::input::Input;

pub(crate) fn check(bytes: &[u8]) {
    if let Ok(given) = raw::read(bytes) {
        let again = raw::read(in_json(&given.filter).as_bytes()).expect("a filter that was written");
        assert_eq!(again.filter, given.filter);
    }
    let text = String::from_utf8_lossy(bytes);
    for format in [Format::Crosvm, Format::Firecracker, Format::MsrSafe] {
        if let Ok(imported) = import(format, &text) {
            let policy = imported.to_string();
            let read = msrgate_policy::Policy::parse("imported.toml", &policy);
            assert!(read.is_ok(), "{policy}\n{:#?}", read.err());
        }
    }
    is_refused_as_the_engine_refuses(&filter(&mut Input::new(bytes)));
}

fn in_json(filter: &Filter) -> String {
    let ranges = filter.ranges().iter().map(|range| {
        let bitmap: String = range.bitmap_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let (base, nmsrs, flags) = (range.base(), range.nmsrs(), range.ops().bits());
        format!("{{\"base\":{base},\"nmsrs\":{nmsrs},\"flags\":{flags},\"bitmap\":\"{bitmap}\"}}")
    });
    let flags = u32::from(filter.default_verdict() == Verdict::Deny);
    format!(
        "{{\"flags\":{flags},\"ranges\":[{}]}}",
        ranges.collect::<Vec<_>>().join(",")
    )
}

/// A structure that is often just right or just wrong.
fn filter(input: &mut Input<'_>) -> RawFilter {
    let flags = input.u32_or(&[0, 1, 0, 1, 2, 3]);
    let count = input.byte() % 17;
    let ranges = (0..count.min(16)).map(|_| {
        let nmsrs = input.u32_or(&[0, 1, 63, 64, 65, 12287, 12288, 12289]);
        let needed = nmsrs.min(20_000).div_ceil(64) as usize * 8;
        let length = match input.byte() % 8 {
            0 => needed.saturating_sub(1),
            1 => 0,
            _ => needed,
        };
        RawRange {
            flags: input.u32_or(&[1, 2, 3, 3, 1, 2, 0, 4]),
            nmsrs,
            base: input.u32_or(&[0, 0x10, 0x7f0, 0xc000_0000, 0xffff_fff0]),
            bitmap: vec![input.byte(); length],
        }
    });
    RawFilter {
        flags,
        ranges: ranges.collect(),
    }
}

/// Asserts that the engine refuses the structure with the same error number in a process's memory. The memory of a bitmap that has all its
/// bits ends with a whole word, and that of another where the bitmap ends.
fn is_refused_as_the_engine_refuses(filter: &RawFilter) {
    const AT: u64 = 0x1000;
    let layout = Layout::NATIVE;
    let mut structure = vec![0; layout.filter_size];
    let mut put = |at: usize, bytes: &[u8]| structure[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &filter.flags.to_le_bytes());
    for (slot, range) in filter.ranges.iter().enumerate() {
        let at = layout.ranges + slot * layout.range_size;
        put(at, &range.flags.to_le_bytes());
        put(at + 4, &range.nmsrs.to_le_bytes());
        put(at + 8, &range.base.to_le_bytes());
        put(at + layout.bitmap, &(AT * (slot as u64 + 2)).to_le_bytes());
    }
    let bitmaps = filter.ranges.iter().map(|range| {
        let mut bytes = range.bitmap.clone();
        if bytes.len() >= range.nmsrs.div_ceil(8) as usize {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes
    });
    let bitmaps: Vec<Vec<u8>> = bitmaps.collect();
    let memory = |address: u64, buffer: &mut [u8]| {
        let region = match (address / AT).checked_sub(1) {
            Some(0) => Some(structure.as_slice()),
            Some(slot) => bitmaps.get(slot as usize - 1).map(Vec::as_slice),
            None => None,
        };
        let bytes = region.and_then(|region| region.get((address % AT) as usize..)?.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(Fault)?);
        Ok(())
    };
    let engine = Vm::new()
        .set_msr_filter(AT, layout, &memory)
        .map_err(|errno| errno.name());
    let ours = filter
        .filter()
        .map(|_| ())
        .map_err(|error| error.kernel_errno().unwrap_or("none"));
    assert_eq!(ours, engine, "{filter:x?}");
}
