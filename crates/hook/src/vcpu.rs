//! Slots for vCPUs, found by descriptor without a lock.

#![expect(unsafe_code, reason = "a cell that a state machine guards")]

use std::cell::{Cell, RefCell, UnsafeCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use crate::board::{Slate, Wanted};
use crate::hook::Register;
use crate::vm::{Policy, Vm};

/// What a vCPU's thread needs.
#[derive(Debug)]
pub(crate) struct Body<G, V> {
    pub(crate) vm: Arc<Vm<G>>,
    pub(crate) vcpu: V,
    pub(crate) id: u32,
    /// Those that hold presets.
    pub(crate) registers: Box<[Register]>,
    /// What is in force on it.
    pub(crate) policy: RefCell<Arc<Policy>>,
    /// Whether something is that it may run under.
    pub(crate) ready: Cell<bool>,
    /// Where its accesses are written down.
    pub(crate) slate: Option<Slate>,
    pub(crate) wanted: Wanted,
}

/// Nobody's.
const FREE: u32 = 0;
/// Has a body, which nobody uses.
const IDLE: u32 = 1;
/// One thread is in KVM_RUN or answers.
const RUNNING: u32 = 2;
/// As `RUNNING`, but the last descriptor is closed; who runs frees the body.
const CLOSED: u32 = 3;

/// INVARIANT: `body` is touched by who holds `RUNNING` or `CLOSED`, and by the holder of the hook's turn where the state
/// is `FREE` or was taken from `IDLE` to `RUNNING` by it.
#[derive(Debug)]
struct Slot<B> {
    state: AtomicU32,
    /// The VMM has put the vCPU into a state, and it did not run since.
    placed: AtomicBool,
    body: UnsafeCell<Option<B>>,
}

// SAFETY: the invariant gives one thread at a time the body, and it may move between threads.
unsafe impl<B: Send> Sync for Slot<B> {}

impl<B> Slot<B> {
    fn free(&self) {
        // SAFETY: the caller holds `RUNNING` or `CLOSED`, so nobody else touches the body.
        let body = unsafe { (*self.body.get()).take() };
        drop(body);
        self.state.store(FREE, Ordering::Release);
    }
}

/// All slots. A slot's memory is made once and never freed, so that a thread may look at one that was just given up.
#[derive(Debug)]
pub(crate) struct Slots<B: 'static>(Box<[AtomicPtr<Slot<B>>]>);

impl<B: Send + 'static> Slots<B> {
    pub(crate) fn new(count: usize) -> Slots<B> {
        Slots((0..count).map(|_| AtomicPtr::default()).collect())
    }

    fn slot(&self, number: u32) -> Option<&'static Slot<B>> {
        let slot = self.0.get(number as usize)?.load(Ordering::Acquire);
        // SAFETY: null, or made by `put` from a box that was leaked, so that it is a slot for ever.
        unsafe { slot.as_ref() }
    }

    /// Puts a body into a free slot, and gives its number. The caller holds the hook's turn.
    pub(crate) fn put(&self, body: B) -> Option<u32> {
        for (pointer, number) in self.0.iter().zip(0..) {
            let slot = match self.slot(number) {
                Some(slot) => slot,
                None => {
                    let slot: &'static Slot<B> = Box::leak(Box::new(Slot {
                        state: AtomicU32::new(FREE),
                        placed: AtomicBool::new(false),
                        body: UnsafeCell::new(None),
                    }));
                    pointer.store(std::ptr::from_ref(slot).cast_mut(), Ordering::Release);
                    slot
                }
            };
            if slot.state.load(Ordering::Acquire) == FREE {
                // SAFETY: a free slot's body is touched by the holder of the turn alone, which the caller is.
                unsafe { *slot.body.get() = Some(body) };
                slot.state.store(IDLE, Ordering::Release);
                return Some(number);
            }
        }
        None
    }

    /// The body for the calling thread alone; `None` where another thread has it, or nobody.
    pub(crate) fn enter(&self, number: u32) -> Option<Entered<B>> {
        let slot = self.slot(number)?;
        slot.state
            .compare_exchange(IDLE, RUNNING, Ordering::Acquire, Ordering::Relaxed)
            .ok()?;
        Some(Entered(slot))
    }

    /// The VMM puts the vCPU into a state.
    pub(crate) fn place(&self, number: u32) {
        if let Some(slot) = self.slot(number) {
            slot.placed.store(true, Ordering::Release);
        }
    }

    /// The last descriptor is closed. The caller holds the hook's turn.
    pub(crate) fn close(&self, number: u32) {
        let Some(slot) = self.slot(number) else { return };
        let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
        loop {
            if slot.state.compare_exchange(IDLE, RUNNING, success, failure).is_ok() {
                return slot.free();
            }
            match slot.state.compare_exchange(RUNNING, CLOSED, success, failure) {
                Err(IDLE) => {}
                _ => return,
            }
        }
    }

    /// Forgets every body without touching what it holds: in the child of a fork the thread that used it is gone, and
    /// may have been in the midst of a change.
    pub(crate) fn forget(&self) {
        for (pointer, number) in self.0.iter().zip(0..) {
            if self.slot(number).is_some() {
                pointer.store(std::ptr::null_mut(), Ordering::Release);
            }
        }
    }
}

/// A body that this thread has for itself.
#[derive(Debug)]
pub(crate) struct Entered<B: 'static>(&'static Slot<B>);

impl<B> Entered<B> {
    pub(crate) fn body(&self) -> Option<&B> {
        // SAFETY: `enter` took the state from `IDLE` to `RUNNING`, so that until `drop` no other thread touches it.
        unsafe { (*self.0.body.get()).as_ref() }
    }

    /// Whether the VMM has put the vCPU into a state since this was asked last.
    pub(crate) fn was_placed(&self) -> bool {
        self.0.placed.load(Ordering::Acquire) && self.0.placed.swap(false, Ordering::AcqRel)
    }
}

impl<B> Drop for Entered<B> {
    fn drop(&mut self) {
        let (success, failure) = (Ordering::Release, Ordering::Acquire);
        if self.0.state.compare_exchange(RUNNING, IDLE, success, failure).is_err() {
            // Closed meanwhile.
            self.0.free();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tells when it is dropped.
    struct Told(Arc<()>);

    #[test]
    fn a_body_that_is_in_use_is_freed_by_its_user_and_the_slot_is_used_again() {
        let slots = Slots::new(1);
        let told = Arc::new(());
        let number = slots.put(Told(Arc::clone(&told))).unwrap();
        assert!(slots.put(Told(Arc::clone(&told))).is_none(), "there is one slot");
        let entered = slots.enter(number).unwrap();
        assert!(slots.enter(number).is_none(), "one thread at a time");
        slots.close(number);
        assert!(slots.enter(number).is_none());
        assert_eq!(
            Arc::strong_count(&entered.body().unwrap().0),
            2,
            "its user still has it"
        );
        drop(entered);
        assert_eq!(Arc::strong_count(&told), 1);
        assert_eq!(slots.put(Told(Arc::clone(&told))), Some(number));
        slots.close(number);
        assert_eq!(Arc::strong_count(&told), 1, "who closes one that nobody uses frees it");
    }
}
