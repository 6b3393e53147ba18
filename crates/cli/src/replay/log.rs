//! What rules with `log` say, as it happens.

use std::collections::{HashMap, HashSet};
use std::io::Write;

use msrgate_core::{Event, Log, Msr, Op};

use super::Got;
use super::compare::Comparison;
use crate::exit::Failure;
use crate::explain;
use crate::stream;

const SECOND: u64 = 1_000_000_000;

/// Which accesses have been logged, so that `first` and `per_second` can be kept.
pub(crate) struct Logged {
    quiet: bool,
    first: HashSet<(Msr, Op)>,
    /// For each rule the second that is being counted, and how many were logged in it.
    counts: HashMap<Option<u32>, (u64, u32)>,
}

impl Logged {
    pub(crate) fn new(quiet: bool) -> Logged {
        Logged {
            quiet,
            first: HashSet::new(),
            counts: HashMap::new(),
        }
    }

    /// Prints the access if its rule says so. Time is the trace's.
    pub(crate) fn see(&mut self, event: &Event, got: &Got, seen: &Comparison) -> Result<(), Failure> {
        let Some(answer) = got.answer else {
            return Ok(());
        };
        if self.quiet || !self.admits(event, answer.log, answer.rule) {
            return Ok(());
        }
        let name = explain::name(event.msr)
            .map(|name| format!(" {name}"))
            .unwrap_or_default();
        let value = match event.op {
            Op::Read => String::new(),
            Op::Write => format!(" = {:#x}", event.value),
        };
        let why = answer.why.map(|why| format!(" ({why})")).unwrap_or_default();
        let rule = answer.rule.and_then(|rule| seen.rules.get(usize::try_from(rule).ok()?));
        let because = rule
            .and_then(|rule| rule.why.as_deref())
            .map(|why| format!(": {why}"))
            .unwrap_or_default();
        writeln!(
            stream::err(),
            "log: vcpu {} {} {}{name}{value}: {}{why}{because}",
            event.vcpu,
            event.op,
            event.msr,
            answer.did,
        )?;
        Ok(())
    }

    fn admits(&mut self, event: &Event, log: Log, rule: Option<u32>) -> bool {
        match log {
            Log::None => false,
            Log::All => true,
            Log::First => self.first.insert((event.msr, event.op)),
            Log::PerSecond(most) => {
                let second = event.t / SECOND;
                let (counted, n) = self.counts.entry(rule).or_insert((second, 0));
                // vCPUs' events may be out of order, and a second that is over does not begin again.
                if *counted < second {
                    (*counted, *n) = (second, 0);
                }
                *n += 1;
                *n <= most
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use msrgate_core::Did;

    use super::*;

    fn event(t: u64, msr: u32) -> Event {
        Event {
            t,
            vm: 0,
            vcpu: 0,
            op: Op::Read,
            msr: Msr(msr),
            value: 0,
            reason: None,
            did: Did::Deny,
            why: None,
            rule: None,
            rip: None,
            cost: None,
        }
    }

    #[test]
    fn the_first_of_each_msr_is_logged_and_no_more() {
        let mut logged = Logged::new(false);
        let admitted: Vec<bool> = [1, 2, 1]
            .into_iter()
            .map(|msr| logged.admits(&event(0, msr), Log::First, None))
            .collect();
        assert_eq!(admitted, [true, true, false]);
    }

    #[test]
    fn each_second_admits_so_many_of_a_rule() {
        let mut logged = Logged::new(false);
        let times = [0, 1, 2, SECOND, SECOND + 1, SECOND + 2];
        let admitted: Vec<bool> = times
            .into_iter()
            .map(|t| logged.admits(&event(t, 1), Log::PerSecond(2), Some(0)))
            .collect();
        assert_eq!(admitted, [true, true, false, true, true, false]);
        // Two vCPUs at the turn of a second, their events by turns.
        let mut logged = Logged::new(false);
        let times = [SECOND, SECOND - 1, SECOND + 1, SECOND - 2, SECOND + 2];
        let admitted: Vec<bool> = times
            .into_iter()
            .map(|t| logged.admits(&event(t, 1), Log::PerSecond(2), Some(0)))
            .collect();
        assert_eq!(admitted, [true, true, false, false, false]);
    }
}
