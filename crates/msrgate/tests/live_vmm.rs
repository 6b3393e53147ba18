//! The example runs. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1.

#[path = "../examples/vmm.rs"]
#[allow(dead_code, unreachable_pub, reason = "a program of its own")]
mod vmm;

#[test]
fn the_guest_of_the_example_reads_what_the_policy_says() {
    if let Err(error) = msrgate::kvm::open() {
        let required = std::env::var("MSRGATE_LANE_REQUIRE").is_ok_and(|value| value == "1");
        assert!(!required, "{error}");
        println!("skipped: {error}");
        return;
    }
    assert_eq!(vmm::run(vmm::POLICY).unwrap(), [0x11, 0, 4]);
}

#[test]
fn a_policy_that_is_none_ends_the_example_with_a_text_that_underlines_what_is_wrong() {
    let error =
        vmm::run("version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = \"IA32_LSTRA\"\nread = \"allow\"\n").unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("vmm.toml:4:7: E"), "{text}");
    assert!(
        text.contains("\n    msr = \"IA32_LSTRA\"\n          ^^^^^^^^^^^^\n"),
        "{text}"
    );
}
