//! What `system_calls` names suffices under a seccomp filter, and none of it is too much.

#![expect(unsafe_code, reason = "seccomp has no safe interface")]

use std::thread;

use kvm_ioctls::Kvm;
use msrgate_core::{Access, Msr, OnLockedBits, Outcome, ReadAction, WriteAction};
use msrgate_guest::{Guest, Mode, Options};
use msrgate_kvm::{Capabilities, DrainStatus, Handlers, Stage, SystemCall, VcpuGate, probe, system_calls};
use msrgate_plan::{CompileOptions, DecisionMap, Plan};

use crate::{MICROCODE, SYSENTER_CS, UNKNOWN, kvm, map, outcomes, read, write};

const ESP: Msr = Msr(0x175);
const LSTAR: Msr = Msr(0xc000_0082);

/// KVM_RUN, and what `Guest` sets before it.
const GUESTS: [u32; 5] = [0xae80, 0x4004_ae99, 0x4138_ae84, 0x4090_ae82, 0x4040_aea0];

/// What Rust's allocator and threads, and a panic's message, take.
const RUNTIMES: [libc::c_long; 15] = [
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_write,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
];

fn number(name: &str) -> libc::c_long {
    match name {
        "ioctl" => libc::SYS_ioctl,
        "fcntl" => libc::SYS_fcntl,
        "close" => libc::SYS_close,
        "openat" => libc::SYS_openat,
        "statx" => libc::SYS_statx,
        "lseek" => libc::SYS_lseek,
        "read" => libc::SYS_read,
        "pread64" => libc::SYS_pread64,
        "getcpu" => libc::SYS_getcpu,
        _ => panic!("{name}"),
    }
}

/// Lets this thread make these calls and what the test itself needs; every other fails with EPERM.
fn confine(calls: &[SystemCall]) {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let equal = |k: u32, jf: u8| libc::sock_filter {
        code: 0x15,
        jt: 0,
        jf,
        k,
    };
    // BPF_LD | BPF_W | BPF_ABS of `struct seccomp_data`, and BPF_RET.
    let (number_of_call, second_argument, allow) =
        (statement(0x20, 0), statement(0x20, 24), statement(0x06, 0x7fff_0000));
    let listed = calls.iter().map(|call| (number(call.name), call.argument));
    let guests = GUESTS.map(|request| (libc::SYS_ioctl, Some(request)));
    let runtimes = RUNTIMES.map(|call| (call, None));
    let mut program = Vec::new();
    for (call, argument) in listed.chain(guests).chain(runtimes) {
        let compared = [second_argument, equal(argument.unwrap_or(0), 1)];
        let compared = &compared[..if argument.is_some() { 2 } else { 0 }];
        program.push(number_of_call);
        program.push(equal(call as u32, compared.len() as u8 + 1));
        program.extend(compared);
        program.push(allow);
    }
    program.push(statement(0x06, 0x0005_0000 | libc::EPERM as u32));
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: takes numbers alone.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the program and what it points to live over the call, which copies it.
    let set = unsafe { libc::syscall(libc::SYS_seccomp, 1u32, 0u32, &raw const program) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// What a guest gets, or at which step the VMM stops.
type Got = Result<Vec<Outcome>, &'static str>;

/// A VMM that makes `accesses` under `plan`, on a thread that is confined after `before`.
struct Vmm<'a> {
    plan: &'a Plan,
    accesses: &'a [Access],
    confined_from: Stage,
}

impl Vmm<'_> {
    fn run(&self, calls: &[SystemCall]) -> Got {
        let run = || {
            let kvm = Kvm::new().unwrap();
            let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
            let confine_from = |stage| {
                if stage == self.confined_from {
                    let from: Vec<SystemCall> = calls.iter().copied().filter(|call| call.stage >= stage).collect();
                    confine(&from);
                }
            };
            confine_from(Stage::Install);
            let probed: Capabilities = probe(&kvm).map_err(|_| "probe")?;
            let gate = probed.install(guest.vm(), self.plan.clone().into(), Handlers::faulting(["h"]));
            let gate = gate.map_err(|_| "install")?;
            confine_from(Stage::Vcpu);
            let vcpu: VcpuGate = gate.vcpu(guest.vcpu(0).unwrap().fd(), 0).map_err(|_| "vcpu")?;
            confine_from(Stage::Dispatch);
            let seen = guest
                .run(0, self.accesses, &mut |pending| _ = pending.dispatch(&vcpu))
                .unwrap();
            let seen = outcomes(seen);
            let drained = vcpu.drain_vcpu(guest.vcpu(0).unwrap().fd_mut());
            if drained != Ok(DrainStatus::Idle) {
                return Err("drain");
            }
            gate.replace(self.plan.clone().into()).map_err(|_| "replace")?;
            Ok(seen)
        };
        thread::scope(|scope| scope.spawn(run).join().expect("the VMM's thread"))
    }
}

