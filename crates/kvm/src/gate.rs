//! A VM that holds a plan.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use msrgate_core::{Filter, Reasons};
use msrgate_plan::Plan;

use crate::counts::Counters;
use crate::epoch::{Epoch, Published, Shared, lock};
use crate::error::Step;
use crate::{Capabilities, Counts, Handlers, InstallError, VcpuGate, VcpuId, ioctl, preset};

/// How many plans are kept for exits that the kernel made under them. A vCPU would have to stay between KVM_RUN and
/// its dispatch for this many replacements to meet an exit that no kept plan made; it then faults.
const KEPT: usize = 8;

/// A VM that holds a plan: its filter in the kernel, its table here.
///
/// Dropping it leaves the filter where it is, which fails closed; [`Gate::remove`] takes it away. Owns a duplicate of
/// the VM's descriptor, so the VM lives as long as it does.
#[derive(Debug)]
pub struct Gate {
    vm: OwnedFd,
    shared: Arc<Shared>,
}

impl Capabilities {
    /// Puts `plan` in force on the VM whose descriptor `vm` is: first the reasons, then the filter, so that no access
    /// is denied by the filter without being handed to user space where the plan wants it to be. Where the filter is
    /// not accepted the reasons are taken back.
    ///
    /// Before the first vCPU runs is the time: exits of a vCPU without a [`VcpuGate`] are nobody's. What the VM held
    /// before, filter and reasons, is lost; the kernel cannot be asked for it. So a second plan that is installed on a VM
    /// replaces the first, whose gates fault what it did not hand over: [`Gate::replace`] is the call for that.
    ///
    /// The plan's presets are put into each vCPU by [`Gate::vcpu`].
    pub fn install(&self, vm: &impl AsRawFd, plan: Arc<Plan>, handlers: Handlers) -> Result<Gate, InstallError> {
        let vm = ioctl::duplicate(vm).map_err(InstallError::of(Step::Duplicate))?;
        let first = Arc::new(Epoch::new(0, plan, &handlers)?);
        ioctl::set_mask(&vm, first.plan.reasons()).map_err(InstallError::of(Step::Mask))?;
        if let Err(source) = ioctl::set_filter(&vm, first.plan.filter()) {
            // A mask that cannot be taken back hands over accesses that nobody answers: the VMM sees them.
            let _ = ioctl::set_mask(&vm, Reasons::NONE);
            return Err(InstallError::of(Step::Filter)(source));
        }
        Ok(Gate {
            vm,
            shared: Arc::new(Shared {
                handlers,
                presets: first.plan.presets().into(),
                generation: AtomicU64::new(0),
                published: Mutex::new(Arc::new(Published {
                    newest: first,
                    older: Vec::new(),
                    coming: None,
                })),
                change: Mutex::new(()),
                counters: Counters::default(),
            }),
        })
    }
}

impl Gate {
    /// The gate of one vCPU, whose descriptor `vcpu` is. `id` is what handlers and events call it: its number, or a [`VcpuId`].
    ///
    /// Owns a duplicate of the descriptor, and refuses one that is no vCPU's. The kernel does not tell of which VM a vCPU is:
    /// the descriptor has to be of this gate's VM, since the accesses of another VM's vCPU are decided by that VM's filter. Puts the presets of the plan that the gate was made with into the vCPU and
    /// reads them back; fails where the kernel does not hold one. So it is to be called after KVM_SET_CPUID2 and before
    /// the vCPU runs, and whoever sets these MSRs later (KVM_SET_MSRS) takes the preset away.
    pub fn vcpu(&self, vcpu: &impl AsRawFd, id: impl Into<VcpuId>) -> Result<VcpuGate, InstallError> {
        let vcpu = ioctl::duplicate(vcpu).map_err(InstallError::of(Step::Duplicate))?;
        ioctl::is_vcpu(&vcpu).map_err(|source| InstallError::NotAVcpu { source })?;
        preset::put(&vcpu, &self.shared.presets)?;
        Ok(VcpuGate::new(vcpu, id.into(), Arc::clone(&self.shared)))
    }

    /// How many accesses of this VM's vCPUs were answered.
    pub fn counts(&self) -> Counts {
        self.shared.counters.now()
    }

    /// The plan that is in force.
    pub fn plan(&self) -> Arc<Plan> {
        let published = self.shared.published();
        Arc::clone(&published.newest.plan)
    }

    /// Puts `plan` in force in place of the one that is, while vCPUs run.
    ///
    /// An access during the call gets what the old plan says or what the new one says; one that begins after it, what
    /// the new one says. An MSR that both treat alike is treated so throughout. What MSRs remember under both plans
    /// (`shadow`, `once`) they go on remembering.
    ///
    /// Takes as long as the kernel needs to wait for readers of the old filter: milliseconds. vCPUs do not wait for it;
    /// the first dispatch of each afterwards takes a lock and allocates once. On an error the old plan is in force.
    ///
    /// A vCPU that runs cannot be given a preset, nor can one be taken back: the plan may only have presets that the
    /// gate was made with, and has to keep the guest from the registers of the others, since they hold what was put
    /// there.
    pub fn replace(&self, plan: Arc<Plan>) -> Result<(), InstallError> {
        let _one_at_a_time = lock(&self.shared.change);
        preset::replaceable(&self.shared.presets, &plan)?;
        let old = self.shared.published();
        let next = Arc::new(Epoch::new(old.newest.number + 1, plan, &self.shared.handlers)?);

        // From here on each vCPU can answer an exit of either filter.
        self.shared.publish(Published {
            coming: Some(Arc::clone(&next)),
            ..Published::clone(&old)
        });
        if let Err(error) = self.swap(old.newest.plan.reasons(), &next.plan) {
            self.shared.publish(Published::clone(&old));
            return Err(error);
        }
        self.shared.publish(Published {
            newest: Arc::clone(&next),
            older: old.settled().take(KEPT - 1).cloned().collect(),
            coming: None,
        });
        // A mask that stays too wide changes nothing for the guest: what the plan does not ask for faults here as it
        // would in the kernel.
        let _ = ioctl::set_mask(&self.vm, next.plan.reasons());
        Ok(())
    }

    /// Widens the mask, then swaps the filter: an access that either filter denies is handed over if its plan says so.
    fn swap(&self, old: Reasons, next: &Plan) -> Result<(), InstallError> {
        ioctl::set_mask(&self.vm, old.union(next.reasons())).map_err(InstallError::of(Step::Mask))?;
        ioctl::set_filter(&self.vm, next.filter()).map_err(|source| {
            let _ = ioctl::set_mask(&self.vm, old);
            InstallError::of(Step::Filter)(source)
        })
    }

    /// Takes the filter away, then the mask: from then on the kernel answers everything. The gates of vCPUs still
    /// answer exits that were made before, and presets stay in the vCPUs.
    ///
    /// On an error the filter may still be there, and the gates answer for it.
    pub fn remove(self) -> Result<Capabilities, InstallError> {
        let _one_at_a_time = lock(&self.shared.change);
        ioctl::set_filter(&self.vm, &Filter::allow_all()).map_err(InstallError::of(Step::Filter))?;
        ioctl::set_mask(&self.vm, Reasons::NONE).map_err(InstallError::of(Step::Mask))?;
        Ok(Capabilities::again())
    }
}
