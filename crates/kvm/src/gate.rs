//! A VM that holds a plan.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use msrgate_core::{Access, ActionTable, Filter, Reason, Reasons, Verdict};
use msrgate_plan::{Plan, Preset};

use crate::error::Step;
use crate::{Handlers, HostMsrs, InstallError, Probed, VcpuGate, ioctl, preset};

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

impl Probed {
    /// Puts `plan` in force on the VM whose descriptor `vm` is: first the reasons, then the filter, so that no access
    /// is denied by the filter without being handed to user space where the plan wants it to be. Where the filter is
    /// not accepted the reasons are taken back.
    ///
    /// Before the first vCPU runs is the time: exits of a vCPU without a [`VcpuGate`] are nobody's. What the VM held
    /// before, filter and reasons, is lost; the kernel cannot be asked for it.
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
            }),
        })
    }
}

impl Gate {
    /// The gate of one vCPU, whose descriptor `vcpu` is. `id` is what handlers and events call it.
    ///
    /// Owns a duplicate of the descriptor. Puts the presets of the plan that the gate was made with into the vCPU and
    /// reads them back; fails where the kernel does not hold one. So it is to be called after KVM_SET_CPUID2 and before
    /// the vCPU runs, and whoever sets these MSRs later (KVM_SET_MSRS) takes the preset away.
    pub fn vcpu(&self, vcpu: &impl AsRawFd, id: u32) -> Result<VcpuGate, InstallError> {
        let vcpu = ioctl::duplicate(vcpu).map_err(InstallError::of(Step::Duplicate))?;
        preset::put(&vcpu, &self.shared.presets)?;
        Ok(VcpuGate::new(vcpu, id, Arc::clone(&self.shared)))
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
    pub fn remove(self) -> Result<Probed, InstallError> {
        let _one_at_a_time = lock(&self.shared.change);
        ioctl::set_filter(&self.vm, &Filter::allow_all()).map_err(InstallError::of(Step::Filter))?;
        ioctl::set_mask(&self.vm, Reasons::NONE).map_err(InstallError::of(Step::Mask))?;
        Ok(Probed::again())
    }
}

/// What the gates of a VM's vCPUs share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) handlers: Handlers,
    /// What each vCPU's registers hold from its gate's making on.
    presets: Box<[Preset]>,
    /// How often `published` was replaced: what a vCPU compares, without the lock.
    generation: AtomicU64,
    published: Mutex<Arc<Published>>,
    /// Held over a whole replacement.
    change: Mutex<()>,
}

impl Shared {
    /// Which publication is the last one.
    pub(crate) fn generation(&self) -> u64 {
        // Pairs with the release in `publish`.
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn published(&self) -> Arc<Published> {
        Arc::clone(&lock(&self.published))
    }

    fn publish(&self, published: Published) {
        *lock(&self.published) = Arc::new(published);
        // After the store, so that who sees the new number finds at least this publication.
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// Nothing panics while it holds one of these locks, and if something did, what they guard is replaced as a whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The plans whose filters an exit may have been made under.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    /// The plan that is in force.
    pub(crate) newest: Arc<Epoch>,
    /// Those that were before, newest first.
    older: Vec<Arc<Epoch>>,
    /// The plan whose filter is on its way into the kernel.
    coming: Option<Arc<Epoch>>,
}

impl Published {
    /// Newest first.
    fn settled(&self) -> impl Iterator<Item = &Arc<Epoch>> {
        [&self.newest].into_iter().chain(&self.older)
    }

    /// The plan that answers an exit of a vCPU that has answered by `own` so far.
    ///
    /// Never one older than `own`, and `coming` only for what none of the others denies: since a vCPU that has met the
    /// new filter cannot meet the old one again, it never has to go back, and what its MSRs remember goes along.
    pub(crate) fn deciding<'a>(&'a self, own: &'a Arc<Epoch>, access: Access, reason: Reason) -> &'a Arc<Epoch> {
        if self.older.is_empty() && self.coming.is_none() {
            return &self.newest;
        }
        let mut settled = self.settled().take_while(|epoch| epoch.number >= own.number);
        if let Some(epoch) = settled.find(|epoch| epoch.hands_over(access, reason)) {
            return epoch;
        }
        match &self.coming {
            // The wider mask of a replacement hands over what `own` leaves to the kernel; `own` faults it likewise.
            Some(coming) if reason == Reason::Filter && coming.hands_over(access, reason) => coming,
            _ => own,
        }
    }
}

/// One plan's time in force.
#[derive(Debug)]
pub(crate) struct Epoch {
    number: u64,
    plan: Arc<Plan>,
    pub(crate) host: Option<HostMsrs>,
}

impl Epoch {
    fn new(number: u64, plan: Arc<Plan>, handlers: &Handlers) -> Result<Epoch, InstallError> {
        if let Some(name) = plan.table().handlers().find(|name| handlers.find(name).is_none()) {
            return Err(InstallError::UnknownHandler { name: name.into() });
        }
        let host = HostMsrs::for_table(plan.table())?;
        Ok(Epoch { number, plan, host })
    }

    pub(crate) fn table(&self) -> &ActionTable {
        self.plan.table()
    }

    /// The name of what the plan means.
    pub(crate) fn hash(&self) -> [u8; 32] {
        self.plan.hash()
    }

    /// Whether the kernel, holding this plan, makes such an exit, or did while its mask was wider than this plan's.
    fn hands_over(&self, access: Access, reason: Reason) -> bool {
        match reason {
            Reason::Filter => self.plan.filter().verdict(access.msr(), access.op()) == Verdict::Deny,
            Reason::Unknown | Reason::Invalid => self.plan.reasons().contains(reason),
        }
    }
}
