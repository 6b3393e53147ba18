//! The list of what is the same when it is passed through.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use msrgate_core::{Msr, Op};
use msrgate_guest::{Mode, passthrough_safe};
use msrgate_kvm::{Capabilities, probe};

use crate::kvm;

/// Those that are the same in each mode, with each CPUID.
fn everywhere((kvm, probed): (&Kvm, &Capabilities), accesses: &[(Msr, Op)]) -> BTreeSet<(Msr, Op)> {
    let mut alike: BTreeSet<(Msr, Op)> = accesses.iter().copied().collect();
    // A guest whose CPUID lacks a feature faults where the host does not.
    let nothing = CpuId::new(0).unwrap();
    for (mode, cpuid) in [(Mode::Real, None), (Mode::Real, Some(&nothing)), (Mode::Long, None)] {
        let left: Vec<(Msr, Op)> = alike.iter().copied().collect();
        let here: BTreeSet<(Msr, Op)> = passthrough_safe((kvm, probed), &left, mode, cpuid)
            .unwrap()
            .into_iter()
            .collect();
        alike.retain(|access| here.contains(access));
    }
    alike
}

#[test]
fn each_register_that_may_be_passed_through_is_the_same_when_it_is() {
    let Some(kvm) = kvm() else { return };
    let probed = probe(&kvm).unwrap();
    let mut listed = Vec::new();
    for entry in msrgate_msrs::all() {
        let ops = Op::ALL.into_iter().filter(|op| entry.passes_through(*op));
        listed.extend(ops.map(|op| (entry.msr, op)));
    }
    let alike = everywhere((&kvm, &probed), &listed);
    let differ: Vec<&(Msr, Op)> = listed.iter().filter(|access| !alike.contains(access)).collect();
    assert!(differ.is_empty(), "not the same when passed through: {differ:x?}");
}

/// Registers which, by KVM's source, hold a value or have one answer, and which no clock, counter or event changes.
const CANDIDATES: [RangeInclusive<u32>; 24] = [
    0x17..=0x17,
    0x2a..=0x2a,
    0xcd..=0xce,
    0xfe..=0xfe,
    0x10a..=0x10a,
    0x11e..=0x11e,
    0x140..=0x140,
    0x174..=0x176,
    0x179..=0x17b,
    0x198..=0x199,
    0x1a0..=0x1a0,
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x277..=0x277,
    0x2ff..=0x2ff,
    0x606..=0x606,
    0xc000_0081..=0xc000_0084,
    0xc000_0100..=0xc000_0103,
    0xc001_0010..=0xc001_0010,
    0xc001_0055..=0xc001_0058,
    0xc001_0112..=0xc001_0113,
    0xc001_1021..=0xc001_102c,
];

/// Not asked of the list, but what the list is made from: `--ignored --nocapture` prints what this kernel has.
#[test]
#[ignore = "prints what the list is made from"]
fn what_is_the_same_on_this_kernel() {
    let Some(kvm) = kvm() else { return };
    let probed = probe(&kvm).unwrap();
    let all = CANDIDATES.iter().cloned().flatten();
    let all: Vec<(Msr, Op)> = all.flat_map(|msr| Op::ALL.map(|op| (Msr(msr), op))).collect();
    for (msr, op) in everywhere((&kvm, &probed), &all) {
        println!("SAME {op} {msr}");
    }
}
