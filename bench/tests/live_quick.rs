//! The benches on this machine's KVM build and run. No figure is looked at.

mod run;

#[test]
fn what_needs_kvm_is_measured() {
    let required = std::env::var_os("MSRGATE_LANE_REQUIRE").is_some_and(|required| required == "1");
    for entry in run::quick(&["exit_dispatch", "constant_read", "install"]) {
        // Which values are held is the kernel's affair.
        let may_lack = entry["key"] == "constant_read";
        if let Some(why) = run::skipped(&entry) {
            assert!(may_lack || !required, "{why}");
            println!("skipped: {why}");
        }
    }
}
