//! What VMs and accesses take of the allocator, counted: VMs of one policy share its filter, an access takes nothing.

#![expect(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use msrgate_core::{
    ActionTable, Filter, FilterRange, FlatFilter, Msr, MsrRange, Op, Ops, PassthroughMsr, ReadAction, Reasons, Verdict,
    WriteAction,
};
use msrgate_engine::{Instruction, Intercepts, Msrs, Path, Refusal, Step, Vcpu, Vm};

thread_local! {
    static BYTES: Cell<usize> = const { Cell::new(0) };
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

/// Counts the bytes that a thread has, and its calls.
struct Counting;

// SAFETY: every call goes on to the system's allocator as it came; the counters neither allocate nor have a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.set(BYTES.get().wrapping_add(layout.size()));
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        BYTES.set(BYTES.get().wrapping_sub(layout.size()));
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promises are passed on, and `memory` came from the system's allocator.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn bytes_of<T>(make: impl FnOnce() -> T) -> (T, usize) {
    let before = BYTES.get();
    let made = make();
    (made, BYTES.get().wrapping_sub(before))
}

/// 16 ranges of 12288 MSRs: all that a filter can hold.
fn filter() -> Filter {
    let ranges = (0..16).map(|slot| FilterRange::new(0x1000_0000 * slot, 12288, Ops::BOTH, [1 << slot; 192]).unwrap());
    Filter::new(Verdict::Deny, ranges.collect::<Vec<_>>()).unwrap()
}

fn vm(filter: &Arc<FlatFilter>) -> (Arc<Vm>, Vcpu) {
    let vm = Arc::new(Vm::new());
    vm.set_filter(Arc::clone(filter));
    let vcpu = Vcpu::new(Arc::clone(&vm), Intercepts::all());
    (vm, vcpu)
}

#[test]
fn ten_thousand_vms_take_one_filter() {
    const VMS: usize = 10_000;
    let (filter, once) = bytes_of(|| Arc::<FlatFilter>::from(filter()));
    let (mut vms, all) = bytes_of(|| (0..VMS).map(|_| vm(&filter)).collect::<Vec<_>>());
    let each = all / VMS;
    println!("{once} bytes for the filter, {each} for each VM with a vCPU");
    assert!(once > 50_000, "{once}");
    assert!(each < 1024, "{each}");
    for (_, vcpu) in &mut vms {
        assert_eq!(vcpu.verdict(Msr(0x1000_0001), Op::Read), Verdict::Allow);
        assert_eq!(vcpu.verdict(Msr(0x1000_0002), Op::Read), Verdict::Deny);
    }
}

#[test]
fn a_new_policy_for_all_vms_leaves_nothing_of_the_one_before() {
    const VMS: usize = 100;
    let first: Arc<FlatFilter> = filter().into();
    let (mut vms, _) = bytes_of(|| (0..VMS).map(|_| vm(&first)).collect::<Vec<_>>());
    let gone = Arc::downgrade(&first);
    drop(first);
    let mut sizes = Vec::new();
    for _ in 0..5 {
        let (next, _) = bytes_of(|| Arc::<FlatFilter>::from(filter()));
        for (vm, vcpu) in &mut vms {
            vm.set_filter(Arc::clone(&next));
            assert_eq!(vcpu.verdict(Msr(0), Op::Write), Verdict::Allow);
        }
        sizes.push(BYTES.get());
    }
    assert!(gone.upgrade().is_none());
    let (last, before) = (sizes[4], sizes[3]);
    assert!(last.abs_diff(before) < 4096, "{sizes:?}");
}

#[test]
fn a_vcpu_neither_allocates_nor_frees_while_a_writer_replaces_what_it_is_under() {
    struct NoMsrs;
    impl Msrs for NoMsrs {
        fn read(&mut self, _: Msr) -> Result<u64, Refusal> {
            Err(Refusal::Unknown)
        }
        fn write(&mut self, _: Msr, _: u64) -> Result<(), Refusal> {
            Err(Refusal::Unknown)
        }
    }
    let vm = Arc::new(Vm::new());
    let install = || {
        let deny = (ReadAction::Deny, WriteAction::Deny);
        let table = ActionTable::new(vec![], vec![], deny.clone(), deny).unwrap();
        vm.install(filter(), Reasons::ALL, table);
    };
    install();
    let candidates = [PassthroughMsr::new(MsrRange::single(Msr(0x1000_0002)), Ops::BOTH)];
    let mut vcpu = Vcpu::new(Arc::clone(&vm), Intercepts::svm(candidates));
    for _ in 0..20 {
        // Each replaces what the vCPU has, on a thread of its own so that this one's calls are the vCPU's.
        let replaced = || std::thread::scope(|scope| scope.spawn(install).join().unwrap());
        let calls = |work: &mut dyn FnMut()| {
            let before = CALLS.get();
            work();
            CALLS.get() - before
        };
        replaced();
        let denied = Instruction::Rdmsr { rcx: 0x1000_0002 };
        assert_eq!(
            calls(&mut || {
                let step = vcpu.execute(denied, Path::VmExit, &mut NoMsrs);
                assert!(matches!(step, Ok(Step::Exit(_))));
            }),
            0
        );
        for _ in 0..2 {
            replaced();
            assert_eq!(calls(&mut || assert!(vcpu.pick_up().changed)), 0);
        }
        assert_eq!(
            calls(&mut || {
                assert!(vcpu.table().is_some());
                vcpu.complete(0, 0);
            }),
            0
        );
    }
}
