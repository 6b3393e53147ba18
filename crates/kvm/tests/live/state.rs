//! What a vCPU remembers goes along to another VM.

use std::cell::RefCell;
use std::rc::Rc;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use msrgate_core::{Access, Msr, Op, Outcome, ReadAction, WriteAction};
use msrgate_guest::{Guest, Mode};
use msrgate_kvm::{Capabilities, Fault, Gate, Handler, Handlers, SaveError, StateError, VcpuGate, VcpuId};
use msrgate_plan::{DecisionMap, Plan};

use crate::{UNKNOWN, by_rule, gated, kvm, outcomes, plan, read, run, write};

const SHADOWED: Msr = Msr(0xc001_0015);
const UNTOUCHED: Msr = Msr(0xc001_0016);
const LSTAR: Msr = Msr(0xc000_0082);
const CSTAR: Msr = Msr(0xc000_0083);

/// Two shadow registers, two MSRs with one write each, and shadows of what the kernel does not know.
fn remembering(initial: u64) -> DecisionMap {
    let shadow = ReadAction::Shadow(initial);
    DecisionMap::new(
        by_rule(ReadAction::Allow, &[(SHADOWED, shadow.clone()), (UNTOUCHED, shadow)]),
        by_rule(
            WriteAction::Allow,
            &[
                (SHADOWED, WriteAction::Shadow),
                (UNTOUCHED, WriteAction::Shadow),
                (LSTAR, WriteAction::Once),
                (CSTAR, WriteAction::Once),
            ],
        ),
    )
    .with_unknown((ReadAction::Shadow(0), WriteAction::Shadow))
}

/// A guest in a VM of its own, under the plan.
struct Machine {
    guest: Guest,
    gate: Gate,
    vcpu: VcpuGate,
}

impl Machine {
    fn new(kvm: &Kvm, probed: Capabilities, map: &DecisionMap, handlers: Handlers) -> Machine {
        let (guest, gate, vcpu) = gated(kvm, probed, Mode::Real, plan(map), handlers);
        Machine { guest, gate, vcpu }
    }

    fn run(&mut self, accesses: &[Access]) -> Vec<Outcome> {
        outcomes(&run(&mut self.guest, &self.vcpu, accesses))
    }

    fn save(&mut self) -> String {
        self.vcpu.save_vcpu(self.guest.vcpu(0).unwrap().fd_mut()).unwrap()
    }
}

#[test]
fn a_guest_that_is_rolled_back_in_place_finds_what_it_had_and_nothing_since() {
    let Some((kvm, probed)) = kvm() else { return };
    let mut machine = Machine::new(&kvm, probed, &remembering(7), Handlers::new());
    assert_eq!(
        machine.run(&[write(SHADOWED, 1), write(CSTAR, 0x1000)]),
        [Outcome::Done; 2]
    );
    let state = machine.save();
    let since = [write(SHADOWED, 2), write(UNTOUCHED, 2), write(LSTAR, 0x2000)];
    assert_eq!(machine.run(&since), [Outcome::Done; 3]);

    // Refused as a whole: what was locked since is locked.
    let other = plan(&remembering(8));
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, other, Handlers::new());
    let others = vcpu.save_vcpu(guest.vcpu(0).unwrap().fd_mut()).unwrap();
    assert!(matches!(
        machine.vcpu.roll_back(others.as_bytes()),
        Err(StateError::OtherPolicy { .. })
    ));
    assert_eq!(machine.run(&[write(LSTAR, 0x2000)]), [Outcome::Fault]);

    machine.vcpu.roll_back(state.as_bytes()).unwrap();
    let seen = machine.run(&[
        read(SHADOWED),
        read(UNTOUCHED),
        write(LSTAR, 0x3000),
        write(LSTAR, 0x3000),
        write(CSTAR, 0x3000),
    ]);
    let [one, seven] = [1, 7].map(Outcome::Value);
    assert_eq!(seen, [one, seven, Outcome::Done, Outcome::Fault, Outcome::Fault]);
}

