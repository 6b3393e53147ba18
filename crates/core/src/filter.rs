//! The filter that a VM holds, and the decision it makes.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use crate::{Msr, MsrRange, Op, Ops, abi};

/// The filter's word on an access.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Verdict {
    /// The kernel handles the access as if there were no filter.
    Allow,
    /// The kernel does not look at the access: it faults, or is handed to user space with [`crate::Reason::Filter`].
    Deny,
}

impl Verdict {
    /// The word in a policy and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Verdict::Allow => "allow",
            Verdict::Deny => "deny",
        }
    }
}

/// One range of a filter: an inclusive allow-list of up to 12288 MSRs for one or both directions.
///
/// Holds what the kernel accepts, no less: at least one direction, 1 to 12288 MSRs, and a bitmap of whole 64-bit words,
/// since the kernel copies whole longs (`kvm_add_msr_filter`). A base near 2^32 is accepted too, and such a range
/// matches nothing, as in the kernel.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct FilterRange {
    base: u32,
    nmsrs: u32,
    ops: Ops,
    bitmap: Box<[u64]>,
}

impl FilterRange {
    /// Bit `i` of `bitmap` set means that `base + i` is allowed; bits from `nmsrs` on are ignored.
    ///
    /// The only way in. Fails where the kernel's `kvm_add_msr_filter` would give EINVAL, or where `bitmap` is not
    /// exactly the words that the kernel copies.
    pub fn new(base: u32, nmsrs: u32, ops: Ops, bitmap: impl Into<Box<[u64]>>) -> Result<FilterRange, FilterError> {
        let bitmap = bitmap.into();
        if ops.is_empty() {
            return Err(FilterError::NoDirection);
        }
        if nmsrs == 0 || nmsrs > abi::MAX_RANGE_MSRS {
            return Err(FilterError::RangeSize { nmsrs });
        }
        let words = nmsrs.div_ceil(64) as usize;
        if bitmap.len() != words {
            return Err(FilterError::BitmapLength {
                words: bitmap.len(),
                needed: words,
            });
        }
        Ok(FilterRange {
            base,
            nmsrs,
            ops,
            bitmap,
        })
    }

    /// The first MSR of the range.
    pub fn base(&self) -> u32 {
        self.base
    }

    /// How many MSRs it spans: 1 to 12288.
    pub fn nmsrs(&self) -> u32 {
        self.nmsrs
    }

    /// The directions it decides; in the other it is transparent.
    pub fn ops(&self) -> Ops {
        self.ops
    }

    /// The allow bits, `nmsrs` rounded up to whole words.
    pub fn bitmap(&self) -> &[u64] {
        &self.bitmap
    }

    /// The bytes that the kernel copies: little-endian words.
    pub fn bitmap_bytes(&self) -> Vec<u8> {
        self.bitmap.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The MSRs that the range matches; `None` where its end wraps, since it then matches nothing.
    pub fn span(&self) -> Option<MsrRange> {
        let end = self.base.wrapping_add(self.nmsrs);
        MsrRange::new(Msr(self.base), Msr(end.checked_sub(1)?))
    }

    /// What the kernel asks before any range, as a range: x2APIC's registers are allowed.
    pub(crate) fn x2apic() -> FilterRange {
        FilterRange {
            base: MsrRange::X2APIC.first().0,
            nmsrs: 0x100,
            ops: Ops::BOTH,
            bitmap: Box::new([u64::MAX; 4]),
        }
    }

    /// Which of the 64 MSRs from `start` on the range decides, and which it allows.
    pub(crate) fn verdicts(&self, start: u64, op: Op) -> (u64, u64) {
        let Some(span) = self.span().filter(|_| self.ops.contains(op)) else {
            return (0, 0);
        };
        let first = u64::from(span.first().0);
        let end = first + span.len();
        if start + 64 <= first || end <= start {
            return (0, 0);
        }
        let below = |bit: u64| if bit < 64 { (1 << bit) - 1 } else { u64::MAX };
        let decided = below(end - start) & !below(first.saturating_sub(start));
        let word = |index: u64| {
            usize::try_from(index)
                .ok()
                .and_then(|index| self.bitmap.get(index))
                .copied()
                .unwrap_or(0)
        };
        let allowed = match start.checked_sub(first) {
            // The range starts within these.
            None => word(0) << (first - start),
            Some(bit) if bit % 64 == 0 => word(bit / 64),
            Some(bit) => word(bit / 64) >> (bit % 64) | word(bit / 64 + 1) << (64 - bit % 64),
        };
        (decided, allowed)
    }

    /// What the range says of an access; `None` where it does not match and the walk goes on.
    #[inline]
    fn verdict(&self, msr: Msr, op: Op) -> Option<(u32, Verdict)> {
        // The kernel compares in u32 arithmetic, so an end that wrapped matches nothing (`kvm_msr_allowed`).
        let end = self.base.wrapping_add(self.nmsrs);
        if !self.ops.contains(op) || msr.0 < self.base || msr.0 >= end {
            return None;
        }
        let bit = msr.0 - self.base;
        let word = self.bitmap.get((bit / 64) as usize)?;
        let allowed = word >> (bit % 64) & 1 == 1;
        Some((bit, if allowed { Verdict::Allow } else { Verdict::Deny }))
    }
}

/// What decided an access, in the order in which the kernel asks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DecidedBy {
    /// The MSR is one of x2APIC's, which no filter stops.
    X2apic,
    /// Bit `bit` of the range in slot `slot`, counted from 0.
    Range {
        /// Position among the filter's ranges.
        slot: u8,
        /// The MSR's distance from the range's base.
        bit: u32,
    },
    /// No range matched.
    Default,
}

