//! On live KVM. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1.

#![expect(unsafe_code, reason = "the mapped `kvm_run` is a union")]

use std::cell::{Cell, RefCell};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use kvm_ioctls::Kvm;
use msrgate_core::{
    Access, Did, Filter, FilterRange, Log, Msr, MsrRange, Op, Ops, Otherwise, Outcome, ReadAction, Reason, Verdict,
    Why, WriteAction, abi,
};
use msrgate_guest::{Guest, Mode, Options, Pending, Seen};
use msrgate_kvm::{Dispatch, Drained, Fault, Gate, Handler, Handlers, InstallError, Probed, VcpuGate, probe};
use msrgate_plan::{Decision, DecisionMap, Intervals, Plan};

const APIC_BASE: Msr = Msr(0x1b);
const APIC_BASE_VALUE: Outcome = Outcome::Value(0xfee0_0900);
const SYSENTER_CS: Msr = Msr(0x174);
const MICROCODE: Msr = Msr(0x8b);
/// No processor has it.
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

fn read(msr: Msr) -> Access {
    Access::Read { msr }
}

fn write(msr: Msr, value: u64) -> Access {
    Access::Write { msr, value }
}

fn by_rule<A: Clone + Eq>(allow: A, rules: &[(Msr, A)]) -> Intervals<Decision<A>> {
    let rules = rules.iter().zip(0..).map(|((msr, action), rule)| {
        let decision = Decision {
            action: action.clone(),
            rule: Some(rule),
            log: Log::None,
        };
        (MsrRange::single(*msr), decision)
    });
    Intervals::first_match(Decision::of(allow), rules)
}

/// Allows all but what `reads` and `writes` name.
fn map(reads: &[(Msr, ReadAction)], writes: &[(Msr, WriteAction)]) -> DecisionMap {
    DecisionMap {
        reads: by_rule(ReadAction::Allow, reads),
        writes: by_rule(WriteAction::Allow, writes),
        ..DecisionMap::allow_all()
    }
}

fn plan(reads: &[(Msr, ReadAction)], writes: &[(Msr, WriteAction)]) -> Arc<Plan> {
    Arc::new(Plan::compile(&map(reads, writes)).unwrap())
}

/// A guest with one vCPU, gated by `plan`.
fn gated(kvm: &Kvm, probed: Probed, mode: Mode, plan: Arc<Plan>, handlers: Handlers) -> (Guest, Gate, VcpuGate) {
    let mut guest = Guest::new(kvm, mode, &Options::default()).unwrap();
    let gate = probed.install(guest.vm(), plan, handlers).unwrap();
    let vcpu = gate.vcpu(guest.vcpu(0).unwrap().fd(), 7).unwrap();
    (guest, gate, vcpu)
}

fn run(guest: &mut Guest, gate: &VcpuGate, accesses: &[Access]) -> Vec<Seen> {
    let dispatch = &mut |pending: &mut Pending<'_>| {
        pending.dispatch(gate).unwrap();
    };
    guest.run(0, accesses, dispatch).unwrap().to_vec()
}

fn outcomes(seen: &[Seen]) -> Vec<Outcome> {
    seen.iter().map(|seen| seen.outcome).collect()
}

fn did(seen: &Seen) -> (Did, Option<Why>) {
    let answer = seen.exit.unwrap().answer.unwrap();
    (answer.did, answer.why)
}

/// What an access is to get, and what the gate is to say of it; `None` where it is not to exit.
type Expected = (Access, Outcome, Option<(Did, Option<Why>)>);

