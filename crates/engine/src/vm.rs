//! A VM: its filter, its mask of exit reasons, and the ioctls that change them.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use msrgate_core::abi::{self, EnableCap, Layout};
use msrgate_core::{ActionTable, Filter, FlatFilter, Msr, Op, Reasons, Verdict};

use crate::profile::{Compat, Coverage, ReservedBits};
use crate::slot::{Rules, Slot};
use crate::user_filter::copy_filter;
use crate::{Errno, Profile, UserMemory};

/// What KVM holds of MSR filtering for each VM. It is shared by the vCPUs and whoever changes the filter; every method
/// takes `&self`.
pub struct Vm {
    slot: Slot,
    dead: AtomicBool,
    profile: Profile,
    unknown_msrs: UnknownMsrs,
}

/// What an MSR gives that the hypervisor does not know: KVM's module parameter `ignore_msrs`.
///
/// It applies after the filter, and only to [`crate::Refusal::Unknown`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnknownMsrs {
    /// An exit with [`msrgate_core::Reason::Unknown`] where the mask has it, else #GP(0).
    Refused,
    /// Reads give 0, writes are dropped, nothing exits.
    Ignored,
}

/// Who touches an MSR, for those accesses that are no RDMSR or WRMSR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// RDMSR, WRMSR and their kin, executed by L1 or L2, by the processor or the emulator, or asked for by a
    /// confidential guest's VMGEXIT or TDVMCALL: always filtered.
    Instruction,
    /// An entry of a nested VMX MSR list. It never exits to user space. A denied VM-entry load fails the entry with exit
    /// reason 34 and the entry's position, counted from 1, as its qualification; earlier entries stay applied. A denied
    /// VM-exit store or load is a VMX abort.
    NestedList,
    /// A look at an MSR while emulating another instruction: RDTSC, RDPID, SYSENTER, SYSCALL, RSM.
    SideEffect,
    /// State of the VMCS or VMCB, a task switch, SMM entry, INIT: never filtered.
    Architectural,
    /// The VMM: KVM_GET_MSRS, KVM_SET_MSRS, saving and restoring: never filtered.
    Host,
}

impl Vm {
    /// A VM of [`Profile::NEWEST`] without a filter, that hands no access to user space.
    pub fn new() -> Vm {
        Vm {
            slot: Slot::empty(),
            dead: AtomicBool::new(false),
            profile: Profile::NEWEST,
            unknown_msrs: UnknownMsrs::Refused,
        }
    }

    /// The VM with the behaviour of another kernel.
    #[must_use]
    pub fn with_profile(self, profile: Profile) -> Vm {
        Vm { profile, ..self }
    }

    /// The VM with another answer to MSRs that the hypervisor does not know.
    #[must_use]
    pub fn with_unknown_msrs(self, unknown_msrs: UnknownMsrs) -> Vm {
        Vm { unknown_msrs, ..self }
    }

    /// The kernel that the VM takes after.
    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// What unknown MSRs give.
    pub fn unknown_msrs(&self) -> UnknownMsrs {
        self.unknown_msrs
    }

    /// Puts the VM under a filter, a mask of exit reasons, and the table that answers what comes of both, in place of
    /// what it had: no access meets some of the one and some of the other.
    ///
    /// The filter is a [`Filter`] or an [`Arc`] of one that was flattened, which VMs share, as they may the table. When
    /// this returns, each access that starts later gets the new verdict, on every vCPU. The interception bitmaps follow
    /// when a vCPU next picks the filter up ([`crate::Vcpu::pick_up`]); the caller kicks the vCPUs that are in the guest.
    ///
    /// What was replaced is freed before this returns, but for what vCPUs have that did not look since: a later change
    /// of the VM's filter or mask frees that, or the end of the VM. The kernel waits until no vCPU has it, and this does
    /// not. There is no more of it than there are vCPUs.
    pub fn install(&self, filter: impl Into<Arc<FlatFilter>>, reasons: Reasons, table: impl Into<Arc<ActionTable>>) {
        let (filter, table) = (Some(filter.into()), Some(table.into()));
        self.slot.publish(|_| Rules { filter, reasons, table });
    }

    /// KVM_X86_SET_MSR_FILTER on the VM's descriptor, with `argp` in either layout; a layout that is neither gives
    /// EFAULT. Otherwise as [`Self::set_filter`].
    ///
    /// A failed call changes nothing, but for [`crate::Replacement::Piecewise`].
    pub fn set_msr_filter(&self, argp: u64, layout: Layout, memory: &impl UserMemory) -> Result<(), Errno> {
        self.gate()?;
        let (filter, result) = copy_filter(argp, layout, &self.profile, memory)?;
        self.set_filter(filter);
        result
    }

