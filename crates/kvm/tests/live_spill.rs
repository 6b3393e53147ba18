//! What a plan passes on to the kernel from user space, on live KVM. Skipped where /dev/kvm does not open, unless
//! MSRGATE_LANE_REQUIRE is 1.

use std::sync::Arc;

use kvm_ioctls::Kvm;
use msrgate_core::{Access, Did, Log, Msr, MsrRange, Op, Outcome, ReadAction, WriteAction};
use msrgate_guest::{Guest, Mode, Options};
use msrgate_kvm::{Handlers, Probed, probe};
use msrgate_plan::{Decision, DecisionMap, Intervals, Plan, Spillable};

const PAT: Msr = Msr(0x277);

/// KVM, or `None` where the test is to be skipped.
fn kvm() -> Option<(Kvm, Probed)> {
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

/// PAT and sixteen MSRs far from each other are the kernel's, all else is denied.
fn seventeen() -> DecisionMap {
    fn of<A: Clone + Eq>(allow: A, deny: A) -> Intervals<Decision<A>> {
        let decision = Decision {
            action: allow,
            rule: Some(0),
            log: Log::None,
        };
        let msrs = (1..=16).map(|i| Msr(i * 0x10000)).chain([PAT]);
        Intervals::first_match(
            Decision::of(deny),
            msrs.map(|msr| (MsrRange::single(msr), decision.clone())),
        )
    }
    let spillable = |op| Spillable {
        msr: PAT,
        op,
        weight: 1,
    };
    DecisionMap {
        reads: of(ReadAction::Allow, ReadAction::Deny),
        writes: of(WriteAction::Allow, WriteAction::Deny),
        spill: Some(Op::ALL.map(spillable).to_vec()),
        ..DecisionMap::allow_all()
    }
}

#[test]
fn what_is_spilled_gets_the_guest_what_the_kernel_would_have_given() {
    let Some((kvm, probed)) = kvm() else { return };
    let write = |value| Access::Write { msr: PAT, value };
    let read = Access::Read { msr: PAT };
    // 2 is no memory type, and bit 63 of no use; what the kernel makes of them is its own.
    let accesses = [
        read,
        write(0x0701_0600_0701_0106),
        read,
        write(2),
        read,
        write(1 << 63),
        read,
    ];
    let mut alone = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let plainly: Vec<Outcome> = alone
        .run(0, &accesses, &mut |_| {})
        .unwrap()
        .iter()
        .map(|seen| seen.outcome)
        .collect();
    assert_eq!(plainly[2], Outcome::Value(0x0701_0600_0701_0106));

    let plan = Plan::compile(&seventeen()).unwrap();
    assert_eq!(plan.spilled().count(), 2);
    let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let gate = probed.install(guest.vm(), Arc::new(plan), Handlers::new()).unwrap();
    let vcpu = gate.vcpu(guest.vcpu(0).unwrap().fd(), 0).unwrap();
    assert!(vcpu.passes(read) && vcpu.passes(write(0)) && !vcpu.passes(Access::Read { msr: Msr(0x10) }));
    let seen = guest.run(0, &accesses, &mut |pending| {
        pending.dispatch(&vcpu);
    });
    let seen = seen.unwrap();
    let outcomes: Vec<Outcome> = seen.iter().map(|seen| seen.outcome).collect();
    assert_eq!(outcomes, plainly);
    for seen in seen {
        let did = seen.exit.and_then(|exit| exit.answer).map(|answer| answer.did);
        let refused = seen.outcome == Outcome::Fault;
        assert_eq!(did, Some(if refused { Did::Deny } else { Did::Pass }));
    }
}
