//! On live KVM. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1.

mod passthrough;
mod guest;

use kvm_ioctls::Kvm;

/// KVM, or `None` where the test is to be skipped.
pub(crate) fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            let required = std::env::var("MSRGATE_LANE_REQUIRE").is_ok_and(|value| value == "1");
            assert!(!required, "/dev/kvm does not open: {error}");
            println!("skipped: /dev/kvm does not open: {error}");
            None
        }
    }
}
