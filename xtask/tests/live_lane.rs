//! That a lane is what its name says. These are also the live tests to start from: one that cannot
//! run prints `skipped: ` and the reason, unless `MSRGATE_LANE_REQUIRE` says that it must run.

use std::env;
use std::fs::{self, OpenOptions};
use std::io;

/// Opens KVM, or says why the test is skipped.
fn kvm() -> Option<fs::File> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => Some(kvm),
        Err(error) => skip(&error),
    }
}

fn skip<T>(why: &io::Error) -> Option<T> {
    assert!(
        env::var_os("MSRGATE_LANE_REQUIRE").is_none(),
        "/dev/kvm does not open: {why}"
    );
    println!("skipped: /dev/kvm does not open: {why}");
    None
}

#[test]
fn kvm_opens() {
    let _ = kvm();
}

#[test]
fn the_vendor_module_and_the_kernel_are_the_ones_that_the_lane_promises() {
    let Some(_) = kvm() else { return };
    let module = match env::var("MSRGATE_LANE").as_deref() {
        Ok("nested") => "kvm_amd",
        Ok("intel") => "kvm_intel",
        _ => {
            println!("skipped: this machine's own KVM promises nothing");
            return;
        }
    };
    let modules = fs::read_to_string("/proc/modules").expect("the list of modules can be read");
    assert!(
        modules.lines().any(|line| line.split(' ').next() == Some(module)),
        "{modules}"
    );
    let series = env::var("MSRGATE_LANE_KERNEL").expect("the lane names its kernel");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the release can be read");
    assert!(release.starts_with(&format!("{series}.")), "{release}");
}
