//! Which slates are a vCPU's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{SLATES, head};
use crate::mapping::{Mapping, word};

/// That a slate is one vCPU's, until it is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    head: Arc<Mapping>,
    pub(super) number: usize,
}

impl Taken {
    /// The first that is nobody's, of all processes that have the board.
    pub(super) fn any(head: &Arc<Mapping>) -> Option<Taken> {
        let number = (0..SLATES).find(|number| {
            let (word, bit) = Taken::bit(head, *number);
            word.fetch_or(bit, Ordering::Acquire) & bit == 0
        })?;
        word(head.words(), head::SLATES).fetch_max(number as u64 + 1, Ordering::Relaxed);
        let head = Arc::clone(head);
        Some(Taken { head, number })
    }

    fn bit(head: &Mapping, number: usize) -> (&AtomicU64, u64) {
        (word(head.words(), head::TAKEN + number / 64), 1 << (number % 64))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let (word, bit) = Taken::bit(&self.head, self.number);
        word.fetch_and(!bit, Ordering::Release);
    }
}
