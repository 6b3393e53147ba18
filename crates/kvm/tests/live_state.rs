//! What a vCPU remembers goes along to another VM, on live KVM. Skipped where /dev/kvm does not open, unless
//! MSRGATE_LANE_REQUIRE is 1.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use msrgate_core::{Access, Log, Msr, MsrRange, Op, Outcome, ReadAction, WriteAction};
use msrgate_guest::{Guest, Mode, Options};
use msrgate_kvm::{Fault, Gate, Handler, Handlers, Probed, SaveError, StateError, VcpuGate, probe};
use msrgate_plan::{Decision, DecisionMap, Intervals, Plan};

const SHADOWED: Msr = Msr(0xc001_0015);
const UNTOUCHED: Msr = Msr(0xc001_0016);
const LSTAR: Msr = Msr(0xc000_0082);
const CSTAR: Msr = Msr(0xc000_0083);
/// No kernel knows it.
const UNKNOWN: Msr = Msr(0xdead_beef);

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

/// By MSR what it gets, else `allow`.
fn intervals<A: Clone + Eq>(allow: A, rules: &[(Msr, A)]) -> Intervals<Decision<A>> {
    let rules = rules.iter().map(|(msr, action)| {
        let decision = Decision {
            action: action.clone(),
            rule: Some(0),
            log: Log::None,
        };
        (MsrRange::single(*msr), decision)
    });
    Intervals::first_match(Decision::of(allow), rules)
}

/// Two shadow registers, two MSRs with one write each, and shadows of what the kernel does not know.
fn map(initial: u64) -> DecisionMap {
    let shadow = ReadAction::Shadow(initial);
    DecisionMap {
        reads: intervals(ReadAction::Allow, &[(SHADOWED, shadow.clone()), (UNTOUCHED, shadow)]),
        writes: intervals(
            WriteAction::Allow,
            &[
                (SHADOWED, WriteAction::Shadow),
                (UNTOUCHED, WriteAction::Shadow),
                (LSTAR, WriteAction::Once),
                (CSTAR, WriteAction::Once),
            ],
        ),
        unknown: (ReadAction::Shadow(0), WriteAction::Shadow),
        ..DecisionMap::allow_all()
    }
}

/// A guest in a VM of its own, under the plan.
struct Machine {
    guest: Guest,
    gate: Gate,
    vcpu: VcpuGate,
}

impl Machine {
    fn new(kvm: &Kvm, probed: Probed, map: &DecisionMap, handlers: Handlers) -> Machine {
        let mut guest = Guest::new(kvm, Mode::Real, &Options::default()).unwrap();
        let plan = Arc::new(Plan::compile(map).unwrap());
        let gate = probed.install(guest.vm(), plan, handlers).unwrap();
        let vcpu = gate.vcpu(guest.vcpu(0).unwrap().fd(), 0).unwrap();
        Machine { guest, gate, vcpu }
    }

    fn run(&mut self, accesses: &[Access]) -> Vec<Outcome> {
        let seen = self.guest.run(0, accesses, &mut |pending| {
            pending.dispatch(&self.vcpu);
        });
        seen.unwrap().iter().map(|seen| seen.outcome).collect()
    }

    fn save(&mut self) -> String {
        self.vcpu.save_vcpu(self.guest.vcpu(0).unwrap().fd_mut()).unwrap()
    }
}

fn read(msr: Msr) -> Access {
    Access::Read { msr }
}

fn write(msr: Msr, value: u64) -> Access {
    Access::Write { msr, value }
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
    let map = map(7);
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
    let mut here = Machine::new(&kvm, probed, &map(7), Handlers::new());
    here.run(&[write(SHADOWED, 1), write(LSTAR, 0x1000)]);
    let state = here.save();
    let mut there = Machine::new(&kvm, probed, &map(8), Handlers::new());
    there.run(&[write(CSTAR, 0x1000)]);
    let before = there.save();
    let error = there.vcpu.restore(state.as_bytes()).unwrap_err();
    assert!(matches!(error, StateError::OtherPolicy { .. }), "{error}");
    let hash: String = here
        .gate
        .plan()
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
    let mut machine = Machine::new(&kvm, probed, &map(7), Handlers::new());
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
    let mut here = Machine::new(&kvm, probed, &map(7), Handlers::new());
    here.run(&[write(SHADOWED, 1), write(LSTAR, 0x1000)]);
    here.gate.replace(Arc::new(Plan::compile(&map(8)).unwrap())).unwrap();
    let state = here.save();
    let mut there = Machine::new(&kvm, probed, &map(7), Handlers::new());
    there.gate.replace(Arc::new(Plan::compile(&map(8)).unwrap())).unwrap();
    there.vcpu.restore(state.as_bytes()).unwrap();
    let seen = there.run(&[read(SHADOWED), read(UNTOUCHED), write(LSTAR, 0x2000)]);
    assert_eq!(seen, [Outcome::Value(1), Outcome::Value(8), Outcome::Fault]);
}

#[test]
fn a_vcpu_whose_exit_waits_for_its_answer_is_not_saved() {
    let Some((kvm, probed)) = kvm() else { return };
    let mut machine = Machine::new(&kvm, probed, &map(7), Handlers::new());
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
    fn read(&self, _: u32, _: Msr) -> Result<u64, Fault> {
        let restored = ASKING.with_borrow(|gate| gate.as_ref().map(|gate| gate.restore(b"")));
        assert_eq!(restored, Some(Err(StateError::InHandler)));
        Ok(1)
    }

    fn write(&self, _: u32, _: Msr, _: u64) -> Result<(), Fault> {
        Err(Fault)
    }
}

#[test]
fn a_handler_cannot_restore_the_vcpu_that_waits_for_it() {
    let Some((kvm, probed)) = kvm() else { return };
    let map = DecisionMap {
        reads: intervals(
            ReadAction::Allow,
            &[(SHADOWED, ReadAction::Handler("restoring".into()))],
        ),
        ..DecisionMap::allow_all()
    };
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
