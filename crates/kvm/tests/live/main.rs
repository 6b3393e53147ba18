//! On live KVM. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1.

#![expect(unsafe_code, reason = "the mapped `kvm_run` is a union")]

mod answer;
mod install;
mod interrupted;
mod presets;
mod replace;
mod sandbox;
mod spill;
mod state;

use std::sync::Arc;

use kvm_ioctls::Kvm;
use msrgate_core::{Access, Disposition, FaultCause, Msr, MsrRange, Outcome, ReadAction, WriteAction};
use msrgate_guest::{Guest, Mode, Options, Pending, Seen};
use msrgate_kvm::{Capabilities, Gate, Handlers, VcpuGate, VcpuId, probe};
use msrgate_plan::{Decision, DecisionMap, Intervals, Plan};
pub(crate) const APIC_BASE: Msr = Msr(0x1b);
pub(crate) const APIC_BASE_VALUE: Outcome = Outcome::Value(0xfee0_0900);
pub(crate) const SYSENTER_CS: Msr = Msr(0x174);
pub(crate) const MICROCODE: Msr = Msr(0x8b);
/// No processor has it.
pub(crate) const UNKNOWN: Msr = Msr(0xdead_beef);

/// KVM, or `None` where the test is to be skipped.
pub(crate) fn kvm() -> Option<(Kvm, Capabilities)> {
    let ready = match msrgate_kvm::open().and_then(|kvm| probe(&kvm)) {
        Ok(probed) => Kvm::new().map(|kvm| (kvm, probed)).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match ready {
        Ok(ready) => Some(ready),
        Err(reason) => {
            let required = std::env::var("MSRGATE_LANE_REQUIRE").is_ok_and(|value| value == "1");
            assert!(!required, "{reason}");
            println!("skipped: {reason}");
            None
        }
    }
}

pub(crate) fn read(msr: Msr) -> Access {
    Access::Read { msr }
}

pub(crate) fn write(msr: Msr, value: u64) -> Access {
    Access::Write { msr, value }
}

pub(crate) fn by_rule<A: Clone + Eq>(allow: A, rules: &[(Msr, A)]) -> Intervals<Decision<A>> {
    let rules = rules.iter().zip(0..).map(|((msr, action), rule)| {
        let decision = Decision::of(action.clone()).by(rule);
        (MsrRange::single(*msr), decision)
    });
    Intervals::first_match(Decision::of(allow), rules)
}

/// Allows all but what `reads` and `writes` name.
pub(crate) fn map(reads: &[(Msr, ReadAction)], writes: &[(Msr, WriteAction)]) -> DecisionMap {
    DecisionMap::new(by_rule(ReadAction::Allow, reads), by_rule(WriteAction::Allow, writes))
}

pub(crate) fn plan(map: &DecisionMap) -> Arc<Plan> {
    Arc::new(Plan::compile(map).unwrap())
}

/// A guest with one vCPU, gated by `plan`.
pub(crate) fn gated(
    kvm: &Kvm,
    probed: Capabilities,
    mode: Mode,
    plan: Arc<Plan>,
    handlers: Handlers,
) -> (Guest, Gate, VcpuGate) {
    let mut guest = Guest::new(kvm, mode, &Options::default()).unwrap();
    let gate = probed.install(guest.vm(), plan, handlers).unwrap();
    let id = VcpuId::new(7).in_vm(6);
    let vcpu = gate.vcpu(guest.vcpu(0).unwrap().fd(), id).unwrap();
    (guest, gate, vcpu)
}

pub(crate) fn run(guest: &mut Guest, gate: &VcpuGate, accesses: &[Access]) -> Vec<Seen> {
    let dispatch = &mut |pending: &mut Pending<'_>| {
        pending.dispatch(gate).unwrap();
    };
    guest.run(0, accesses, dispatch).unwrap().to_vec()
}

pub(crate) fn outcomes(seen: &[Seen]) -> Vec<Outcome> {
    seen.iter().map(|seen| seen.outcome).collect()
}

pub(crate) fn did(seen: &Seen) -> (Disposition, Option<FaultCause>) {
    let answer = seen.exit.unwrap().answer.unwrap();
    (answer.did, answer.why)
}

/// What an access is to get, and what the gate is to say of it; `None` where it is not to exit.
pub(crate) type Expected = (Access, Outcome, Option<(Disposition, Option<FaultCause>)>);

/// Runs `accesses` in both modes under a plan, and compares what the guest saw.
pub(crate) fn check(reads: &[(Msr, ReadAction)], writes: &[(Msr, WriteAction)], accesses: &[Expected]) {
    let Some((kvm, probed)) = kvm() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let (mut guest, _gate, vcpu) = gated(&kvm, probed, mode, plan(&map(reads, writes)), Handlers::new());
        let list: Vec<Access> = accesses.iter().map(|(access, ..)| *access).collect();
        for (seen, (access, outcome, expected)) in run(&mut guest, &vcpu, &list).iter().zip(accesses) {
            assert_eq!(seen.outcome, *outcome, "{mode:?} {access:x?}");
            assert_eq!(seen.exit.map(|_| did(seen)), *expected, "{mode:?} {access:x?}");
        }
    }
}
