//! The plans of a VM, in the order of time: the one in force, and those that an exit may still have been made under.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use msrgate_core::{Access, ActionTable, Reason, Verdict};
use msrgate_plan::{Plan, Preset};

use crate::counts::Counters;
use crate::{Handlers, HostMsrs, InstallError};

/// What the gates of a VM's vCPUs share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) handlers: Handlers,
    /// What each vCPU's registers hold from its gate's making on.
    pub(crate) presets: Box<[Preset]>,
    /// How often `published` was replaced: what a vCPU compares, without the lock.
    pub(crate) generation: AtomicU64,
    pub(crate) published: Mutex<Arc<Published>>,
    /// Held over a whole replacement.
    pub(crate) change: Mutex<()>,
    pub(crate) counters: Counters,
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

    pub(crate) fn publish(&self, published: Published) {
        *lock(&self.published) = Arc::new(published);
        // After the store, so that who sees the new number finds at least this publication.
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// Nothing panics while it holds one of these locks, and if something did, what they guard is replaced as a whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The plans whose filters an exit may have been made under.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    /// The plan that is in force.
    pub(crate) newest: Arc<Epoch>,
    /// Those that were before, newest first.
    pub(crate) older: Vec<Arc<Epoch>>,
    /// The plan whose filter is on its way into the kernel.
    pub(crate) coming: Option<Arc<Epoch>>,
}

impl Published {
    /// Newest first.
    pub(crate) fn settled(&self) -> impl Iterator<Item = &Arc<Epoch>> {
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
    pub(crate) number: u64,
    pub(crate) plan: Arc<Plan>,
    pub(crate) host: Option<HostMsrs>,
}

impl Epoch {
    pub(crate) fn new(number: u64, plan: Arc<Plan>, handlers: &Handlers) -> Result<Epoch, InstallError> {
        if let Some(name) = plan.table().handlers().find(|name| handlers.find(name).is_none()) {
            return Err(InstallError::UnknownHandler { name: name.into() });
        }
        let host = HostMsrs::for_table(plan.table())?;
        Ok(Epoch { number, plan, host })
    }

    pub(crate) fn table(&self) -> &ActionTable {
        self.plan.table()
    }

    /// Whether the kernel, holding this plan, makes such an exit, or did while its mask was wider than this plan's.
    fn hands_over(&self, access: Access, reason: Reason) -> bool {
        match reason {
            Reason::Filter => self.plan.filter().verdict(access.msr(), access.op()) == Verdict::Deny,
            Reason::Unknown | Reason::Invalid => self.plan.reasons().contains(reason),
        }
    }
}
