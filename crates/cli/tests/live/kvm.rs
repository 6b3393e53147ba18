//! Whether a test may use this machine's KVM.

use std::fs::OpenOptions;

/// Whether `/dev/kvm` opens. Where it does not the test is skipped, or fails if its lane requires KVM.
pub(crate) fn kvm_opens() -> bool {
    let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") else {
        return true;
    };
    let required = std::env::var("MSRGATE_LANE_REQUIRE").is_ok_and(|value| value == "1");
    assert!(!required, "/dev/kvm does not open: {error}");
    println!("skipped: /dev/kvm does not open: {error}");
    false
}
