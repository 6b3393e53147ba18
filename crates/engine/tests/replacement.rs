//! Replacing a filter while vCPUs run.
#![cfg(not(loom))]

mod machine;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;

use msrgate_core::{Candidate, Filter, FilterRange, Msr, MsrRange, Op, Ops, Reason, Reasons, Verdict};
use msrgate_engine::{Completion, Instruction, Intercepts, Path, PickUp, Step, Vcpu, Vm};

use machine::Machine;

const VCPUS: usize = 4;
const REPLACEMENTS: u32 = 4000;
/// After so many replacements the writer waits until each vCPU has made so many more accesses by one filter.
const BETWEEN: u32 = 100;
const PINNED: u64 = 20;
/// Filter `n` denies `FIRST + n % COUNT` and allows the rest of these.
const FIRST: u32 = 0x1000;
const COUNT: u32 = 64;
/// Denied by every filter, each time through another range.
const ALWAYS_DENIED: u32 = 0x17;
/// Allowed by every filter, each time through another range or the default.
const ALWAYS_ALLOWED: u32 = 0x18;

fn filter(n: u32) -> Filter {
    let numbered = FilterRange::new(FIRST, COUNT, Ops::BOTH, [!(1u64 << (n % COUNT))]).unwrap();
    let constant = FilterRange::new(ALWAYS_DENIED, 2, Ops::BOTH, [0b10]).unwrap();
    // Decides neither constant; moves the others to another slot.
    let filler = |i: u32| FilterRange::new(0x4000_0000 + i, 12288, Ops::BOTH, vec![u64::from(n); 192]).unwrap();
    let mut ranges: Vec<_> = (0..n % 7).map(filler).collect();
    if n.is_multiple_of(2) {
        ranges.push(constant);
        ranges.push(numbered);
        Filter::new(Verdict::Allow, ranges).unwrap()
    } else {
        ranges.push(numbered);
        ranges.extend((0..n % 5).map(filler));
        ranges.push(FilterRange::new(ALWAYS_ALLOWED, 1, Ops::BOTH, [1]).unwrap());
        Filter::new(Verdict::Deny, ranges).unwrap()
    }
}

/// Whether an RDMSR is allowed, by what the vCPU does with it.
fn allowed(vcpu: &mut Vcpu, msr: u32, machine: &mut Machine) -> bool {
    machine.reads.clear();
    match vcpu.execute(Instruction::Rdmsr { rcx: msr.into() }, Path::VmExit, machine) {
        Ok(Step::Exit(exit)) => {
            assert_eq!(exit.reason, Reason::Filter);
            let _ = vcpu.complete(0, 0);
            false
        }
        Ok(Step::Complete(Completion::Done { .. })) => true,
        other => panic!("{other:?}"),
    }
}

fn candidates() -> [Candidate; 1] {
    [Candidate::new(
        MsrRange::new(Msr(FIRST), Msr(FIRST + COUNT - 1)).unwrap(),
        Ops::BOTH,
    )]
}