/// Runs `accesses` in both modes under a plan, and compares what the guest saw.
fn check(reads: &[(Msr, ReadAction)], writes: &[(Msr, WriteAction)], accesses: &[Expected]) {
    let Some((kvm, probed)) = kvm() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let (mut guest, _gate, vcpu) = gated(&kvm, probed, mode, plan(reads, writes), Handlers::new());
        let list: Vec<Access> = accesses.iter().map(|(access, ..)| *access).collect();
        for (seen, (access, outcome, expected)) in run(&mut guest, &vcpu, &list).iter().zip(accesses) {
            assert_eq!(seen.outcome, *outcome, "{mode:?} {access:x?}");
            assert_eq!(seen.exit.map(|_| did(seen)), *expected, "{mode:?} {access:x?}");
        }
    }
}

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
    let map = DecisionMap {
        reads: by_rule(ReadAction::Deny, &[(APIC_BASE, ReadAction::Allow)]),
        writes: by_rule(WriteAction::Deny, &[]),
        ..DecisionMap::allow_all()
    };
    let plan = Arc::new(Plan::compile(&map).unwrap());
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Long, plan, Handlers::new());
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
            (read(SYSENTER_CS), Outcome::Fault, Some((Did::Deny, None))),
            (read(MICROCODE), Outcome::Value(0), Some((Did::Zero, None))),
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
            (read(MICROCODE), Outcome::Value(value), Some((Did::Value, None))),
            (read(UNKNOWN), Outcome::Value(u64::MAX), Some((Did::Value, None))),
            (write(SYSENTER_CS, 5), Outcome::Done, Some((Did::Ignore, None))),
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
            (read(UNKNOWN), Outcome::Value(3), Some((Did::Shadow, None))),
            (write(UNKNOWN, u64::MAX), Outcome::Done, Some((Did::Shadow, None))),
            (read(UNKNOWN), Outcome::Value(u64::MAX), Some((Did::Shadow, None))),
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
                otherwise: Otherwise::Deny,
            },
        )],
        &[
            (write(SYSENTER_CS, 0xff), Outcome::Done, Some((Did::Mask, None))),
            (read(SYSENTER_CS), Outcome::Value(0xf1), Some((Did::Mask, None))),
            (
                write(SYSENTER_CS, 0x100),
                Outcome::Fault,
                Some((Did::Fault, Some(Why::BitsLocked))),
            ),
            (read(SYSENTER_CS), Outcome::Value(0xf1), Some((Did::Mask, None))),
        ],
    );
}

#[test]
fn a_mask_of_an_msr_that_the_kernel_does_not_hold_faults() {
    let refused = Some((Did::Fault, Some(Why::KernelRefused)));
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
            (write(SYSENTER_CS, 2), Outcome::Done, Some((Did::Only, None))),
            (
                write(SYSENTER_CS, 3),
                Outcome::Fault,
                Some((Did::Fault, Some(Why::ValueNotListed))),
            ),
            (read(SYSENTER_CS), Outcome::Value(2), None),
            (write(esp, 0x10), Outcome::Done, Some((Did::Once, None))),
            (
                write(esp, 0x20),
                Outcome::Fault,
                Some((Did::Fault, Some(Why::AlreadyWritten))),
            ),
            (read(esp), Outcome::Value(0x10), None),
        ],
    );
}

/// Knows one MSR; panics at another.
struct Cores;

impl Handler for Cores {
    fn read(&self, vcpu: u32, msr: Msr) -> Result<u64, Fault> {
        match msr {
            Msr(0x35) => Ok(u64::from(vcpu) << 32 | 0x10),
            MICROCODE => panic!("a handler that cannot"),
            _ => Err(Fault),
        }
    }

    fn write(&self, _vcpu: u32, msr: Msr, value: u64) -> Result<(), Fault> {
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
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&reads, &writes), handlers);
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
    assert_eq!(did(&seen[0]), (Did::Handler, None));
    assert_eq!(did(&seen[1]), (Did::Fault, Some(Why::HandlerPanicked)));
    assert_eq!(did(&seen[2]), (Did::Fault, Some(Why::HandlerFault)));
    assert_eq!(did(&seen[4]), (Did::Fault, Some(Why::HandlerFault)));
}

thread_local! {
    /// What a handler needs to come back.
    static SELF: RefCell<Option<(Rc<VcpuGate>, *mut kvm_bindings::kvm_run)>> = const { RefCell::new(None) };
    static INNER: Cell<Option<(Why, u8)>> = const { Cell::new(None) };
}

/// Dispatches the exit that it is asked about.
struct ComesBack;

