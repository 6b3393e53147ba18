//! The filter of `msrgate-core`.

use msrgate_core::{Filter, FilterRange, FlatFilter, Ops, Verdict};

use crate::compiled::compile;
use crate::{
    AccessStep, Call, CallResult, Case, Descriptor, Implementation, Place, Process, RawFilter, RawRange, Seen, Step,
    Stop, Subject, Target, perform,
};

/// What a plan's filter says, or one that is built from a raw one's numbers. Has no memory and no errno: a call that
/// fails for where its arguments lie it cannot make.
#[derive(Clone, Copy, Debug)]
pub struct CoreFilter;

impl Implementation for CoreFilter {
    fn name(&self) -> &str {
        "filter"
    }

    fn start(&self, case: &Case, _: Process) -> Result<Box<dyn Subject + '_>, Stop> {
        Ok(Box::new(FilterInForce::start(case)?))
    }
}

/// The filter, flattened for who asks often.
#[derive(Clone, Copy, Debug)]
pub struct Flat;

impl Implementation for Flat {
    fn name(&self) -> &str {
        "flat filter"
    }

    fn start(&self, case: &Case, _: Process) -> Result<Box<dyn Subject + '_>, Stop> {
        Ok(Box::new(Flattened(FilterInForce::start(case)?)))
    }
}

struct Flattened(FilterInForce);

impl Subject for Flattened {
    fn access(&mut self, step: &AccessStep) -> Result<Seen, Stop> {
        let verdict = FlatFilter::new(self.0.filter.clone()).verdict(step.msr(), step.op());
        let seen = self.0.access(step)?;
        Ok(Seen {
            verdict: Some(verdict),
            ..seen
        })
    }

    fn call(&mut self, call: &Call) -> Result<Option<CallResult>, Stop> {
        self.0.set(call)
    }

    fn replace(&mut self, policy: &str) -> Result<(), Stop> {
        self.0.replace(policy)
    }
}

/// The filter that is in force.
pub(crate) struct FilterInForce {
    pub(crate) filter: Filter,
    cpuid: Option<msrgate_msrs::cpuid::Cpuid>,
}

impl FilterInForce {
    pub(crate) fn start(case: &Case) -> Result<FilterInForce, Stop> {
        let cpuid = crate::compiled::cpuid(case)?;
        let filter = match &case.policy {
            Some(policy) => compile(policy, cpuid.as_ref())?.plan.filter().clone(),
            None => Filter::allow_all(),
        };
        if case.steps.iter().any(|step| matches!(step, Step::Kill)) {
            return Err(Stop::skip("it has no VM that could die"));
        }
        Ok(FilterInForce { filter, cpuid })
    }

    pub(crate) fn set(&mut self, call: &Call) -> Result<Option<CallResult>, Stop> {
        let Target::SetMsrFilter(raw) = &call.target else {
            // Exit reasons change no verdict.
            return Ok(None);
        };
        match build(call, raw)? {
            Some(filter) => {
                self.filter = filter;
                Ok(Some(CallResult::OK))
            }
            None => Ok(Some(CallResult::EINVAL)),
        }
    }

    pub(crate) fn replace(&mut self, policy: &str) -> Result<(), Stop> {
        self.filter = compile(policy, self.cpuid.as_ref())?.plan.filter().clone();
        Ok(())
    }
}

impl Subject for FilterInForce {
    fn access(&mut self, step: &AccessStep) -> Result<Seen, Stop> {
        let verdict = self.filter.verdict(step.msr(), step.op());
        for call in &step.meanwhile {
            perform(call, |call| self.set(call))?;
        }
        Ok(Seen {
            verdict: Some(verdict),
            ..Seen::default()
        })
    }

    fn call(&mut self, call: &Call) -> Result<Option<CallResult>, Stop> {
        self.set(call)
    }

    fn replace(&mut self, policy: &str) -> Result<(), Stop> {
        FilterInForce::replace(self, policy)
    }
}

/// The filter that the raw one's numbers make; `None` where they make none.
fn build(call: &Call, raw: &RawFilter) -> Result<Option<Filter>, Stop> {
    let readable = |place: Place| matches!(place, Place::Mapped | Place::Unaligned);
    let used: Vec<&RawRange> = raw.ranges.iter().filter(|range| range.nmsrs != 0).collect();
    if call.on != Descriptor::Vm || !readable(call.argp) || !used.iter().all(|range| readable(range.at)) {
        return Err(Stop::skip(
            "a filter is built from numbers, not from a process's memory",
        ));
    }
    if raw.layout.is_some() {
        return Err(Stop::skip("a filter has no binary layout"));
    }
    let default = match raw.flags {
        0 => Verdict::Allow,
        1 => Verdict::Deny,
        _ => return Err(Stop::skip("a filter has no flags but its default")),
    };
    let ranges: Option<Vec<FilterRange>> = used
        .into_iter()
        .map(|range| {
            let ops = Ops::from_bits(range.flags)?;
            // Longer than any range may be, so that a huge one is not allocated.
            let words = range.nmsrs.div_ceil(64).min(0x1000);
            let bytes = range.bitmap.iter().copied().chain(std::iter::repeat(0));
            let bytes: Vec<u8> = bytes.take(words as usize * 8).collect();
            let (words, _) = bytes.as_chunks();
            let bitmap: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
            FilterRange::new(range.base, range.nmsrs, ops, bitmap).ok()
        })
        .collect();
    Ok(ranges.and_then(|ranges| Filter::new(default, ranges).ok()))
}
