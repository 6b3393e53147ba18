//! What an access gets, by action and by handler.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use msrgate_core::{Disposition, FaultCause, Msr, Nanos, OnLockedBits, Outcome, ReadAction, Reason, WriteAction};
use msrgate_guest::{Guest, Mode, Options};
use msrgate_kvm::{Counts, Dispatch, Fault, Handler, Handlers, VcpuGate, VcpuId};
use msrgate_plan::DecisionMap;

use crate::{
    APIC_BASE, APIC_BASE_VALUE, MICROCODE, SYSENTER_CS, UNKNOWN, by_rule, check, did, gated, kvm, map, outcomes, plan,
    read, run, write,
};

#[test]
fn a_plan_of_pure_deny_faults_in_the_kernel_without_an_exit() {
    check(
        &[(SYSENTER_CS, ReadAction::Deny)],
        &[(SYSENTER_CS, WriteAction::Deny)],
        &[
            (read(SYSENTER_CS), Outcome::Fault, None),
            (write(SYSENTER_CS, 1), Outcome::Fault, None),
            (read(APIC_BASE), APIC_BASE_VALUE, None),
        ],
    );
}

#[test]
fn a_default_of_deny_leaves_what_a_rule_allows() {
    let Some((kvm, probed)) = kvm() else { return };
    let map = DecisionMap::new(
        by_rule(ReadAction::Deny, &[(APIC_BASE, ReadAction::Allow)]),
        by_rule(WriteAction::Deny, &[]),
    );
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Long, plan(&map), Handlers::new());
    let accesses = [read(APIC_BASE), read(SYSENTER_CS), write(SYSENTER_CS, 0)];
    let seen = run(&mut guest, &vcpu, &accesses);
    assert_eq!(outcomes(&seen), [APIC_BASE_VALUE, Outcome::Fault, Outcome::Fault]);
    assert!(seen.iter().all(|seen| seen.exit.is_none()));
}

#[test]
fn a_denial_beside_an_answer_exits_and_faults() {
    check(
        &[(SYSENTER_CS, ReadAction::Deny), (MICROCODE, ReadAction::Value(0))],
        &[],
        &[
            (read(SYSENTER_CS), Outcome::Fault, Some((Disposition::Deny, None))),
            (read(MICROCODE), Outcome::Value(0), Some((Disposition::Zero, None))),
            (read(APIC_BASE), APIC_BASE_VALUE, None),
        ],
    );
}

#[test]
fn a_value_reaches_eax_and_edx_and_an_ignored_write_does_nothing() {
    let value = 0x0102_0304_8506_0708;
    check(
        &[
            (MICROCODE, ReadAction::Value(value)),
            (UNKNOWN, ReadAction::Value(u64::MAX)),
        ],
        &[(SYSENTER_CS, WriteAction::Ignore)],
        &[
            (read(MICROCODE), Outcome::Value(value), Some((Disposition::Value, None))),
            (
                read(UNKNOWN),
                Outcome::Value(u64::MAX),
                Some((Disposition::Value, None)),
            ),
            (write(SYSENTER_CS, 5), Outcome::Done, Some((Disposition::Ignore, None))),
            (read(SYSENTER_CS), Outcome::Value(0), None),
        ],
    );
}

#[test]
fn a_shadow_register_reads_what_was_written() {
    check(
        &[(UNKNOWN, ReadAction::Shadow(3))],
        &[(UNKNOWN, WriteAction::Shadow)],
        &[
            (read(UNKNOWN), Outcome::Value(3), Some((Disposition::Shadow, None))),
            (
                write(UNKNOWN, u64::MAX),
                Outcome::Done,
                Some((Disposition::Shadow, None)),
            ),
            (
                read(UNKNOWN),
                Outcome::Value(u64::MAX),
                Some((Disposition::Shadow, None)),
            ),
        ],
    );
}

