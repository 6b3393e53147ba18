//! What the hardware passes through, against the engine's bitmaps.
//!
//! An access that does not leave the guest is not counted by the kernel's `exits` statistic. Each MSR is counted before
//! there is a filter that denies it, under one, and after it.

use std::io;
use std::sync::Arc;

use msrgate_core::{Access, Candidate, Filter, FilterRange, Msr, MsrRange, Op, Ops, Outcome, Verdict};
use msrgate_engine::{Intercepts, Vcpu as EngineVcpu, Vendor, Vm};
use msrgate_guest::raw::{Arena, Caller};
use msrgate_guest::{Guest, GuestError};
use serde_json::Value;

use super::call::{Call, PAGES, Place, RawFilter, RawRange};
use super::guest_failed;
use super::host::Host;
use super::live::Machine;
use super::report::{Disagreement, Report, Table};
use crate::exit::{Exit, Failure};

/// Accesses of one count.
const TIMES: u64 = 200;

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
fn candidates(vendor: Vendor) -> Vec<Candidate> {
    let range =
        |first: u32, last: u32, ops: Ops| MsrRange::new(Msr(first), Msr(last)).map(|range| Candidate::new(range, ops));
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

pub(super) fn run(machine: &Machine, host: &Host, report: &mut Report) -> Result<(), Failure> {
    let Some(vendor) = host.vendor else {
        let why = format!("{} has no bitmap: it leaves no access to the hardware", host.module);
        report.skipped.push(why);
        return Ok(());
    };
    let mut counter = Counter::new(machine)?;
    if let Err(error) = counter.guest.exits(0) {
        report.skipped.push(format!("the kernel does not count exits: {error}"));
        return Ok(());
    }
    let mut rows = Vec::new();
    for (msr, name) in MSRS {
        for op in Op::ALL {
            // The clock runs; a write of what it was sets it back.
            if msr == 0x10 && op == Op::Write {
                continue;
            }
            row(&mut counter, vendor, report, &mut rows, (Msr(msr), op, name))?;
        }
    }
    report.table = Some(Table {
        name: "interception",
        columns: &["msr", "name", "op", "before", "under", "after", "user", "bitmap"],
        rows,
    });
    Ok(())
}

/// What is in force while the exits are counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum When {
    /// Nothing yet, or everything allowed.
    Before,
    /// A filter that denies this MSR in this direction.
    Under,
    /// Everything allowed again.
    After,
}

fn row(
    counter: &mut Counter,
    vendor: Vendor,
    report: &mut Report,
    rows: &mut Vec<Vec<Value>>,
    (msr, op, name): (Msr, Op, &str),
) -> Result<(), Failure> {
    let vm = Arc::new(Vm::new());
    let mut vcpu = EngineVcpu::new(
        Arc::clone(&vm),
        match vendor {
            Vendor::Intel => Intercepts::vmx(candidates(vendor)),
            Vendor::Amd => Intercepts::svm(candidates(vendor)),
        },
    );
    let mut exits: Vec<Value> = Vec::new();
    let mut asked = 0;
    let mut bitmap: Vec<&str> = Vec::new();
    let word = |intercepted: bool| if intercepted { "intercepted" } else { "passed" };
    for when in [When::Before, When::Under, When::After] {
        match when {
            When::Before => {}
            When::Under => {
                counter.deny(msr, Ops::of(op))?;
                vm.set_filter(denying(msr, op)?);
                report.filters += 1;
            }
            When::After => {
                counter.allow_all()?;
                vm.set_filter(Filter::allow_all());
                report.filters += 1;
            }
        }
        let intercepts = vcpu.pick_up().intercepts.intercepts(msr, op);
        let count = counter.count(msr, op)?;
        report.accesses += TIMES;
        // A timer of the host's makes a few exits.
        let left = count.exits >= TIMES;
        let expected_asked = if when == When::Under { TIMES } else { 0 };
        if left != intercepts || count.asked != expected_asked {
            report.disagreements.push(Disagreement {
                what: format!("{op} {msr} {name}, {when:?} the filter"),
                live: format!("{} exits, {} to user space, of {TIMES}", count.exits, count.asked),
                engine: format!("{}, {expected_asked} to user space", word(intercepts)),
                candidate: None,
                case: None,
            });
        }
        exits.push(count.exits.into());
        asked += count.asked;
        bitmap.push(word(intercepts));
    }
    let mut row: Vec<Value> = vec![msr.to_string().into(), name.into(), op.name().into()];
    row.extend(exits);
    row.extend([asked.into(), bitmap.join(", ").into()]);
    rows.push(row);
    Ok(())
}

