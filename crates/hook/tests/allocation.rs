//! The path of an answered exit does not allocate.

#![expect(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use libc::{c_int, c_ulong};
use msrgate_core::{Access, Answer, Did, Log, Msr, MsrRange, Outcome, ReadAction};
use msrgate_hook::{Gate, Handover, Hook, Kernel, Mode, RawExit, Received, Setup, Vcpu, Wanted};
use msrgate_plan::{Decision, DecisionMap, Intervals, Plan};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts what each thread allocates and frees.
struct Counting;

// SAFETY: every call goes on to the system's allocator as it came; the counter neither allocates nor has a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are passed on, and `memory` came from the system's allocator.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const KVM_RUN: c_ulong = 0xae80;
const MICROCODE: Msr = Msr(0x8b);

/// So many exits at each KVM_RUN of the VMM.
const EXITS: u32 = 6000;

static LEFT: AtomicU32 = AtomicU32::new(0);
static ANSWERED: AtomicU64 = AtomicU64::new(0);

struct Endless;

impl Kernel for Endless {
    type Gate = Endless;

    fn ioctl(&self, _: c_int, request: c_ulong, _: usize) -> c_int {
        static NEXT: AtomicU32 = AtomicU32::new(100);
        match request {
            KVM_RUN => {
                LEFT.store(LEFT.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
                0
            }
            _ => NEXT.fetch_add(1, Ordering::Relaxed).cast_signed(),
        }
    }

    fn close(&self, _: c_int) -> c_int {
        0
    }

    fn is_kvm(&self, _: c_int) -> bool {
        true
    }

    fn install(&self, _: c_int, _: c_int, _: Arc<Plan>) -> Result<Endless, String> {
        Ok(Endless)
    }

    fn read(&self, _: u64, _: &mut [u8]) -> bool {
        false
    }

    fn say(&self, line: &str) {
        panic!("{line}");
    }
}

impl Gate for Endless {
    type Vcpu = Endless;

    fn vcpu(&self, _: c_int, _: u32) -> Result<Endless, String> {
        Ok(Endless)
    }

    fn replace(&self, _: Arc<Plan>) -> Result<(), (c_int, String)> {
        Ok(())
    }
}

impl Vcpu for Endless {
    fn exit(&self) -> Option<RawExit> {
        let access = Access::Read { msr: MICROCODE };
        let reason = 4;
        (LEFT.load(Ordering::Relaxed) > 0).then_some(RawExit { access, reason })
    }

    fn passes(&self, _: Access) -> bool {
        false
    }

    fn dispatch(&self) -> Option<Answer> {
        ANSWERED.fetch_add(1, Ordering::Relaxed);
        Some(Answer {
            outcome: Outcome::Value(5),
            did: Did::Value,
            why: None,
            rule: Some(0),
            log: Log::All,
        })
    }

    fn answer(&self, _: Outcome) {
        panic!("nothing is watched");
    }

    fn is_reset(&self, _: c_int) -> bool {
        panic!("nothing is remembered");
    }

    fn forget(&self) {
        panic!("nothing is remembered");
    }

    fn take_back(&self, _: c_int) -> Result<(), c_int> {
        panic!("nothing is watched");
    }
}

#[test]
fn answering_and_writing_down_allocates_nothing_even_where_events_are_lost() {
    let fixed = Decision {
        action: ReadAction::Value(5),
        rule: Some(0),
        log: Log::All,
    };
    let map = DecisionMap {
        reads: Intervals::first_match(Decision::of(ReadAction::Allow), [(MsrRange::single(MICROCODE), fixed)]),
        ..DecisionMap::allow_all()
    };
    let wanted = Wanted {
        mode: Mode::Enforce,
        events: true,
        rip: false,
        by_cpuid: false,
    };
    let handover = Handover::new(&map, wanted).unwrap();
    let variable = handover.variable().unwrap();
    let hook = Hook::new(Endless, move || {
        let received = Received::from_variable(&variable).map_err(|error| error.to_string())?;
        Ok(Setup {
            map: received.map().map_err(|error| error.to_string())?,
            board: Some(received.board().map_err(|error| error.to_string())?),
        })
    });
    let vm = hook.ioctl(3, 0xae01, 0);
    let vcpu = hook.ioctl(vm, 0xae41, 0);
    assert!(vm > 0 && vcpu > 0);

    LEFT.store(EXITS + 1, Ordering::Relaxed);
    let before = ALLOCATIONS.get();
    assert_eq!(hook.ioctl(vcpu, KVM_RUN, 0), 0);
    assert_eq!(ALLOCATIONS.get(), before);
    assert_eq!(ANSWERED.load(Ordering::Relaxed), u64::from(EXITS));

    let mut reader = handover.board().reader();
    let written = reader.drain(&mut |_, _| ()) as u64;
    assert!(reader.missing().events > 0, "the ring was too small for all");
    assert_eq!(written + reader.missing().events, u64::from(EXITS));
}