#[test]
fn a_mask_stands_between_the_guest_and_the_kernels_register() {
    check(
        &[(SYSENTER_CS, ReadAction::Mask { keep: 0xf0, set: 1 })],
        &[(
            SYSENTER_CS,
            WriteAction::Mask {
                may_change: 0xff,
                otherwise: OnLockedBits::Deny,
            },
        )],
        &[
            (write(SYSENTER_CS, 0xff), Outcome::Done, Some((Disposition::Mask, None))),
            (read(SYSENTER_CS), Outcome::Value(0xf1), Some((Disposition::Mask, None))),
            (
                write(SYSENTER_CS, 0x100),
                Outcome::Fault,
                Some((Disposition::Fault, Some(FaultCause::BitsLocked))),
            ),
            (read(SYSENTER_CS), Outcome::Value(0xf1), Some((Disposition::Mask, None))),
        ],
    );
}

#[test]
fn a_mask_of_an_msr_that_the_kernel_does_not_hold_faults() {
    let refused = Some((Disposition::Fault, Some(FaultCause::KernelRefused)));
    check(
        &[(UNKNOWN, ReadAction::Mask { keep: 1, set: 0 })],
        &[(UNKNOWN, WriteAction::Once)],
        &[
            (read(UNKNOWN), Outcome::Fault, refused),
            (write(UNKNOWN, 1), Outcome::Fault, refused),
        ],
    );
}

#[test]
fn only_takes_its_values_and_once_takes_the_first() {
    let esp = Msr(0x175);
    check(
        &[],
        &[
            (SYSENTER_CS, WriteAction::Only([2, 4].into())),
            (esp, WriteAction::Once),
        ],
        &[
            (write(SYSENTER_CS, 2), Outcome::Done, Some((Disposition::Only, None))),
            (
                write(SYSENTER_CS, 3),
                Outcome::Fault,
                Some((Disposition::Fault, Some(FaultCause::ValueNotListed))),
            ),
            (read(SYSENTER_CS), Outcome::Value(2), None),
            (write(esp, 0x10), Outcome::Done, Some((Disposition::Once, None))),
            (
                write(esp, 0x20),
                Outcome::Fault,
                Some((Disposition::Fault, Some(FaultCause::AlreadyWritten))),
            ),
            (read(esp), Outcome::Value(0x10), None),
        ],
    );
}

/// Knows one MSR; panics at another.
struct Cores;

impl Handler for Cores {
    fn read(&self, vcpu: VcpuId, msr: Msr) -> Result<u64, Fault> {
        match msr {
            Msr(0x35) => Ok(u64::from(vcpu.index) << 32 | 0x10),
            MICROCODE => panic!("a handler that cannot"),
            _ => Err(Fault),
        }
    }

    fn write(&self, _vcpu: VcpuId, msr: Msr, value: u64) -> Result<(), Fault> {
        if msr == Msr(0x35) && value == 1 {
            Ok(())
        } else {
            Err(Fault)
        }
    }
}

#[test]
fn a_handler_answers_and_its_fault_and_its_panic_are_faults() {
    let Some((kvm, probed)) = kvm() else { return };
    let name: Arc<str> = "cores".into();
    let cores = Msr(0x35);
    let reads = [cores, MICROCODE, SYSENTER_CS].map(|msr| (msr, ReadAction::Handler(name.clone())));
    let writes = [(cores, WriteAction::Handler(name))];
    let handlers = Handlers::new().with("cores", Cores);
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&map(&reads, &writes)), handlers);
    let accesses = [
        read(cores),
        read(MICROCODE),
        read(SYSENTER_CS),
        write(cores, 1),
        write(cores, 2),
        read(cores),
    ];
    let seen = run(&mut guest, &vcpu, &accesses);
    let value = Outcome::Value(7 << 32 | 0x10);
    assert_eq!(
        outcomes(&seen),
        [
            value,
            Outcome::Fault,
            Outcome::Fault,
            Outcome::Done,
            Outcome::Fault,
            value
        ]
    );
    assert_eq!(did(&seen[0]), (Disposition::Handler, None));
    assert_eq!(did(&seen[1]), (Disposition::Fault, Some(FaultCause::HandlerPanicked)));
    assert_eq!(did(&seen[2]), (Disposition::Fault, Some(FaultCause::HandlerFault)));
    assert_eq!(did(&seen[4]), (Disposition::Fault, Some(FaultCause::HandlerFault)));
}

