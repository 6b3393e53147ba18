//! For which accesses passing through from user space gives the guest what it would have got.

use std::error::Error;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd};
use msrgate_core::{Access, Fault, Log, Msr, MsrRange, Op, Outcome, ReadAction, WriteAction};
use msrgate_kvm::{Capabilities, Handlers};
use msrgate_plan::{Decision, DecisionMap, Intervals, Plan};

use crate::held::{get, set};
use crate::{Guest, GuestError, Mode, Options, Pending};

/// Bits that writes turn over, beside all and none.
const BITS: [u32; 14] = [0, 1, 2, 3, 6, 8, 10, 11, 12, 20, 31, 32, 47, 63];

/// FS_BASE, GS_BASE and KERNEL_GS_BASE, which hold canonical addresses.
///
/// A processor refuses others in WRMSR. QEMU's emulator takes them, and its VMLOAD makes them canonical: what a read gets
/// after such a write depends on whether an interrupt of the host came between.
const BASES: RangeInclusive<Msr> = Msr(0xc000_0100)..=Msr(0xc000_0102);

/// The accesses among `accesses` that this kernel treats alike whether the guest's own instruction makes them or user space does,
/// by KVM_GET_MSRS and KVM_SET_MSRS.
///
/// Three guests do the same: one by itself, one whose reads are passed through, and one whose writes are. Each register is
/// read, written with values of all kinds and read again after each. An access counts where all outcomes are the same,
/// values and faults, and where the host then sees the same in all registers that `accesses` name. What a register does
/// beside holding a value is not seen: time that passes, memory that KVM writes.
pub fn passthrough_safe(
    (kvm, probed): (&Kvm, &Capabilities),
    accesses: &[(Msr, Op)],
    mode: Mode,
    cpuid: Option<&CpuId>,
) -> Result<Vec<(Msr, Op)>, GuestError> {
    let mut msrs: Vec<Msr> = accesses.iter().map(|(msr, _)| *msr).collect();
    msrs.sort_unstable();
    msrs.dedup();
    let mut alike = Vec::new();
    let mut made: Option<ThreeGuests> = None;
    for msr in &msrs {
        let guests = match &mut made {
            Some(guests) => guests,
            None => made.insert(ThreeGuests::new((kvm, probed), mode, cpuid, &msrs)?),
        };
        let same = guests.same(*msr, &msrs);
        for (op, same) in Op::ALL.into_iter().zip(same) {
            if same && accesses.contains(&(*msr, op)) {
                alike.push((*msr, op));
            }
        }
        // What differs would go on to, and a guest that broke may have lost more than this register.
        if same != [true; 2] {
            made = None;
        }
    }
    Ok(alike)
}

/// One guest that is left alone, one whose reads are passed through, one whose writes are.
struct ThreeGuests([Guest; 3]);

impl ThreeGuests {
    fn new(
        (kvm, probed): (&Kvm, &Capabilities),
        mode: Mode,
        cpuid: Option<&CpuId>,
        msrs: &[Msr],
    ) -> Result<ThreeGuests, GuestError> {
        let options = Options {
            cpuid: cpuid.cloned(),
            ..Options::default()
        };
        let guest = || Guest::new(kvm, mode, &options);
        let passed = |op| {
            let guest = guest()?;
            let failed = |error: Box<dyn Error + Send + Sync>| GuestError::Kvm {
                doing: "putting a filter on the guest",
                source: io::Error::other(error),
            };
            let plan = Plan::compile(&with_exit_reasons(op, msrs)).map_err(|error| failed(error.into()))?;
            let gate = probed.install(guest.vm(), Arc::new(plan), Handlers::new());
            // The gate's end leaves the filter in force.
            gate.map(|_| guest).map_err(|error| failed(error.into()))
        };
        Ok(ThreeGuests([guest()?, passed(Op::Read)?, passed(Op::Write)?]))
    }

    /// Whether reads, and writes, of a register are the same in the guest that is left alone and in the one whose are
    /// passed through.
    fn same(&mut self, msr: Msr, all: &[Msr]) -> [bool; 2] {
        let ThreeGuests([alone, reads, writes]) = self;
        let held = first(alone).and_then(|fd| get(fd, msr)).unwrap_or(0);
        let values = [held, 0, 1, u64::MAX, 0xffff_8000_1234_5000, 0x0123_4567_89ab_cdef];
        let values = values.into_iter().chain(BITS.map(|bit| held ^ 1 << bit)).chain([held]);
        let mut sequence = vec![Access::Read { msr }];
        for value in values {
            sequence.push(Access::Write { msr, value });
            if !BASES.contains(&msr) || canonical(value) {
                sequence.push(Access::Read { msr });
            }
        }
        let plain = outcomes(alone, &sequence);
        let (by_reads, by_writes) = (outcomes(reads, &sequence), outcomes(writes, &sequence));
        let view = |guest: &mut Guest| -> Vec<Option<u64>> {
            all.iter()
                .map(|msr| first(guest).and_then(|fd| get(fd, *msr)))
                .collect()
        };
        let plainly = view(alone);
        [
            plain.is_some() && plain == by_reads && plainly == view(reads),
            plain.is_some() && plain == by_writes && plainly == view(writes),
        ]
    }
}

/// Whether bits 63:47 are the same, as an address of 48 bits has them.
fn canonical(address: u64) -> bool {
    matches!(address >> 47, 0 | 0x1_ffff)
}

fn first(guest: &mut Guest) -> Option<&VcpuFd> {
    guest.vcpu(0).ok().map(|vcpu| vcpu.fd())
}

/// What the accesses get; `None` where one of them breaks the guest.
fn outcomes(guest: &mut Guest, accesses: &[Access]) -> Option<Vec<Outcome>> {
    let seen = guest.run(0, accesses, &mut pass).ok()?;
    Some(seen.iter().map(|seen| seen.outcome).collect())
}

/// Does as the host what the guest wants done.
fn pass(pending: &mut Pending<'_>) {
    match pending.access() {
        Access::Read { msr } => {
            let value = get(pending.fd(), msr).ok_or(Fault);
            pending.answer(|_| value, |_, _| Err(Fault));
        }
        Access::Write { msr, value } => {
            let done = set(pending.fd(), msr, value).ok_or(Fault);
            pending.answer(|_| Err(Fault), |_, _| done);
        }
    }
}

/// Reads or writes of these registers are handed to user space.
fn with_exit_reasons(op: Op, msrs: &[Msr]) -> DecisionMap {
    fn handed<A: Clone + Eq>(allow: A, deny: A, msrs: &[Msr]) -> Intervals<Decision<A>> {
        // A denial that is logged is handed over.
        let handed = Decision::of(deny).logged(Log::All);
        let msrs = msrs.iter().map(|msr| (MsrRange::single(*msr), handed.clone()));
        Intervals::first_match(Decision::of(allow), msrs)
    }
    let map = DecisionMap::allow_all();
    match op {
        Op::Read => map.with_reads(handed(ReadAction::Allow, ReadAction::Deny, msrs)),
        Op::Write => map.with_writes(handed(WriteAction::Allow, WriteAction::Deny, msrs)),
    }
}
