//! Filters that are replaced while vCPUs run.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use msrgate_core::{Access, Fault, Filter, FilterRange, Msr, Op, Ops, Outcome, Verdict};
use msrgate_guest::raw::{Arena, Request};
use msrgate_guest::{Mode, Options};

use super::hypervisor::{
    Batch, Calls, Descriptor, FILTER, Hypervisor, KERNEL_GS_BASE, SYSENTER_CS, SYSENTER_ESP, denying, everywhere,
};
use super::kernel::Kernel;
use super::live::Live;
use super::raw_filter::{placed, setting};

/// Denied by both filters, in one by a range of its own and in the other by a bit of a long one.
const ALWAYS_DENIED: Msr = Msr(0x1000_0100);
/// Denied by neither. Passed through where the hardware can.
const NEVER_DENIED: Msr = SYSENTER_CS;
/// Denied by the filters of even numbers, and passed through else.
const DENIED_BY_EVEN: Msr = KERNEL_GS_BASE;
/// Denied by those of odd ones.
const DENIED_BY_ODD: Msr = SYSENTER_ESP;
/// Two that no KVM knows, which so are intercepted whatever the filter: denied by even filters, and by odd ones.
const UNKNOWN_BY_EVEN: Msr = Msr(0x2000_0000);
const UNKNOWN_BY_ODD: Msr = Msr(0x2000_0001);
/// What the registers hold.
const HELD: u64 = 0x5000;
/// What user space answers.
const ANSWERED: u64 = 0x99;

fn filters() -> [Filter; 2] {
    let range = |base: Msr, nmsrs: u32, bits: u64| {
        let words = vec![bits; nmsrs.div_ceil(64) as usize];
        FilterRange::new(base.0, nmsrs, Ops::READ, words).unwrap()
    };
    let even = [
        range(ALWAYS_DENIED, 1, 0),
        range(DENIED_BY_EVEN, 1, 0),
        range(UNKNOWN_BY_EVEN, 1, 0),
    ];
    let odd = [
        range(UNKNOWN_BY_EVEN, 2, 0b01),
        range(NEVER_DENIED, 1, 1),
        range(DENIED_BY_ODD, 1, 0),
        range(Msr(0x4000_0000), 12288, u64::MAX),
        range(Msr(ALWAYS_DENIED.0 - 0x100), 12288, 0),
    ];
    [even.to_vec(), odd.to_vec()].map(|ranges| Filter::new(Verdict::Allow, ranges).unwrap())
}

fn accesses() -> Vec<Access> {
    let msrs = [
        ALWAYS_DENIED,
        DENIED_BY_EVEN,
        UNKNOWN_BY_EVEN,
        NEVER_DENIED,
        DENIED_BY_ODD,
        UNKNOWN_BY_ODD,
    ];
    msrs.map(|msr| Access::Read { msr }).repeat(10)
}

/// Filters are numbered as they are installed, from 0.
#[derive(Default)]
struct Load {
    started: AtomicU64,
    done: AtomicU64,
    /// By vCPU.
    batches: Vec<AtomicU64>,
    over: AtomicBool,
}

/// What a vCPU saw.
#[derive(Clone, Copy, Default, Debug)]
struct Counts {
    batches: u64,
    /// Batches over which no filter was replaced.
    quiet: u64,
    by_even: u64,
    by_odd: u64,
    /// Accesses that were passed through by older bits than those of the filter that decided one before.
    slipped: u64,
}

