//! Every order in which a few replacements and accesses can interleave.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p msrgate-engine --release --test loom`
#![cfg(loom)]

use std::sync::Arc;

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;
use msrgate_core::{ActionTable, Filter, FilterRange, Msr, Op, Ops, ReadAction, Reasons, Verdict, WriteAction};
use msrgate_engine::{Errno, Instruction, Intercepts, Msrs, Path, Refusal, Step, Vcpu, Vm};

/// Denies MSR `n` and `0x100`, allows every other.
fn filter(n: u32) -> Filter {
    let mut ranges = vec![FilterRange::new(n, 1, Ops::BOTH, [0]).unwrap()];
    ranges.push(FilterRange::new(0x100, 1, Ops::BOTH, [0]).unwrap());
    if n % 2 == 1 {
        ranges.reverse();
    }
    Filter::new(Verdict::Allow, ranges).unwrap()
}

/// Which of the filters decides: the MSR, of 0 to 3, that is denied at one look.
fn held(vcpu: &mut Vcpu) -> u32 {
    assert_eq!(vcpu.verdict(Msr(0x100), Op::Read), Verdict::Deny);
    assert_eq!(vcpu.verdict(Msr(0x101), Op::Read), Verdict::Allow);
    held_filter(vcpu)
}

/// The same of the filter that the vCPU has.
fn held_filter(vcpu: &Vcpu) -> u32 {
    let filter = vcpu.filter().unwrap();
    let denied: Vec<u32> = (0..4)
        .filter(|n| filter.verdict(Msr(*n), Op::Read) == Verdict::Deny)
        .collect();
    assert_eq!(denied.len(), 1, "no whole filter");
    denied[0]
}

fn vm() -> Arc<Vm> {
    let vm = Arc::new(Vm::new());
    vm.set_filter(filter(0));
    vm
}

#[test]
fn a_filter_that_was_installed_before_an_access_decides_it() {
    loom::model(|| {
        let vm = vm();
        let installed = Arc::new(AtomicU32::new(0));
        let writer = {
            let (vm, installed) = (vm.clone(), installed.clone());
            thread::spawn(move || {
                for n in 1..=2 {
                    vm.set_filter(filter(n));
                    installed.store(n, Ordering::Release);
                }
            })
        };
        let mut vcpu = Vcpu::new(vm, Intercepts::all());
        let floor = installed.load(Ordering::Acquire);
        assert!(held(&mut vcpu) >= floor, "stale");
        writer.join().unwrap();
        assert_eq!(held(&mut vcpu), 2);
    });
}

#[test]
fn a_vcpu_never_goes_back_to_an_older_filter() {
    loom::model(|| {
        let vm = vm();
        let writer = {
            let vm = vm.clone();
            thread::spawn(move || (1..=3).for_each(|n| vm.set_filter(filter(n))))
        };
        let mut vcpu = Vcpu::new(vm, Intercepts::all());
        let first = held(&mut vcpu);
        let second = held(&mut vcpu);
        assert!(first <= second, "{first} then {second}");
        writer.join().unwrap();
    });
}

#[test]
fn no_access_sees_an_older_filter_than_an_access_that_ended_before() {
    // Three threads: bounded, or it takes hours. The one order that could fail needs two preemptions.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let vm = vm();
        let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
        let seen = Arc::new(AtomicU32::new(0));
        let writer = {
            let vm = vm.clone();
            thread::spawn(move || (1..=2).for_each(|n| vm.set_filter(filter(n))))
        };
        let other = {
            let seen = seen.clone();
            thread::spawn(move || {
                let filter = held(&mut Vcpu::new(vm, Intercepts::all()));
                seen.store(filter, Ordering::Release);
            })
        };
        let floor = seen.load(Ordering::Acquire);
        assert!(held(&mut vcpu) >= floor, "older than {floor}");
        writer.join().unwrap();
        other.join().unwrap();
    });
}

#[test]
fn of_two_writers_one_is_last_for_every_vcpu() {
    loom::model(|| {
        let vm = vm();
        let writer = {
            let vm = vm.clone();
            thread::spawn(move || vm.set_filter(filter(1)))
        };
        vm.set_filter(filter(2));
        let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
        let early = held(&mut vcpu);
        assert!(early == 1 || early == 2);
        writer.join().unwrap();
        let last = held(&mut vcpu);
        assert_eq!(held(&mut Vcpu::new(vm, Intercepts::all())), last);
        assert!(early == 2 || last == 1, "{early} then {last}");
    });
}

/// Answers what the kernel does not know by `n`: what tells one table from another.
fn table(n: u32) -> ActionTable {
    let unknown = (ReadAction::Value(n.into()), WriteAction::Deny);
    ActionTable::new(vec![], vec![], unknown.clone(), unknown).unwrap()
}

struct NoMsrs;

impl Msrs for NoMsrs {
    fn read(&mut self, _: Msr) -> Result<u64, Refusal> {
        Err(Refusal::Error(Errno::Eio))
    }
    fn write(&mut self, _: Msr, _: u64) -> Result<(), Refusal> {
        Err(Refusal::Error(Errno::Eio))
    }
}

#[test]
fn an_access_meets_filter_mask_and_table_of_one_installation() {
    loom::model(|| {
        let vm = Arc::new(Vm::new());
        // What filter 0 denies exits, what filter 1 denies faults.
        vm.install(filter(0), Reasons::ALL, table(0));
        let writer = {
            let vm = vm.clone();
            thread::spawn(move || {
                vm.install(filter(1), Reasons::NONE, table(1));
                vm.install(filter(2), Reasons::ALL, table(2));
            })
        };
        let mut vcpu = Vcpu::new(vm, Intercepts::all());
        let both = Instruction::Rdmsr { rcx: 0x100 };
        let exits = matches!(vcpu.execute(both, Path::VmExit, &mut NoMsrs), Ok(Step::Exit(_)));
        let met = held_filter(&vcpu);
        assert_eq!(exits, met != 1, "the mask of another filter");
        // Whatever is picked up while the access waits, its own table answers it.
        let _ = vcpu.pick_up();
        let expected = if exits { met } else { held_filter(&vcpu) };
        assert_eq!(vcpu.table().unwrap().unknown().0, ReadAction::Value(expected.into()));
        vcpu.complete(0, 0);
        assert_eq!(
            vcpu.table().unwrap().unknown().0,
            ReadAction::Value(held_filter(&vcpu).into())
        );
        writer.join().unwrap();
    });
}