#[test]
fn vcpus_see_old_or_new_answers_only_and_nothing_stale_while_a_writer_replaces_the_filter() {
    let vm = Arc::new(Vm::new());
    vm.set_reasons(Reasons::ALL);
    vm.install(filter(0));
    let [begun, ended] = [0; 2].map(|_| Arc::new(AtomicU32::new(0)));
    let stop = Arc::new(AtomicBool::new(false));
    // What each vCPU accessed while no filter was replaced.
    let pinned: [_; VCPUS] = [0; VCPUS].map(|_| Arc::new(AtomicU64::new(0)));
    let vcpus: Vec<_> = pinned
        .iter()
        .enumerate()
        .map(|(i, pinned)| {
            let (vm, begun, ended) = (vm.clone(), begun.clone(), ended.clone());
            let (stop, pinned) = (stop.clone(), pinned.clone());
            thread::spawn(move || {
                let intercepts = if i % 2 == 0 {
                    Intercepts::vmx(candidates())
                } else {
                    Intercepts::svm(candidates())
                };
                let mut vcpu = Vcpu::new(vm, intercepts);
                let mut machine = Machine::default();
                let mut rounds = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    rounds += 1;
                    assert!(!allowed(&mut vcpu, ALWAYS_DENIED, &mut machine));
                    assert!(allowed(&mut vcpu, ALWAYS_ALLOWED, &mut machine));
                    // Every filter from `from`, which was in place before the access, to `to`, which was perhaps
                    // begun before it ended, may have decided it.
                    let from = ended.load(Ordering::SeqCst);
                    let msr = (from + COUNT - 2 + rounds as u32 % 5) % COUNT;
                    let answer = allowed(&mut vcpu, FIRST + msr, &mut machine);
                    let to = begun.load(Ordering::SeqCst);
                    let window = from..=to;
                    let may_deny = window.clone().any(|n| n % COUNT == msr);
                    let may_allow = window.clone().any(|n| n % COUNT != msr);
                    assert!(if answer { may_allow } else { may_deny }, "{msr} {answer} {window:?}");
                    pinned.fetch_add(u64::from(from == to), Ordering::Relaxed);
                    // The bitmap belongs to the filter that decided.
                    let held = vcpu.filter().unwrap();
                    for op in Op::ALL {
                        let expected = held.verdict(Msr(FIRST + msr), op) == Verdict::Deny;
                        assert_eq!(vcpu.intercepts().intercepts(Msr(FIRST + msr), op), expected);
                    }
                }
                rounds
            })
        })
        .collect();
    for n in 1..=REPLACEMENTS {
        let next = filter(n);
        begun.store(n, Ordering::SeqCst);
        vm.install(next);
        ended.store(n, Ordering::SeqCst);
        if !n.is_multiple_of(BETWEEN) {
            continue;
        }
        for (vcpu, pinned) in vcpus.iter().zip(&pinned) {
            let before = pinned.load(Ordering::Relaxed);
            while pinned.load(Ordering::Relaxed) < before + PINNED && !vcpu.is_finished() {
                thread::yield_now();
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    let rounds: u64 = vcpus.into_iter().map(|vcpu| vcpu.join().unwrap()).sum();
    let pinned: u64 = pinned.iter().map(|pinned| pinned.load(Ordering::Relaxed)).sum();
    println!("{rounds} rounds, {REPLACEMENTS} replacements, {pinned} accesses that one filter alone could decide");
}

#[test]
fn writers_race_and_the_last_one_wins() {
    let vm = Arc::new(Vm::new());
    let writers: Vec<_> = (0..4)
        .map(|i| {
            let vm = vm.clone();
            thread::spawn(move || (0..2000).for_each(|n| vm.install(filter(4 * n + i))))
        })
        .collect();
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    vm.install(filter(5));
    assert_eq!(vcpu.verdict(Msr(FIRST + 5), Op::Read), Verdict::Deny);
    assert_eq!(vcpu.filter(), Some(&filter(5)));
}

#[test]
fn a_vcpu_picks_a_filter_up_once() {
    let vm = Arc::new(Vm::new());
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::vmx(candidates()));
    assert_eq!(vcpu.pick_up(), PickUp::Unchanged);
    for n in 0..5 {
        vm.install(filter(n));
        assert_eq!(vcpu.pick_up(), PickUp::Changed);
        assert_eq!(vcpu.pick_up(), PickUp::Unchanged);
    }
}

#[test]
fn a_new_vcpu_starts_with_the_filter_of_its_moment() {
    let vm = Arc::new(Vm::new());
    vm.install(filter(3));
    for intercepts in [Intercepts::vmx(candidates()), Intercepts::svm(candidates())] {
        let mut vcpu = Vcpu::new(vm.clone(), intercepts);
        assert_eq!(vcpu.filter(), Some(&filter(3)));
        for msr in 0..COUNT {
            assert_eq!(vcpu.intercepts().intercepts(Msr(FIRST + msr), Op::Read), msr == 3);
        }
        assert_eq!(vcpu.pick_up(), PickUp::Unchanged);
    }
}

#[test]
fn without_a_filter_all_candidates_are_open_and_nothing_else() {
    let vm = Arc::new(Vm::new());
    let vcpu = Vcpu::new(vm, Intercepts::vmx(candidates()));
    for msr in 0..0x2000 {
        let open = (FIRST..FIRST + COUNT).contains(&msr);
        assert_eq!(vcpu.intercepts().intercepts(Msr(msr), Op::Write), !open);
    }
}

#[test]
fn each_vcpu_recomputes_its_own_bitmap_when_it_picks_a_filter_up() {
    let vm = Arc::new(Vm::new());
    let [mut first, mut second] = [0; 2].map(|_| Vcpu::new(vm.clone(), Intercepts::svm(candidates())));
    let intercepted = |vcpu: &Vcpu| vcpu.intercepts().intercepts(Msr(FIRST + 3), Op::Read);
    vm.install(filter(3));
    assert!(!intercepted(&first), "nothing changes before it is picked up");
    let _ = first.pick_up();
    assert!(intercepted(&first));
    assert!(!intercepted(&second));
    assert_eq!(
        second.verdict(Msr(FIRST + 3), Op::Read),
        Verdict::Deny,
        "an access picks it up too"
    );
    assert!(intercepted(&second));
    vm.install(filter(4));
    let _ = first.pick_up();
    assert!(
        !intercepted(&first),
        "an MSR that is allowed again is passed through again"
    );
}

#[test]
fn new_candidates_are_opened_with_the_current_filter() {
    let vm = Arc::new(Vm::new());
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::vmx([]));
    assert!(vcpu.intercepts().intercepts(Msr(FIRST), Op::Read));
    vcpu.recalculate(candidates());
    assert!(!vcpu.intercepts().intercepts(Msr(FIRST), Op::Read));
    vm.install(filter(0));
    vcpu.recalculate(candidates());
    assert!(vcpu.intercepts().intercepts(Msr(FIRST), Op::Read));
    assert!(!vcpu.intercepts().intercepts(Msr(FIRST + 1), Op::Read));
    vcpu.recalculate([]);
    assert!(vcpu.intercepts().intercepts(Msr(FIRST + 1), Op::Read));
}

#[test]
fn a_vcpu_without_a_bitmap_intercepts_everything() {
    let vcpu = Vcpu::new(Arc::new(Vm::new()), Intercepts::all());
    assert!(vcpu.intercepts().intercepts(Msr(0x10), Op::Read));
    assert!(vcpu.intercepts().vmx_bitmap().is_none() && vcpu.intercepts().svm_permission_map().is_none());
}

#[test]
fn a_vcpu_outlives_the_other_owners_of_its_vm() {
    let vm = Arc::new(Vm::new());
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
    vm.install(filter(1));
    drop(vm);
    assert_eq!(vcpu.verdict(Msr(FIRST + 1), Op::Read), Verdict::Deny);
}
