//! Which failing accesses are handed over, and what `kvm_run` holds then.

use msrgate_core::{Access, Msr, Op, Ops, Outcome};

use super::hypervisor::{
    Came, FILTER, Hypervisor, INVALID, JUNK, RunMsr, SYSENTER_CS, UNKNOWN, UNKNOWN_MSR, X2APIC_ID, everywhere,
    on_the_kernel,
};
use super::kernel::TurnedOn;

const PAT: Msr = Msr(0x277);

#[test]
fn every_mask_hands_over_the_reasons_that_it_has_and_the_others_fault() {
    everywhere(|vm| {
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        for mask in 0..8 {
            vm.mask(mask).unwrap();
            let failing = [
                (FILTER, vm.read(SYSENTER_CS)),
                (FILTER, vm.write(SYSENTER_CS, 5)),
                (UNKNOWN_MSR, vm.read(UNKNOWN)),
                (UNKNOWN_MSR, vm.write(UNKNOWN, 5)),
                (INVALID, vm.read(X2APIC_ID)),
                (INVALID, vm.write(X2APIC_ID, 0)),
            ];
            for (reason, came) in failing {
                match came {
                    Came::Out(_, msr) => assert_eq!(u64::from(msr.reason), mask & reason, "{mask}"),
                    came => assert_eq!((came, mask & reason), (Came::Fault, 0), "{mask}"),
                }
            }
        }
        // A denied write never came to the kernel's register, whatever the mask.
        assert_eq!(vm.host_read(SYSENTER_CS), Some(0));
    });
}

#[test]
fn denied_beats_unknown_and_invalid() {
    everywhere(|vm| {
        vm.mask(7).unwrap();
        vm.deny(Ops::BOTH, &[UNKNOWN, PAT]);
        assert_eq!(vm.read(UNKNOWN).reason(), 4);
        assert_eq!(vm.write(UNKNOWN, 1).reason(), 4);
        // No memory type has the number 2.
        assert_eq!(vm.write(PAT, 2).reason(), 4);
    });
}

#[test]
fn an_exit_of_a_read_clears_error_padding_and_data() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::READ, &[SYSENTER_CS]);
        vm.host_write(SYSENTER_CS, 0x1234);
        vm.enter(Op::Read, JUNK, SYSENTER_CS.0.into(), JUNK);
        vm.set_run_bytes([0xff; 24]);
        let expected = RunMsr {
            error: 0,
            pad: [0; 7],
            reason: 4,
            index: SYSENTER_CS.0,
            data: 0,
        };
        assert_eq!(vm.go_on(), Came::Out(29, expected));
    });
}

#[test]
fn an_exit_of_a_write_has_the_lower_halves_of_rdx_and_rax_for_data() {
    everywhere(|vm| {
        vm.mask(UNKNOWN_MSR).unwrap();
        vm.enter(
            Op::Write,
            0xffff_ffff_1111_2222,
            UNKNOWN.0.into(),
            0xffff_ffff_3333_4444,
        );
        vm.set_run_bytes([0xff; 24]);
        let expected = RunMsr {
            error: 0,
            pad: [0; 7],
            reason: 2,
            index: UNKNOWN.0,
            data: 0x3333_4444_1111_2222,
        };
        assert_eq!(vm.go_on(), Came::Out(30, expected));
    });
}

#[test]
fn an_exit_leaves_rip_before_the_instruction_and_the_registers_as_they_were() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        for op in Op::ALL {
            vm.enter(op, JUNK, SYSENTER_CS.0.into(), !JUNK);
            let before = vm.registers();
            assert_eq!(vm.go_on().reason(), 4);
            assert_eq!(vm.registers(), before);
        }
    });
}

#[test]
fn an_exit_outside_of_l2_and_smm_has_neither_flag() {
    on_the_kernel(|vm| {
        let dynamic: &mut dyn Hypervisor = vm;
        dynamic.mask(FILTER).unwrap();
        dynamic.deny(Ops::READ, &[SYSENTER_CS]);
        assert_eq!(dynamic.read(SYSENTER_CS).reason(), 4);
        let flags = vm.fd().get_kvm_run().flags;
        // KVM_RUN_X86_SMM and KVM_RUN_X86_GUEST_MODE.
        assert_eq!(flags & 0b101, 0, "{flags:#x}");
    });
}

#[test]
fn exits_of_msrs_have_no_statistic_of_their_own() {
    on_the_kernel(|vm| {
        let names = vm.statistics();
        assert!(names.iter().any(|name| name == "exits"), "{names:?}");
        assert!(!names.iter().any(|name| name.contains("msr")), "{names:?}");
        // They count among all exits.
        let dynamic: &mut dyn Hypervisor = vm;
        dynamic.mask(FILTER).unwrap();
        dynamic.deny(Ops::READ, &[SYSENTER_CS]);
        let accesses = [Access::Read { msr: SYSENTER_CS }; 50];
        let before = vm.guest.exits(0).unwrap();
        let seen = vm.batch(&accesses, &mut |_| Outcome::Value(1));
        assert!(seen.iter().all(|(_, reason)| *reason == 4));
        assert!(vm.guest.exits(0).unwrap() - before >= 50);
    });
}

#[test]
fn ignore_msrs_hides_unknown_msrs_and_neither_denied_nor_invalid_ones() {
    // What sets the guest up is not to run with it.
    if TurnedOn::in_a_lane("ignore_msrs").is_none() {
        return;
    }
    on_the_kernel(|live| {
        let vm: &mut dyn Hypervisor = live;
        vm.mask(7).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS, Msr(UNKNOWN.0 + 1)]);
        let ignoring = TurnedOn::in_a_lane("ignore_msrs");
        assert_eq!(vm.read(UNKNOWN), Came::Done { rax: 0, rdx: 0 });
        assert!(matches!(vm.write(UNKNOWN, 1), Came::Done { .. }));
        assert_eq!(vm.read(Msr(UNKNOWN.0 + 1)).reason(), 4);
        assert_eq!(vm.read(SYSENTER_CS).reason(), 4);
        assert_eq!(vm.read(X2APIC_ID).reason(), 1);
        assert_eq!(vm.write(PAT, 2).reason(), 1);
        drop(ignoring);
    });
}
