//! The engine under real virtualization hardware: the cases, what is made up, and which accesses leave the guest.
//!
//! `cargo xtask test --only bare` starts the machine. That an access leaves the guest just where the engine's bitmap says is
//! checked with every access, in [`msrgate_suite::Bare`].

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use msrgate_core::{Access, Msr, Op, Ops, Reason, Verdict};
use msrgate_guest::Mode;
use msrgate_suite::{
    AccessStep, Bare, Call, Case, Engine, Implementation, Interceptions, Library, Live, Process, RawFilter, RawRange,
    Seen, Step, cases, check_all, run,
};
use msrgate_verify::random_case;

/// The one machine of all tests, for one of them at a time; nothing where it cannot be had.
fn bare() -> Option<(MutexGuard<'static, ()>, &'static Bare)> {
    static BARE: OnceLock<Option<Bare>> = OnceLock::new();
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let start = || match Bare::start() {
        Ok(bare) => Some(bare),
        Err(why) if std::env::var_os("MSRGATE_LANE_REQUIRE").is_some() => panic!("{why}"),
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    };
    Some((alone, BARE.get_or_init(start).as_ref()?))
}

#[test]
fn bare_metal_does_what_the_cases_say() {
    let Some((_alone, bare)) = bare() else { return };
    let tally = check_all(&cases(), bare);
    println!("{}\n{tally}", bare.name());
    assert!(tally.failed.is_empty(), "{}", tally.failed.join("\n"));
    assert!(tally.passed > 150, "{}", tally.passed);
    let Interceptions { left, made } = bare.take_counts();
    println!("{left} of {made} accesses left the guest");
    assert!(
        left > 0 && left < made,
        "some pass by the filter and the hypervisor, some do not"
    );
}

/// Candidates of a seed. The live lanes compare the same ones with KVM (`msrgate verify --random`).
const SEEDS: [u64; 2] = [1, 2];
const CANDIDATES: u64 = 150;

#[test]
fn bare_metal_does_what_the_engine_does_of_made_up_calls() {
    let Some((_alone, bare)) = bare() else { return };
    let mut compared = 0;
    for case in SEEDS.map(|seed| random_case(seed, 0..CANDIDATES, 8)) {
        for process in [Process::Native, Process::Compat] {
            let mut engine = Engine::VM_EXIT.start(&case, process).expect("the engine");
            let mut metal = bare.start(&case, process).expect("the machine");
            for step in &case.steps {
                match step {
                    Step::Call(call) => {
                        // The engine has no descriptor for some.
                        if let Ok(gives) = engine.call(call) {
                            assert_eq!(metal.call(call), Ok(gives), "{}: {call}", case.name);
                        }
                    }
                    Step::Access(access) => {
                        assert_eq!(metal.access(access), engine.access(access), "{}: {access:?}", case.name);
                        compared += 1;
                    }
                    Step::Replace(_) | Step::Kill => {}
                }
            }
        }
    }
    println!("{compared} accesses compared");
    assert!(compared > 1000);
}

/// What `msrgate verify --random` compares with the engine, here without the engine between the two.
#[test]
fn bare_metal_does_what_live_kvm_does_of_made_up_calls() {
    let Some((_alone, bare)) = bare() else { return };
    let kvm = match Live::open(Mode::Long, Library::Rust) {
        Ok(kvm) => kvm,
        Err(why) => return println!("skipped: {why}"),
    };
    let (mut calls, mut denied, mut allowed) = (0, 0, 0);
    for case in SEEDS.map(|seed| random_case(seed, 0..CANDIDATES, 8)) {
        let mut metal = bare.start(&case, Process::Native).expect("the machine");
        let mut live = kvm.start(&case, Process::Native).expect("KVM");
        for step in &case.steps {
            match step {
                Step::Call(call) => {
                    if let Ok(gives) = metal.call(call) {
                        assert_eq!(live.call(call), Ok(gives), "{}: {call}", case.name);
                        calls += 1;
                    }
                }
                Step::Access(access) => {
                    let on_metal = metal.access(access).expect("the bitmap is true");
                    // What is behind the filter is not the same, and KVM carries some writes out that end a guest.
                    if on_metal.verdict == Some(Verdict::Allow) && access.op() == Op::Write {
                        continue;
                    }
                    let on_kvm = live.access(access).expect("the guest goes on");
                    let told = |seen: &Seen| seen.exit == Some(Some(Reason::Filter));
                    assert_eq!(told(&on_metal), told(&on_kvm), "{}: {access:?}", case.name);
                    if on_metal.verdict == Some(Verdict::Deny) {
                        assert_eq!(on_metal.sees, on_kvm.sees, "{}: {access:?}", case.name);
                        denied += 1;
                    } else {
                        allowed += 1;
                    }
                }
                Step::Replace(_) | Step::Kill => {}
            }
        }
    }
    println!("{calls} calls, {denied} accesses that are denied and {allowed} that are not");
    assert!(calls > 200 && denied > 200 && allowed > 100);
}

#[test]
fn an_access_leaves_the_guest_under_a_filter_that_denies_it_and_at_no_other_time() {
    const TIMES: u64 = 20;
    let Some((_alone, bare)) = bare() else { return };
    let case = Case {
        name: String::new(),
        policy: None,
        cpuid: None,
        process: None,
        ignore_msrs: false,
        steps: Vec::new(),
    };
    let mut vm = bare.start(&case, Process::Native).expect("the machine");
    // Bits that the hypervisor opens, and PAT, which it does not.
    for msr in [0x174, 0x175, 0x176, 0xc000_0081, 0xc000_0102, 0x277].map(Msr) {
        for op in Op::ALL {
            let access = match op {
                Op::Read => Access::Read { msr },
                Op::Write => Access::Write { msr, value: 0 },
            };
            let filter = |denied: Vec<RawRange>| Call::set_msr_filter(RawFilter::allowing(denied));
            let phases = [
                ("before", filter(Vec::new()), false),
                ("under", filter(vec![RawRange::denying(0, msr, Ops::of(op))]), true),
                ("after", filter(Vec::new()), false),
            ];
            for (when, call, denied) in phases {
                vm.call(&call).expect("the call");
                bare.take_counts();
                for _ in 0..TIMES {
                    vm.access(&AccessStep::new(access)).expect("the bitmap is true");
                }
                let left = if denied || msr.0 == 0x277 { TIMES } else { 0 };
                assert_eq!(
                    bare.take_counts(),
                    Interceptions { left, made: TIMES },
                    "{op} {msr} {when}"
                );
            }
        }
    }
}

#[test]
fn a_case_that_is_wrong_fails_on_bare_metal() {
    let Some((_alone, bare)) = bare() else { return };
    let mut access = AccessStep::new(Access::Read { msr: Msr(0x174) });
    access.expect.sees = Some(msrgate_core::Outcome::Fault);
    let case = Case {
        name: "SYSENTER_CS faults".into(),
        policy: None,
        cpuid: None,
        process: Some(Process::Native),
        ignore_msrs: false,
        steps: vec![Step::Access(access)],
    };
    assert_eq!(check_all(std::slice::from_ref(&case), bare).failed.len(), 1);
    assert!(run(&case, Process::Native, bare).is_ok_and(|seen| seen.len() == 1));
}
