//! One thread at a time, also over a fork.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

/// A lock without memory of its own to free, which the child of a fork can let go of in the parent's place.
///
/// Held over calls that make VMs and vCPUs, and never while a vCPU is run, so that spinning is rare and short.
#[derive(Debug)]
pub(crate) struct Turn(AtomicBool);

impl Turn {
    pub(crate) const fn new() -> Turn {
        Turn(AtomicBool::new(false))
    }

    pub(crate) fn take(&self) {
        while self.0.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    pub(crate) fn leave(&self) {
        self.0.store(false, Ordering::Release);
    }
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, what this thread calls is the hook's own and goes on to libc.
pub(crate) struct Inside(());

impl Inside {
    /// `None` where the thread is inside already.
    pub(crate) fn enter() -> Option<Inside> {
        // Made only where it is given: what is not given would be dropped.
        (!INSIDE.replace(true)).then(|| Inside(()))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_inside_stays_so_however_often_it_is_asked() {
        let inside = Inside::enter();
        assert!(inside.is_some());
        for _ in 0..3 {
            assert!(Inside::enter().is_none());
        }
        drop(inside);
        assert!(Inside::enter().is_some());
    }
}
