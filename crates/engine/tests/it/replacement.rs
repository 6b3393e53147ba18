//! Replacing a filter while vCPUs run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use msrgate_core::{
    ActionTable, Entry, Exit, FaultCause, Filter, FilterRange, FlatFilter, Log, Msr, MsrBackend, MsrRange, Op, Ops,
    Outcome, PassthroughMsr, ReadAction, Reason, Reasons, Verdict, WriteAction,
};
use msrgate_engine::{Completion, Instruction, Intercepts, Path, Step, Vcpu, Vm, Written};

use crate::machine::Machine;

const VCPUS: usize = 4;
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

fn candidates() -> [PassthroughMsr; 1] {
    [PassthroughMsr::new(
        MsrRange::new(Msr(FIRST), Msr(FIRST + COUNT - 1)).unwrap(),
        Ops::BOTH,
    )]
}

#[test]
fn vcpus_see_old_or_new_answers_only_and_nothing_stale_while_a_writer_replaces_the_filter() {
    let vm = Arc::new(Vm::new());
    vm.set_reasons(Reasons::ALL);
    vm.set_filter(filter(0));
    let [begun, ended] = [0; 2].map(|_| Arc::new(AtomicU32::new(0)));
    let vcpus: Vec<_> = (0..VCPUS)
        .map(|i| {
            let (vm, begun, ended) = (vm.clone(), begun.clone(), ended.clone());
            thread::spawn(move || {
                let intercepts = if i % 2 == 0 {
                    Intercepts::vmx(candidates())
                } else {
                    Intercepts::svm(candidates())
                };
                let mut vcpu = Vcpu::new(vm, intercepts);
                let mut machine = Machine::default();
                // Accesses that one filter alone could decide.
                let mut pinned = 0;
                let mut rounds = 0u32;
                while rounds < 1000 || pinned < 300 {
                    rounds += 1;
                    assert!(!allowed(&mut vcpu, ALWAYS_DENIED, &mut machine));
                    assert!(allowed(&mut vcpu, ALWAYS_ALLOWED, &mut machine));
                    // Every filter from `from`, which was in place before the access, to `to`, which was perhaps
                    // begun before it ended, may have decided it.
                    let from = ended.load(Ordering::SeqCst);
                    let msr = (from + COUNT - 2 + rounds % 5) % COUNT;
                    let answer = allowed(&mut vcpu, FIRST + msr, &mut machine);
                    let to = begun.load(Ordering::SeqCst);
                    let window = from..=to;
                    let may_deny = window.clone().any(|n| n % COUNT == msr);
                    let may_allow = window.clone().any(|n| n % COUNT != msr);
                    assert!(if answer { may_allow } else { may_deny }, "{msr} {answer} {window:?}");
                    pinned += u32::from(from == to);
                    // The bitmap belongs to the filter.
                    for op in Op::ALL {
                        let intercepted = vcpu.pick_up().intercepts.intercepts(Msr(FIRST + msr), op);
                        let held = vcpu.filter().unwrap();
                        assert_eq!(intercepted, held.verdict(Msr(FIRST + msr), op) == Verdict::Deny);
                    }
                }
            })
        })
        .collect();
    let mut n = 0;
    while n < 1000 || vcpus.iter().any(|vcpu| !vcpu.is_finished()) {
        n += 1;
        let next = filter(n);
        begun.store(n, Ordering::SeqCst);
        vm.set_filter(next);
        ended.store(n, Ordering::SeqCst);
    }
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
}

#[test]
fn writers_race_and_the_last_one_wins() {
    let vm = Arc::new(Vm::new());
    let writers: Vec<_> = (0..4)
        .map(|i| {
            let vm = vm.clone();
            thread::spawn(move || (0..2000).for_each(|n| vm.set_filter(filter(4 * n + i))))
        })
        .collect();
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    vm.set_filter(filter(5));
    assert_eq!(vcpu.verdict(Msr(FIRST + 5), Op::Read), Verdict::Deny);
    assert_eq!(vcpu.filter(), Some(&filter(5)));
}

#[test]
fn a_vcpu_picks_a_filter_up_once() {
    let vm = Arc::new(Vm::new());
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::vmx(candidates()));
    assert!(vcpu.pick_up().changed, "the first bitmap is news too");
    assert!(!vcpu.pick_up().changed);
    for n in 0..5 {
        vm.set_filter(filter(n));
        assert!(vcpu.pick_up().changed);
        assert!(!vcpu.pick_up().changed);
    }
}

