//! What rules with `log` say, as it happens.

use std::io::Write;

use msrgate_core::{Event, LogLimiter, Op};

use super::compare::Comparison;
use super::machine::AccessResult;
use crate::exit::Failure;
use crate::{stream, words};

/// Which accesses have been logged, so that `first` and `per_second` can be kept.
pub(crate) struct Logged {
    quiet: bool,
    limiter: LogLimiter,
}

impl Logged {
    /// Of a policy of so many rules.
    pub(crate) fn new(quiet: bool, rules: usize) -> Logged {
        Logged {
            quiet,
            limiter: LogLimiter::new(rules),
        }
    }

    /// Prints the access if its rule says so. Time is the trace's.
    pub(crate) fn see(&mut self, event: &Event, got: &AccessResult, seen: &Comparison) -> Result<(), Failure> {
        let Some(answer) = got.answer else {
            return Ok(());
        };
        let rule = answer.rule;
        if self.quiet || !self.limiter.admits(&Event { rule, ..*event }, answer.log) {
            return Ok(());
        }
        let name = words::name(event.msr)
            .map(|name| format!(" {name}"))
            .unwrap_or_default();
        let value = match event.op {
            Op::Read => String::new(),
            Op::Write => format!(" = {:#x}", event.value),
        };
        let why = answer.why.map(|why| format!(" ({why})")).unwrap_or_default();
        let rule = rule.and_then(|rule| seen.rules.get(usize::try_from(rule).ok()?));
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
}