#[test]
fn functions_answer_and_so_does_a_handler_that_the_vmm_keeps_a_hold_of() {
    let Some((kvm, probed)) = kvm() else { return };
    let last = Arc::new(AtomicU64::new(0));
    let written = Arc::clone(&last);
    let handlers = Handlers::new().with("kept", Arc::new(Cores)).with_fns(
        "last",
        |vcpu, msr| Ok(u64::from(vcpu.index) << 32 | u64::from(msr.0)),
        move |_, _, value| match value {
            0 => Err(Fault),
            _ => {
                written.store(value, Ordering::Relaxed);
                Ok(())
            }
        },
    );
    let cores = Msr(0x35);
    let reads = [
        (cores, ReadAction::Handler("kept".into())),
        (MICROCODE, ReadAction::Handler("last".into())),
    ];
    let writes = [(MICROCODE, WriteAction::Handler("last".into()))];
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&map(&reads, &writes)), handlers);
    let accesses = [read(cores), read(MICROCODE), write(MICROCODE, 5), write(MICROCODE, 0)];
    let seen = outcomes(&run(&mut guest, &vcpu, &accesses));
    let by_kept = Outcome::Value(7 << 32 | 0x10);
    let by_function = Outcome::Value(7 << 32 | 0x8b);
    assert_eq!(seen, [by_kept, by_function, Outcome::Done, Outcome::Fault]);
    assert_eq!(last.load(Ordering::Relaxed), 5);
}

#[test]
fn a_handler_that_two_vms_share_is_told_which_vm_and_vcpu_waits_and_what_the_vmm_gave_it() {
    let Some((kvm, probed)) = kvm() else { return };
    let asked = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&asked);
    let read_of = move |vcpu, _| {
        told.lock().unwrap().push(vcpu);
        Ok(0)
    };
    let handlers = Handlers::new().with_fns("who", read_of, |_, _, _| Err(Fault));
    let plan = plan(&map(&[(MICROCODE, ReadAction::Handler("who".into()))], &[]));
    let ids = [VcpuId::new(3), VcpuId::new(3).in_vm(1).with_opaque(u64::MAX)];
    for id in ids {
        let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
        let gate = probed.install(guest.vm(), plan.clone(), handlers.clone()).unwrap();
        let vcpu = gate.vcpu(guest.vcpu(0).unwrap().fd(), id).unwrap();
        run(&mut guest, &vcpu, &[read(MICROCODE)]);
    }
    assert_eq!(*asked.lock().unwrap(), ids);
}

#[test]
fn what_is_answered_is_counted_by_vm() {
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [
        (MICROCODE, ReadAction::Value(1)),
        (UNKNOWN, ReadAction::Deny),
        (SYSENTER_CS, ReadAction::Handler("faults".into())),
    ];
    let plan = plan(&map(&reads, &[(UNKNOWN, WriteAction::Ignore)]));
    let handlers = Handlers::faulting(["faults"]);
    let (mut guest, gate, vcpu) = gated(&kvm, probed, Mode::Real, plan, handlers);
    assert_eq!(gate.counts(), Counts::default());
    // The kernel answers the last one.
    let accesses = [
        read(MICROCODE),
        read(UNKNOWN),
        write(UNKNOWN, 1),
        read(SYSENTER_CS),
        read(APIC_BASE),
    ];
    let seen = run(&mut guest, &vcpu, &accesses);
    let counts = gate.counts();
    // A denied access faults in the kernel where the plan asks for no exit, and is then not counted.
    let denied = u64::from(seen[1].exit.is_some());
    assert_eq!((counts.reads, counts.writes), (2 + denied, 1));
    assert_eq!((counts.faults, counts.failures), (1 + denied, 1));
}

thread_local! {
    /// What a handler needs to come back.
    static SELF: RefCell<Option<(Rc<VcpuGate>, *mut kvm_bindings::kvm_run)>> = const { RefCell::new(None) };
    static INNER: Cell<Option<(FaultCause, u8)>> = const { Cell::new(None) };
}

/// Dispatches the exit that it is asked about.
struct ComesBack;