fn check(plan: &Plan, accesses: &[Access]) {
    let calls = system_calls(plan);
    for confined_from in [Stage::Install, Stage::Vcpu, Stage::Dispatch] {
        let vmm = Vmm {
            plan,
            accesses,
            confined_from,
        };
        // Not confined by anything.
        let free = Vmm {
            confined_from: Stage::Drop,
            ..vmm
        };
        let expected = free.run(&calls);
        assert!(expected.is_ok());
        assert_eq!(vmm.run(&calls), expected, "{confined_from:?}: {calls:?}");
        for (index, left_out) in calls.iter().enumerate() {
            // KVM_RUN and `close` the test's VMM makes too; of the others that have no argument a kernel or a C library
            // may do without.
            let needed = left_out.argument.is_some() && left_out.stage != Stage::Drain;
            if left_out.stage < confined_from || !needed {
                continue;
            }
            let others = |(at, _): &(usize, &SystemCall)| *at != index;
            let same = |call: &SystemCall| (call.name, call.argument) == (left_out.name, left_out.argument);
            let fewer: Vec<SystemCall> = calls.iter().enumerate().filter(others).map(|(_, call)| *call).collect();
            if !fewer.iter().any(|call| call.stage >= confined_from && same(call)) {
                assert_ne!(vmm.run(&fewer), expected, "{confined_from:?} without {left_out:?}");
            }
        }
    }
}

#[test]
fn a_plan_whose_answers_need_no_register_takes_no_call_when_it_answers() {
    let Some(_) = kvm() else { return };
    let reads = [
        (MICROCODE, ReadAction::Value(1)),
        (ESP, ReadAction::Shadow(2)),
        (UNKNOWN, ReadAction::Handler("h".into())),
    ];
    let writes = [(MICROCODE, WriteAction::Ignore), (ESP, WriteAction::Shadow)];
    let plan = Plan::compile(&map(&reads, &writes)).unwrap();
    let at_dispatch = system_calls(&plan)
        .into_iter()
        .filter(|call| call.stage == Stage::Dispatch);
    assert_eq!(at_dispatch.count(), 0);
    let accesses = [
        read(MICROCODE),
        write(MICROCODE, 2),
        write(ESP, 3),
        read(ESP),
        read(UNKNOWN),
    ];
    check(&plan, &accesses);
}

#[test]
fn a_plan_whose_answers_need_the_kernels_registers_takes_the_calls_that_are_named() {
    let Some(_) = kvm() else { return };
    let mask = WriteAction::Mask {
        may_change: 0xff,
        otherwise: OnLockedBits::Drop,
    };
    let reads = [(SYSENTER_CS, ReadAction::Mask { keep: 0xff, set: 0x100 })];
    check(
        &Plan::compile(&map(&reads, &[])).unwrap(),
        &[write(SYSENTER_CS, 3), read(SYSENTER_CS)],
    );
    let masked = map(&[], &[(SYSENTER_CS, mask)]);
    check(
        &Plan::compile(&masked).unwrap(),
        &[write(SYSENTER_CS, 3), read(SYSENTER_CS)],
    );
    let locked = map(
        &[],
        &[(LSTAR, WriteAction::Once), (ESP, WriteAction::Only(vec![8].into()))],
    );
    check(
        &Plan::compile(&locked).unwrap(),
        &[write(LSTAR, 0x1000), read(LSTAR), write(ESP, 8), read(ESP)],
    );
}

#[test]
fn a_plan_with_presets_takes_the_calls_that_put_them_into_a_vcpu() {
    let Some((kvm, _)) = kvm() else { return };
    let map: DecisionMap = map(&[(MICROCODE, ReadAction::Value(0x77))], &[]);
    let held = msrgate_guest::held(&kvm, &map, None).unwrap();
    if held.is_empty() {
        println!("skipped: this kernel holds no microcode revision");
        return;
    }
    let plan = Plan::compile_for(&map, &CompileOptions::default().with_presets(held)).unwrap();
    check(&plan, &[read(MICROCODE)]);
}

#[test]
fn a_plan_that_reads_the_physical_cpu_takes_the_calls_that_are_named() {
    let Some((_, _)) = kvm() else { return };
    if let Err(error) = std::fs::File::open("/dev/cpu/0/msr") {
        println!("skipped: /dev/cpu/0/msr: {error}");
        return;
    }
    let plan = Plan::compile(&map(&[(MICROCODE, ReadAction::Host)], &[])).unwrap();
    check(&plan, &[read(MICROCODE)]);
}
