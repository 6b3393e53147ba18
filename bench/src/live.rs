//! `exit_dispatch`, `constant_read` and `install`, on this machine's KVM.

use std::sync::Arc;

use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, kvm_enable_cap};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuExit, VcpuFd, VmFd};
use msrgate_core::{Access, Msr, Verdict};
use msrgate_guest::{Guest, Mode, Options, held};
use msrgate_kvm::{Capabilities, Handlers, VcpuGate, probe};
use msrgate_plan::{CompileOptions, DecisionMap, Plan};
use msrgate_policy::Policy;

use crate::figure::{Aim, Figure};
use crate::plan;
use crate::rounds::{nanoseconds, rounds, waited};
use crate::{Effort, Measured, Missing};

/// IA32_BIOS_SIGN_ID: KVM stores it and makes no other use of it.
const MICROCODE: Msr = Msr(0x8b);
const REVISION: u64 = 0x1_0000_0000;
const FIXED: &str = "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"IA32_BIOS_SIGN_ID\"\n\
                     read = { value = \"0x100000000\" }\nwrite = \"ignore\"\n";

/// An access that user space answers: by a gate, and by hand in the same loop and the same guest.
pub(crate) fn exit_dispatch(effort: Effort) -> Measured {
    let kvm = open()?;
    let mut guest = Looping::new(&kvm, effort)?;
    let plan = Plan::compile(&map(FIXED)?).map_err(text)?;
    let gate = guest.gate(&kvm, plan)?;
    let [ours, theirs] = rounds(
        effort.of(60, 2),
        &mut guest,
        [&|guest| guest.by_gate(&gate), &|guest| guest.by_hand()],
    )?;
    let figure = Figure::new("a read that exits", "ns", ours.least()).beside("by hand, a constant", theirs.least());
    Ok(vec![figure.aim(Aim::Ratio(1.02))])
}

/// A fixed answer that the kernel holds, beside the same from user space and beside an allowed read.
pub(crate) fn constant_read(effort: Effort) -> Measured {
    let kvm = open()?;
    let map = map(FIXED)?;
    let held = held(&kvm, &map, None).map_err(text)?;
    if held.is_empty() {
        return Err(Missing::Skipped(format!(
            "this kernel does not hold a value in {MICROCODE}"
        )));
    }
    let mut guests = [(); 3].map(|()| Looping::new(&kvm, effort));
    let [preset, exiting, free] = &mut guests;
    let preset = preset.as_mut().map_err(|error| error.clone())?;
    let exiting = exiting.as_mut().map_err(|error| error.clone())?;
    let free = free.as_mut().map_err(|error| error.clone())?;
    let _held = preset.gate(
        &kvm,
        Plan::compile_for(&map, &CompileOptions::default().with_presets(held)).map_err(text)?,
    )?;
    let gate = exiting.gate(&kvm, Plan::compile(&map).map_err(text)?)?;
    let [ours, exit, allowed] = rounds(
        effort.of(60, 2),
        &mut (preset, exiting, free),
        [
            &|guests| guests.0.by_hand(),
            &|guests| guests.1.by_gate(&gate),
            &|guests| guests.2.by_hand(),
        ],
    )?;
    let figure = || Figure::new("a value that the kernel holds", "ns", ours.least());
    Ok(vec![
        figure()
            .beside("an allowed read, no filter", allowed.least())
            .aim(Aim::Ratio(1.1)),
        figure().beside("the same from user space", exit.least()),
    ])
}

/// Installing a plan, beside the two calls that put the same into the kernel.
pub(crate) fn install(effort: Effort) -> Measured {
    let kvm = open()?;
    let guest = Guest::new(&kvm, Mode::Real, &Options::default()).map_err(text)?;
    let plan = Arc::new(Plan::compile(&map(&plan::policy(1_000))?).map_err(text)?);
    let raw = RawFilter::of(&plan);
    let probed = probed(&kvm)?;
    // In one go, since the kernel may make whoever comes next wait for the one before. Microseconds.
    let times = effort.of(16, 2);
    let ours = |vm: &mut &VmFd| {
        waited(1_000 * times, || {
            (0..times).try_for_each(|_| probed.install(*vm, Arc::clone(&plan), Handlers::new()).map(drop))
        })
    };
    let theirs = |vm: &mut &VmFd| waited(1_000 * times, || (0..times).try_for_each(|_| raw.install(vm)));
    let [ours, theirs] = rounds(effort.of(100, 2), &mut guest.vm(), [&ours, &theirs])?;
    let ranges = plan.filter().ranges().len();
    let what = format!(
        "a plan of {ranges} range{} installed",
        if ranges == 1 { "" } else { "s" }
    );
    let figure = Figure::new(what, "µs", ours.median()).beside("the bare calls", theirs.median());
    Ok(vec![figure.aim(Aim::Ratio(1.02))])
}

