//! The place that holds a VM's rules and lets them be replaced under running vCPUs.
//!
//! Two locks hold the current rules, or in the midst of a replacement the current ones and those before; the low bit of
//! a generation says which half is current. A writer fills the other half, publishes the next generation, and fills the
//! first half too. A reader that sees the generation it knows touches no lock. One that sees a new generation tries the
//! current lock; no writer holds that lock unless it has published a later generation meanwhile, so a reader tries again
//! only after a writer has made progress, and never waits.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem;

use msrgate_core::{ActionTable, FlatFilter, Reasons};

use self::sync::{AtomicU64, Ordering, RwLock};

/// What a VM is under.
pub(crate) struct Slot {
    /// INVARIANT: the rules of generation `g` lie in `halves[g % 2]` from before `g` is published until after `g + 1`
    /// is, and in both halves while no writer is at work.
    halves: [RwLock<SlotRules>; 2],
    generation: AtomicU64,
    /// Serialises writers, and keeps replaced rules until no vCPU has them any more: so it is a writer that frees them,
    /// never a vCPU on its access path. Each vCPU has one generation, so there are no more of them than vCPUs.
    retired: RwLock<Vec<SlotRules>>,
}

/// What decides an access and says what becomes of it, replaced as one.
#[derive(Clone)]
pub(crate) struct Rules {
    /// `None` before there is a filter.
    pub(crate) filter: Option<Arc<FlatFilter>>,
    pub(crate) reasons: Reasons,
    /// `None` where the filter came without one.
    pub(crate) table: Option<Arc<ActionTable>>,
}

/// Rules as one VM and its vCPUs hold them.
///
/// INVARIANT: a vCPU lets go of `rules` before `here`, since fields are dropped in this order. So once `here` is the
/// slot's alone no vCPU can be the last to have a filter or a table, however many other VMs share it.
#[derive(Clone)]
struct SlotRules {
    rules: Rules,
    here: Arc<()>,
}

/// Rules as one reader knows them.
pub(crate) struct ReaderRules {
    generation: u64,
    held: SlotRules,
}

impl ReaderRules {
    #[inline]
    pub(crate) fn rules(&self) -> &Rules {
        &self.held.rules
    }
}

impl Slot {
    pub(crate) fn empty() -> Slot {
        let held = SlotRules {
            rules: Rules {
                filter: None,
                reasons: Reasons::NONE,
                table: None,
            },
            here: Arc::new(()),
        };
        Slot {
            halves: [RwLock::new(held.clone()), RwLock::new(held)],
            generation: AtomicU64::new(0),
            retired: RwLock::new(Vec::new()),
        }
    }

    /// Replaces the rules by what `next` makes of them. Every look that starts after this returns sees these or later
    /// ones. Those that were replaced are freed here, or by the first writer that finds no vCPU to have them.
    pub(crate) fn publish(&self, next: impl FnOnce(&Rules) -> Rules) {
        let mut retired = sync::write(&self.retired);
        let generation = self.generation.load(Ordering::Relaxed);
        let mut half = sync::write(self.half(generation.wrapping_add(1)));
        let held = SlotRules {
            rules: next(&half.rules),
            here: Arc::new(()),
        };
        let replaced = mem::replace(&mut *half, held.clone());
        drop(half);
        // Release: who sees the generation takes the half's lock after this writer let it go.
        self.generation.store(generation.wrapping_add(1), Ordering::Release);
        *sync::write(self.half(generation)) = held;
        retired.push(replaced);
        retired.retain(|held| Arc::strong_count(&held.here) > 1);
    }

    /// Whether `seen` is still current; one load.
    #[inline]
    pub(crate) fn is_current(&self, seen: &ReaderRules) -> bool {
        self.generation.load(Ordering::Acquire) == seen.generation
    }

    /// The current rules.
    pub(crate) fn look(&self) -> ReaderRules {
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            if let Some(half) = sync::try_read(self.half(generation)) {
                // The half may already hold the rules after next, written but not published: whoever took them would
                // see them before others see their predecessor. An unchanged generation under the lock rules that out,
                // since the writer of those rules had published `generation + 1` before it took the lock.
                if self.generation.load(Ordering::Acquire) == generation {
                    let held = half.clone();
                    return ReaderRules { generation, held };
                }
            }
            sync::spin_loop();
        }
    }

    fn half(&self, generation: u64) -> &RwLock<SlotRules> {
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

/// The lock under the model checker, which has no poisoning: a panic ends the model.
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
    use alloc::sync::Weak;

    use msrgate_core::Filter;

    use super::*;

    fn publish(slot: &Slot, filter: impl Into<Arc<FlatFilter>>) {
        let filter = filter.into();
        slot.publish(|rules| Rules {
            filter: Some(filter),
            ..rules.clone()
        });
    }

    fn slot(filters: usize) -> Slot {
        let slot = Slot::empty();
        (0..filters).for_each(|_| publish(&slot, Filter::allow_all()));
        slot
    }

    fn current(slot: &Slot) -> Weak<FlatFilter> {
        Arc::downgrade(slot.look().rules().filter.as_ref().unwrap())
    }

    #[test]
    fn a_reader_does_not_wait_for_writers_that_stand_still() {
        for published in 0..4 {
            let slot = slot(published);
            let _first = sync::write(&slot.retired);
            let _writing = sync::write(slot.half(published as u64 + 1));
            assert_eq!(slot.look().rules().filter.is_some(), published > 0);
        }
    }

    #[test]
    fn a_filter_that_no_reader_holds_is_freed_by_the_writer_that_replaces_it() {
        let slot = slot(1);
        let filter = current(&slot);
        publish(&slot, Filter::allow_all());
        assert!(filter.upgrade().is_none());
        assert!(sync::write(&slot.retired).is_empty());
    }

    #[test]
    fn a_filter_that_a_reader_holds_is_freed_by_a_later_writer() {
        let slot = slot(1);
        let seen = slot.look();
        let filter = current(&slot);
        (0..5).for_each(|_| publish(&slot, Filter::allow_all()));
        assert_eq!(sync::write(&slot.retired).len(), 1, "nothing piles up");
        drop(seen);
        assert!(filter.upgrade().is_some(), "not by the reader");
        publish(&slot, Filter::allow_all());
        assert!(filter.upgrade().is_none());
        assert!(sync::write(&slot.retired).is_empty());
    }

    #[test]
    fn a_filter_that_vms_share_is_kept_by_none_that_replaced_it() {
        let filter: Arc<FlatFilter> = Filter::allow_all().into();
        let slots = [(); 3].map(|()| slot(0));
        slots.iter().for_each(|slot| publish(slot, Arc::clone(&filter)));
        let weak = Arc::downgrade(&filter);
        drop(filter);
        for slot in &slots {
            assert!(Weak::ptr_eq(&current(slot), &weak));
        }
        for slot in &slots {
            publish(slot, Filter::allow_all());
            assert!(sync::write(&slot.retired).is_empty());
        }
        assert!(weak.upgrade().is_none());
    }
}
