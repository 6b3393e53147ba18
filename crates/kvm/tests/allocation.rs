//! The answer path does not allocate, and VMs of one plan share it. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1.

#![expect(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use kvm_ioctls::Kvm;
use msrgate_core::{Access, Log, Msr, MsrRange, OnLockedBits, ReadAction, WriteAction};
use msrgate_guest::{Guest, Mode, Options};
use msrgate_kvm::{Fault, Handler, Handlers, VcpuId, probe};
use msrgate_plan::{Decision, DecisionMap, Intervals, Plan};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

/// Counts what each thread allocates, and what it has.
struct Counting;

// SAFETY: every call goes on to the system's allocator as it came; the counters neither allocate nor have a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
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

struct Zero;

impl Handler for Zero {
    fn read(&self, _vcpu: VcpuId, _msr: Msr) -> Result<u64, Fault> {
        Ok(0)
    }

    fn write(&self, _vcpu: VcpuId, _msr: Msr, _value: u64) -> Result<(), Fault> {
        Err(Fault)
    }
}

fn rules<A: Clone + Eq>(allow: A, actions: &[A]) -> Intervals<Decision<A>> {
    let rules = actions.iter().zip(0x174..);
    Intervals::first_match(
        Decision::of(allow),
        rules.map(|(action, msr)| {
            let decision = Decision::of(action.clone()).by(0).logged(Log::All);
            (MsrRange::single(Msr(msr)), decision)
        }),
    )
}

fn kvm() -> Option<Kvm> {
    let kvm = Kvm::new().ok();
    if kvm.is_none() {
        let required = std::env::var("MSRGATE_LANE_REQUIRE").is_ok_and(|value| value == "1");
        assert!(!required, "/dev/kvm does not open");
        println!("skipped: /dev/kvm does not open");
    }
    kvm
}

#[test]
fn a_gate_takes_no_more_for_a_larger_plan() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let probed = probe(&kvm).unwrap();
    let mut sizes = [1, 4096].map(|rules: u32| {
        let reads = (0..rules).map(|rule| {
            let value = Decision::of(ReadAction::Value(rule.into()));
            (MsrRange::single(Msr(0x4000_0000 + rule)), value)
        });
        let map = DecisionMap::allow_all().with_reads(Intervals::first_match(Decision::of(ReadAction::Allow), reads));
        let plan = Arc::new(Plan::compile(&map).unwrap());
        let before = BYTES.get();
        let gate = probed.install(guest.vm(), Arc::clone(&plan), Handlers::new()).unwrap();
        let vcpu = gate.vcpu(guest.vcpu(0).unwrap().fd(), 0).unwrap();
        let taken = BYTES.get().wrapping_sub(before);
        drop((vcpu, gate));
        taken
    });
    println!("{sizes:?} bytes for a gate and a vCPU's gate");
    sizes.sort_unstable();
    let [least, most] = sizes;
    assert_eq!(least, most);
    assert!(most < 2048, "{most}");
}

#[test]
fn no_action_allocates_when_it_answers() {
    let Some(kvm) = kvm() else { return };
    let reads = [
        ReadAction::Deny,
        ReadAction::Value(1),
        ReadAction::Mask { keep: 1, set: 2 },
        ReadAction::Shadow(3),
        ReadAction::Handler("zero".into()),
    ];
    let writes = [
        WriteAction::Once,
        WriteAction::Only([1].into()),
        WriteAction::Mask {
            may_change: 1,
            otherwise: OnLockedBits::Drop,
        },
        WriteAction::Shadow,
        WriteAction::Handler("zero".into()),
        WriteAction::Ignore,
        WriteAction::Deny,
    ];
    let map = DecisionMap::new(rules(ReadAction::Allow, &reads), rules(WriteAction::Allow, &writes))
        .with_unknown((ReadAction::Shadow(0), WriteAction::Shadow));
    let plan = Arc::new(Plan::compile(&map).unwrap());
    let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let handlers = Handlers::new().with("zero", Zero);
    let gate = probe(&kvm).unwrap().install(guest.vm(), plan, handlers).unwrap();
    let vcpu = gate.vcpu(guest.vcpu(0).unwrap().fd(), 0).unwrap();
    let named = (0x174..0x17b).map(Msr);
    let accesses: Vec<Access> = named
        .chain([Msr(0xdead_beef)])
        .flat_map(|msr| [Access::Read { msr }, Access::Write { msr, value: 1 }])
        .collect();
    let mut answered = 0;
    guest
        .run(0, &accesses.repeat(3), &mut |pending| {
            let before = ALLOCATIONS.get();
            pending.dispatch(&vcpu).unwrap();
            assert_eq!(ALLOCATIONS.get(), before, "{:?}", pending.access());
            answered += 1;
        })
        .unwrap();
    // All but the reads of 0x179 and 0x17a, which are the kernel's.
    assert!(answered >= 3 * 14, "{answered}");
}
