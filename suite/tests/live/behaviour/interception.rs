//! What the hardware's bitmaps let through, told by the vCPU's `exits` statistic.

use std::sync::Arc;

use msrgate_core::{Access, Filter, FilterRange, Msr, MsrRange, Ops, Outcome, PassthroughMsr, Verdict};
use msrgate_engine::{Intercepts, Vcpu, Vm};
use msrgate_guest::{Mode, Options};

use super::hypervisor::{
    FILTER, Hypervisor, KERNEL_GS_BASE, SYSENTER_CS, SYSENTER_ESP, UNKNOWN, everywhere, on_the_kernel,
};
use super::kernel::{Kernel, Module};
use super::live::Live;

/// How often an access is made: many more times than a guest leaves for other reasons meanwhile.
const TIMES: usize = 64;

/// The MSRs of this comparison: first, last.
const RANGES: [(u32, u32); 8] = [
    // TSC.
    (0x10, 0x10),
    // APIC base.
    (0x1b, 0x1b),
    // SYSENTER_CS, ESP, EIP.
    (0x174, 0x176),
    // MISC_ENABLE.
    (0x1a0, 0x1a0),
    // PAT.
    (0x277, 0x277),
    // EFER, STAR, LSTAR, CSTAR, SFMASK.
    (0xc000_0080, 0xc000_0084),
    // FS, GS and kernel GS base.
    (0xc000_0100, 0xc000_0102),
    (UNKNOWN.0, UNKNOWN.0),
];

/// What KVM passes through to a guest as this one is (`vmx_possible_passthrough_msrs` and `vmx_vcpu_create`;
/// `direct_access_msrs`, `svm_vcpu_init_msrpm`; from 6.17 `vmx_recalc_msr_intercepts`, `svm_recalc_msr_intercepts`).
fn candidates(module: Module) -> Vec<PassthroughMsr> {
    let range = |first, last| MsrRange::new(Msr(first), Msr(last)).unwrap();
    let bases = PassthroughMsr::new(range(0xc000_0100, 0xc000_0102), Ops::BOTH);
    let sysenter = PassthroughMsr::new(range(0x174, 0x176), Ops::BOTH);
    match module {
        Module::Intel => vec![bases, sysenter, PassthroughMsr::new(range(0x10, 0x10), Ops::READ)],
        Module::Amd => vec![
            bases,
            sysenter,
            PassthroughMsr::new(range(0xc000_0081, 0xc000_0084), Ops::BOTH),
        ],
        Module::Software => Vec::new(),
    }
}

fn accesses(live: &mut Live) -> Vec<Access> {
    let mut accesses = Vec::new();
    for msr in RANGES.iter().flat_map(|(first, last)| *first..=*last).map(Msr) {
        accesses.push(Access::Read { msr });
        // Writing back what is there moves nothing but the time, which is left out.
        match live.host_read(msr) {
            Some(value) if msr != Msr(0x10) => accesses.push(Access::Write { msr, value }),
            _ => {}
        }
    }
    accesses
}

fn denying(ops: Ops) -> Filter {
    let ranges = RANGES.map(|(first, last)| FilterRange::new(first, last - first + 1, ops, [0]).unwrap());
    Filter::new(Verdict::Allow, ranges).unwrap()
}

#[test]
fn the_exits_statistic_says_of_every_msr_what_the_engines_bitmap_says() {
    let Some(kernel) = Kernel::running() else { return };
    let candidates = candidates(kernel.module);
    let bitmap = match kernel.module {
        Module::Intel => Intercepts::vmx(candidates),
        Module::Amd => Intercepts::svm(candidates),
        Module::Software => {
            println!("skipped: this KVM has no hardware and so no bitmap");
            return;
        }
    };
    let mut live = Live::new(&kernel, Mode::Long, Options::default());
    let engine = Arc::new(Vm::new());
    let mut vcpu = Vcpu::new(Arc::clone(&engine), bitmap);
    let accesses = accesses(&mut live);
    let vm: &mut dyn Hypervisor = &mut live;
    vm.mask(FILTER).unwrap();
    let elsewhere = super::hypervisor::denying(Ops::BOTH, &[Msr(0x4000_0000)]);
    let half = {
        // Every second MSR of those that are passed through somewhere.
        let ranges = [(0x174, 3), (0xc000_0081, 4), (0xc000_0100, 3)];
        let ranges = ranges.map(|(base, nmsrs)| FilterRange::new(base, nmsrs, Ops::BOTH, [0b0101]).unwrap());
        Filter::new(Verdict::Allow, ranges).unwrap()
    };
    let filters = [
        ("no filter", None),
        ("all denied", Some(denying(Ops::BOTH))),
        ("reads denied", Some(denying(Ops::READ))),
        ("writes denied", Some(denying(Ops::WRITE))),
        ("every second denied", Some(half)),
        ("others denied", Some(elsewhere)),
        ("all allowed", Some(Filter::allow_all())),
    ];
    let (mut passed, mut handled, mut handed_over) = (0, 0, 0);
    for (name, filter) in filters {
        if let Some(filter) = filter {
            let vm: &mut dyn Hypervisor = &mut live;
            vm.install(&filter);
            engine.set_filter(filter);
        }
        for access in &accesses {
            let (msr, op) = (access.msr(), access.op());
            let verdict = vcpu.verdict(msr, op);
            let intercepted = vcpu.pick_up().intercepts.intercepts(msr, op);
            let before = live.guest.exits(0).unwrap();
            let seen = live.batch(&[*access; TIMES], &mut |access| match access {
                Access::Read { .. } => Outcome::Value(1),
                Access::Write { .. } => Outcome::Done,
            });
            let exits = live.guest.exits(0).unwrap() - before;
            let told = seen.iter().filter(|(_, reason)| *reason == 4).count();
            let what = format!("{name}, {op} {msr}: {exits} exits, {told} to user space, of {TIMES}");
            let expected = if verdict == Verdict::Deny { TIMES } else { 0 };
            assert_eq!(told, expected, "{what}");
            assert_eq!(exits >= TIMES as u64, intercepted, "{what}");
            assert!(intercepted || exits < TIMES as u64 / 2, "{what}");
            match (intercepted, told) {
                (false, _) => passed += 1,
                (true, 0) => handled += 1,
                _ => handed_over += 1,
            }
        }
    }
    println!(
        "{:?}: {passed} passed through, {handled} answered in the kernel, {handed_over} handed over, {} accesses of each",
        kernel.module, TIMES
    );
    assert!(passed > 0 && handled > 0 && handed_over > 0);
}