impl Handler for ComesBack {
    fn read(&self, _vcpu: u32, _msr: Msr) -> Result<u64, Fault> {
        SELF.with_borrow(|own| {
            let (gate, run) = own.as_ref().unwrap();
            // SAFETY: the page of the vCPU that is being dispatched, on its thread; the outer call holds no reference.
            let Dispatch::Answered(answered) = (unsafe { gate.dispatch_raw(*run) }) else {
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

    fn write(&self, _vcpu: u32, _msr: Msr, _value: u64) -> Result<(), Fault> {
        Err(Fault)
    }
}

#[test]
fn a_handler_that_dispatches_its_own_exit_is_told_so_and_the_outer_answer_counts() {
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Handler("back".into()))];
    let handlers = Handlers::new().with("back", ComesBack);
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&reads, &[]), handlers);
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
            let dispatch = unsafe { vcpu.dispatch_raw(page) };
            assert!(matches!(dispatch, Dispatch::Answered(_)));
            // Inside, the fault stood ready.
            assert_eq!(INNER.take(), Some((Why::ReEntered, 1)));
        })
        .unwrap();
    assert_eq!(outcomes(seen), [Outcome::Value(42); 2]);
    SELF.set(None);
}

#[test]
fn a_reason_that_is_not_one_known_bit_faults() {
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Value(1))];
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&reads, &[]), Handlers::new());
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
            assert_eq!(answered.event(0, 0, None).reason, answered.reason);
        })
        .unwrap();
    for seen in &seen[..8] {
        assert_eq!(seen.outcome, Outcome::Fault);
        assert_eq!(did(seen), (Did::Fault, Some(Why::UnknownReason)));
    }
    assert_eq!(seen[8].outcome, Outcome::Value(1));
}

#[test]
fn unknown_msrs_are_answered_where_the_plan_says_so() {
    let Some((kvm, probed)) = kvm() else { return };
    let mut map = map(&[], &[]);
    map.unknown = (ReadAction::Value(0), WriteAction::Ignore);
    let plan = Arc::new(Plan::compile(&map).unwrap());
    let (mut guest, gate, vcpu) = gated(&kvm, probed, Mode::Real, plan, Handlers::new());
    let accesses = [read(UNKNOWN), write(UNKNOWN, 1), read(APIC_BASE)];
    let seen = run(&mut guest, &vcpu, &accesses);
    assert_eq!(outcomes(&seen), [Outcome::Value(0), Outcome::Done, APIC_BASE_VALUE]);
    assert_eq!(seen[0].exit.unwrap().reason_bits, Reason::Unknown as u32);
    gate.remove().unwrap();
    let seen = run(&mut guest, &vcpu, &accesses);
    assert_eq!(outcomes(&seen), [Outcome::Fault, Outcome::Fault, APIC_BASE_VALUE]);
    assert!(seen.iter().all(|seen| seen.exit.is_none()));
}

/// Counts how often it is asked.
struct Counts(Arc<AtomicU64>);

impl Handler for Counts {
    fn read(&self, _vcpu: u32, _msr: Msr) -> Result<u64, Fault> {
        Ok(self.0.fetch_add(1, Ordering::Relaxed))
    }

