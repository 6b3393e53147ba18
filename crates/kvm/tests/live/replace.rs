//! Plans that take the place of others.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use msrgate_core::{Disposition, FaultCause, Msr, Outcome, ReadAction, WriteAction};
use msrgate_guest::{Guest, Mode, Options};
use msrgate_kvm::{Handlers, VcpuGate};

use crate::{
    APIC_BASE, APIC_BASE_VALUE, MICROCODE, SYSENTER_CS, UNKNOWN, did, gated, kvm, map, outcomes, plan, read, run, write,
};

#[test]
fn what_msrs_remember_outlives_a_replacement() {
    let Some((kvm, probed)) = kvm() else { return };
    let writes = [(SYSENTER_CS, WriteAction::Once), (UNKNOWN, WriteAction::Shadow)];
    let reads = [(UNKNOWN, ReadAction::Shadow(1))];
    let (mut guest, gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&map(&reads, &writes)), Handlers::new());
    let seen = run(&mut guest, &vcpu, &[write(SYSENTER_CS, 1), write(UNKNOWN, 2)]);
    assert_eq!(outcomes(&seen), [Outcome::Done, Outcome::Done]);
    let more = [(UNKNOWN, ReadAction::Shadow(1)), (MICROCODE, ReadAction::Value(3))];
    let next = plan(&map(&more, &writes));
    gate.replace(next.clone()).unwrap();
    assert!(Arc::ptr_eq(&gate.plan(), &next));
    let accesses = [read(UNKNOWN), read(MICROCODE), write(SYSENTER_CS, 1)];
    let seen = run(&mut guest, &vcpu, &accesses);
    assert_eq!(outcomes(&seen), [Outcome::Value(2), Outcome::Value(3), Outcome::Fault]);
    assert_eq!(did(&seen[2]), (Disposition::Fault, Some(FaultCause::AlreadyWritten)));
}

#[test]
fn an_exit_that_waits_while_plans_are_replaced_gets_one_of_their_answers() {
    let Some((kvm, probed)) = kvm() else { return };
    // Denied by the first plan alone.
    let first = plan(&map(&[(MICROCODE, ReadAction::Value(1))], &[]));
    let other = plan(&map(&[(UNKNOWN, ReadAction::Value(2))], &[]));
    let third = plan(&map(&[(UNKNOWN, ReadAction::Deny)], &[]));
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
    assert_eq!(did(&seen[0]), (Disposition::Value, None));
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
    let plans = [plan(&map(&a, &once)), plan(&map(&b, &once))];
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
    let rounds = [0, 0].map(AtomicU64::new);
    let (mut old, mut new, mut kernel) = (0, 0, 0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = guest
            .vcpus()
            .iter_mut()
            .zip(gates)
            .zip(&rounds)
            .map(|((vcpu, gate), rounds)| {
                let stop = &stop;
                scope.spawn(move || {
                    let accesses = [
                        read(SAME),
                        read(CHANGES),
                        read(ONLY_A),
                        read(ONLY_B),
                        write(Msr(0x175), 1),
                    ]
                    .repeat(5);
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
            // By turns one plan and the other, until each vCPU has made a whole round under it.
            for rounds in rounds.iter().filter(|_| swap % 19 == 0) {
                let before = rounds.load(Ordering::Relaxed);
                while rounds.load(Ordering::Relaxed) < before + 2 && !threads.iter().any(|t| t.is_finished()) {
                    std::thread::yield_now();
                }
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
    let answers = plan(&map(&[(SYSENTER_CS, ReadAction::Value(10))], &[]));
    let allows = plan(&map(&[], &[]));
    let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let mut probed = probed;
    let mut counts = [0u64; 2];
    for _ in 0..4 {
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
                        .run(&[read(SYSENTER_CS); 20], &mut |pending| {
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
