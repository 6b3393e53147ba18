//! What is left of an access that was handed over when a vCPU is stopped, saved and moved.

use kvm_bindings::kvm_regs;
use msrgate_core::{Access, Op, Ops, Outcome, abi};
use msrgate_guest::Mode;

use super::code::{self, OUT, Pages};
use super::hypervisor::{
    Came, EINTR, EXIT_IO, FILTER, Hypervisor, JUNK, SYSENTER_CS, SYSENTER_ESP, UNKNOWN, UNKNOWN_MSR, everywhere,
    on_the_kernel,
};

const DATA: u64 = 0x0807_0605_0403_0201;

#[test]
fn immediate_exit_completes_and_executes_nothing_and_leaves_the_old_exit_reason_beside_eintr() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        for op in Op::ALL {
            vm.enter(op, JUNK, SYSENTER_CS.0.into(), JUNK);
            assert_eq!(vm.go_on().reason(), 4);
            let (before, msr) = (vm.registers(), vm.run_msr());
            vm.set_immediate_exit(true);
            assert_eq!(vm.run(), Err(EINTR));
            let stale = if op == Op::Read { 29 } else { 30 };
            assert_eq!(vm.exit_reason(), stale);
            assert_eq!(vm.run_msr(), msr);
            assert_eq!(vm.registers().rip, before.rip + 2);
            vm.set_immediate_exit(false);
        }
    });
}

#[test]
fn a_signal_completes_too_and_its_exit_reason_is_intr() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        assert_eq!(vm.read(SYSENTER_CS).reason(), 4);
        let before = vm.registers();
        vm.answer(0, DATA);
        assert_eq!(vm.run_into_signal(), Err(EINTR));
        assert_eq!(vm.exit_reason(), abi::EXIT_INTR);
        assert_eq!(vm.registers().rip, before.rip + 2);
        assert_eq!(vm.registers().rax, DATA & 0xffff_ffff);
    });
}

#[test]
fn a_second_drain_does_nothing() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        for error in [0, 1] {
            assert_eq!(vm.read(SYSENTER_CS).reason(), 4);
            vm.answer(error, DATA);
            vm.drain();
            let (registers, exception) = (vm.registers(), vm.exception());
            vm.answer(1 - error, !DATA);
            vm.drain();
            assert_eq!((vm.registers(), vm.exception()), (registers, exception));
        }
    });
}

#[test]
fn a_drained_error_is_a_waiting_exception_13() {
    everywhere(|vm| {
        vm.mask(UNKNOWN_MSR).unwrap();
        for came in [vm.read(UNKNOWN), vm.write(UNKNOWN, 1)] {
            assert_eq!(came.reason(), 2);
        }
        assert_eq!(vm.exception(), None);
        vm.answer(1, 0);
        vm.drain();
        assert_eq!(vm.exception(), Some((13, 0)));
    });
}

#[test]
fn a_drained_vcpu_goes_on_in_a_new_vm_and_nothing_is_asked_again() {
    everywhere(|vm| {
        vm.host_write(SYSENTER_ESP, 0x77);
        for (op, error) in [(Op::Read, 0), (Op::Write, 0), (Op::Read, 1), (Op::Write, 1)] {
            vm.mask(FILTER).unwrap();
            vm.deny(Ops::BOTH, &[SYSENTER_CS]);
            vm.enter(op, 0x1111, SYSENTER_CS.0.into(), 0x2222);
            assert_eq!(vm.go_on().reason(), 4);
            vm.answer(error, DATA);
            vm.drain();
            let saved = (vm.registers(), vm.exception());
            vm.move_to_new_vm();
            assert_eq!((vm.registers(), vm.exception()), saved);
            let expected = match (op, error) {
                (_, 1) => Came::Fault,
                (Op::Read, _) => Came::Done {
                    rax: DATA & 0xffff_ffff,
                    rdx: DATA >> 32,
                },
                (Op::Write, _) => Came::Done {
                    rax: 0x1111,
                    rdx: 0x2222,
                },
            };
            assert_eq!(vm.go_on(), expected, "{op}, {error}");
            assert_eq!(vm.host_read(SYSENTER_ESP), Some(0x77));
        }
    });
}

#[test]
fn neither_filter_nor_mask_comes_along_to_a_new_vm() {
    everywhere(|vm| {
        vm.mask(7).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        assert_eq!(vm.read(SYSENTER_CS).reason(), 4);
        assert_eq!(vm.read(UNKNOWN).reason(), 2);
        vm.drain();
        vm.move_to_new_vm();
        assert!(matches!(vm.read(SYSENTER_CS), Came::Done { .. }));
        assert_eq!(vm.read(UNKNOWN), Came::Fault);
    });
}