/// What a VMM does with the MSRs of its list that the guest can reach.
fn move_registers(from: &VcpuFd, to: &VcpuFd, plan: &Plan) {
    let list = [LSTAR, CSTAR, Msr(0x174), SHADOWED];
    let reached = |msr: &Msr| Op::ALL.into_iter().any(|op| plan.reaches(*msr, op));
    let reached: Vec<Msr> = list.into_iter().filter(reached).collect();
    assert_eq!(reached, [LSTAR, CSTAR, Msr(0x174)]);
    let entries: Vec<kvm_msr_entry> = reached
        .iter()
        .map(|msr| kvm_msr_entry {
            index: msr.0,
            ..Default::default()
        })
        .collect();
    let mut msrs = Msrs::from_entries(&entries).unwrap();
    assert_eq!(from.get_msrs(&mut msrs).unwrap(), reached.len());
    assert_eq!(to.set_msrs(&msrs).unwrap(), reached.len());
}

#[test]
fn a_guest_that_moves_to_another_vm_reads_back_its_shadows_and_finds_its_locks() {
    let Some((kvm, probed)) = kvm() else { return };
    let map = remembering(7);
    let mut here = Machine::new(&kvm, probed, &map, Handlers::new());
    let done = here.run(&[
        write(SHADOWED, 0xfedc_ba98_7654_3210),
        write(UNKNOWN, 5),
        write(LSTAR, 0x1000),
        write(Msr(0x174), 8),
    ]);
    assert_eq!(done, [Outcome::Done; 4]);
    let state = here.save();
    let lines: Vec<&str> = state.lines().collect();
    let [version, policy, memories @ .., end] = lines.as_slice() else {
        panic!("{state}")
    };
    assert_eq!(*version, "msrgate-state 1");
    assert!(policy.starts_with("policy ") && end.starts_with("end 3 "), "{state}");
    let expected = [
        "once 0xc0000082",
        "shadow 0xc0010015 0xfedcba9876543210",
        "shadow 0xdeadbeef 0x5",
    ];
    assert_eq!(memories, expected);

    let mut there = Machine::new(&kvm, probed, &map, Handlers::new());
    let (from, to) = (here.guest.vcpu(0).unwrap().fd(), there.guest.vcpu(0).unwrap().fd());
    move_registers(from, to, &here.gate.plan());
    there.vcpu.restore(state.as_bytes()).unwrap();
    let seen = there.run(&[
        read(SHADOWED),
        read(UNTOUCHED),
        read(UNKNOWN),
        read(LSTAR),
        read(Msr(0x174)),
        write(LSTAR, 0x2000),
        read(LSTAR),
        // The lock that was open still is.
        write(CSTAR, 0x3000),
        write(CSTAR, 0x3000),
    ]);
    let expected = [
        Outcome::Value(0xfedc_ba98_7654_3210),
        Outcome::Value(7),
        Outcome::Value(5),
        Outcome::Value(0x1000),
        Outcome::Value(8),
        Outcome::Fault,
        Outcome::Value(0x1000),
        Outcome::Done,
        Outcome::Fault,
    ];
    assert_eq!(seen, expected);
    assert!(there.save().contains("once 0xc0000083\n"));
}

#[test]
fn a_state_of_another_policy_is_refused_and_changes_nothing() {
    let Some((kvm, probed)) = kvm() else { return };
    let mut here = Machine::new(&kvm, probed, &remembering(7), Handlers::new());
    here.run(&[write(SHADOWED, 1), write(LSTAR, 0x1000)]);
    let state = here.save();
    let mut there = Machine::new(&kvm, probed, &remembering(8), Handlers::new());
    there.run(&[write(CSTAR, 0x1000)]);
    let before = there.save();
    let error = there.vcpu.restore(state.as_bytes()).unwrap_err();
    assert!(matches!(error, StateError::OtherPolicy { .. }), "{error}");
    let hash: String = here
        .gate
        .plan()
        .map()
        .hash()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert!(error.to_string().contains(&hash), "{error}");
    assert_eq!(there.save(), before);
    assert_eq!(there.run(&[read(SHADOWED)]), [Outcome::Value(8)]);
}