    fn write(&self, _vcpu: u32, _msr: Msr, _value: u64) -> Result<(), Fault> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn an_answered_access_is_not_answered_again_after_eintr() {
    let Some((kvm, probed)) = kvm() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let asked = Arc::new(AtomicU64::new(0));
        let name: Arc<str> = "counts".into();
        let plan = plan(
            &[(MICROCODE, ReadAction::Handler(name.clone()))],
            &[(MICROCODE, WriteAction::Handler(name))],
        );
        let handlers = Handlers::new().with("counts", Counts(asked.clone()));
        let (mut guest, _gate, vcpu) = gated(&kvm, probed, mode, plan, handlers);
        let accesses = [read(MICROCODE), write(MICROCODE, 5)].repeat(50);
        let seen = guest
            .run(0, &accesses, &mut |pending| {
                let (before, position) = (pending.rip(), pending.position() as u64);
                pending.dispatch(&vcpu).unwrap();
                assert_eq!(asked.load(Ordering::Relaxed), position + 1);
                // A look that comes too often.
                assert_eq!(vcpu.dispatch_vcpu(pending.fd()), Dispatch::NotMine);
                // The VMM is asked to leave; it looks at `kvm_run` although KVM_RUN said EINTR.
                let fd = pending.fd();
                fd.set_kvm_immediate_exit(1);
                assert_eq!(fd.run().unwrap_err().errno(), 4);
                assert_eq!(vcpu.dispatch_vcpu(fd), Dispatch::NotMine);
                fd.set_kvm_immediate_exit(0);
                // The access is complete: the instruction is behind the guest.
                let regs = fd.get_regs().unwrap();
                assert_eq!(regs.rip, before + 2);
                if position % 2 == 0 {
                    assert_eq!(regs.rax & 0xffff_ffff, position);
                }
                assert_eq!(vcpu.drain_vcpu(fd).unwrap(), Drained::Idle);
                assert_eq!(fd.get_regs().unwrap(), regs);
            })
            .unwrap();
        let expected = (0..50).flat_map(|n| [Outcome::Value(2 * n), Outcome::Done]);
        assert!(outcomes(seen).into_iter().eq(expected));
        assert_eq!(asked.load(Ordering::Relaxed), 100);
    }
}

#[test]
fn the_kernel_leaves_a_stale_exit_reason_beside_eintr() {
    // What the test above guards against: without a dispatch the old number is still there.
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Value(1))];
    let (mut guest, _gate, _vcpu) = gated(&kvm, probed, Mode::Real, plan(&reads, &[]), Handlers::new());
    let seen = guest
        .run(0, &[read(MICROCODE)], &mut |pending| {
            pending.answer(Outcome::Value(9));
            let fd = pending.fd();
            fd.set_kvm_immediate_exit(1);
            assert_eq!(fd.run().unwrap_err().errno(), 4);
            fd.set_kvm_immediate_exit(0);
            assert_eq!(fd.get_kvm_run().exit_reason, abi::EXIT_X86_RDMSR);
        })
        .unwrap();
    assert_eq!(outcomes(seen), [Outcome::Value(9)]);
}

#[test]
fn draining_completes_the_answer_and_refuses_an_exit_without_one() {
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Value(0x77)), (UNKNOWN, ReadAction::Deny)];
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Long, plan(&reads, &[]), Handlers::new());
    let seen = guest
        .run(0, &[read(MICROCODE), read(UNKNOWN)], &mut |pending| {
            let before = pending.rip();
            let fd = pending.fd();
            assert_eq!(vcpu.drain_vcpu(fd).unwrap(), Drained::Unanswered);
            assert_eq!(fd.get_regs().unwrap().rip, before);
            assert!(matches!(vcpu.dispatch_vcpu(fd), Dispatch::Answered(_)));
            assert_eq!(vcpu.drain_vcpu(fd).unwrap(), Drained::Idle);
            assert_eq!(fd.get_kvm_run().immediate_exit, 0);
            let regs = fd.get_regs().unwrap();
            if pending.position() == 0 {
                assert_eq!((regs.rip, regs.rax), (before + 2, 0x77));
            } else {
                // #GP waits to be delivered.
                let exception = pending.fd().get_vcpu_events().unwrap().exception;
                assert_eq!((exception.nr, exception.error_code, regs.rip), (13, 0, before));
            }
        })
        .unwrap();
    assert_eq!(outcomes(seen), [Outcome::Value(0x77), Outcome::Fault]);
}

#[test]
fn an_exit_of_a_filter_that_is_not_ours_faults() {
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Value(1))];
    let (mut guest, gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&reads, &[]), Handlers::new());
    // Somebody else replaces the filter behind our back.
    let filter = Filter::new(
        Verdict::Allow,
        vec![FilterRange::new(SYSENTER_CS.0, 1, Ops::BOTH, vec![0]).unwrap()],
    )
    .unwrap();
    set_filter(&guest, &filter);
    let seen = run(&mut guest, &vcpu, &[read(SYSENTER_CS), read(APIC_BASE)]);
    assert_eq!(outcomes(&seen), [Outcome::Fault, APIC_BASE_VALUE]);
    assert_eq!(did(&seen[0]), (Did::Fault, Some(Why::NoRule)));
    // Nor is it answered by a plan that is over.
    let next = [(SYSENTER_CS, ReadAction::Value(2))];
    gate.replace(plan(&next, &[])).unwrap();
    assert_eq!(
        outcomes(&run(&mut guest, &vcpu, &[read(SYSENTER_CS)])),
        [Outcome::Value(2)]
    );
    set_filter(&guest, plan(&reads, &[]).filter());
    let seen = run(&mut guest, &vcpu, &[read(MICROCODE)]);
    assert_eq!(did(&seen[0]), (Did::Fault, Some(Why::NoRule)));
}