    /// Replaces the filter alone, as the kernel's call does: the mask of exit reasons stays, and there is no table any
    /// more. There is no way back to having no filter; [`Filter::allow_all`] decides likewise. Otherwise as
    /// [`Self::install`].
    pub fn set_filter(&self, filter: impl Into<Arc<FlatFilter>>) {
        let filter = Some(filter.into());
        self.slot.publish(|rules| Rules {
            filter,
            reasons: rules.reasons,
            table: None,
        });
    }

    /// KVM_ENABLE_CAP on the VM's descriptor: sets the mask of exit reasons. `argp` points to a `struct kvm_enable_cap`
    /// of 104 bytes, the same in both layouts.
    ///
    /// The kernel knows other capabilities, this engine only KVM_CAP_X86_USER_SPACE_MSR.
    pub fn enable_cap(&self, argp: u64, memory: &impl UserMemory) -> Result<(), Errno> {
        self.gate()?;
        let mut bytes = [0; EnableCap::BYTES];
        memory.read(argp, &mut bytes)?;
        let EnableCap { cap, flags, arg: mask } = EnableCap::from_bytes(&bytes);
        if flags != 0 || cap != abi::CAP_X86_USER_SPACE_MSR {
            return Err(Errno::Einval);
        }
        if self.profile.reserved_bits == ReservedBits::Refused && Reasons::from_bits(mask).is_none() {
            return Err(Errno::Einval);
        }
        self.set_reasons(Reasons::from_bits(mask & u64::from(Reasons::ALL.bits())).unwrap_or(Reasons::NONE));
        Ok(())
    }

    /// Hands accesses that fail for one of `reasons` to user space, all others fault; filter and table stay. Counts from
    /// each vCPU's next access; an access that waits for user space already goes on waiting.
    pub fn set_reasons(&self, reasons: Reasons) {
        self.slot.publish(|rules| Rules {
            reasons,
            ..rules.clone()
        });
    }

    /// The mask of exit reasons.
    pub fn reasons(&self) -> Reasons {
        self.slot.look().rules().reasons
    }

    /// KVM_CHECK_EXTENSION for the two capabilities of MSR filtering: 1, and 0 for any other.
    pub fn check_extension(&self, cap: u64) -> u32 {
        let known = [abi::CAP_X86_USER_SPACE_MSR, abi::CAP_X86_MSR_FILTER];
        known.into_iter().any(|known| u64::from(known) == cap).into()
    }

    /// Lets every later ioctl on the VM fail with EIO, as after `kvm_vm_dead`. vCPUs keep filtering.
    pub fn kill(&self) {
        self.dead.store(true, Ordering::Relaxed);
    }

    /// The gate before every VM ioctl.
    pub(crate) fn gate(&self) -> Result<(), Errno> {
        if self.dead.load(Ordering::Relaxed) {
            return Err(Errno::Eio);
        }
        Ok(())
    }

    /// Whether `origin` may touch the MSR. For instructions a [`crate::Vcpu`] asks by itself, and faster.
    pub fn allows(&self, origin: Origin, msr: Msr, op: Op) -> Verdict {
        let coverage = match origin {
            Origin::Instruction => Coverage::Filtered,
            Origin::NestedList => self.profile.nested_lists,
            Origin::SideEffect => self.profile.side_effects,
            Origin::Architectural | Origin::Host => Coverage::Exempt,
        };
        match coverage {
            Coverage::Filtered => self.slot.look().rules().verdict(msr, op),
            Coverage::Exempt => Verdict::Allow,
        }
    }

    pub(crate) fn slot(&self) -> &Slot {
        &self.slot
    }

    pub(crate) fn has_compat_ioctl(&self) -> bool {
        self.profile.compat == Compat::Present
    }
}

impl Rules {
    /// The filter, if there is one.
    pub(crate) fn filter(&self) -> Option<&Filter> {
        self.filter.as_ref().map(|filter| filter.filter())
    }

    /// What the filter says, or the absence of one.
    #[inline]
    pub(crate) fn verdict(&self, msr: Msr, op: Op) -> Verdict {
        self.filter
            .as_ref()
            .map_or(Verdict::Allow, |filter| filter.verdict(msr, op))
    }
}

impl Default for Vm {
    fn default() -> Vm {
        Vm::new()
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("reasons", &self.reasons())
            .field("profile", &self.profile)
            .field("unknown_msrs", &self.unknown_msrs)
            .finish_non_exhaustive()
    }
}