#[test]
fn a_state_unlocks_nothing_that_is_locked() {
    let Some((kvm, probed)) = kvm() else { return };
    let mut machine = Machine::new(&kvm, probed, &remembering(7), Handlers::new());
    machine.run(&[write(SHADOWED, 1)]);
    let early = machine.save();
    machine.run(&[write(SHADOWED, 2), write(LSTAR, 0x1000)]);
    machine.vcpu.restore(early.as_bytes()).unwrap();
    let seen = machine.run(&[read(SHADOWED), write(LSTAR, 0x2000)]);
    assert_eq!(seen, [Outcome::Value(1), Outcome::Fault]);
    // A processor that is reset is another matter.
    machine.vcpu.reset();
    machine.vcpu.restore(early.as_bytes()).unwrap();
    assert_eq!(machine.run(&[write(LSTAR, 0x2000)]), [Outcome::Done]);
}

#[test]
fn a_vcpu_that_has_not_met_the_new_plan_is_saved_under_it() {
    let Some((kvm, probed)) = kvm() else { return };
    let mut here = Machine::new(&kvm, probed, &remembering(7), Handlers::new());
    here.run(&[write(SHADOWED, 1), write(LSTAR, 0x1000)]);
    here.gate.replace(plan(&remembering(8))).unwrap();
    let state = here.save();
    let mut there = Machine::new(&kvm, probed, &remembering(7), Handlers::new());
    there.gate.replace(plan(&remembering(8))).unwrap();
    there.vcpu.restore(state.as_bytes()).unwrap();
    let seen = there.run(&[read(SHADOWED), read(UNTOUCHED), write(LSTAR, 0x2000)]);
    assert_eq!(seen, [Outcome::Value(1), Outcome::Value(8), Outcome::Fault]);
}

#[test]
fn a_vcpu_whose_exit_waits_for_its_answer_is_not_saved() {
    let Some((kvm, probed)) = kvm() else { return };
    let mut machine = Machine::new(&kvm, probed, &remembering(7), Handlers::new());
    let Machine { guest, vcpu: gate, .. } = &mut machine;
    let mut refused = false;
    guest
        .run(0, &[write(LSTAR, 0x1000)], &mut |pending| {
            let error = gate.save_vcpu(pending.fd()).unwrap_err();
            refused = matches!(error, SaveError::Unanswered);
            pending.dispatch(gate);
        })
        .unwrap();
    assert!(refused);
    assert!(machine.save().contains("once 0xc0000082"));
}

thread_local! {
    /// The gate that the handler below is asked by.
    static ASKING: RefCell<Option<Rc<VcpuGate>>> = const { RefCell::new(None) };
}

/// A handler that restores the vCPU that it answers for.
struct Restoring;

impl Handler for Restoring {
    fn read(&self, _: VcpuId, _: Msr) -> Result<u64, Fault> {
        let restored = ASKING.with_borrow(|gate| gate.as_ref().map(|gate| gate.restore(b"")));
        assert_eq!(restored, Some(Err(StateError::InHandler)));
        Ok(1)
    }

    fn write(&self, _: VcpuId, _: Msr, _: u64) -> Result<(), Fault> {
        Err(Fault)
    }
}

#[test]
fn a_handler_cannot_restore_the_vcpu_that_waits_for_it() {
    let Some((kvm, probed)) = kvm() else { return };
    let map = DecisionMap::allow_all().with_reads(by_rule(
        ReadAction::Allow,
        &[(SHADOWED, ReadAction::Handler("restoring".into()))],
    ));
    let machine = Machine::new(&kvm, probed, &map, Handlers::new().with("restoring", Restoring));
    let Machine { mut guest, vcpu, .. } = machine;
    let gate = Rc::new(vcpu);
    ASKING.set(Some(Rc::clone(&gate)));
    let seen = guest.run(0, &[read(SHADOWED)], &mut |pending| {
        pending.dispatch(&gate);
    });
    // A handler that panics faults.
    assert_eq!(seen.unwrap()[0].outcome, Outcome::Value(1));
}
