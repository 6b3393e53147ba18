//! A map as what a filter's ranges have to serve.

use alloc::vec::Vec;

use msrgate_core::{Msr, MsrRange, Ops};

use crate::Intervals;

/// A stretch of MSRs of equal treatment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Segment {
    pub(crate) first: u64,
    /// The first MSR after it.
    pub(crate) end: u64,
    /// Whether reads are allowed.
    pub(crate) read: bool,
    /// Whether writes are allowed.
    pub(crate) write: bool,
    /// Whether reads differ from the default and must be served by a range.
    pub(crate) need_read: bool,
    /// Whether writes differ from the default and must be served by a range.
    pub(crate) need_write: bool,
}

impl Segment {
    pub(crate) fn mixed(&self) -> bool {
        self.read != self.write
    }

    pub(crate) fn needs(&self) -> bool {
        self.need_read || self.need_write
    }
}

/// Which directions a range of a covering serves.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Direction {
    /// Reads alone.
    Read,
    /// Writes alone.
    Write,
    /// Reads and writes, with one bit an MSR.
    Both,
}

impl Direction {
    /// The flags of such a filter range.
    pub const fn ops(self) -> Ops {
        match self {
            Direction::Read => Ops::READ,
            Direction::Write => Ops::WRITE,
            Direction::Both => Ops::BOTH,
        }
    }
}

/// The map as segments that differ from their neighbours; the last MSR of all needs nothing, since no range reaches it.
pub(crate) fn segments(allowed: &Intervals<(bool, bool)>, default: bool, free: &[MsrRange]) -> Vec<Segment> {
    let last = MsrRange::single(Msr::MAX);
    let no_effect = Intervals::first_match(false, free.iter().chain([&last]).map(|range| (*range, true)));
    let treated = allowed.zip(&no_effect, |pair, free| if *free { (default, default) } else { *pair });
    treated
        .iter()
        .map(|(range, (read, write))| Segment {
            first: u64::from(range.first().0),
            end: u64::from(range.last().0) + 1,
            read: *read,
            write: *write,
            need_read: *read != default,
            need_write: *write != default,
        })
        .collect()
}

/// The bits that a bitmap grows by.
pub(crate) const WORD: u64 = 64;
