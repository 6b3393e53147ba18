//! The decision map.

use msrgate_core::{MsrRange, Op, Verdict};
use msrgate_plan::DecisionMap;

use crate::compiled::compile_case;
use crate::{AccessStep, Case, Implementation, Process, Seen, Stop, Subject};

/// What the decision map says: actions, and whether the kernel may answer.
#[derive(Clone, Copy, Debug)]
pub struct Map;

impl Implementation for Map {
    fn name(&self) -> &str {
        "decision map"
    }

    fn start(&self, case: &Case, _: Process) -> Result<Box<dyn Subject + '_>, Stop> {
        Ok(Box::new(compile_case(case)?.map))
    }
}

impl Subject for DecisionMap {
    fn access(&mut self, step: &AccessStep) -> Result<Seen, Stop> {
        let msr = step.msr();
        let action = match step.op() {
            Op::Read => self.reads().get(msr).action.to_string(),
            Op::Write => self.writes().get(msr).action.to_string(),
        };
        let verdict = if self.allows(msr, step.op()) {
            Verdict::Allow
        } else {
            Verdict::Deny
        };
        // What no filter decides is no map's to say.
        let filtered = !MsrRange::X2APIC.contains(msr) && msr != msrgate_core::Msr::MAX;
        Ok(Seen {
            action: Some(action),
            verdict: filtered.then_some(verdict),
            ..Seen::default()
        })
    }
}
