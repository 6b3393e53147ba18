//! The permission bitmaps of VMX and SVM, with every MSR a candidate for pass-through.

use msrgate_core::{Filter, Msr, MsrRange, Op, Ops, PassthroughMsr, SvmPermissionMap, Verdict, VmxBitmap};

use crate::filter::FilterInForce;
use crate::{AccessStep, Call, CallResult, Case, Implementation, Process, Seen, Stop, Subject, perform};

/// A VMX bitmap.
#[derive(Clone, Copy, Debug)]
pub struct Vmx;

/// An SVM permissions map.
#[derive(Clone, Copy, Debug)]
pub struct Svm;

/// The MSRs that each has bits for.
const VMX: [(u32, u32); 2] = [(0, 0x1fff), (0xc000_0000, 0xc000_1fff)];
const SVM: [(u32, u32); 3] = [(0, 0x1fff), (0xc000_0000, 0xc000_1fff), (0xc001_0000, 0xc001_1fff)];

impl Implementation for Vmx {
    fn name(&self) -> &str {
        "VMX bitmap"
    }

    fn start(&self, case: &Case, _: Process) -> Result<Box<dyn Subject + '_>, Stop> {
        Ok(Box::new(Derived {
            held: FilterInForce::start(case)?,
            derive: |filter| {
                let bitmap = VmxBitmap::derive(filter, &EVERYTHING);
                Box::new(move |msr, op| bitmap.intercepts(msr, op))
            },
            derived: None,
            windows: &VMX,
        }))
    }
}

impl Implementation for Svm {
    fn name(&self) -> &str {
        "SVM permissions map"
    }

    fn start(&self, case: &Case, _: Process) -> Result<Box<dyn Subject + '_>, Stop> {
        Ok(Box::new(Derived {
            held: FilterInForce::start(case)?,
            derive: |filter| {
                let map = SvmPermissionMap::derive(filter, &EVERYTHING);
                Box::new(move |msr, op| map.intercepts(msr, op))
            },
            derived: None,
            windows: &SVM,
        }))
    }
}

const EVERYTHING: [PassthroughMsr; 1] = [PassthroughMsr::new(MsrRange::ALL, Ops::BOTH)];

/// A bitmap's word on an access.
type Intercepts = Box<dyn Fn(Msr, Op) -> bool>;

struct Derived {
    held: FilterInForce,
    derive: fn(&Filter) -> Intercepts,
    /// The bitmap of the filter that is held, once it was asked.
    derived: Option<Intercepts>,
    windows: &'static [(u32, u32)],
}

impl Subject for Derived {
    fn access(&mut self, step: &AccessStep) -> Result<Seen, Stop> {
        let (msr, op) = (step.msr(), step.op());
        let intercepts = self.derived.get_or_insert_with(|| (self.derive)(&self.held.filter));
        let intercepted = intercepts(msr, op);
        let has_bit = self
            .windows
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&msr.0));
        if !has_bit && !intercepted {
            return Err(Stop::fail("an MSR that has no bit is passed through"));
        }
        for call in &step.meanwhile {
            perform(call, |call| self.call(call))?;
        }
        let verdict = if intercepted { Verdict::Deny } else { Verdict::Allow };
        Ok(Seen {
            verdict: has_bit.then_some(verdict),
            ..Seen::default()
        })
    }

    fn call(&mut self, call: &Call) -> Result<Option<CallResult>, Stop> {
        self.derived = None;
        self.held.set(call)
    }

    fn replace(&mut self, policy: &str) -> Result<(), Stop> {
        self.derived = None;
        self.held.replace(policy)
    }
}
