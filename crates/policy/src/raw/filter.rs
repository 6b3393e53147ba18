//! `struct kvm_msr_filter` as it was given, and what the kernel makes of it.

use msrgate_core::abi::{FILTER_DEFAULT_DENY, MAX_BITMAP_BYTES, MAX_RANGE_MSRS, MAX_RANGES};
use msrgate_core::{Filter, FilterRange, MsrRange, Ops, Verdict};
use msrgate_plan::{DecisionMap, Preset};

use super::error::RawError;
use crate::print::counted;

/// What was read.
#[derive(Clone, Debug)]
pub struct RawInput {
    /// What the kernel makes of it.
    pub filter: Filter,
    /// What a plan says beside that of user space's answers; `None` for a raw filter, which says nothing of them.
    pub plan: Option<DecisionMap>,
    /// The presets of a plan, which the filter leaves to the kernel.
    pub presets: Vec<Preset>,
    /// What the kernel takes for something else than it looks like, in sentences.
    pub remarks: Vec<String>,
}

/// `struct kvm_msr_filter`, not yet looked at by anyone. Ranges with `nmsrs` 0 are empty slots.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct RawFilter {
    /// `KVM_MSR_FILTER_DEFAULT_DENY`, or nothing.
    pub flags: u32,
    /// The slots.
    pub ranges: Vec<RawRange>,
}

/// `struct kvm_msr_filter_range`, with the memory that its pointer leads to.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct RawRange {
    /// `KVM_MSR_FILTER_READ` and `KVM_MSR_FILTER_WRITE`.
    pub flags: u32,
    /// How many MSRs.
    pub nmsrs: u32,
    /// The first one.
    pub base: u32,
    /// What is known to lie where the pointer leads, at least a bit for each MSR. The kernel copies whole words of 8 bytes,
    /// and the bits behind the last MSR decide nothing.
    pub bitmap: Vec<u8>,
}

impl RawFilter {
    /// What KVM_X86_SET_MSR_FILTER makes of it, checked in the kernel's order (`kvm_vm_ioctl_set_msr_filter`,
    /// `kvm_add_msr_filter`, Linux 6.12): the first fault decides the error.
    pub fn filter(&self) -> Result<Filter, RawError> {
        if self.ranges.len() > MAX_RANGES {
            let message = format!(
                "there are {} ranges, and `struct kvm_msr_filter` has room for {MAX_RANGES}",
                self.ranges.len()
            );
            return Err(RawError::new(message));
        }
        if self.flags & !FILTER_DEFAULT_DENY != 0 {
            let message = format!(
                "the filter's flags {:#x} have a bit that the kernel does not know: \
                 KVM_MSR_FILTER_DEFAULT_DENY ({FILTER_DEFAULT_DENY:#x}) is the only one",
                self.flags
            );
            return Err(RawError::new(message).errno("EINVAL"));
        }
        let default = self.default();
        let used = || (0..).zip(&self.ranges).filter(|(_, range)| range.nmsrs != 0);
        if used().next().is_none() && default == Verdict::Deny {
            let message = "the kernel refuses to deny by default without a range that has MSRs";
            return Err(RawError::new(message).errno("EINVAL"));
        }
        let ranges = used()
            .map(|(slot, range)| range.range(slot))
            .collect::<Result<Vec<_>, _>>()?;
        Filter::new(default, ranges).map_err(|error| RawError::new(error.to_string()).errno("EINVAL"))
    }

