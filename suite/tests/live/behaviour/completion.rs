//! How an access ends that was handed over.

use msrgate_core::{Op, Ops, abi};

use super::hypervisor::{
    Came, EINVAL, FILTER, Hypervisor, JUNK, Registers, RunMsr, SYSENTER_CS, UNKNOWN, UNKNOWN_MSR, everywhere,
    on_the_kernel,
};
use super::kernel::{Module, parameter};

/// Bytes of RDMSR and of WRMSR.
const LENGTH: u64 = 2;
const DATA: u64 = 0x8877_6655_4433_2211;

/// Leaves a denied access pending, its registers full of junk.
fn pending(vm: &mut (dyn Hypervisor + '_), op: Op) -> Registers {
    vm.mask(FILTER).unwrap();
    vm.deny(Ops::BOTH, &[SYSENTER_CS]);
    vm.enter(op, JUNK, 0xffff_fffc << 32 | u64::from(SYSENTER_CS.0), JUNK);
    let before = vm.registers();
    assert_eq!(vm.go_on().reason(), 4);
    before
}

#[test]
fn a_read_gets_data_in_eax_and_edx_zero_extended_and_rip_moves_on() {
    everywhere(|vm| {
        let before = pending(vm, Op::Read);
        vm.answer(0, DATA);
        vm.drain();
        let expected = Registers {
            rax: DATA & 0xffff_ffff,
            rdx: DATA >> 32,
            rip: before.rip + LENGTH,
            ..before
        };
        assert_eq!(vm.registers(), expected);
    });
}

#[test]
fn a_write_moves_on_and_what_becomes_of_data_does_not_matter() {
    everywhere(|vm| {
        for data in [0, DATA] {
            let before = pending(vm, Op::Write);
            vm.answer(0, data);
            vm.drain();
            let rip = before.rip + LENGTH;
            assert_eq!(vm.registers(), Registers { rip, ..before });
        }
        assert_eq!(vm.host_read(SYSENTER_CS), Some(0));
    });
}

#[test]
fn any_error_but_0_is_a_general_protection_fault_on_the_instruction() {
    everywhere(|vm| {
        for op in Op::ALL {
            for error in [1, 2, 0x7f, 0x80, 0xff] {
                let before = pending(vm, op);
                vm.answer(error, DATA);
                vm.drain();
                assert_eq!(vm.registers(), before, "{error:#x}");
                assert_eq!(vm.exception(), Some((13, 0)), "{error:#x}");
                assert_eq!(vm.go_on(), Came::Fault, "{error:#x}");
                // The guest's handler touches neither.
                let Registers { rax, rdx, .. } = vm.registers();
                assert_eq!((rax, rdx), (before.rax, before.rdx), "{error:#x}");
            }
        }
    });
}

#[test]
fn what_user_space_leaves_alone_reads_0_and_writes() {
    everywhere(|vm| {
        let _ = pending(vm, Op::Read);
        assert_eq!(vm.go_on(), Came::Done { rax: 0, rdx: 0 });
        let before = pending(vm, Op::Write);
        let Registers { rax, rdx, .. } = before;
        assert_eq!(vm.go_on(), Came::Done { rax, rdx });
    });
}

#[test]
fn only_error_and_data_are_read_back() {
    everywhere(|vm| {
        for op in Op::ALL {
            let before = pending(vm, op);
            vm.set_run_msr(RunMsr {
                error: 0,
                pad: [0xff; 7],
                reason: 0xffff_ffff,
                index: UNKNOWN.0,
                data: DATA,
            });
            vm.set_exit_reason(match op {
                Op::Read => abi::EXIT_X86_WRMSR,
                Op::Write => abi::EXIT_X86_RDMSR,
            });
            vm.drain();
            let (rax, rdx) = match op {
                Op::Read => (DATA & 0xffff_ffff, DATA >> 32),
                Op::Write => (before.rax, before.rdx),
            };
            let rip = before.rip + LENGTH;
            let expected = Registers {
                rax,
                rdx,
                rip,
                ..before
            };
            assert_eq!(vm.registers(), expected, "{op}");
        }
    });
}

#[test]
fn another_filter_and_another_mask_in_between_cancel_nothing() {
    everywhere(|vm| {
        for op in Op::ALL {
            let before = pending(vm, op);
            vm.mask(0).unwrap();
            vm.set_filter(0, &[]).unwrap();
            vm.answer(0, DATA);
            vm.drain();
            assert_eq!(vm.registers().rip, before.rip + LENGTH);
            if op == Op::Read {
                assert_eq!(vm.registers().rax, DATA & 0xffff_ffff);
            }
            // Nor does a fault need the mask.
            let before = pending(vm, op);
            vm.mask(0).unwrap();
            vm.answer(1, 0);
            vm.drain();
            assert_eq!((vm.registers(), vm.exception()), (before, Some((13, 0))));
        }
    });
}

#[test]
fn registers_that_are_set_in_between_stay_but_for_those_that_the_read_gives() {
    everywhere(|vm| {
        let before = pending(vm, Op::Read);
        vm.set_registers(Registers {
            rax: 1,
            rbx: 2,
            rcx: 3,
            rdx: 4,
            ..before
        });
        vm.answer(0, DATA);
        vm.drain();
        let expected = Registers {
            rax: DATA & 0xffff_ffff,
            rbx: 2,
            rcx: 3,
            rdx: DATA >> 32,
            rip: before.rip + LENGTH,
        };
        assert_eq!(vm.registers(), expected);
        // A write gives none.
        let before = pending(vm, Op::Write);
        let set = Registers {
            rax: 1,
            rdx: 4,
            ..before
        };
        vm.set_registers(set);
        vm.drain();
        let rip = before.rip + LENGTH;
        assert_eq!(vm.registers(), Registers { rip, ..set });
    });
}

#[test]
fn registers_that_are_set_by_the_dirty_bits_of_kvm_run_in_between_stay_likewise() {
    on_the_kernel(|live| {
        let before = pending(live, Op::Read);
        {
            let vm: &mut dyn Hypervisor = live;
            vm.answer(0, DATA);
        }
        let regs = &mut live.fd().sync_regs_mut().regs;
        (regs.rax, regs.rbx) = (1, 2);
        live.fd().set_sync_dirty_reg(kvm_ioctls::SyncReg::Register);
        let vm: &mut dyn Hypervisor = live;
        vm.drain();
        let expected = Registers {
            rax: DATA & 0xffff_ffff,
            rbx: 2,
            rdx: DATA >> 32,
            rip: before.rip + LENGTH,
            ..before
        };
        assert_eq!(vm.registers(), expected);
    });
}

#[test]
fn a_rip_that_is_set_in_between_is_lost_or_kept_by_vendor() {
    on_the_kernel(|live| {
        // Of two bytes too.
        let moved = live.before[1].rip;
        let keeps = match live.kernel.module {
            // The exit's length is added to where RIP is.
            Module::Intel => true,
            // Where the next instruction is the processor has told, or else KVM looks at what stands where RIP is.
            Module::Amd => !parameter("kvm_amd", "nrips"),
            // The emulator knows where the next one is.
            Module::Software => false,
        };
        let vm: &mut dyn Hypervisor = live;
        let before = pending(vm, Op::Read);
        vm.set_registers(Registers { rip: moved, ..before });
        vm.drain();
        let from = if keeps { moved } else { before.rip };
        assert_eq!(
            vm.registers().rip,
            from + LENGTH,
            "was {:#x}, set to {moved:#x}",
            before.rip
        );
    });
}

#[test]
fn a_kvm_run_that_fails_before_the_completion_leaves_it_pending() {
    on_the_kernel(|live| {
        let before = pending(live, Op::Read);
        {
            let vm: &mut dyn Hypervisor = live;
            vm.answer(0, DATA);
        }
        let valid = live.fd().get_kvm_run().kvm_valid_regs;
        // A bit of the lower half: 6.12 lets those of the upper one pass.
        live.fd().get_kvm_run().kvm_valid_regs = 1 << 31;
        assert_eq!(live.run(), Err(EINVAL));
        live.fd().get_kvm_run().kvm_valid_regs = valid;
        assert_eq!(live.registers(), before);
        let vm: &mut dyn Hypervisor = live;
        vm.drain();
        assert_eq!(vm.registers().rip, before.rip + LENGTH);
        assert_eq!(vm.registers().rax, DATA & 0xffff_ffff);
    });
}

#[test]
fn a_single_step_stops_right_behind_the_completed_instruction() {
    on_the_kernel(|live| {
        let before = pending(live, Op::Read);
        {
            let vm: &mut dyn Hypervisor = live;
            vm.answer(0, DATA);
        }
        let debug = kvm_bindings::kvm_guest_debug {
            control: kvm_bindings::KVM_GUESTDBG_ENABLE | kvm_bindings::KVM_GUESTDBG_SINGLESTEP,
            ..Default::default()
        };
        live.fd().set_guest_debug(&debug).unwrap();
        assert_eq!(live.run(), Ok(()));
        assert_eq!(live.exit_reason(), kvm_bindings::KVM_EXIT_DEBUG);
        assert_eq!(live.registers().rip, before.rip + LENGTH);
        assert_eq!(live.registers().rax, DATA & 0xffff_ffff);
        live.fd().set_guest_debug(&Default::default()).unwrap();
        let vm: &mut dyn Hypervisor = live;
        assert!(matches!(vm.go_on(), Came::Done { .. }));
    });
}

#[test]
fn an_access_is_handed_over_once_and_the_next_anew() {
    everywhere(|vm| {
        vm.mask(UNKNOWN_MSR).unwrap();
        for value in 0..10 {
            assert_eq!(vm.read(UNKNOWN).reason(), 2);
            vm.answer(0, value);
            assert_eq!(vm.go_on(), Came::Done { rax: value, rdx: 0 });
        }
    });
}
