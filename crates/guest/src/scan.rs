//! What a guest sees: each MSR is read, and where that does no harm written back.
//!
//! ```
//! # use kvm_ioctls::Kvm;
//! use msrgate_core::{Msr, MsrRange};
//! use msrgate_guest::scan::Scanner;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let Ok(kvm) = Kvm::new() else {
//! #     println!("skipped: /dev/kvm does not open");
//! #     return Ok(());
//! # };
//! // The whole of it is `WINDOWS`, and takes some seconds.
//! let mtrrs = MsrRange::new(Msr(0x200), Msr(0x2ff)).unwrap_or(MsrRange::X2APIC);
//! let scan = Scanner::new(&kvm).scan(&[mtrrs], &mut |_done, _of| {})?;
//! for seen in &scan.readable {
//!     println!("{} = {:#x}", seen.msr, seen.value);
//! }
//! # assert!(scan.readable.len() + scan.faults as usize == 0x100);
//! # Ok(())
//! # }
//! ```

mod lists;
mod compare;
mod migrate;

use std::fmt;
use std::sync::Arc;

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use msrgate_core::{Access, Msr, MsrRange, Op, Outcome, Verdict, WriteTarget};
use msrgate_kvm::{Capabilities, Gate, Handlers, InstallError, VcpuGate};
use msrgate_plan::Plan;

pub use self::compare::{Change, Difference};
pub use self::lists::{Lists, Offer, Taken};
pub use self::migrate::{GuestUse, Kind, Obstacle, Shared, common, migrate};
use crate::memory::MAX_ENTRIES;
use crate::{Guest, GuestDied, GuestError, Mode, Options};

/// Where processors and hypervisors have their MSRs: the processor's, Hyper-V's and Xen's, KVM's, and the two windows of
/// AMD's. Both permission maps of the hardware lie within them.
pub const WINDOWS: [MsrRange; 5] = [
    window(0, 0x3fff),
    window(0x4000_0000, 0x4000_11ff),
    window(0x4b56_4d00, 0x4b56_4dff),
    window(0xc000_0000, 0xc000_3fff),
    window(0xc001_0000, 0xc001_3fff),
];

const fn window(first: u32, last: u32) -> MsrRange {
    match MsrRange::new(Msr(first), Msr(last)) {
        Some(range) => range,
        None => MsrRange::ALL,
    }
}

/// The most MSRs of one scan: so many that all results fit into some tens of megabytes.
pub const MOST: u64 = 1 << 20;

/// IA32_APIC_BASE: x2APIC mode.
const X2APIC_ENABLE: u64 = 1 << 10;

/// How often a guest may break before the scan is given up: then it is not the accesses that break it.
const MOST_BROKEN: usize = 64;

/// Which MSRs are written back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writes {
    /// No MSR is written.
    None,
    /// Those that are no [commands](msrgate_msrs::command).
    Safe,
    /// All.
    All,
}

/// Scans with guests of one kind: on one KVM, with one CPUID, under one plan or none.
#[derive(Debug)]
pub struct Scanner<'a> {
    kvm: &'a Kvm,
    cpuid: Option<CpuId>,
    ruled: Option<(&'a Capabilities, Arc<Plan>, Handlers)>,
    writes: Writes,
    x2apic: bool,
}

impl<'a> Scanner<'a> {
    /// Guests with all that KVM supports and no plan; writes that are no commands.
    pub fn new(kvm: &'a Kvm) -> Scanner<'a> {
        Scanner {
            kvm,
            cpuid: None,
            ruled: None,
            writes: Writes::Safe,
            x2apic: false,
        }
    }

    /// Guests with this CPUID.
    #[must_use]
    pub fn cpuid(self, cpuid: CpuId) -> Scanner<'a> {
        Scanner {
            cpuid: Some(cpuid),
            ..self
        }
    }