    /// What the kernel takes, and for something else than it looks like.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        let default = self.default();
        for (slot, range) in (0..).zip(&self.ranges) {
            let Ok(checked) = range.range(slot) else { continue };
            let copied = checked.bitmap().len() * 8;
            if range.bitmap.len() < copied {
                remarks.push(format!(
                    "range {slot}: its bitmap has {}, and the kernel copies {copied}, whole words of 8: the bytes behind it \
                     decide nothing, but must be readable",
                    counted(range.bitmap.len() as u64, "byte", "bytes")
                ));
            }
            match checked.span() {
                None => remarks.push(format!(
                    "range {slot} ends behind 0xffffffff: its end wraps to zero, and the kernel matches no MSR with it"
                )),
                Some(_) if default == Verdict::Allow && denies_x2apic(&checked) => remarks.push(format!(
                    "range {slot} denies MSRs of {}: no filter stops the x2APIC's registers",
                    MsrRange::X2APIC
                )),
                Some(_) => {}
            }
        }
        remarks
    }

    fn default(&self) -> Verdict {
        match self.flags & FILTER_DEFAULT_DENY {
            0 => Verdict::Allow,
            _ => Verdict::Deny,
        }
    }

    /// Itself as what is given.
    pub(super) fn given(&self) -> Result<RawInput, RawError> {
        Ok(RawInput {
            filter: self.filter()?,
            plan: None,
            presets: Vec::new(),
            remarks: self.remarks(),
        })
    }
}

/// Whether a range has a bit that would close a register of the x2APIC.
fn denies_x2apic(range: &FilterRange) -> bool {
    let bits = range
        .bitmap()
        .iter()
        .flat_map(|word| (0..64).map(move |bit| word >> bit & 1 == 1));
    let msrs = range.span().into_iter().flat_map(|span| span.iter());
    msrs.zip(bits)
        .any(|(msr, allows)| MsrRange::X2APIC.contains(msr) && !allows)
}

impl RawRange {
    fn range(&self, slot: u32) -> Result<FilterRange, RawError> {
        let ops = Ops::from_bits(self.flags).filter(|ops| !ops.is_empty()).ok_or_else(|| {
            let message = format!(
                "range {slot}: its flags are {:#x}; the kernel takes KVM_MSR_FILTER_READ (1), KVM_MSR_FILTER_WRITE (2) \
                 or both (3)",
                self.flags
            );
            RawError::new(message).errno("EINVAL")
        })?;
        if self.nmsrs == 0 || self.nmsrs > MAX_RANGE_MSRS {
            let message = format!(
                "range {slot}: it has {}; a range holds 1 to {MAX_RANGE_MSRS}",
                counted(self.nmsrs.into(), "MSR", "MSRs")
            );
            return Err(RawError::new(message).errno("EINVAL"));
        }
        let needed = self.nmsrs.div_ceil(8) as usize;
        if self.bitmap.len() < needed {
            let message = format!(
                "range {slot}: its bitmap has {}, and {} {needed}: what lies behind the bitmap decides, or \
                 nothing does",
                counted(self.bitmap.len() as u64, "byte", "bytes"),
                counted(self.nmsrs.into(), "MSR needs", "MSRs need")
            );
            return Err(RawError::new(message).errno("EFAULT"));
        }
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            u64::from_le_bytes(word)
        };
        let words = self.nmsrs.div_ceil(64) as usize;
        let bitmap: Vec<u64> = self.bitmap.chunks(8).take(words).map(word).collect();
        FilterRange::new(self.base, self.nmsrs, ops, bitmap)
            .map_err(|error| RawError::new(format!("range {slot}: {error}")).errno("EINVAL"))
    }
}

/// What a name of the kernel's header stands for.
pub(super) fn kernel_name(name: &str) -> Option<u64> {
    Some(match name {
        "KVM_MSR_FILTER_READ" => 1,
        "KVM_MSR_FILTER_WRITE" => 2,
        "KVM_MSR_FILTER_RANGE_VALID_MASK" => 3,
        "KVM_MSR_FILTER_DEFAULT_ALLOW" => 0,
        "KVM_MSR_FILTER_DEFAULT_DENY" | "KVM_MSR_FILTER_VALID_MASK" => u64::from(FILTER_DEFAULT_DENY),
        "KVM_MSR_FILTER_MAX_RANGES" => MAX_RANGES as u64,
        "KVM_MSR_FILTER_MAX_BITMAP_SIZE" => u64::from(MAX_BITMAP_BYTES),
        _ => return None,
    })
}
