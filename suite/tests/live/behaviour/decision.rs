//! Which accesses a filter denies. Most of it is in `testdata/cases/verdict.toml`; here is what takes registers.

use msrgate_core::{Access, Msr, Op, Ops, Outcome};

use super::hypervisor::{Came, FILTER, SYSENTER_CS, UNKNOWN, X2APIC_ID, everywhere};

#[test]
fn the_upper_half_of_rcx_does_not_count() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        for op in Op::ALL {
            vm.enter(op, 0, 0xffff_fffc << 32 | u64::from(SYSENTER_CS.0), 0);
            let Came::Out(_, msr) = vm.go_on() else { panic!("{op}") };
            assert_eq!((msr.index, msr.reason), (SYSENTER_CS.0, 4));
        }
        // Nor does it make another MSR a denied one.
        vm.enter(Op::Read, 0, u64::from(SYSENTER_CS.0) << 32 | 0x175, 0);
        assert_eq!(vm.go_on(), Came::Done { rax: 0, rdx: 0 });
    });
}

#[test]
fn the_decision_is_the_same_for_every_vcpu() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::READ, &[SYSENTER_CS, UNKNOWN]);
        for vcpu in 0..2 {
            assert_eq!(vm.read(SYSENTER_CS).reason(), 4);
            assert_eq!(vm.read(UNKNOWN).reason(), 4);
            assert!(matches!(vm.write(SYSENTER_CS, 1), Came::Done { .. }));
            if vcpu == 0 {
                vm.another_vcpu();
            }
        }
    });
}

#[test]
fn an_msr_that_is_allowed_may_still_fault() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS]);
        assert_eq!(vm.read(UNKNOWN), Came::Fault);
        // There is no local APIC.
        assert_eq!(vm.read(X2APIC_ID), Came::Fault);
    });
}

#[test]
fn exactly_256_msrs_of_x2apic_are_allowed_whatever_the_filter_says() {
    everywhere(|vm| {
        vm.mask(7).unwrap();
        let bitmap = vec![0; 0x180 / 8];
        let range = super::raw_filter::range(3, 0x180, 0x7c0, bitmap);
        vm.set_filter(1, &[range]).unwrap();
        let accesses: Vec<Access> = (0x7c0..0x940)
            .flat_map(|msr| {
                let msr = Msr(msr);
                [Access::Read { msr }, Access::Write { msr, value: 0 }]
            })
            .collect();
        let seen = vm.batch(&accesses, &mut |_| Outcome::Fault);
        for (access, (_, reason)) in accesses.iter().zip(seen) {
            let x2apic = (0x800..0x900).contains(&access.msr().0);
            assert_eq!(reason == 4, !x2apic, "{access:x?}: {reason}");
        }
    });
}
