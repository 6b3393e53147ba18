//! Time, without a system call.

#![expect(unsafe_code, reason = "an instruction")]

use std::time::Instant;

/// The processor's time stamp counter, which does not stop and counts alike on all CPUs wherever KVM is of use.
pub(crate) fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and it touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Turns the ticks in events into time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    ticks: u64,
}

impl Clock {
    /// Whose time starts at 0.
    pub fn start() -> Clock {
        Clock {
            start: Instant::now(),
            ticks: ticks(),
        }
    }

    /// Nanoseconds since the start, of an event that is already written. The longer the clock runs, the better it knows
    /// the counter's rate.
    pub fn nanoseconds(&self, event: u64) -> u64 {
        self.lasting(event.saturating_sub(self.ticks))
    }

    /// How many nanoseconds so many ticks last.
    pub fn lasting(&self, some: u64) -> u64 {
        let (now, elapsed) = (ticks(), self.start.elapsed().as_nanos());
        let all = u128::from(now.wrapping_sub(self.ticks)).max(1);
        u64::try_from(u128::from(some).saturating_mul(elapsed) / all).unwrap_or(u64::MAX)
    }
}