#[test]
fn a_passed_through_msr_keeps_its_value_while_it_is_denied_and_is_reached_again() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        let msrs = [SYSENTER_CS, SYSENTER_ESP, Msr(0x176), Msr(0xc000_0081), KERNEL_GS_BASE];
        let reads = msrs.map(|msr| Access::Read { msr });
        let writes = |value| msrs.map(|msr| Access::Write { msr, value });
        let nobody = &mut |access: Access| -> Outcome { panic!("{access:x?}") };
        let seen = vm.batch(&writes(0x5670), nobody);
        assert_eq!(seen, [(Outcome::Done, 0); 5]);
        for round in 0..3 {
            vm.deny(Ops::BOTH, &msrs);
            let seen = vm.batch(&reads, &mut |access| Outcome::Value(access.msr().0.into()));
            let expected = msrs.map(|msr| (Outcome::Value(msr.0.into()), 4));
            assert_eq!(seen, expected, "round {round}");
            let seen = vm.batch(&writes(1), &mut |_| Outcome::Done);
            assert_eq!(seen, [(Outcome::Done, 4); 5], "round {round}");
            vm.install(&Filter::allow_all());
            let seen = vm.batch(&reads, nobody);
            assert_eq!(seen, [(Outcome::Value(0x5670), 0); 5], "round {round}");
        }
        // In one direction alone.
        vm.deny(Ops::WRITE, &msrs);
        assert_eq!(vm.batch(&reads, nobody), [(Outcome::Value(0x5670), 0); 5]);
        assert_eq!(vm.batch(&writes(1), &mut |_| Outcome::Fault), [(Outcome::Fault, 4); 5]);
    });
}

#[test]
fn a_bad_value_for_a_passed_through_msr_never_comes_to_the_kernel() {
    on_the_kernel(|live| {
        // Not canonical. A processor faults; QEMU's emulation takes it.
        let write = Access::Write {
            msr: KERNEL_GS_BASE,
            value: 1 << 63,
        };
        let module = live.kernel.module;
        let vm: &mut dyn Hypervisor = live;
        vm.mask(7).unwrap();
        let reason = if module == Module::Software { 1 } else { 0 };
        let seen = vm.batch(&[write], &mut |_| Outcome::Fault);
        assert_eq!(seen[0].1, reason);
        // It does where it is denied.
        vm.deny(Ops::BOTH, &[KERNEL_GS_BASE]);
        assert_eq!(vm.batch(&[write], &mut |_| Outcome::Fault), [(Outcome::Fault, 4)]);
    });
}

#[test]
fn denying_one_passed_through_msr_in_place_of_another_switches_both_in_a_stopped_guest() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        let (a, b) = (SYSENTER_ESP, KERNEL_GS_BASE);
        let reads = [a, b].map(|msr| Access::Read { msr });
        for (denied, expected) in [
            (&[a][..], [4, 0]),
            (&[b][..], [0, 4]),
            (&[][..], [0, 0]),
            (&[a, b][..], [4, 4]),
        ] {
            vm.deny(Ops::READ, denied);
            let seen = vm.batch(&reads, &mut |_| Outcome::Value(0));
            assert_eq!(seen.iter().map(|(_, reason)| *reason).collect::<Vec<_>>(), expected);
        }
    });
}