#[test]
fn a_filter_that_execute_picked_up_is_still_reported_by_pick_up() {
    let vm = Arc::new(Vm::new());
    type Call = fn(&mut Vcpu);
    let execute: Call = |vcpu| _ = allowed(vcpu, ALWAYS_ALLOWED, &mut Machine::default());
    let exit: Call = |vcpu| _ = allowed(vcpu, ALWAYS_DENIED, &mut Machine::default());
    let verdict: Call = |vcpu| _ = vcpu.verdict(Msr(FIRST), Op::Read);
    let recalculate: Call = |vcpu| vcpu.recalculate(candidates());
    let calls: [(&str, &[Call]); 5] = [
        ("execute", &[execute]),
        ("execute, which exits", &[exit]),
        ("verdict", &[verdict]),
        ("recalculate", &[recalculate]),
        ("all of them", &[verdict, recalculate, exit, execute]),
    ];
    vm.set_reasons(Reasons::ALL);
    for intercepts in [Intercepts::vmx(candidates()), Intercepts::svm(candidates())] {
        let mut vcpu = Vcpu::new(vm.clone(), intercepts);
        assert!(vcpu.pick_up().changed);
        for (n, (name, call)) in calls.iter().enumerate() {
            vm.set_filter(filter(n as u32));
            call.iter().for_each(|call| call(&mut vcpu));
            let picked_up = vcpu.pick_up();
            assert!(picked_up.changed, "{name}");
            assert!(picked_up.intercepts.intercepts(Msr(FIRST + n as u32), Op::Read));
            assert!(!vcpu.pick_up().changed, "{name}");
        }
        vcpu.recalculate([]);
        assert!(vcpu.pick_up().changed, "other candidates under the same filter");
    }
}

#[test]
fn a_new_vcpu_starts_with_the_filter_of_its_moment() {
    let vm = Arc::new(Vm::new());
    vm.set_filter(filter(3));
    for intercepts in [Intercepts::vmx(candidates()), Intercepts::svm(candidates())] {
        let mut vcpu = Vcpu::new(vm.clone(), intercepts);
        assert_eq!(vcpu.filter(), Some(&filter(3)));
        for msr in 0..COUNT {
            assert_eq!(
                vcpu.pick_up().intercepts.intercepts(Msr(FIRST + msr), Op::Read),
                msr == 3
            );
        }
        assert!(!vcpu.pick_up().changed);
    }
}

#[test]
fn without_a_filter_all_candidates_are_open_and_nothing_else() {
    let vm = Arc::new(Vm::new());
    let mut vcpu = Vcpu::new(vm, Intercepts::vmx(candidates()));
    let intercepts = vcpu.pick_up().intercepts;
    for msr in 0..0x2000 {
        let open = (FIRST..FIRST + COUNT).contains(&msr);
        assert_eq!(intercepts.intercepts(Msr(msr), Op::Write), !open);
    }
}

#[test]
fn new_candidates_are_opened_with_the_current_filter() {
    let vm = Arc::new(Vm::new());
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::vmx([]));
    assert!(vcpu.pick_up().intercepts.intercepts(Msr(FIRST), Op::Read));
    vcpu.recalculate(candidates());
    assert!(!vcpu.pick_up().intercepts.intercepts(Msr(FIRST), Op::Read));
    vm.set_filter(filter(0));
    vcpu.recalculate(candidates());
    assert!(vcpu.pick_up().intercepts.intercepts(Msr(FIRST), Op::Read));
    assert!(!vcpu.pick_up().intercepts.intercepts(Msr(FIRST + 1), Op::Read));
    vcpu.recalculate([]);
    assert!(vcpu.pick_up().intercepts.intercepts(Msr(FIRST + 1), Op::Read));
}

#[test]
fn a_vcpu_without_a_bitmap_intercepts_everything() {
    let mut vcpu = Vcpu::new(Arc::new(Vm::new()), Intercepts::all());
    let intercepts = vcpu.pick_up().intercepts;
    assert!(intercepts.intercepts(Msr(0x10), Op::Read));
    assert!(intercepts.vmx_bitmap().is_none() && intercepts.svm_permission_map().is_none());
}

#[test]
fn a_vcpu_outlives_the_other_owners_of_its_vm() {
    let vm = Arc::new(Vm::new());
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
    vm.set_filter(filter(1));
    drop(vm);
    assert_eq!(vcpu.verdict(Msr(FIRST + 1), Op::Read), Verdict::Deny);
}

/// Filter `n`, a table that answers `n` to what it denies alone, and a mask that has such accesses exit or fault.
fn rules(n: u32) -> (Arc<FlatFilter>, Reasons, Arc<ActionTable>) {
    let reasons = if n.is_multiple_of(2) {
        Reasons::ALL
    } else {
        Reasons::NONE
    };
    let range = MsrRange::single(Msr(FIRST + n % COUNT));
    let entry = Entry::new(range, ReadAction::Value(n.into()), None, Log::None);
    let deny = (ReadAction::Deny, WriteAction::Deny);
    let table = ActionTable::new(vec![entry], vec![], deny.clone(), deny).unwrap();
    (filter(n).into(), reasons, table.into())
}

struct Nobody;

impl MsrBackend for Nobody {
    fn kernel_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::KernelRefused)
    }
    fn kernel_write(&mut self, _: Msr, _: u64) -> Result<(), FaultCause> {
        Err(FaultCause::KernelRefused)
    }
    fn host_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::HostUnreadable)
    }
    fn handler_read(&mut self, _: &str, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::NoHandler)
    }
    fn handler_write(&mut self, _: &str, _: Msr, _: u64) -> Result<(), FaultCause> {
        Err(FaultCause::NoHandler)
    }
}