/// What a VM's filter holds: a default and at most 16 ranges, of which the first that matches decides.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Filter {
    default: Verdict,
    ranges: Box<[FilterRange]>,
}

impl Filter {
    /// Fails where KVM_X86_SET_MSR_FILTER would: more than 16 ranges, or none under a default of deny.
    pub fn new(default: Verdict, ranges: impl Into<Box<[FilterRange]>>) -> Result<Filter, FilterError> {
        let ranges = ranges.into();
        if ranges.len() > abi::MAX_RANGES {
            return Err(FilterError::TooManyRanges { ranges: ranges.len() });
        }
        if ranges.is_empty() && default == Verdict::Deny {
            return Err(FilterError::EmptyDeny);
        }
        Ok(Filter { default, ranges })
    }

    /// The filter that allows everything: what KVM_X86_SET_MSR_FILTER takes to turn filtering off.
    pub fn allow_all() -> Filter {
        Filter {
            default: Verdict::Allow,
            ranges: Box::default(),
        }
    }

    /// What an access gets that no range matches.
    pub fn default_verdict(&self) -> Verdict {
        self.default
    }

    /// The ranges in slot order.
    pub fn ranges(&self) -> &[FilterRange] {
        &self.ranges
    }

    /// Whether the kernel may answer the access (`kvm_msr_allowed`).
    #[inline]
    pub fn verdict(&self, msr: Msr, op: Op) -> Verdict {
        self.decide(msr, op).0
    }

    /// The verdict together with what gave it.
    #[inline]
    pub fn decide(&self, msr: Msr, op: Op) -> (Verdict, DecidedBy) {
        // Asked before anything else: the kernel allows x2APIC even where a range denies it.
        if MsrRange::X2APIC.contains(msr) {
            return (Verdict::Allow, DecidedBy::X2apic);
        }
        for (range, slot) in self.ranges.iter().zip(0..) {
            if let Some((bit, verdict)) = range.verdict(msr, op) {
                return (verdict, DecidedBy::Range { slot, bit });
            }
        }
        (self.default, DecidedBy::Default)
    }
}

/// Why something is not a filter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum FilterError {
    /// A range that decides neither reads nor writes.
    NoDirection,
    /// A range of no MSRs, or of more than 12288.
    RangeSize {
        /// How many it was to have.
        nmsrs: u32,
    },
    /// A bitmap that is not exactly the words that the kernel copies.
    BitmapLength {
        /// 64-bit words given.
        words: usize,
        /// 64-bit words that the range needs.
        needed: usize,
    },
    /// More ranges than the kernel has slots.
    TooManyRanges {
        /// How many were given.
        ranges: usize,
    },
    /// A default of deny without a range, which the kernel refuses.
    EmptyDeny,
}

impl fmt::Display for FilterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FilterError::NoDirection => f.write_str("a range must decide reads, writes or both"),
            FilterError::RangeSize { nmsrs } => {
                write!(f, "a range spans 1 to {} MSRs, not {nmsrs}", abi::MAX_RANGE_MSRS)
            }
            FilterError::BitmapLength { words, needed } => {
                let s = if *words == 1 { "" } else { "s" };
                write!(
                    f,
                    "the bitmap has {words} word{s} of 64 bits where the kernel reads {needed}"
                )
            }
            FilterError::TooManyRanges { ranges } => {
                write!(f, "a filter holds at most {} ranges, not {ranges}", abi::MAX_RANGES)
            }
            FilterError::EmptyDeny => {
                f.write_str("the kernel refuses a filter that denies by default and has no range")
            }
        }
    }
}

