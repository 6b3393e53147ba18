//! The index of a model-specific register, and inclusive ranges of them.

use core::fmt;

/// The index of a model-specific register: what a guest puts in ECX.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Msr(pub u32);

impl Msr {
    /// The smallest index.
    pub const MIN: Msr = Msr(0);
    /// The largest index. No filter range can cover it: the end of such a range wraps to zero.
    pub const MAX: Msr = Msr(u32::MAX);
    /// IA32_TSC_DEADLINE, whose writes some kernels complete before they ask the filter (KVM's
    /// `handle_fastpath_set_msr_irqoff`).
    pub const TSC_DEADLINE: Msr = Msr(0x6e0);
}

impl fmt::Display for Msr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// MSRs from `first` to `last`, both included; never empty.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MsrRange {
    first: Msr,
    last: Msr,
}

impl MsrRange {
    /// All 2^32 indices.
    pub const ALL: MsrRange = MsrRange {
        first: Msr::MIN,
        last: Msr::MAX,
    };

    /// The x2APIC registers, which KVM never filters (`kvm_msr_allowed`).
    pub const X2APIC: MsrRange = MsrRange {
        first: Msr(0x800),
        last: Msr(0x8ff),
    };

    /// `None` where `first` is after `last`.
    pub const fn new(first: Msr, last: Msr) -> Option<MsrRange> {
        if first.0 <= last.0 {
            Some(MsrRange { first, last })
        } else {
            None
        }
    }

    /// The range of one MSR.
    pub const fn single(msr: Msr) -> MsrRange {
        MsrRange { first: msr, last: msr }
    }

    /// The first MSR of the range.
    pub const fn first(self) -> Msr {
        self.first
    }

    /// The last MSR of the range, which belongs to it.
    pub const fn last(self) -> Msr {
        self.last
    }

    /// How many MSRs the range holds: 1 to 2^32.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(self) -> u64 {
        self.last.0 as u64 - self.first.0 as u64 + 1
    }

    /// Whether `msr` lies in the range.
    pub const fn contains(self, msr: Msr) -> bool {
        self.first.0 <= msr.0 && msr.0 <= self.last.0
    }

    /// Whether every MSR of `self` lies in `other`.
    pub const fn is_within(self, other: MsrRange) -> bool {
        other.first.0 <= self.first.0 && self.last.0 <= other.last.0
    }

    /// The MSRs that lie in both.
    pub fn intersection(self, other: MsrRange) -> Option<MsrRange> {
        MsrRange::new(self.first.max(other.first), self.last.min(other.last))
    }

    /// Each MSR in order.
    pub fn iter(self) -> impl Iterator<Item = Msr> {
        (self.first.0..=self.last.0).map(Msr)
    }
}

impl fmt::Display for MsrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            self.first.fmt(f)
        } else {
            write!(f, "{}..={}", self.first, self.last)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reversed_range_does_not_exist() {
        assert_eq!(MsrRange::new(Msr(2), Msr(1)), None);
    }

    #[test]
    fn the_range_of_all_msrs_counts_two_to_the_thirty_second() {
        assert_eq!(MsrRange::ALL.len(), 1 << 32);
    }

    #[test]
    fn both_ends_belong_to_a_range() {
        assert!(MsrRange::X2APIC.contains(Msr(0x800)));
        assert!(MsrRange::X2APIC.contains(Msr(0x8ff)));
        assert!(!MsrRange::X2APIC.contains(Msr(0x7ff)));
        assert!(!MsrRange::X2APIC.contains(Msr(0x900)));
    }
}
