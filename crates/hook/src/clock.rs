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

    /// Nanoseconds since the start, of an event that is already written.
    pub fn nanoseconds(&self, event: u64) -> u64 {
        self.rate().lasting(event.saturating_sub(self.ticks))
    }

    /// The counter's rate, as far as it is known: the longer the clock runs, the better.
    pub fn rate(&self) -> Rate {
        Rate {
            ticks: u128::from(ticks().wrapping_sub(self.ticks)).max(1),
            nanoseconds: self.start.elapsed().as_nanos(),
        }
    }
}

/// How fast the counter goes. What is to be added up or compared is turned into time by one rate.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    ticks: u128,
    nanoseconds: u128,
}

impl Rate {
    /// How many nanoseconds so many ticks last.
    pub fn lasting(&self, some: u64) -> u64 {
        let nanoseconds = u128::from(some).saturating_mul(self.nanoseconds) / self.ticks;
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    }
}