fn set_filter(guest: &Guest, filter: &Filter) {
    let ranges: Vec<_> = filter
        .ranges()
        .iter()
        .map(|range| (range, range.bitmap_bytes()))
        .collect();
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(range, bytes)| kvm_ioctls::MsrFilterRange {
            flags: kvm_ioctls::MsrFilterRangeFlags::from_bits_truncate(range.ops().bits()),
            base: range.base(),
            msr_count: range.nmsrs(),
            bitmap: bytes,
        })
        .collect();
    let default = match filter.default_verdict() {
        Verdict::Allow => kvm_ioctls::MsrFilterDefaultAction::ALLOW,
        Verdict::Deny => kvm_ioctls::MsrFilterDefaultAction::DENY,
    };
    guest.vm().set_msr_filter(default, &ranges).unwrap();
}

#[test]
fn what_msrs_remember_outlives_a_replacement() {
    let Some((kvm, probed)) = kvm() else { return };
    let writes = [(SYSENTER_CS, WriteAction::Once), (UNKNOWN, WriteAction::Shadow)];
    let reads = [(UNKNOWN, ReadAction::Shadow(1))];
    let (mut guest, gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&reads, &writes), Handlers::new());
    let seen = run(&mut guest, &vcpu, &[write(SYSENTER_CS, 1), write(UNKNOWN, 2)]);
    assert_eq!(outcomes(&seen), [Outcome::Done, Outcome::Done]);
    let more = [(UNKNOWN, ReadAction::Shadow(1)), (MICROCODE, ReadAction::Value(3))];
    let next = plan(&more, &writes);
    gate.replace(next.clone()).unwrap();
    assert!(Arc::ptr_eq(&gate.plan(), &next));
    let accesses = [read(UNKNOWN), read(MICROCODE), write(SYSENTER_CS, 1)];
    let seen = run(&mut guest, &vcpu, &accesses);
    assert_eq!(outcomes(&seen), [Outcome::Value(2), Outcome::Value(3), Outcome::Fault]);
    assert_eq!(did(&seen[2]), (Did::Fault, Some(Why::AlreadyWritten)));
}

#[test]
fn an_exit_that_waits_while_plans_are_replaced_gets_one_of_their_answers() {
    let Some((kvm, probed)) = kvm() else { return };
    // Denied by the first plan alone.
    let first = plan(&[(MICROCODE, ReadAction::Value(1))], &[]);
    let other = plan(&[(UNKNOWN, ReadAction::Value(2))], &[]);
    let third = plan(&[(UNKNOWN, ReadAction::Deny)], &[]);
    let (mut guest, gate, vcpu) = gated(&kvm, probed, Mode::Real, first, Handlers::new());
    let seen = guest
        .run(0, &[read(MICROCODE), read(UNKNOWN), read(MICROCODE)], &mut |pending| {
            if pending.position() == 0 {
                gate.replace(other.clone()).unwrap();
                gate.replace(third.clone()).unwrap();
                gate.replace(other.clone()).unwrap();
            }
            pending.dispatch(&vcpu).unwrap();
        })
        .unwrap();
    assert_eq!(seen[0].outcome, Outcome::Value(1));
    assert_eq!(did(&seen[0]), (Did::Value, None));
    assert_eq!(seen[1].outcome, Outcome::Value(2));
    // The kernel's own.
    assert_eq!(seen[2].exit, None);
}

