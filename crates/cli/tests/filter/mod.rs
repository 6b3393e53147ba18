//! A plan's filter as a program of somebody else would read it from `plan --json`: nothing here is msrgate's.
#![allow(dead_code, reason = "each test uses a part of this")]

use std::collections::BTreeSet;

use serde_json::Value;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    Read,
    Write,
}

impl Op {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Op::Read => "rdmsr",
            Op::Write => "wrmsr",
        }
    }
}

pub(crate) struct Range {
    pub(crate) base: u32,
    pub(crate) nmsrs: u32,
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) bitmap: Vec<u8>,
}

impl Range {
    pub(crate) fn bit(&self, offset: u32) -> bool {
        self.bitmap[offset as usize / 8] >> (offset % 8) & 1 == 1
    }
}

pub(crate) struct Filter {
    pub(crate) default_allow: bool,
    pub(crate) ranges: Vec<Range>,
}

impl Filter {
    pub(crate) fn parse(plan: &Value) -> Filter {
        let ranges = plan["ranges"].as_array().expect("ranges").iter().map(|range| {
            let digits = range["bitmap"].as_str().expect("a bitmap");
            let bytes = (0..digits.len()).step_by(2);
            Range {
                base: u32::from_str_radix(range["base"].as_str().expect("a base").trim_start_matches("0x"), 16)
                    .expect("hexadecimal"),
                nmsrs: range["nmsrs"].as_u64().expect("a count").try_into().expect("32 bits"),
                read: range["read"].as_bool().expect("a flag"),
                write: range["write"].as_bool().expect("a flag"),
                bitmap: bytes
                    .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).expect("a byte"))
                    .collect(),
            }
        });
        Filter {
            default_allow: plan["default"] == "allow",
            ranges: ranges.collect(),
        }
    }

    /// The kernel's rule: the first range of this direction that covers the MSR has the bit, else the default.
    pub(crate) fn allows(&self, msr: u32, op: Op) -> bool {
        for range in &self.ranges {
            let serves = match op {
                Op::Read => range.read,
                Op::Write => range.write,
            };
            if serves && msr >= range.base && msr - range.base < range.nmsrs {
                return range.bit(msr - range.base);
            }
        }
        self.default_allow
    }
}

/// The MSRs around each edge of a filter: where a range begins or ends, where its bits change, and where the hardware's
/// own bitmaps do.
pub(crate) fn boundaries(filter: &Filter) -> BTreeSet<u32> {
    let mut edges = vec![
        0,
        0x800,
        0x900,
        0x1fff,
        0x2000,
        0x4000_0000,
        0xc000_0000,
        0xc000_2000,
        0xc001_0000,
        0xc001_2000,
    ];
    for range in &filter.ranges {
        edges.extend([range.base, range.base + (range.nmsrs - 1)]);
        edges.extend(
            (1..range.nmsrs)
                .filter(|at| range.bit(*at) != range.bit(at - 1))
                .map(|at| range.base + at),
        );
    }
    edges
        .into_iter()
        .flat_map(|msr: u32| [msr.saturating_sub(1), msr, msr.saturating_add(1)])
        .collect()
}