/// Ends the load where a vCPU ends it, be it by a panic.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Load {
    fn of(vcpus: usize) -> Load {
        Load {
            batches: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
            ..Load::default()
        }
    }

    /// Replaces the filter `swaps` times.
    fn swap(&self, calls: &dyn Calls, swaps: u64) {
        let arguments: [(Arena, u64); 2] = filters().map(|filter| placed(&setting(&filter)));
        for number in 1..=swaps {
            let (arena, argp) = &arguments[(number % 2) as usize];
            self.started.store(number, Ordering::SeqCst);
            calls.call(Descriptor::Vm, Request::SetMsrFilter, *argp, arena).unwrap();
            self.done.store(number, Ordering::SeqCst);
            // By turns behind an even one and an odd one.
            if number % 49 == 0 {
                // A pause, so that each vCPU has quiet batches.
                for batches in &self.batches {
                    let before = batches.load(Ordering::SeqCst);
                    while batches.load(Ordering::SeqCst) < before + 3 {
                        if self.over.load(Ordering::SeqCst) {
                            return;
                        }
                        thread::yield_now();
                    }
                }
            }
        }
        self.over.store(true, Ordering::SeqCst);
    }

    /// Has a vCPU make batches until the last filter is there, and judges each.
    fn vcpu(&self, batches: &AtomicU64, mut batch: impl FnMut(&[Access]) -> Batch) -> Counts {
        let accesses = accesses();
        let _over = Over(&self.over);
        let mut counts = Counts::default();
        let mut last = false;
        loop {
            let first = self.done.load(Ordering::SeqCst);
            let seen = batch(&accesses);
            let newest = self.started.load(Ordering::SeqCst);
            self.judge(&accesses, &seen, first, newest, &mut counts);
            batches.fetch_add(1, Ordering::SeqCst);
            if last {
                return counts;
            }
            last = self.over.load(Ordering::SeqCst);
        }
    }

    /// Each access was decided by one of the filters from number `first` to number `newest`, and by no older one than
    /// those before it. But a bit of the hardware may be older than the filter: what it passes through counts for its
    /// own MSR alone.
    fn judge(&self, accesses: &[Access], seen: &Batch, first: u64, newest: u64, counts: &mut Counts) {
        counts.batches += 1;
        counts.quiet += u64::from(first == newest);
        // By the filter itself, then by the bits of DENIED_BY_EVEN and DENIED_BY_ODD.
        let mut numbers = [first; 3];
        for (access, (outcome, reason)) in accesses.iter().zip(seen) {
            let msr = access.msr();
            let denied = *reason == 4;
            assert!(denied || *reason == 0, "{msr} exits for reason {reason}");
            let unknown = matches!(msr, UNKNOWN_BY_EVEN | UNKNOWN_BY_ODD);
            let expected = match (denied, unknown) {
                (true, _) => Outcome::Value(ANSWERED),
                (false, true) => Outcome::Fault,
                (false, false) => Outcome::Value(HELD),
            };
            assert_eq!(*outcome, expected, "{msr}");
            let (by, parity) = match msr {
                ALWAYS_DENIED | NEVER_DENIED => {
                    assert_eq!(denied, msr == ALWAYS_DENIED, "{msr} shows another treatment");
                    continue;
                }
                UNKNOWN_BY_EVEN => (0, u64::from(!denied)),
                UNKNOWN_BY_ODD => (0, u64::from(denied)),
                DENIED_BY_EVEN => (1, u64::from(!denied)),
                _ => (2, u64::from(denied)),
            };
            if let Some(number) = numbers.get_mut(by) {
                *number += u64::from(*number % 2 != parity);
                assert!(*number <= newest, "{msr}: by no filter from {first} to {newest}");
            }
            // Of more than two filters the one in between could be meant.
            let only_two = newest - first == 1;
            counts.slipped += u64::from(only_two && by > 0 && numbers[by] < numbers[0]);
            match parity {
                0 => counts.by_even += 1,
                _ => counts.by_odd += 1,
            }
        }
    }
}