#[test]
fn running_vcpus_get_old_or_new_and_never_a_third_thing() {
    let Some((kvm, probed)) = kvm() else { return };
    const SAME: Msr = Msr(0x1000_0000);
    const CHANGES: Msr = Msr(0x1000_0001);
    const ONLY_A: Msr = SYSENTER_CS;
    const ONLY_B: Msr = APIC_BASE;
    let same = (SAME, ReadAction::Value(7));
    let a = [
        same.clone(),
        (CHANGES, ReadAction::Value(1)),
        (ONLY_A, ReadAction::Value(10)),
    ];
    let b = [same, (CHANGES, ReadAction::Value(2)), (ONLY_B, ReadAction::Value(20))];
    let once = [(Msr(0x175), WriteAction::Once)];
    // `once` is in one plan only, so that what it remembers must not get lost on the way.
    let plans = [plan(&a, &once), plan(&b, &once)];
    let options = Options {
        vcpus: 2,
        ..Options::default()
    };
    let mut guest = Guest::new(&kvm, Mode::Real, &options).unwrap();
    let gate = probed.install(guest.vm(), plans[0].clone(), Handlers::new()).unwrap();
    let gates: Vec<VcpuGate> = (0..2)
        .map(|id| gate.vcpu(guest.vcpu(id).unwrap().fd(), id as u32).unwrap())
        .collect();
    let stop = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    let (mut old, mut new, mut kernel) = (0, 0, 0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = guest
            .vcpus()
            .iter_mut()
            .zip(gates)
            .map(|(vcpu, gate)| {
                let (stop, rounds) = (&stop, &rounds);
                scope.spawn(move || {
                    let accesses = [
                        read(SAME),
                        read(CHANGES),
                        read(ONLY_A),
                        read(ONLY_B),
                        write(Msr(0x175), 1),
                    ]
                    .repeat(20);
                    let mut counts = [0; 3];
                    let mut writes = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let seen = vcpu
                            .run(&accesses, &mut |pending| {
                                pending.dispatch(&gate).unwrap();
                            })
                            .unwrap();
                        for seen in seen.chunks(5) {
                            assert_eq!(seen[0].outcome, Outcome::Value(7), "{:?}", seen[0]);
                            match seen[1].outcome {
                                Outcome::Value(1) => counts[0] += 1,
                                Outcome::Value(2) => counts[1] += 1,
                                _ => panic!("{:?}", seen[1]),
                            }
                            for (seen, own, kernels) in
                                [(&seen[2], 10, Outcome::Value(0)), (&seen[3], 20, APIC_BASE_VALUE)]
                            {
                                let kernels =
                                    seen.outcome == kernels || own == 20 && seen.outcome == Outcome::Value(0xfee0_0800);
                                assert!(seen.outcome == Outcome::Value(own) || kernels, "{seen:?}");
                                counts[2] += u64::from(kernels);
                            }
                            writes += u64::from(seen[4].outcome == Outcome::Done);
                        }
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                    assert_eq!(writes, 1, "`once` lets one write through");
                    counts
                })
            })
            .collect();
        for swap in 1..=200 {
            gate.replace(plans[swap % 2].clone()).unwrap();
            let before = rounds.load(Ordering::Relaxed);
            while swap % 20 == 0
                && rounds.load(Ordering::Relaxed) < before + 4
                && !threads.iter().any(|t| t.is_finished())
            {
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            let counts = thread.join().unwrap();
            old += counts[0];
            new += counts[1];
            kernel += counts[2];
        }
    });
    println!("200 replacements: {old} answers of one plan, {new} of the other, {kernel} of the kernel");
    assert!(old > 0 && new > 0 && kernel > 0);
}