    /// Guests under `plan`.
    #[must_use]
    pub fn under(self, probed: &'a Capabilities, plan: Arc<Plan>, handlers: Handlers) -> Scanner<'a> {
        Scanner {
            ruled: Some((probed, plan, handlers)),
            ..self
        }
    }

    /// Which MSRs are written back.
    #[must_use]
    pub fn writes(self, writes: Writes) -> Scanner<'a> {
        Scanner { writes, ..self }
    }

    /// Guests whose local APIC is in x2APIC mode, as firmware would put it there: its registers are MSRs then, which no
    /// filter stops.
    #[must_use]
    pub fn x2apic(self) -> Scanner<'a> {
        Scanner { x2apic: true, ..self }
    }

    /// Reads every MSR of `ranges`, reads those again that gave a value, and then writes that value back.
    ///
    /// Under a plan, writes that the plan keeps from the kernel (`deny`, `ignore`, `shadow`) are made of every MSR: of 0
    /// where the read gave no value, commands too.
    ///
    /// The guest runs in real mode, with interrupt controllers; what breaks it is told, and a new one goes on. `progress`
    /// gets how many accesses are made, and how many are to be made as far as that is known.
    pub fn scan(&self, ranges: &[MsrRange], progress: &mut dyn FnMut(u64, u64)) -> Result<Scan, ScanError> {
        let ranges = joined(ranges);
        let msrs = total(&ranges);
        if msrs > MOST {
            return Err(ScanError::TooMany { msrs });
        }
        let mut run = Run {
            scanner: self,
            machine: self.machine()?,
            scan: Scan {
                ranges: ranges.clone(),
                readable: Vec::new(),
                written: Vec::new(),
                writable: Vec::new(),
                broken: Vec::new(),
                faults: 0,
                lists: Some(Lists::ask(self.kvm, &self.options())?),
            },
            done: 0,
            of: msrs,
            progress,
        };
        let reads = ranges.iter().flat_map(|range| range.iter()).map(read);
        run.make(reads, |scan, access, outcome| match outcome {
            Outcome::Value(value) => scan.readable.push(Readable {
                msr: access.msr(),
                value,
                volatile: false,
            }),
            _ => scan.faults += 1,
        })?;

        let again: Vec<Access> = run.scan.readable.iter().map(|seen| read(seen.msr)).collect();
        run.of += again.len() as u64;
        let mut place = 0;
        run.make(again.into_iter(), |scan, access, outcome| {
            // What broke the guest has no outcome.
            while let Some(seen) = scan.readable.get_mut(place) {
                place += 1;
                if seen.msr == access.msr() {
                    seen.volatile = outcome != Outcome::Value(seen.value);
                    break;
                }
            }
        })?;

        let writes = self.to_write(&ranges, &run.scan.readable);
        run.of += writes.len() as u64;
        run.make(writes.into_iter(), |scan, access, outcome| {
            append(&mut scan.written, access.msr());
            if outcome == Outcome::Done {
                scan.writable.push(access.msr());
            }
        })?;
        Ok(run.scan)
    }

    /// The writes to be made, in order.
    fn to_write(&self, ranges: &[MsrRange], readable: &[Readable]) -> Vec<Access> {
        if self.writes == Writes::None {
            return Vec::new();
        }
        let safe = |msr| self.writes == Writes::All || msrgate_msrs::command(msr).is_none();
        let Some((_, plan, _)) = &self.ruled else {
            let readable = readable.iter().filter(|seen| safe(seen.msr));
            return readable.map(|seen| write(seen.msr, seen.value)).collect();
        };
        let mut readable = readable.iter().peekable();
        let msrs = ranges.iter().flat_map(|range| range.iter());
        msrs.filter_map(|msr| {
            let value = readable.next_if(|seen| seen.msr == msr).map(|seen| seen.value);
            match value {
                _ if kept_from_kernel(plan, msr) => Some(write(msr, value.unwrap_or(0))),
                Some(value) if safe(msr) => Some(write(msr, value)),
                _ => None,
            }
        })
        .collect()
    }

    fn options(&self) -> Options {
        Options {
            cpuid: self.cpuid.clone(),
            vcpus: 1,
            irqchip: true,
        }
    }

    fn machine(&self) -> Result<Machine, ScanError> {
        let mut guest = Guest::new(self.kvm, Mode::Real, &self.options())?;
        if self.x2apic {
            let fd = guest.vcpu(0)?.fd();
            let mut sregs = fd.get_sregs().map_err(GuestError::of("KVM_GET_SREGS"))?;
            sregs.apic_base |= X2APIC_ENABLE;
            fd.set_sregs(&sregs)
                .map_err(GuestError::of("putting the local APIC into x2APIC mode"))?;
        }
        let gate = match &self.ruled {
            None => None,
            Some((probed, plan, handlers)) => {
                let gate = probed.install(guest.vm(), Arc::clone(plan), handlers.clone())?;
                let vcpu = gate.vcpu(guest.vcpu(0)?.fd(), 0)?;
                Some((gate, vcpu))
            }
        };
        Ok(Machine { guest, gate })
    }
}

