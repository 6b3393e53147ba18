//! What the hardware passes through, against the engine's bitmaps.
//!
//! An access that does not leave the guest is not counted by the kernel's `exits` statistic. Each MSR is counted before
//! there is a filter that denies it, under one, and after it.

use std::sync::Arc;

use msrgate_core::{Access, Msr, MsrRange, Op, Ops, Outcome, PassthroughMsr, Reason};
use msrgate_engine::{Intercepts, Process, Vcpu as EngineVcpu, Vendor, Vm};
use msrgate_guest::Guest;
use msrgate_guest::raw::{Arena, Caller};

use crate::case::{Call, PAGES, RawFilter, RawRange};
use crate::{Disagreement, Interception, Machine, Report, VerifyError};

/// Accesses of one count.
const TIMES: u64 = Interception::TIMES;

/// An MSR that is passed through by one vendor at least.
const MSRS: [(u32, &str); 11] = [
    (0x10, "IA32_TSC"),
    (0x174, "IA32_SYSENTER_CS"),
    (0x175, "IA32_SYSENTER_ESP"),
    (0x176, "IA32_SYSENTER_EIP"),
    (0xc000_0081, "IA32_STAR"),
    (0xc000_0082, "IA32_LSTAR"),
    (0xc000_0083, "IA32_CSTAR"),
    (0xc000_0084, "IA32_FMASK"),
    (0xc000_0100, "IA32_FS_BASE"),
    (0xc000_0101, "IA32_GS_BASE"),
    (0xc000_0102, "IA32_KERNEL_GS_BASE"),
];

/// What the kernel passes through always: `vmx_recalc_msr_intercepts`, `svm_recalc_msr_intercepts` and what was before
/// them.
fn candidates(vendor: Vendor) -> Vec<PassthroughMsr> {
    let range = |first: u32, last: u32, ops: Ops| {
        MsrRange::new(Msr(first), Msr(last)).map(|range| PassthroughMsr::new(range, ops))
    };
    let both = [
        range(0x174, 0x176, Ops::BOTH),
        range(0xc000_0100, 0xc000_0102, Ops::BOTH),
    ];
    let own = match vendor {
        Vendor::Intel => range(0x10, 0x10, Ops::READ),
        Vendor::Amd => range(0xc000_0081, 0xc000_0084, Ops::BOTH),
    };
    both.into_iter().chain([own]).flatten().collect()
}

impl Machine {
    /// Counts which MSRs the hardware passes through before a filter that denies them, under it, and after it.
    pub fn interception(&self) -> Result<Report, VerifyError> {
        let mut report = Report::default();
        let Some(vendor) = self.kernel.vendor() else {
            let why = format!(
                "{} has no bitmap: it leaves no access to the hardware",
                self.kernel.module()
            );
            report.skipped.push(why);
            return Ok(report);
        };
        let mut counter = Counter::new(self)?;
        if let Err(error) = counter.guest.exits(0) {
            report.skipped.push(format!("the kernel does not count exits: {error}"));
            return Ok(report);
        }
        for (msr, name) in MSRS {
            for op in Op::ALL {
                // The clock runs; a write of what it was sets it back.
                if msr == 0x10 && op == Op::Write {
                    continue;
                }
                one(&mut counter, vendor, &mut report, (Msr(msr), op, name))?;
            }
        }
        Ok(report)
    }
}