impl Handler for ComesBack {
    fn read(&self, _vcpu: VcpuId, _msr: Msr) -> Result<u64, Fault> {
        SELF.with_borrow(|own| {
            let (gate, run) = own.as_ref().unwrap();
            // SAFETY: the page of the vCPU that is being dispatched, on its thread; the outer call holds no reference.
            let Dispatch::Answered(answered) = (unsafe { gate.dispatch_raw(run.cast()) }) else {
                panic!("not taken for an MSR exit")
            };
            // SAFETY: as above.
            let page = unsafe { &**run };
            // SAFETY: the exit is one of an MSR, and the field is made of integers.
            let error = unsafe { page.__bindgen_anon_1.msr }.error;
            INNER.set(Some((answered.answer.why.unwrap(), error)));
        });
        Ok(42)
    }

    fn write(&self, _vcpu: VcpuId, _msr: Msr, _value: u64) -> Result<(), Fault> {
        Err(Fault)
    }
}

#[test]
fn a_handler_that_dispatches_its_own_exit_is_told_so_and_the_outer_answer_counts() {
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Handler("back".into()))];
    let handlers = Handlers::new().with("back", ComesBack);
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&map(&reads, &[])), handlers);
    let vcpu = Rc::new(vcpu);
    let seen = guest
        .run(0, &[read(MICROCODE), read(MICROCODE)], &mut |pending| {
            let run = pending.fd().get_kvm_run();
            // SAFETY: the exit is one of an MSR, and the field is made of integers.
            let msr = unsafe { run.__bindgen_anon_1.msr };
            // As the kernel leaves it.
            run.__bindgen_anon_1.msr = kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_23 { error: 0, ..msr };
            let page: *mut kvm_bindings::kvm_run = run;
            SELF.set(Some((vcpu.clone(), page)));
            // SAFETY: this vCPU's page, which this thread alone touches; the reference it came from is gone.
            let dispatch = unsafe { vcpu.dispatch_raw(page.cast()) };
            assert!(matches!(dispatch, Dispatch::Answered(_)));
            // Inside, the fault stood ready.
            assert_eq!(INNER.take(), Some((FaultCause::ReEntered, 1)));
        })
        .unwrap();
    assert_eq!(outcomes(seen), [Outcome::Value(42); 2]);
    SELF.set(None);
}

#[test]
fn a_reason_that_is_not_one_known_bit_faults() {
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Value(1))];
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&map(&reads, &[])), Handlers::new());
    let reasons = [0, 3, 5, 6, 7, 8, 1 << 31, u32::MAX];
    let seen = guest
        .run(0, &[read(MICROCODE); 9], &mut |pending| {
            let position = pending.position();
            if let Some(reason) = reasons.get(position) {
                // As a kernel from the future would.
                pending.fd().get_kvm_run().__bindgen_anon_1.msr = {
                    // SAFETY: the exit is one of an MSR, and the field is made of integers.
                    let mut msr = unsafe { pending.fd().get_kvm_run().__bindgen_anon_1.msr };
                    msr.reason = *reason;
                    msr
                };
            }
            let answered = pending.dispatch(&vcpu).unwrap();
            assert_eq!(answered.reason, (position == 8).then_some(Reason::Filter));
            assert_eq!(answered.event(Nanos(0), None).reason, answered.reason);
        })
        .unwrap();
    for seen in &seen[..8] {
        assert_eq!(seen.outcome, Outcome::Fault);
        assert_eq!(did(seen), (Disposition::Fault, Some(FaultCause::UnknownReason)));
    }
    assert_eq!(seen[8].outcome, Outcome::Value(1));
}

#[test]
fn unknown_msrs_are_answered_where_the_plan_says_so() {
    let Some((kvm, probed)) = kvm() else { return };
    let map = map(&[], &[]);
    let map = map.with_unknown((ReadAction::Value(0), WriteAction::Ignore));
    let (mut guest, gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&map), Handlers::new());
    let accesses = [read(UNKNOWN), write(UNKNOWN, 1), read(APIC_BASE)];
    let seen = run(&mut guest, &vcpu, &accesses);
    assert_eq!(outcomes(&seen), [Outcome::Value(0), Outcome::Done, APIC_BASE_VALUE]);
    assert_eq!(seen[0].exit.unwrap().reason_bits, Reason::Unknown as u32);
    gate.remove().unwrap();
    let seen = run(&mut guest, &vcpu, &accesses);
    assert_eq!(outcomes(&seen), [Outcome::Fault, Outcome::Fault, APIC_BASE_VALUE]);
    assert!(seen.iter().all(|seen| seen.exit.is_none()));
}
