//! Numbers and layouts.

use msrgate_core::{Op, Ops, abi};

use super::hypervisor::{Descriptor, FILTER, JUNK, SYSENTER_CS, everywhere};

#[test]
fn both_capabilities_are_1_on_the_system_and_on_a_vm() {
    everywhere(|vm| {
        for on in [Descriptor::System, Descriptor::Vm] {
            for capability in [abi::CAP_X86_USER_SPACE_MSR, abi::CAP_X86_MSR_FILTER] {
                assert_eq!(vm.check_extension(on, capability), 1, "{on:?}, {capability}");
            }
        }
    });
}

#[test]
fn an_exit_lies_at_byte_32_of_kvm_run() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        vm.enter(Op::Write, 0x8877_6655, SYSENTER_CS.0.into(), 0x1122_3344);
        vm.set_run_bytes([0xff; 24]);
        assert_eq!(vm.run(), Ok(()));
        assert_eq!(vm.exit_reason(), 30);
        let mut expected = [0; 24];
        expected[8] = 4;
        expected[12..14].copy_from_slice(&[0x74, 0x01]);
        expected[16..].copy_from_slice(&[0x55, 0x66, 0x77, 0x88, 0x44, 0x33, 0x22, 0x11]);
        assert_eq!(vm.run_bytes(), expected);
        vm.enter(Op::Read, JUNK, SYSENTER_CS.0.into(), JUNK);
        assert_eq!(vm.run(), Ok(()));
        assert_eq!(vm.exit_reason(), 29);
    });
}