fn open() -> Result<Kvm, Missing> {
    Kvm::new().map_err(|error| Missing::Skipped(format!("/dev/kvm does not open: {error}")))
}

fn probed(kvm: &Kvm) -> Result<Capabilities, String> {
    probe(kvm).map_err(text)
}

fn map(policy: &str) -> Result<DecisionMap, String> {
    let policy = Policy::parse("bench.toml", policy).map_err(|rejected| format!("{:?}", rejected.diagnostics))?;
    policy.decision_map(None).map_err(text)
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

/// A guest that reads one MSR again and again.
pub(crate) struct Looping {
    guest: Guest,
    reads: usize,
}

impl Looping {
    pub(crate) fn new(kvm: &Kvm, effort: Effort) -> Result<Looping, String> {
        let mut guest = Guest::new(kvm, Mode::Real, &Options::default()).map_err(text)?;
        // What its table holds is made for one return from KVM_RUN, exits apart; the guest keeps it and makes it again.
        let reads = effort.of(4000, 40);
        guest
            .run(0, &vec![Access::Read { msr: MICROCODE }; reads], &mut |_| {})
            .map_err(text)?;
        Ok(Looping { guest, reads })
    }

    pub(crate) fn gate(&mut self, kvm: &Kvm, plan: Plan) -> Result<VcpuGate, String> {
        let gate = probed(kvm)?
            .install(self.guest.vm(), Arc::new(plan), Handlers::new())
            .map_err(text)?;
        gate.vcpu(self.guest.vcpu(0).map_err(text)?.fd(), 0).map_err(text)
    }

    pub(crate) fn vcpu(&mut self) -> Result<&mut VcpuFd, String> {
        Ok(self.guest.vcpu(0).map_err(text)?.fd_mut())
    }

    /// Nanoseconds of a read whose exit, where it makes one, a gate answers.
    fn by_gate(&mut self, gate: &VcpuGate) -> Result<f64, String> {
        let reads = self.reads;
        let vcpu = self.vcpu()?;
        nanoseconds(reads, || {
            loop {
                match vcpu.run() {
                    Ok(VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_)) => _ = gate.dispatch_vcpu(vcpu),
                    Ok(VcpuExit::IoOut(..)) => return Ok(()),
                    other => return Err(format!("{other:?}")),
                }
            }
        })
    }

    /// Reads the register as a VMM without a gate does.
    fn by_hand(&mut self) -> Result<f64, String> {
        let reads = self.reads;
        let vcpu = self.vcpu()?;
        nanoseconds(reads, || {
            loop {
                match vcpu.run() {
                    Ok(VcpuExit::X86Rdmsr(exit)) => {
                        *exit.data = REVISION;
                        *exit.error = 0;
                    }
                    Ok(VcpuExit::IoOut(..)) => return Ok(()),
                    other => return Err(format!("{other:?}")),
                }
            }
        })
    }
}

/// What a VMM with kvm-ioctls alone hands to the kernel.
struct RawFilter {
    reasons: u64,
    default: Verdict,
    ranges: Vec<(MsrFilterRangeFlags, u32, u32, Vec<u8>)>,
}

impl RawFilter {
    fn of(plan: &Plan) -> RawFilter {
        let ranges = plan.filter().ranges().iter().map(|range| {
            let flags = MsrFilterRangeFlags::from_bits_truncate(range.ops().bits());
            (flags, range.base(), range.nmsrs(), range.bitmap_bytes())
        });
        RawFilter {
            reasons: plan.reasons().bits().into(),
            default: plan.filter().default_verdict(),
            ranges: ranges.collect(),
        }
    }

    fn install(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        vm.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            args: [self.reasons, 0, 0, 0],
            ..Default::default()
        })?;
        let ranges: Vec<MsrFilterRange<'_>> = self
            .ranges
            .iter()
            .map(|(flags, base, msr_count, bitmap)| MsrFilterRange {
                flags: *flags,
                base: *base,
                msr_count: *msr_count,
                bitmap,
            })
            .collect();
        let default = match self.default {
            Verdict::Allow => MsrFilterDefaultAction::ALLOW,
            Verdict::Deny => MsrFilterDefaultAction::DENY,
        };
        vm.set_msr_filter(default, &ranges)
    }
}
