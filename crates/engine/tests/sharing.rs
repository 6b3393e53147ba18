//! VMs of one policy share its filter: what each takes is counted, not timed.

#![expect(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use msrgate_core::{Filter, FilterRange, Lookup, Msr, Op, Ops, Verdict};
use msrgate_engine::{Intercepts, Vcpu, Vm};

thread_local! {
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

/// Counts the bytes that a thread has.
struct Counting;

// SAFETY: every call goes on to the system's allocator as it came; the counter neither allocates nor has a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.set(BYTES.get().wrapping_add(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        BYTES.set(BYTES.get().wrapping_sub(layout.size()));
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

fn vm(filter: &Arc<Lookup>) -> (Arc<Vm>, Vcpu) {
    let vm = Arc::new(Vm::new());
    vm.install(Arc::clone(filter));
    let vcpu = Vcpu::new(Arc::clone(&vm), Intercepts::all());
    (vm, vcpu)
}

#[test]
fn ten_thousand_vms_take_one_filter() {
    const VMS: usize = 10_000;
    let (filter, once) = bytes_of(|| Arc::<Lookup>::from(filter()));
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
    let first: Arc<Lookup> = filter().into();
    let (mut vms, _) = bytes_of(|| (0..VMS).map(|_| vm(&first)).collect::<Vec<_>>());
    let gone = Arc::downgrade(&first);
    drop(first);
    let mut sizes = Vec::new();
    for _ in 0..5 {
        let (next, _) = bytes_of(|| Arc::<Lookup>::from(filter()));
        for (vm, vcpu) in &mut vms {
            vm.install(Arc::clone(&next));
            assert_eq!(vcpu.verdict(Msr(0), Op::Write), Verdict::Allow);
        }
        sizes.push(BYTES.get());
    }
    assert!(gone.upgrade().is_none());
    let (last, before) = (sizes[4], sizes[3]);
    assert!(last.abs_diff(before) < 4096, "{sizes:?}");
}