impl core::error::Error for FilterError {}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn range(base: u32, nmsrs: u32, ops: Ops, word: u64) -> FilterRange {
        let words = vec![word; nmsrs.div_ceil(64) as usize];
        FilterRange::new(base, nmsrs, ops, words).unwrap()
    }

    fn check(filter: &Filter, msr: u32, read: Verdict, write: Verdict) {
        assert_eq!(filter.verdict(Msr(msr), Op::Read), read, "rdmsr {msr:#x}");
        assert_eq!(filter.verdict(Msr(msr), Op::Write), write, "wrmsr {msr:#x}");
    }

    use Verdict::{Allow, Deny};

    #[test]
    fn a_default_decides_what_no_range_matches() {
        let filter = Filter::new(Deny, vec![range(0x10, 1, Ops::BOTH, 1)]).unwrap();
        check(&filter, 0xf, Deny, Deny);
        check(&filter, 0x10, Allow, Allow);
        check(&filter, 0x11, Deny, Deny);
        check(&Filter::allow_all(), 0x11, Allow, Allow);
    }

    #[test]
    fn a_clear_bit_denies_under_a_default_of_allow() {
        let filter = Filter::new(Allow, vec![range(0x10, 2, Ops::BOTH, 0b10)]).unwrap();
        check(&filter, 0x10, Deny, Deny);
        check(&filter, 0x11, Allow, Allow);
    }

    #[test]
    fn first_match_wins_when_ranges_overlap() {
        let filter = Filter::new(Allow, vec![range(0x10, 1, Ops::BOTH, 1), range(0x10, 2, Ops::BOTH, 0)]).unwrap();
        check(&filter, 0x10, Allow, Allow);
        check(&filter, 0x11, Deny, Deny);
    }

    #[test]
    fn a_range_is_transparent_in_the_direction_it_leaves_out() {
        let filter = Filter::new(Deny, vec![range(0x10, 1, Ops::READ, 1), range(0x10, 1, Ops::BOTH, 0)]).unwrap();
        check(&filter, 0x10, Allow, Deny);
    }

    #[test]
    fn two_ranges_of_one_base_give_each_direction_its_bitmap() {
        let filter = Filter::new(Deny, vec![range(0, 64, Ops::READ, 1), range(0, 64, Ops::WRITE, 2)]).unwrap();
        check(&filter, 0, Allow, Deny);
        check(&filter, 1, Deny, Allow);
    }

    #[test]
    fn bits_from_nmsrs_on_are_ignored() {
        let filter = Filter::new(Deny, vec![range(0x10, 1, Ops::BOTH, u64::MAX)]).unwrap();
        check(&filter, 0x11, Deny, Deny);
    }

    #[test]
    fn x2apic_is_allowed_before_any_range_is_asked() {
        let filter = Filter::new(Deny, vec![range(0x700, 0x300, Ops::BOTH, 0)]).unwrap();
        check(&filter, 0x7ff, Deny, Deny);
        check(&filter, 0x800, Allow, Allow);
        check(&filter, 0x8ff, Allow, Allow);
        check(&filter, 0x900, Deny, Deny);
        assert_eq!(filter.decide(Msr(0x800), Op::Read).1, DecidedBy::X2apic);
    }

    #[test]
    fn the_last_index_is_never_covered() {
        let filter = Filter::new(Deny, vec![range(u32::MAX, 1, Ops::BOTH, 1)]).unwrap();
        check(&filter, u32::MAX, Deny, Deny);
        let filter = Filter::new(Deny, vec![range(u32::MAX - 1, 1, Ops::BOTH, 1)]).unwrap();
        check(&filter, u32::MAX - 1, Allow, Allow);
        check(&filter, u32::MAX, Deny, Deny);
    }

    #[test]
    fn a_range_whose_end_wraps_matches_nothing() {
        let wrapped = range(0xffff_fff0, 0x20, Ops::BOTH, u64::MAX);
        assert_eq!(wrapped.span(), None);
        let filter = Filter::new(Deny, vec![wrapped]).unwrap();
        for msr in [0xffff_ffef, 0xffff_fff0, 0xffff_ffff, 0, 0xf, 0x10] {
            check(&filter, msr, Deny, Deny);
        }
    }

    #[test]
    fn the_decider_names_slot_and_bit() {
        let filter = Filter::new(Deny, vec![range(0x10, 1, Ops::WRITE, 1), range(0, 0x40, Ops::BOTH, 0)]).unwrap();
        assert_eq!(
            filter.decide(Msr(0x10), Op::Write).1,
            DecidedBy::Range { slot: 0, bit: 0 }
        );
        assert_eq!(
            filter.decide(Msr(0x10), Op::Read).1,
            DecidedBy::Range { slot: 1, bit: 0x10 }
        );
        assert_eq!(filter.decide(Msr(0x40), Op::Read).1, DecidedBy::Default);
    }

    #[test]
    fn what_the_kernel_refuses_is_not_a_filter() {
        assert_eq!(Filter::new(Deny, vec![]), Err(FilterError::EmptyDeny));
        let one = range(0, 1, Ops::BOTH, 0);
        assert!(Filter::new(Deny, vec![one.clone(); 16]).is_ok());
        assert_eq!(
            Filter::new(Deny, vec![one; 17]),
            Err(FilterError::TooManyRanges { ranges: 17 })
        );
        assert_eq!(
            FilterRange::new(0, 0, Ops::BOTH, vec![]),
            Err(FilterError::RangeSize { nmsrs: 0 })
        );
        assert!(FilterRange::new(0, 12288, Ops::BOTH, vec![0; 192]).is_ok());
        assert_eq!(
            FilterRange::new(0, 12289, Ops::BOTH, vec![0; 193]),
            Err(FilterError::RangeSize { nmsrs: 12289 })
        );
        assert_eq!(
            FilterRange::new(0, 1, Ops::NONE, vec![0]),
            Err(FilterError::NoDirection)
        );
        assert_eq!(
            FilterRange::new(0, 65, Ops::BOTH, vec![0]),
            Err(FilterError::BitmapLength { words: 1, needed: 2 })
        );
    }
}
