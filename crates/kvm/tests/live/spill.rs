//! What a plan passes on to the kernel from user space.

use std::sync::Arc;

use msrgate_core::{Access, Disposition, Msr, Op, Outcome, ReadAction, WriteAction};
use msrgate_guest::{Guest, Mode, Options};
use msrgate_kvm::Handlers;
use msrgate_plan::{CompileOptions, DecisionMap, Plan, Spillable};

use crate::{by_rule, gated, kvm, outcomes, run};

const PAT: Msr = Msr(0x277);

/// PAT and sixteen MSRs far from each other are the kernel's, all else is denied.
fn seventeen() -> Plan {
    let msrs: Vec<Msr> = (1..=16).map(|i| Msr(i * 0x10000)).chain([PAT]).collect();
    let reads: Vec<_> = msrs.iter().map(|msr| (*msr, ReadAction::Allow)).collect();
    let writes: Vec<_> = msrs.iter().map(|msr| (*msr, WriteAction::Allow)).collect();
    let spillable = |op| Spillable::new(PAT, op, 1);
    let map = DecisionMap::new(by_rule(ReadAction::Deny, &reads), by_rule(WriteAction::Deny, &writes));
    let options = CompileOptions::default().spilling(Op::ALL.map(spillable).to_vec());
    Plan::compile_for(&map, &options).unwrap()
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
    let plainly = outcomes(alone.run(0, &accesses, &mut |_| {}).unwrap());
    assert_eq!(plainly[2], Outcome::Value(0x0701_0600_0701_0106));

    let plan = Arc::new(seventeen());
    assert_eq!(plan.spilled().count(), 2);
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan, Handlers::new());
    assert!(vcpu.passes(read) && vcpu.passes(write(0)) && !vcpu.passes(Access::Read { msr: Msr(0x10) }));
    let seen = run(&mut guest, &vcpu, &accesses);
    assert_eq!(outcomes(&seen), plainly);
    for seen in seen {
        let did = seen.exit.and_then(|exit| exit.answer).map(|answer| answer.did);
        let refused = seen.outcome == Outcome::Fault;
        assert_eq!(did, Some(if refused { Disposition::Deny } else { Disposition::Pass }));
    }
}
