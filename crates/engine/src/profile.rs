//! In what kernels differ.

use msrgate_core::Msr;

/// Which kernel's behaviour a VM has.
///
/// | | [`V5_10`](Self::V5_10) | [`V5_12`](Self::V5_12) | [`V5_13`](Self::V5_13) | [`V5_18`](Self::V5_18) | [`V5_19`](Self::V5_19) | [`V6_1`](Self::V6_1) | [`V6_12`](Self::V6_12) | [`V6_18`](Self::V6_18) | [`NEWEST`](Self::NEWEST) |
/// |---|---|---|---|---|---|---|---|---|---|
/// | a filter is replaced | piecewise | whole | whole | whole | whole | whole | whole | whole | whole |
/// | a range's flags are checked | last | last | first | first | first | first | first | first | first |
/// | reserved bits | ignored | ignored | ignored | ignored | refused | refused | refused | refused | refused |
/// | compat ioctl | no | no | no | no | no | yes | yes | yes | yes |
/// | side effects filtered | yes | yes | yes | no | no | no | no | no | no |
/// | nested lists filtered | yes | yes | yes | no | no | no | yes | yes | yes |
/// | fast path of TSC_DEADLINE | Intel | Intel | Intel | Intel | Intel | Intel | Intel | both | filtered |
///
/// The fields are public for a mix: `Profile { tsc_deadline: TscDeadline::Filtered, ..Profile::V6_1 }`. A stable series
/// may have taken a change early: 5.10.27 replaces a filter whole, and 5.10.154 refuses reserved bits and has the compat
/// ioctl.
///
/// Left out are faults that an access met by the way it came, not by the filter: the exit that the emulator lost before
/// 5.16, the RIP that it then went on from before 5.17, and the moments in which an access met half a filter before
/// 5.12. A profile is that of a release: between the commit that brought filters in, 1a155254ff93, and 5.10, they covered
/// x2APIC too.
///
/// `V6_18` is also what later kernels do, up to 7.3-rc, which was read: nothing of the above has changed since. What else passes a
/// filter on Linux no profile has, since it comes to no [`crate::Vcpu`]; a hypervisor that lets a guest have it lets it pass too:
///
/// | | |
/// |---|---|
/// | L2's MSRs by the lists of a VMCS | modelled: `nested_lists`, asked as [`crate::Origin::NestedList`] |
/// | immediate forms of RDMSR and WRMSRNS, from 6.18 | modelled on every profile: whether a guest has them is the processor's |
/// | L2's MSRs by fields of a VMCS, by VMRUN, VMLOAD and VMSAVE | not modelled: never filtered |
/// | branch records (LBR) | not modelled. KVM passes them through on demand, and a filter that is replaced does not close them; here [`crate::Intercepts`] close with the filter |
/// | TDX, from 6.16 | not modelled: TDVMCALL gives a status where this engine gives #GP, and the module keeps MSRs of its own |
/// | CET by XRSTORS, from 6.18 | not modelled: the processor's |
/// | a mediated PMU | not modelled: RDPMC makes no exit, and the fast path of TSC_DEADLINE is not taken where a counter counts instructions |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Profile {
    /// How a filter is replaced.
    pub replacement: Replacement,
    /// When the flags of a range are checked.
    pub range_flags: RangeFlags,
    /// Bits without a meaning in the filter's flags and in the mask of exit reasons.
    pub reserved_bits: ReservedBits,
    /// Whether a 32-bit process has an ioctl of its own.
    pub compat: Compat,
    /// [`crate::Origin::SideEffect`].
    pub side_effects: Coverage,
    /// [`crate::Origin::NestedList`].
    pub nested_lists: Coverage,
    /// Writes of IA32_TSC_DEADLINE on [`crate::Path::Fastpath`].
    pub tsc_deadline: TscDeadline,
}