fn prepare(vm: &mut (dyn Hypervisor + '_)) {
    for msr in [NEVER_DENIED, DENIED_BY_EVEN, DENIED_BY_ODD] {
        assert!(vm.host_write(msr, HELD));
    }
    vm.mask(FILTER).unwrap();
    vm.install(&filters()[0]);
}

fn answer(_: Access) -> Outcome {
    Outcome::Value(ANSWERED)
}

fn report(name: &str, counts: &[Counts], swaps: u64, start: Instant) {
    println!("{name}: {swaps} filters in {:.1?}: {counts:?}", start.elapsed());
    for counts in counts {
        assert!(counts.quiet > 0 && counts.by_even > 0 && counts.by_odd > 0);
    }
}

#[test]
fn a_running_vcpu_sees_old_or_new_only_and_what_is_equal_in_both_never_changes() {
    everywhere(|vm| {
        prepare(vm);
        let swaps = 1000;
        let calls = vm.calls();
        let load = Load::of(1);
        let start = Instant::now();
        let counts = thread::scope(|scope| {
            scope.spawn(|| load.swap(&*calls, swaps));
            load.vcpu(&load.batches[0], |accesses| vm.batch(accesses, &mut answer))
        });
        report(vm.name(), &[counts], swaps, start);
    });
}

#[test]
fn two_running_vcpus_see_old_or_new_only_each() {
    let Some(kernel) = Kernel::running() else { return };
    let options = Options {
        vcpus: 2,
        ..Default::default()
    };
    let mut live = Live::new(&kernel, Mode::Long, options);
    for vcpu in live.guest.vcpus() {
        let writes = [NEVER_DENIED, DENIED_BY_EVEN, DENIED_BY_ODD].map(|msr| Access::Write { msr, value: HELD });
        vcpu.run(&writes, &mut |_| {}).unwrap();
    }
    prepare(&mut live);
    let swaps = 1000;
    let calls = live.calls();
    let load = Load::of(2);
    let start = Instant::now();
    let counts: Vec<Counts> = thread::scope(|scope| {
        scope.spawn(|| load.swap(&*calls, swaps));
        let vcpus: Vec<_> = live
            .guest
            .vcpus()
            .iter_mut()
            .zip(&load.batches)
            .map(|(vcpu, batches)| {
                let load = &load;
                scope.spawn(move || {
                    load.vcpu(batches, |accesses| {
                        let seen = vcpu.run(accesses, &mut |pending| {
                            pending.answer(|_| Ok(ANSWERED), |_, _| Err(Fault))
                        });
                        let reason = |seen: &msrgate_guest::Seen| seen.exit.map_or(0, |exit| exit.reason_bits);
                        let seen = seen.unwrap().iter();
                        seen.map(|seen| (seen.outcome, reason(seen))).collect()
                    })
                })
            })
            .collect();
        vcpus.into_iter().map(|vcpu| vcpu.join().unwrap()).collect()
    });
    report(live.name(), &counts, swaps, start);
}

#[test]
fn of_writers_at_once_one_is_last_and_its_filter_is_whole() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        let calls = vm.calls();
        let pairs: Vec<[Msr; 2]> = (0..4)
            .map(|n| [0x1000_0000, 0xc000_1000].map(|base| Msr(base + n)))
            .collect();
        let accesses: Vec<Access> = pairs.iter().flatten().map(|msr| Access::Read { msr: *msr }).collect();
        for _ in 0..10 {
            thread::scope(|scope| {
                for pair in &pairs {
                    let calls = &*calls;
                    scope.spawn(move || {
                        let (arena, argp) = placed(&setting(&denying(Ops::BOTH, pair)));
                        for _ in 0..5 {
                            calls.call(Descriptor::Vm, Request::SetMsrFilter, argp, &arena).unwrap();
                        }
                    });
                }
            });
            let seen = vm.batch(&accesses, &mut |_| Outcome::Fault);
            let denied: Vec<[bool; 2]> = seen.chunks(2).map(|pair| [pair[0].1 == 4, pair[1].1 == 4]).collect();
            assert_eq!(
                denied.iter().filter(|pair| **pair == [true; 2]).count(),
                1,
                "{denied:?}"
            );
            assert_eq!(
                denied.iter().filter(|pair| **pair == [false; 2]).count(),
                3,
                "{denied:?}"
            );
        }
    });
}

#[test]
fn a_filter_that_is_there_before_an_access_decides_it() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        let reads: Vec<Access> = [SYSENTER_CS, KERNEL_GS_BASE].map(|msr| Access::Read { msr }).repeat(2);
        for round in 0..40 {
            let denied = [SYSENTER_CS, KERNEL_GS_BASE][round % 2];
            vm.deny(Ops::of(Op::Read), &[denied]);
            let seen = vm.batch(&reads, &mut answer);
            for (access, (_, reason)) in reads.iter().zip(seen) {
                assert_eq!(reason == 4, access.msr() == denied, "round {round}, {access:x?}");
            }
        }
    });
}