/// Whether no write of `msr` comes to the kernel's own register, whatever is written.
fn kept_from_kernel(plan: &Plan, msr: Msr) -> bool {
    let writes = plan.table().writes();
    let after = writes.partition_point(|entry| entry.range.last() < msr);
    let action = writes.get(after).filter(|entry| entry.range.contains(msr));
    plan.filter().verdict(msr, Op::Write) == Verdict::Deny
        && action.is_none_or(|entry| entry.action.target() == WriteTarget::Elsewhere)
}

fn read(msr: Msr) -> Access {
    Access::Read { msr }
}

fn write(msr: Msr, value: u64) -> Access {
    Access::Write { msr, value }
}

/// A guest and what answers its exits.
struct Machine {
    guest: Guest,
    /// Dropped with the guest: a gate that went away would leave its filter, and nobody to answer.
    gate: Option<(Gate, VcpuGate)>,
}

/// A scan that goes on.
struct Run<'a> {
    scanner: &'a Scanner<'a>,
    machine: Machine,
    scan: Scan,
    done: u64,
    of: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Run<'_> {
    /// Lets the guest make the accesses in order; `got` hears of each, but for those that break it.
    fn make(
        &mut self,
        mut accesses: impl Iterator<Item = Access>,
        mut got: impl FnMut(&mut Scan, Access, Outcome),
    ) -> Result<(), ScanError> {
        let mut batch: Vec<Access> = Vec::with_capacity(MAX_ENTRIES);
        loop {
            (self.progress)(self.done, self.of);
            batch.clear();
            batch.extend(accesses.by_ref().take(MAX_ENTRIES));
            if batch.is_empty() {
                return Ok(());
            }
            let mut rest = batch.as_slice();
            while !rest.is_empty() {
                let Machine { guest, gate } = &mut self.machine;
                let vcpu = guest.vcpu(0)?;
                let broke = match vcpu.run(rest, &mut |pending| {
                    if let Some((_, gate)) = gate {
                        pending.dispatch(gate);
                    }
                }) {
                    Ok(_) => None,
                    Err(GuestError::GuestDied { position, access, how }) => Some((position, access, how)),
                    Err(error) => return Err(error.into()),
                };
                for (access, seen) in rest.iter().zip(vcpu.seen()) {
                    got(&mut self.scan, *access, seen.outcome);
                }
                let Some((position, access, how)) = broke else {
                    break;
                };
                if self.scan.broken.len() == MOST_BROKEN {
                    return Err(GuestError::GuestDied { position, access, how }.into());
                }
                self.scan.broken.push(Broken { access, how });
                // What the access left in the old one's registers would be seen in others.
                self.machine = self.scanner.machine()?;
                rest = rest.get(position + 1..).unwrap_or_default();
            }
            self.done += batch.len() as u64;
        }
    }
}