#[test]
fn an_answer_that_is_not_drained_is_lost_and_the_new_vm_asks_again() {
    // The engine refuses such a save: `Vcpu::ready_to_save`.
    on_the_kernel(|live| {
        let vm: &mut dyn Hypervisor = live;
        vm.mask(UNKNOWN_MSR).unwrap();
        assert_eq!(vm.read(UNKNOWN).reason(), 2);
        vm.answer(0, DATA);
        vm.move_to_new_vm();
        vm.mask(UNKNOWN_MSR).unwrap();
        assert_eq!(vm.go_on().reason(), 2);
        assert_eq!(vm.go_on(), Came::Done { rax: 0, rdx: 0 });
    });
}

#[test]
fn kvm_get_msrs_stops_at_the_first_msr_that_kvm_does_not_know() {
    on_the_kernel(|live| {
        let entries = [SYSENTER_CS, SYSENTER_ESP, UNKNOWN, SYSENTER_CS].map(|msr| kvm_bindings::kvm_msr_entry {
            index: msr.0,
            ..Default::default()
        });
        let mut msrs = kvm_bindings::Msrs::from_entries(&entries).unwrap();
        assert_eq!(live.fd().get_msrs(&mut msrs), Ok(2));
    });
}

/// The number of rounds that [`LOOP`] makes.
const ROUNDS: u64 = 12;

/// Writes a count to an MSR and reads the MSR back, and adds what it reads up in DI. In 16 bits and in 64.
#[rustfmt::skip]
const LOOP: [u8; 18] = [
    0x89, 0xf0, // mov ax, si
    0x31, 0xd2, // xor dx, dx
    0x0f, 0x30, // wrmsr
    0x0f, 0x32, // rdmsr
    0x01, 0xc7, // add di, ax
    0xff, 0xc6, // inc si
    0xff, 0xcd, // dec bp
    0x75, 0xf0, // jnz the first
    OUT[0], OUT[1],
];

#[test]
fn a_guest_that_moves_to_a_new_vm_at_each_exit_repeats_nothing_and_loses_nothing() {
    on_the_kernel(|live| {
        let page = Pages::with(&[&LOOP]);
        page.map(live.guest.vm());
        code::enter(
            live,
            kvm_regs {
                rbp: ROUNDS,
                rcx: UNKNOWN.0.into(),
                ..Default::default()
            },
        );
        let (mut writes, mut reads, mut moves) = (Vec::new(), 0, 0);
        let mut sum = 0;
        loop {
            let vm: &mut dyn Hypervisor = live;
            vm.mask(UNKNOWN_MSR).unwrap();
            assert_eq!(vm.run(), Ok(()));
            let msr = vm.run_msr();
            match vm.exit_reason() {
                abi::EXIT_X86_WRMSR => {
                    writes.push(msr.data);
                    // Every third write faults, where the guest's handler can come back.
                    let fault = live.mode == Mode::Long && msr.data % 3 == 2;
                    let vm: &mut dyn Hypervisor = live;
                    vm.answer(fault.into(), 0);
                }
                abi::EXIT_X86_RDMSR => {
                    reads += 1;
                    let value = 100 + 7 * reads;
                    sum += value;
                    vm.answer(0, value);
                }
                EXIT_IO => break,
                other => panic!("exit {other}"),
            }
            let vm: &mut dyn Hypervisor = live;
            vm.drain();
            // What is pending is over: whoever looks finds the old exit, and must not take it for a new one.
            let saved = live.saved();
            *live = live.restored(&saved);
            page.map(live.guest.vm());
            moves += 1;
        }
        assert_eq!(writes, (0..ROUNDS).collect::<Vec<_>>());
        assert_eq!((reads, moves), (ROUNDS, 2 * ROUNDS));
        let regs = live.fd().get_regs().unwrap();
        assert_eq!((regs.rdi & 0xffff, regs.rsi & 0xffff), (sum, ROUNDS));
        // The page is in the VM until it is gone.
        let kernel = live.kernel.clone();
        *live = super::live::Live::new(&kernel, live.mode, Default::default());
    });
}

#[test]
fn a_batch_of_accesses_gets_each_answer_once() {
    everywhere(|vm| {
        vm.mask(UNKNOWN_MSR).unwrap();
        let accesses = [Access::Read { msr: UNKNOWN }; 200];
        let mut asked = 0;
        let seen = vm.batch(&accesses, &mut |_| {
            asked += 1;
            Outcome::Value(asked)
        });
        assert_eq!(asked, 200);
        for ((outcome, _), number) in seen.iter().zip(1..) {
            assert_eq!(*outcome, Outcome::Value(number));
        }
    });
}
