//! What the database says of how a guest's value is saved, beside what this machine's KVM lists. Skipped where /dev/kvm does
//! not open, unless MSRGATE_LANE_REQUIRE is 1.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::collections::BTreeSet;

use kvm_ioctls::Kvm;
use msrgate_core::Msr;
use msrgate_msrs::State;

use crate::kvm::kvm_opens;

#[test]
fn what_kvm_lists_is_known_as_listed_and_what_is_known_as_unlisted_it_does_not_list() {
    if !kvm_opens() {
        return;
    }
    let kvm = Kvm::new().expect("/dev/kvm");
    let listed = kvm.get_msr_index_list().expect("a list");
    let listed: BTreeSet<u32> = listed.as_slice().iter().copied().collect();
    assert!(listed.len() > 20, "{listed:x?}");
    let unknown: Vec<Msr> = listed
        .iter()
        .map(|msr| Msr(*msr))
        .filter(|msr| msrgate_msrs::by_msr(*msr).is_none_or(|entry| entry.state != State::Listed))
        .collect();
    assert_eq!(unknown, [], "listed by KVM, and not known to be");
    let listed_too: Vec<&str> = msrgate_msrs::all()
        .iter()
        .filter(|entry| entry.state == State::Unlisted && listed.contains(&entry.msr.0))
        .map(|entry| entry.name())
        .collect();
    assert_eq!(listed_too, [""; 0], "known as unlisted, and listed by KVM");
}