impl Profile {
    /// Linux 5.10 and 5.11: a call that fails at a range has already replaced the filter. The filter is asked in KVM's
    /// common MSR accessors, so by much that is no RDMSR or WRMSR.
    pub const V5_10: Profile = Profile {
        replacement: Replacement::Piecewise,
        range_flags: RangeFlags::Last,
        reserved_bits: ReservedBits::Ignored,
        compat: Compat::Missing,
        side_effects: Coverage::Filtered,
        nested_lists: Coverage::Filtered,
        tsc_deadline: TscDeadline::BypassedOnIntel,
    };
    /// Linux 5.12: a filter is replaced whole or not at all.
    pub const V5_12: Profile = Profile {
        replacement: Replacement::Whole,
        ..Profile::V5_10
    };
    /// Linux 5.13 to 5.17: a range's flags are checked before its bitmap is copied.
    pub const V5_13: Profile = Profile {
        range_flags: RangeFlags::First,
        ..Profile::V5_12
    };
    /// Linux 5.18: only instructions are filtered.
    pub const V5_18: Profile = Profile {
        side_effects: Coverage::Exempt,
        nested_lists: Coverage::Exempt,
        ..Profile::V5_13
    };
    /// Linux 5.19 and 6.0: reserved bits are refused.
    pub const V5_19: Profile = Profile {
        reserved_bits: ReservedBits::Refused,
        ..Profile::V5_18
    };
    /// Linux 6.1 to 6.11: a 32-bit process can install a filter.
    pub const V6_1: Profile = Profile {
        compat: Compat::Present,
        ..Profile::V5_19
    };
    /// Linux 6.12 to 6.17: the MSR lists of a nested VM entry and exit are filtered.
    pub const V6_12: Profile = Profile {
        nested_lists: Coverage::Filtered,
        ..Profile::V6_1
    };
    /// Linux 6.18 and later, up to 7.3-rc: TSC_DEADLINE escapes on AMD too.
    pub const V6_18: Profile = Profile {
        tsc_deadline: TscDeadline::Bypassed,
        ..Profile::V6_12
    };
    /// The newest documented kernel, except that writes of TSC_DEADLINE are filtered like any other: the bypass is a
    /// known gap of KVM, not an intention.
    pub const NEWEST: Profile = Profile {
        tsc_deadline: TscDeadline::Filtered,
        ..Profile::V6_18
    };
}

impl Default for Profile {
    fn default() -> Profile {
        Profile::NEWEST
    }
}

/// How KVM_X86_SET_MSR_FILTER puts a filter in place of another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Replacement {
    /// The old one goes, then the ranges come one by one. A call that fails at a range leaves the new default and the
    /// ranges before that one; where there are none it leaves everything allowed, whatever the default is.
    Piecewise,
    /// A call that fails changes nothing.
    Whole,
}

/// When KVM_X86_SET_MSR_FILTER checks the flags of a range, which decides the error where more than they are wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RangeFlags {
    /// Before the size and the bitmap: EINVAL, wherever the bitmap points.
    First,
    /// After the bitmap was copied: EFAULT where it cannot be.
    Last,
}

/// What becomes of bits that have no meaning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReservedBits {
    /// Accepted; the mask of exit reasons is cut to its low 32 bits.
    Ignored,
    /// EINVAL.
    Refused,
}

/// Whether the 260-byte layout has an ioctl number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compat {
    /// ENOTTY.
    Missing,
    /// `KVM_X86_SET_MSR_FILTER_COMPAT`, for 32-bit processes only.
    Present,
}

/// Whether the filter is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Coverage {
    /// The filter is asked.
    Filtered,
    /// The filter is not asked.
    Exempt,
}

/// Whether the fast path of a VM exit completes a write of IA32_TSC_DEADLINE without asking the filter
/// (`handle_fastpath_set_msr_irqoff`, later `handle_fastpath_wrmsr`). Reads are always filtered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TscDeadline {
    /// Never: the filter is asked.
    Filtered,
    /// On Intel only.
    BypassedOnIntel,
    /// On Intel and AMD.
    Bypassed,
}

impl TscDeadline {
    /// Whether the filter is passed by for a write of `msr` on the fast path of `vendor`.
    pub(crate) fn bypasses(self, vendor: Vendor, msr: Msr) -> bool {
        let here = match self {
            TscDeadline::Filtered => false,
            TscDeadline::BypassedOnIntel => vendor == Vendor::Intel,
            TscDeadline::Bypassed => true,
        };
        here && msr == Msr::TSC_DEADLINE
    }
}

/// Whose virtualisation the host's processor has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vendor {
    /// VMX.
    Intel,
    /// SVM.
    Amd,
}