#[test]
fn a_plan_comes_to_running_vcpus_changes_and_goes_without_a_fault() {
    // Each plan but the pure ones needs the mask that the others do not: an order that leaves a hole faults.
    let Some((kvm, probed)) = kvm() else { return };
    let answers = plan(&[(SYSENTER_CS, ReadAction::Value(10))], &[]);
    let allows = plan(&[], &[]);
    let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let mut probed = probed;
    let mut counts = [0u64; 2];
    for _ in 0..10 {
        let vm = guest.vm().as_raw_fd();
        let vcpu_fd = guest.vcpu(0).unwrap().fd().as_raw_fd();
        let vcpu: OnceLock<Mutex<VcpuGate>> = OnceLock::new();
        let stop = AtomicBool::new(false);
        let rounds = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let (stop, rounds, gate) = (&stop, &rounds, &vcpu);
            let guest = guest.vcpu(0).unwrap();
            let thread = scope.spawn(move || {
                let mut counts = [0; 2];
                loop {
                    let over = stop.load(Ordering::Relaxed);
                    let seen = guest
                        .run(&[read(SYSENTER_CS); 50], &mut |pending| {
                            pending.dispatch(&gate.wait().lock().unwrap()).unwrap();
                        })
                        .unwrap();
                    for seen in seen {
                        match seen.outcome {
                            Outcome::Value(10) => counts[0] += 1,
                            Outcome::Value(0) => counts[1] += 1,
                            _ => panic!("{seen:?}"),
                        }
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                    if over {
                        assert!(seen.iter().all(|seen| seen.exit.is_none()));
                        return counts;
                    }
                }
            });
            let wait = || {
                let before = rounds.load(Ordering::Relaxed);
                while rounds.load(Ordering::Relaxed) < before + 2 && !thread.is_finished() {
                    std::thread::yield_now();
                }
            };
            wait();
            let gate = probed.install(&vm, answers.clone(), Handlers::new()).unwrap();
            vcpu.set(Mutex::new(gate.vcpu(&vcpu_fd, 0).unwrap())).unwrap();
            wait();
            for _ in 0..50 {
                gate.replace(allows.clone()).unwrap();
                gate.replace(answers.clone()).unwrap();
            }
            wait();
            probed = gate.remove().unwrap();
            stop.store(true, Ordering::Relaxed);
            let seen = thread.join().unwrap();
            counts = [counts[0] + seen[0], counts[1] + seen[1]];
        });
    }
    println!("{} answers of the plan, {} of the kernel", counts[0], counts[1]);
    assert!(counts[0] > 0 && counts[1] > 0);
}

#[test]
fn what_cannot_be_installed_leaves_the_vm_as_it_was() {
    let Some((kvm, probed)) = kvm() else { return };
    let handled = plan(&[(MICROCODE, ReadAction::Handler("nobody".into()))], &[]);
    let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let error = probed
        .install(guest.vm(), handled.clone(), Handlers::new())
        .unwrap_err();
    assert!(matches!(&error, InstallError::UnknownHandler { name } if &**name == "nobody"));
    let seen = guest.run(0, &[read(MICROCODE)], &mut |_| {}).unwrap();
    assert_eq!(seen[0].exit, None);

    let (mut guest, gate, vcpu) = gated(
        &kvm,
        probed,
        Mode::Real,
        plan(&[(MICROCODE, ReadAction::Value(4))], &[]),
        Handlers::new(),
    );
    assert!(matches!(
        gate.replace(handled),
        Err(InstallError::UnknownHandler { .. })
    ));
    let seen = run(&mut guest, &vcpu, &[read(MICROCODE)]);
    assert_eq!(outcomes(&seen), [Outcome::Value(4)]);

    let plan = plan(&[], &[]);
    let null = std::fs::File::open("/dev/null").unwrap();
    let install = |fd: &dyn AsRawFd| probed.install(&fd.as_raw_fd(), plan.clone(), Handlers::new());
    assert!(matches!(install(&null), Err(InstallError::Kernel { .. })));
    assert!(matches!(install(&kvm), Err(InstallError::Kernel { .. })));
    assert!(matches!(install(&-1), Err(InstallError::Io { .. })));
}

#[test]
fn a_host_action_needs_the_msr_device() {
    let Some((kvm, probed)) = kvm() else { return };
    let guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let plan = plan(&[(Msr(0x10), ReadAction::Host)], &[]);
    let installed = probed.install(guest.vm(), plan, Handlers::new());
    match std::fs::File::open("/dev/cpu/0/msr") {
        Ok(_) => {
            let gate = installed.unwrap();
            let mut guest = guest;
            let vcpu = gate.vcpu(guest.vcpu(0).unwrap().fd(), 0).unwrap();
            let seen = run(&mut guest, &vcpu, &[read(Msr(0x10))]);
            assert_eq!(did(&seen[0]), (Did::Host, None));
        }
        Err(_) => {
            let error = installed.unwrap_err();
            assert!(matches!(&error, InstallError::HostMsrs { path, .. } if path.ends_with("cpu/0/msr")));
            assert!(error.to_string().contains("modprobe msr"));
        }
    }
}

