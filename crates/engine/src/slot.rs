//! The place that holds a VM's filter and lets it be replaced under running vCPUs.
//!
//! Two locks hold the current filter and the one before; the low bit of a generation says which is current. A writer
//! fills the other one and then publishes the next generation. A reader that sees the generation it knows touches no
//! lock. One that sees a new generation tries the current lock; no writer holds that lock unless it has published a
//! later generation meanwhile, so a reader tries again only after a writer has made progress, and never waits.

use alloc::sync::Arc;
use alloc::vec::Vec;

use msrgate_core::Lookup;

use self::sync::{AtomicU64, Ordering, RwLock};

/// A VM's filter, or none yet.
pub(crate) struct Slot {
    /// INVARIANT: filter `g` lies in `halves[g % 2]` from before `g` is published until after `g + 1` is.
    halves: [RwLock<Option<Held>>; 2],
    generation: AtomicU64,
    /// Serialises writers, and keeps each replaced filter until no vCPU has it any more: so it is a writer that frees
    /// it, never a vCPU on its access path.
    retired: RwLock<Vec<Held>>,
}

/// A filter as one VM and its vCPUs hold it.
///
/// INVARIANT: a vCPU lets go of `filter` before `here`, since fields are dropped in this order. So once `here` is the
/// slot's alone no vCPU can be the last to have the filter, however many other VMs share it.
#[derive(Clone)]
pub(crate) struct Held {
    pub(crate) filter: Arc<Lookup>,
    here: Arc<()>,
}

/// A filter as one reader knows it.
pub(crate) struct Seen {
    pub(crate) generation: u64,
    pub(crate) held: Option<Held>,
}

impl Slot {
    pub(crate) fn empty() -> Slot {
        Slot {
            halves: [RwLock::new(None), RwLock::new(None)],
            generation: AtomicU64::new(0),
            retired: RwLock::new(Vec::new()),
        }
    }

    /// Replaces the filter. Every look that starts after this returns sees `filter` or a later one.
    pub(crate) fn publish(&self, filter: Arc<Lookup>) {
        let held = Held {
            filter,
            here: Arc::new(()),
        };
        let mut retired = sync::write(&self.retired);
        let current = self.generation.load(Ordering::Relaxed);
        let next = current.wrapping_add(1);
        let before_last = sync::write(self.half(next)).replace(held);
        // Release: who sees the generation takes the half's lock after this writer let it go.
        self.generation.store(next, Ordering::Release);
        retired.extend(before_last);
        retired.retain(|held| Arc::strong_count(&held.here) > 1);
    }

    /// Whether `seen` is still current; one load.
    #[inline]
    pub(crate) fn is_current(&self, seen: &Seen) -> bool {
        self.generation.load(Ordering::Acquire) == seen.generation
    }

    /// The current filter.
    pub(crate) fn look(&self) -> Seen {
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            if let Some(half) = sync::try_read(self.half(generation)) {
                // The half may already hold the filter after next, written but not published: whoever took it would
                // see it before others see its predecessor. An unchanged generation under the lock rules that out,
                // since the writer of that filter had published `generation + 1` before it took the lock.
                if self.generation.load(Ordering::Acquire) == generation {
                    let held = half.clone();
                    return Seen { generation, held };
                }
            }
            sync::spin_loop();
        }
    }

    fn half(&self, generation: u64) -> &RwLock<Option<Held>> {
        let [even, odd] = &self.halves;
        if generation.is_multiple_of(2) { even } else { odd }
    }
}

#[cfg(not(loom))]
mod sync {
    pub(super) use core::hint::spin_loop;
    pub(super) use core::sync::atomic::{AtomicU64, Ordering};
    pub(super) use spin::RwLock;
    use spin::{RwLockReadGuard, RwLockWriteGuard};

    pub(super) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
        lock.write()
    }

    pub(super) fn try_read<T>(lock: &RwLock<T>) -> Option<RwLockReadGuard<'_, T>> {
        lock.try_read()
    }
}

/// The same under the model checker, which has no poisoning: a panic ends the model.
#[cfg(loom)]
mod sync {
    pub(super) use loom::hint::spin_loop;
    pub(super) use loom::sync::RwLock;
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
    use loom::sync::{RwLockReadGuard, RwLockWriteGuard};

    #[expect(clippy::unwrap_used, reason = "only in models")]
    pub(super) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
        lock.write().unwrap()
    }

    pub(super) fn try_read<T>(lock: &RwLock<T>) -> Option<RwLockReadGuard<'_, T>> {
        lock.try_read().ok()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use msrgate_core::Filter;

    use super::*;

    fn slot(filters: usize) -> Slot {
        let slot = Slot::empty();
        (0..filters).for_each(|_| slot.publish(Filter::allow_all().into()));
        slot
    }

    #[test]
    fn a_reader_does_not_wait_for_writers_that_stand_still() {
        for published in 0..4 {
            let slot = slot(published);
            let _first = sync::write(&slot.retired);
            let _writing = sync::write(slot.half(published as u64 + 1));
            assert_eq!(slot.look().held.is_some(), published > 0);
        }
    }

    #[test]
    fn a_filter_that_a_reader_holds_is_freed_by_a_later_writer() {
        let slot = slot(1);
        let seen = slot.look();
        let filter = Arc::downgrade(&seen.held.as_ref().unwrap().filter);
        (0..5).for_each(|_| slot.publish(Filter::allow_all().into()));
        drop(seen);
        assert!(filter.upgrade().is_some(), "not by the reader");
        slot.publish(Filter::allow_all().into());
        assert!(filter.upgrade().is_none());
        assert!(sync::write(&slot.retired).is_empty(), "nothing piles up");
    }

    #[test]
    fn a_filter_that_vms_share_is_kept_by_none_that_replaced_it() {
        let filter: Arc<Lookup> = Filter::allow_all().into();
        let slots = [(); 3].map(|()| slot(0));
        slots.iter().for_each(|slot| slot.publish(Arc::clone(&filter)));
        assert!(
            slots
                .iter()
                .all(|slot| Arc::ptr_eq(&slot.look().held.unwrap().filter, &filter))
        );
        let filter = {
            let weak = Arc::downgrade(&filter);
            drop(filter);
            weak
        };
        for slot in &slots {
            (0..2).for_each(|_| slot.publish(Filter::allow_all().into()));
            assert!(sync::write(&slot.retired).is_empty());
        }
        assert!(filter.upgrade().is_none());
    }
}
