//! `plan --json`, put into the kernel by a program that shares nothing with msrgate: plain ioctls, a guest of three
//! instructions, and numbers from the kernel's header. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE
//! is 1.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![expect(unsafe_code, reason = "plain ioctls and mapped memory")]

mod machine;

use std::collections::BTreeSet;

use machine::Machine;

use crate::allows::Allows;
use crate::command::{Folder, POLICIES};
use crate::filter::{Filter, Op, boundaries};
use crate::kvm::kvm_opens;

#[test]
fn a_plan_in_the_kernel_denies_exactly_what_its_policy_does_not_allow() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let mut asked = 0;
    for (name, _) in POLICIES {
        let path = format!("policies/{name}");
        let plan = folder.run(&["plan", "--json", &path]).code(0).json();
        let filter = Filter::parse(&plan);
        let policy = Allows::load(&folder.path().join(&path));
        let machine = Machine::new();
        machine.install(&filter);
        let msrs: BTreeSet<u32> = policy.edges().chain(boundaries(&filter)).collect();
        for msr in msrs {
            for op in [Op::Read, Op::Write] {
                // What the kernel never filters.
                let allowed = policy.allows(msr, op) || (0x800..=0x8ff).contains(&msr);
                let escapes = match op {
                    // AMD's hardware does not intercept reads of SEV_STATUS.
                    Op::Read => msr == 0xc001_0131,
                    // The fast path of IA32_TSC_DEADLINE.
                    Op::Write => msr == 0x6e0,
                };
                // What no range can cover, and what may escape where it is denied.
                if msr == u32::MAX || escapes && !allowed {
                    continue;
                }
                let denied = machine.is_denied(msr, op);
                assert_eq!(denied, !allowed, "{name}: {} {msr:#x}", op.name());
                asked += 1;
            }
        }
    }
    println!("{asked} accesses of {} policies", POLICIES.len());
    assert!(asked > 1000, "{asked}");
}

#[test]
fn without_a_filter_this_guest_sees_nothing_denied() {
    if !kvm_opens() {
        return;
    }
    let machine = Machine::new();
    for msr in [0x10, 0x8b, 0x277, 0xc000_0080, 0xdead_beef] {
        assert!(!machine.is_denied(msr, Op::Read), "{msr:#x}");
        assert!(!machine.is_denied(msr, Op::Write), "{msr:#x}");
    }
}