fn denying(msr: Msr, op: Op) -> Result<Filter, Failure> {
    FilterRange::new(msr.0, 1, Ops::of(op), [0])
        .and_then(|range| Filter::new(Verdict::Allow, [range]))
        .map_err(|error| Failure::Line(Exit::Guest, error.to_string()))
}

/// A guest whose exits are counted.
struct Counter {
    guest: Guest,
    vm: Caller,
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
    fn new(machine: &Machine) -> Result<Counter, Failure> {
        let failed = |error: io::Error| Failure::Line(Exit::Machine, format!("setting a VM up failed: {error}"));
        let guest = machine.guest(1)?;
        let mut counter = Counter {
            vm: Caller::of(guest.vm()).map_err(failed)?,
            arena: Arena::new(PAGES).map_err(failed)?,
            guest,
        };
        counter.call(&Call::mask(4, Place::Mapped))?;
        Ok(counter)
    }

    fn call(&mut self, call: &Call) -> Result<(), Failure> {
        let (request, argp) = call.place(&mut self.arena);
        let failed = |error: io::Error| Failure::Line(Exit::Machine, format!("{request:?} failed: {error}"));
        self.vm.call(request, argp).map_err(failed)
    }

    fn deny(&mut self, msr: Msr, ops: Ops) -> Result<(), Failure> {
        self.call(&filter(vec![RawRange {
            slot: 0,
            flags: ops.bits(),
            nmsrs: 1,
            base: msr.0,
            bitmap: vec![0; 8],
            at: Place::Mapped,
        }]))
    }

    fn allow_all(&mut self) -> Result<(), Failure> {
        self.call(&filter(Vec::new()))
    }

    fn count(&mut self, msr: Msr, op: Op) -> Result<Count, Failure> {
        let failed = |error: GuestError| guest_failed(&error);
        let read = Access::Read { msr };
        let access = match op {
            Op::Read => read,
            // It gets back what it holds; under a filter of writes alone it can be read.
            Op::Write => match self.guest.run(0, &[read], &mut |_| {}).map_err(failed)?.first() {
                Some(seen) => match seen.outcome {
                    Outcome::Value(value) => Access::Write { msr, value },
                    _ => Access::Write { msr, value: 0 },
                },
                None => Access::Write { msr, value: 0 },
            },
        };
        let mut asked = 0;
        let mut run = |guest: &mut Guest, times: u64| {
            let accesses = vec![access; usize::try_from(times).unwrap_or(1)];
            asked = 0;
            let ran = guest.run(0, &accesses, &mut |pending| {
                asked += u64::from(pending.reason_bits() == 4);
                pending.answer(|_| Ok(0), |_, _| Ok(()));
            });
            ran.map(drop)
        };
        // What the guest touches for the first time makes exits of its own.
        run(&mut self.guest, 2).map_err(failed)?;
        let before = self.guest.exits(0).map_err(failed)?;
        run(&mut self.guest, TIMES).map_err(failed)?;
        let after = self.guest.exits(0).map_err(failed)?;
        Ok(Count {
            exits: after.saturating_sub(before),
            asked,
        })
    }
}

fn filter(ranges: Vec<RawRange>) -> Call {
    Call::filter(RawFilter {
        flags: 0,
        pad: 0,
        compat: false,
        ranges,
    })
}