/// What a guest sees.
#[derive(Debug)]
pub struct Scan {
    /// The MSRs that were read; sorted, and none touches the next.
    pub ranges: Vec<MsrRange>,
    /// Those whose read gave a value, in order.
    pub readable: Vec<Readable>,
    /// The MSRs that were written; sorted, and none touches the next.
    pub written: Vec<MsrRange>,
    /// Those whose write was done, in order.
    pub writable: Vec<Msr>,
    /// The accesses that broke a guest.
    pub broken: Vec<Broken>,
    /// How many of the first reads were #GP.
    pub faults: u64,
    /// What KVM tells a VMM; `None` where that was not asked.
    pub lists: Option<Lists>,
}

/// An MSR whose read gave a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Readable {
    /// Which.
    pub msr: Msr,
    /// What the first read gave.
    pub value: u64,
    /// Whether the second read gave something else: a clock, a counter.
    pub volatile: bool,
}

/// An access that broke the guest.
#[derive(Debug)]
pub struct Broken {
    /// The access.
    pub access: Access,
    /// What happened.
    pub how: GuestDied,
}

/// Sorted, and none touches the next.
fn joined(ranges: &[MsrRange]) -> Vec<MsrRange> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut joined: Vec<MsrRange> = Vec::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if u64::from(range.first().0) <= u64::from(last.last().0) + 1 => {
                *last = MsrRange::new(last.first(), last.last().max(range.last())).unwrap_or(*last);
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// `ranges` with `msr`, which lies behind them.
fn append(ranges: &mut Vec<MsrRange>, msr: Msr) {
    match ranges.last_mut() {
        Some(last) if last.last().0.checked_add(1) == Some(msr.0) => {
            *last = MsrRange::new(last.first(), msr).unwrap_or(*last);
        }
        _ => ranges.push(MsrRange::single(msr)),
    }
}

fn total(ranges: &[MsrRange]) -> u64 {
    ranges.iter().map(|range| range.len()).sum()
}

/// Why there is no scan.
#[derive(Debug)]
#[non_exhaustive]
pub enum ScanError {
    /// More MSRs than [`MOST`].
    TooMany {
        /// How many.
        msrs: u64,
    },
    /// The guest does not run.
    Guest(GuestError),
    /// The plan is not in force.
    Install(InstallError),
}

impl fmt::Display for ScanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ScanError::TooMany { msrs } => {
                write!(
                    f,
                    "{msrs} MSRs are more than the {MOST} of one scan: scan them in parts"
                )
            }
            ScanError::Guest(error) => error.fmt(f),
            ScanError::Install(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ScanError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ScanError::TooMany { .. } => None,
            ScanError::Guest(error) => error.source(),
            ScanError::Install(error) => error.source(),
        }
    }
}

impl From<GuestError> for ScanError {
    fn from(error: GuestError) -> ScanError {
        ScanError::Guest(error)
    }
}

impl From<InstallError> for ScanError {
    fn from(error: InstallError) -> ScanError {
        ScanError::Install(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u32, last: u32) -> MsrRange {
        MsrRange::new(Msr(first), Msr(last)).unwrap()
    }

    #[test]
    fn the_windows_are_in_order_and_apart() {
        assert_eq!(joined(&WINDOWS), WINDOWS);
        assert!(total(&WINDOWS) < MOST);
    }

    #[test]
    fn ranges_that_touch_or_overlap_are_one() {
        let given = [
            range(8, 9),
            range(0, 3),
            range(4, 5),
            range(2, 4),
            range(u32::MAX, u32::MAX),
        ];
        assert_eq!(joined(&given), [range(0, 5), range(8, 9), range(u32::MAX, u32::MAX)]);
        let mut written = Vec::new();
        for msr in [0, 1, 3, u32::MAX - 1, u32::MAX] {
            append(&mut written, Msr(msr));
        }
        assert_eq!(written, [range(0, 1), range(3, 3), range(u32::MAX - 1, u32::MAX)]);
    }

    #[test]
    fn a_range_of_all_msrs_is_more_than_a_scan_takes() {
        assert!(total(&joined(&[MsrRange::ALL, range(0, 5)])) > MOST);
    }
}