/// Counts the accesses of one MSR in one direction.
fn one(
    counter: &mut Counter,
    vendor: Vendor,
    report: &mut Report,
    (msr, op, name): (Msr, Op, &'static str),
) -> Result<(), VerifyError> {
    let intercepts = match vendor {
        Vendor::Intel => Intercepts::vmx(candidates(vendor)),
        Vendor::Amd => Intercepts::svm(candidates(vendor)),
    };
    counter.engine = Arc::new(Vm::new());
    let mut vcpu = EngineVcpu::new(Arc::clone(&counter.engine), intercepts);
    let mut row = Interception {
        msr,
        name,
        op,
        exits: [0; 3],
        asked: 0,
        intercepted: [false; 3],
    };
    let rows = row.exits.iter_mut().zip(&mut row.intercepted);
    for (when, (exits, intercepted)) in ["before", "under", "after"].into_iter().zip(rows) {
        let denied = when == "under";
        if when != "before" {
            let ranges = if denied {
                vec![RawRange::denying(0, msr, Ops::of(op))]
            } else {
                Vec::new()
            };
            counter.call(&Call::set_msr_filter(RawFilter::allowing(ranges)))?;
            report.filters += 1;
        }
        *intercepted = vcpu.pick_up().intercepts.intercepts(msr, op);
        let count = counter.count(msr, op)?;
        report.accesses += TIMES;
        // A timer of the host's makes a few exits.
        let left = count.exits >= TIMES;
        let expected_asked = if denied { TIMES } else { 0 };
        if left != *intercepted || count.asked != expected_asked {
            let word = if *intercepted { "intercepted" } else { "passed" };
            report.disagreements.push(Disagreement::new(
                format!("{op} {msr} {name}, {when} the filter"),
                format!("{} exits, {} to user space, of {TIMES}", count.exits, count.asked),
                format!("{word}, {expected_asked} to user space"),
            ));
        }
        *exits = count.exits;
        row.asked += count.asked;
    }
    report.interception.push(row);
    Ok(())
}

/// A guest whose exits are counted.
struct Counter {
    guest: Guest,
    vm: Caller,
    engine: Arc<Vm>,
    arena: Arena,
}

/// What [`TIMES`] accesses came to.
struct Count {
    /// Exits of any kind.
    exits: u64,
    /// Exits that user space was asked about, for the filter's sake.
    asked: u64,
}

impl Counter {
    fn new(machine: &Machine) -> Result<Counter, VerifyError> {
        let guest = machine.guest(1)?;
        let mut counter = Counter {
            vm: Caller::of(guest.vm())?,
            engine: Arc::new(Vm::new()),
            arena: Arena::new(PAGES)?,
            guest,
        };
        counter.call(&Call::enable_cap(Reason::Filter as u64))?;
        Ok(counter)
    }

    /// Makes the call on both.
    fn call(&mut self, call: &Call) -> Result<(), VerifyError> {
        let (request, argp) = call.place(Process::Native, &mut self.arena);
        call.on_engine(&self.engine, Process::Native, (request, argp), &self.arena);
        Ok(self.vm.call(request, argp)?)
    }

    fn count(&mut self, msr: Msr, op: Op) -> Result<Count, VerifyError> {
        let read = Access::Read { msr };
        let access = match op {
            Op::Read => read,
            // It gets back what it holds; under a filter of writes alone it can be read.
            Op::Write => match self
                .guest
                .run(0, &[read], &mut |_| {})?
                .first()
                .map(|seen| seen.outcome)
            {
                Some(Outcome::Value(value)) => Access::Write { msr, value },
                _ => Access::Write { msr, value: 0 },
            },
        };
        let mut asked = 0;
        let mut run = |guest: &mut Guest, times: u64| -> Result<(), VerifyError> {
            let accesses = vec![access; usize::try_from(times).unwrap_or(1)];
            asked = 0;
            let ran = guest.run(0, &accesses, &mut |pending| {
                asked += u64::from(pending.reason_bits() == Reason::Filter as u32);
                pending.answer(|_| Ok(0), |_, _| Ok(()));
            });
            ran?;
            Ok(())
        };
        // What the guest touches for the first time makes exits of its own.
        run(&mut self.guest, 2)?;
        let before = self.guest.exits(0)?;
        run(&mut self.guest, TIMES)?;
        let after = self.guest.exits(0)?;
        Ok(Count {
            exits: after.saturating_sub(before),
            asked,
        })
    }
}
