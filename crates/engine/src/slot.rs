//! The place that holds a VM's filter and lets it be replaced under running vCPUs.
//!
//! Two locks hold the current filter and the one before; the low bit of a generation says which is current. A writer
//! fills the other one and then publishes the next generation. A reader that sees the generation it knows touches no
//! lock. One that sees a new generation tries the current lock; no writer holds that lock unless it has published a
//! later generation meanwhile, so a reader tries again only after a writer has made progress, and never waits.

use alloc::sync::Arc;
use alloc::vec::Vec;

use msrgate_core::Filter;

use self::sync::{AtomicU64, Ordering, RwLock};

/// A VM's filter, or none yet.
pub(crate) struct Slot {
    /// INVARIANT: filter `g` lies in `halves[g % 2]` from before `g` is published until after `g + 1` is.
    halves: [RwLock<Option<Arc<Filter>>>; 2],
    generation: AtomicU64,
    /// Serialises writers, and keeps each replaced filter until no vCPU has it any more: so it is a writer that frees
    /// it, never a vCPU on its access path.
    retired: RwLock<Vec<Arc<Filter>>>,
}

/// A filter as one reader knows it.
pub(crate) struct Seen {
    pub(crate) generation: u64,
    pub(crate) filter: Option<Arc<Filter>>,
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
    pub(crate) fn publish(&self, filter: Filter) {
        let filter = Arc::new(filter);
        let mut retired = sync::write(&self.retired);
        let current = self.generation.load(Ordering::Relaxed);
        let next = current.wrapping_add(1);
        let before_last = sync::write(self.half(next)).replace(filter);
        // Release: who sees the generation takes the half's lock after this writer let it go.
        self.generation.store(next, Ordering::Release);
        retired.extend(before_last);
        retired.retain(|filter| Arc::strong_count(filter) > 1);
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
                    let filter = half.clone();
                    return Seen { generation, filter };
                }
            }
            sync::spin_loop();
        }
    }

    fn half(&self, generation: u64) -> &RwLock<Option<Arc<Filter>>> {
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
    use super::*;

    fn slot(filters: usize) -> Slot {
        let slot = Slot::empty();
        (0..filters).for_each(|_| slot.publish(Filter::allow_all()));
        slot
    }

    #[test]
    fn a_reader_does_not_wait_for_writers_that_stand_still() {
        for published in 0..4 {
            let slot = slot(published);
            let _first = sync::write(&slot.retired);
            let _writing = sync::write(slot.half(published as u64 + 1));
            assert_eq!(slot.look().filter.is_some(), published > 0);
        }
    }

    #[test]
    fn a_filter_that_a_reader_holds_is_freed_by_a_later_writer() {
        let slot = slot(1);
        let seen = slot.look();
        let filter = Arc::downgrade(seen.filter.as_ref().unwrap());
        (0..5).for_each(|_| slot.publish(Filter::allow_all()));
        drop(seen);
        assert!(filter.upgrade().is_some(), "not by the reader");
        slot.publish(Filter::allow_all());
        assert!(filter.upgrade().is_none());
        assert!(sync::write(&slot.retired).is_empty(), "nothing piles up");
    }
}
