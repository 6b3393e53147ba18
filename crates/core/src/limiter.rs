//! Which events of rules that log are told.

use alloc::boxed::Box;
use alloc::vec;

use crate::{Event, Log, Msr, Op};

/// Keeps `first` and `per_second`: says of each event whether its rule's log takes it.
///
/// Allocates when it is made. Asking it never does, and never locks or panics.
#[derive(Clone, Debug)]
pub struct LogLimiter {
    /// By rule, the default last: the second that is being counted, and how many events were told in it.
    seconds: Box<[(u64, u32)]>,
    /// A hash table of MSRs and directions that were told of; 0 in a free slot.
    told: Box<[u64]>,
    count: usize,
}

impl LogLimiter {
    /// MSRs and directions that a limiter remembers for [`Log::First`]. Once it has met so many, others are not told.
    pub const MOST_FIRST: usize = 1 << 14;

    /// For a policy of so many rules.
    pub fn new(rules: usize) -> LogLimiter {
        LogLimiter {
            seconds: vec![(0, 0); rules.saturating_add(1)].into(),
            told: vec![0; 2 * Self::MOST_FIRST].into(),
            count: 0,
        }
    }

    /// Whether an event is told, whose rule logs as `log` says. Rules that the policy does not have share the default's
    /// budget.
    pub fn admits(&mut self, event: &Event, log: Log) -> bool {
        match log {
            Log::None => false,
            Log::All => true,
            Log::First => self.is_first(event.msr, event.op),
            Log::PerSecond(most) => {
                let default = self.seconds.len().saturating_sub(1);
                let rule = event.rule.and_then(|rule| usize::try_from(rule).ok());
                let rule = rule.map_or(default, |rule| rule.min(default));
                let Some((second, count)) = self.seconds.get_mut(rule) else {
                    return false;
                };
                // The events of vCPUs may be out of order, and a second that is over does not begin again.
                let this = event.t.0 / 1_000_000_000;
                if *second < this {
                    (*second, *count) = (this, 0);
                }
                *count = count.saturating_add(1);
                *count <= most
            }
        }
    }

    fn is_first(&mut self, msr: Msr, op: Op) -> bool {
        let key = 1 << 63 | u64::from(msr.0) << 1 | op as u64;
        let slots = self.told.len();
        let start = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize;
        // At most half of the slots are taken, so an empty one ends the search.
        for probe in 0..slots {
            match self.told.get_mut(start.wrapping_add(probe) % slots) {
                Some(slot) if *slot == 0 => {
                    let is_room = self.count < Self::MOST_FIRST;
                    if is_room {
                        *slot = key;
                        self.count += 1;
                    }
                    return is_room;
                }
                Some(slot) if *slot == key => return false,
                _ => {}
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Disposition, Nanos};

    const SECOND: u64 = 1_000_000_000;

    fn event(t: u64, rule: Option<u32>, msr: u32) -> Event {
        Event {
            t: Nanos(t),
            vm: 0,
            vcpu: 0,
            op: Op::Read,
            msr: Msr(msr),
            value: 0,
            reason: None,
            did: Disposition::Deny,
            why: None,
            would: None,
            rule,
            rip: None,
            within: None,
            cost: None,
        }
    }

    #[test]
    fn the_first_of_each_msr_and_direction_is_told_and_no_more() {
        let mut limiter = LogLimiter::new(0);
        let write = Event {
            op: Op::Write,
            ..event(0, None, 1)
        };
        let events = [event(0, None, 1), event(0, None, 2), event(1, None, 1), write, write];
        assert_eq!(
            events.map(|event| limiter.admits(&event, Log::First)),
            [true, true, false, true, false]
        );
        assert!(!limiter.admits(&write, Log::None));
        assert!(limiter.admits(&write, Log::All) && limiter.admits(&write, Log::All));
    }

    #[test]
    fn a_limiter_that_remembers_all_it_can_tells_of_nothing_new() {
        let mut limiter = LogLimiter::new(0);
        let most = LogLimiter::MOST_FIRST as u32;
        let told = (0..2 * most).filter(|msr| limiter.admits(&event(0, None, *msr), Log::First));
        assert_eq!(told.count(), LogLimiter::MOST_FIRST);
        assert!((0..2 * most).all(|msr| !limiter.admits(&event(0, None, msr), Log::First)));
    }

    #[test]
    fn each_second_tells_so_many_of_a_rule() {
        let told = |most, events: &[(u64, Option<u32>, u32)]| -> alloc::vec::Vec<bool> {
            let mut limiter = LogLimiter::new(2);
            let admits = |(t, rule, msr): &(u64, Option<u32>, u32)| {
                limiter.admits(&event(*t, *rule, *msr), Log::PerSecond(most))
            };
            events.iter().map(admits).collect()
        };
        // One rule over three MSRs.
        assert_eq!(
            told(1, &[(0, Some(0), 1), (1, Some(0), 2), (2, Some(0), 3)]),
            [true, false, false]
        );
        assert_eq!(
            told(1, &[(0, Some(0), 1), (1, Some(1), 1), (2, None, 1), (3, Some(9), 1)]),
            [true, true, true, false]
        );
        let times = |times: [u64; 6]| times.map(|t| (t, Some(0), 1));
        assert_eq!(
            told(2, &times([0, 1, 2, SECOND, SECOND + 1, SECOND + 2])),
            [true, true, false, true, true, false]
        );
        // Two vCPUs at the turn of a second, their events by turns.
        assert_eq!(
            told(
                2,
                &times([SECOND, SECOND - 1, SECOND + 1, SECOND - 2, SECOND + 2, SECOND + 3])
            ),
            [true, true, false, false, false, false]
        );
    }
}