#[test]
fn the_capability_takes_three_bits_and_nothing_else() {
    let Some((kvm, _)) = kvm() else { return };
    let guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let enable = |mask: u64, flags: u32| {
        let cap = kvm_bindings::kvm_enable_cap {
            cap: abi::CAP_X86_USER_SPACE_MSR,
            flags,
            args: [mask, u64::MAX, u64::MAX, u64::MAX],
            ..Default::default()
        };
        guest.vm().enable_cap(&cap).map_err(|error| error.errno())
    };
    for bit in 0..64 {
        let expected = if bit < 3 { Ok(()) } else { Err(22) };
        assert_eq!(enable(1 << bit, 0), expected, "bit {bit}");
    }
    for mask in 0..8 {
        assert_eq!(enable(mask, 0), Ok(()));
    }
    assert_eq!(enable(0, 1), Err(22));
}

#[test]
fn the_upper_half_of_rcx_does_not_reach_the_filter() {
    // In long mode the guest's program leaves bits there with each access.
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Value(1))];
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Long, plan(&reads, &[]), Handlers::new());
    let seen = guest
        .run(0, &[read(MICROCODE)], &mut |pending| {
            let regs = pending.fd().get_regs().unwrap();
            assert_eq!(regs.rcx as u32, MICROCODE.0);
            assert_ne!(regs.rcx >> 32, 0);
            assert_eq!(pending.access(), read(MICROCODE));
            pending.dispatch(&vcpu).unwrap();
        })
        .unwrap();
    assert_eq!(outcomes(seen), [Outcome::Value(1)]);
}

#[test]
fn x2apic_registers_and_other_exits_are_not_ours() {
    let Some((kvm, probed)) = kvm() else { return };
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&[], &[]), Handlers::new());
    let fd = guest.vcpu(0).unwrap().fd_mut();
    for exit in 0..64 {
        fd.get_kvm_run().exit_reason = exit;
        let mine = exit == abi::EXIT_X86_RDMSR || exit == abi::EXIT_X86_WRMSR;
        assert_eq!(vcpu.dispatch_vcpu(fd) != Dispatch::NotMine, mine, "exit {exit}");
        assert_eq!(fd.get_kvm_run().exit_reason, if mine { abi::EXIT_INTR } else { exit });
    }
}

#[test]
fn an_event_tells_what_the_guest_gave_or_got() {
    let Some((kvm, probed)) = kvm() else { return };
    let plan = plan(
        &[(MICROCODE, ReadAction::Value(1)), (UNKNOWN, ReadAction::Deny)],
        &[(UNKNOWN, WriteAction::Ignore)],
    );
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan, Handlers::new());
    let mut events = Vec::new();
    guest
        .run(
            0,
            &[read(MICROCODE), read(UNKNOWN), write(UNKNOWN, 9)],
            &mut |pending| {
                let rip = pending.rip();
                let answered = pending.dispatch(&vcpu).unwrap();
                events.push(answered.event(5, 6, Some(rip)));
            },
        )
        .unwrap();
    let told: Vec<_> = events
        .iter()
        .map(|event| (event.op, event.msr, event.value, event.did, event.rule))
        .collect();
    assert_eq!(
        told,
        [
            (Op::Read, MICROCODE, 1, Did::Value, Some(0)),
            (Op::Read, UNKNOWN, 0, Did::Deny, Some(1)),
            (Op::Write, UNKNOWN, 9, Did::Ignore, Some(0)),
        ]
    );
    for event in &events {
        assert_eq!((event.t, event.vm, event.vcpu), (5, 6, 7));
        assert_eq!((event.reason, event.why), (Some(Reason::Filter), None));
        assert!(event.rip.is_some());
    }
}