/// What the vCPU's table says to an exit.
fn answer(vcpu: &Vcpu, exit: Exit) -> Outcome {
    let table = vcpu.table().unwrap();
    table.answer(exit, &mut table.vcpu_state(), &mut Nobody).outcome
}

#[test]
fn the_table_is_that_of_the_filter_that_the_pending_access_met() {
    let vm = Arc::new(Vm::new());
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::vmx(candidates()));
    assert!(vcpu.table().is_none());
    let install = |n| {
        let (filter, reasons, table) = rules(n);
        vm.install(filter, reasons, table);
    };
    let read = |msr: u32| Instruction::Rdmsr { rcx: msr.into() };
    for meanwhile in [
        |_: &mut Vcpu| (),
        |vcpu: &mut Vcpu| vcpu.recalculate(candidates()),
        |vcpu: &mut Vcpu| _ = vcpu.verdict(Msr(0), Op::Read),
        |vcpu: &mut Vcpu| _ = vcpu.pick_up(),
    ] {
        install(2);
        let step = vcpu.execute(read(FIRST + 2), Path::VmExit, &mut Machine::default());
        let Ok(Step::Exit(exit)) = step else { panic!("{step:?}") };
        for n in 3..6 {
            install(n);
            meanwhile(&mut vcpu);
            assert_eq!(answer(&vcpu, exit), Outcome::Value(2), "after {n}");
        }
        vm.set_filter(filter(7));
        meanwhile(&mut vcpu);
        assert_eq!(answer(&vcpu, exit), Outcome::Value(2));
        assert!(vcpu.answer_read(Ok(2)).is_some());
        let _ = vcpu.pick_up();
        assert!(vcpu.table().is_none(), "a filter alone comes without a table");
        assert_eq!(vm.reasons(), rules(5).1, "and leaves the mask as it was");
    }
}

#[test]
fn a_mask_alone_leaves_filter_and_table() {
    let vm = Arc::new(Vm::new());
    let (filter, reasons, table) = rules(3);
    vm.install(filter, reasons, table);
    let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
    let read = Instruction::Rdmsr {
        rcx: (FIRST + 3).into(),
    };
    let fault = Ok(Step::Complete(Completion::Fault));
    assert_eq!(vcpu.execute(read, Path::VmExit, &mut Machine::default()), fault);
    vm.set_reasons(Reasons::ALL);
    let step = vcpu.execute(read, Path::VmExit, &mut Machine::default());
    let Ok(Step::Exit(exit)) = step else { panic!("{step:?}") };
    assert_eq!(answer(&vcpu, exit), Outcome::Value(3));
}

#[test]
fn an_access_meets_filter_mask_and_table_of_one_installation_while_a_writer_replaces_them() {
    const ACCESSES: u32 = 20_000;
    let all: Vec<_> = (0..COUNT).map(rules).collect();
    let vm = Arc::new(Vm::new());
    let install = |n: usize| {
        let (filter, reasons, table) = all[n % all.len()].clone();
        vm.install(filter, reasons, table);
    };
    install(0);
    let vcpu = || {
        let mut vcpu = Vcpu::new(vm.clone(), Intercepts::vmx(candidates()));
        let mut machine = Machine::default();
        let (mut asked, mut exits, mut faults) = (0u32, 0u32, 0u32);
        while exits < ACCESSES / 100 || faults < ACCESSES / 100 || asked < ACCESSES {
            let msr = asked % COUNT;
            asked += 1;
            machine.reads.clear();
            let rdmsr = Instruction::Rdmsr {
                rcx: (FIRST + msr).into(),
            };
            match vcpu.execute(rdmsr, Path::VmExit, &mut machine).unwrap() {
                Step::Complete(Completion::Done { .. }) => {}
                // One filter alone denies the MSR, and its mask says which of the two.
                Step::Complete(Completion::Fault) => {
                    assert_eq!(msr % 2, 1);
                    faults += 1;
                }
                Step::Exit(exit) => {
                    assert_eq!(msr % 2, 0);
                    exits += 1;
                    if exits.is_multiple_of(2) {
                        let _ = vcpu.pick_up();
                    }
                    assert_eq!(answer(&vcpu, exit), Outcome::Value(msr.into()));
                    let done = vcpu.answer_read(Ok(msr.into()));
                    assert!(matches!(
                        done,
                        Some(Completion::Done {
                            written: Written::RaxRdx { .. },
                            ..
                        })
                    ));
                }
                other => panic!("{other:?}"),
            }
        }
    };
    thread::scope(|scope| {
        let vcpus: Vec<_> = (0..VCPUS).map(|_| scope.spawn(vcpu)).collect();
        (1..)
            .take_while(|_| vcpus.iter().any(|vcpu| !vcpu.is_finished()))
            .for_each(install);
    });
}
