//! The cases on live KVM. Skipped where it does not open, unless MSRGATE_LANE_REQUIRE is 1.

use msrgate_guest::Mode;
use msrgate_suite::{Implementation, Library, Live, cases, check_all};

/// KVM, or `None` where the test is to be skipped.
fn live(mode: Mode, library: Library) -> Option<Live> {
    match Live::open(mode, library) {
        Ok(live) => Some(live),
        Err(error) => {
            let required = std::env::var("MSRGATE_LANE_REQUIRE").is_ok_and(|value| value == "1");
            assert!(!required, "the cases cannot run on KVM: {error}");
            println!("skipped: {error}");
            None
        }
    }
}

fn check(mode: Mode, library: Library) {
    let Some(live) = live(mode, library) else { return };
    let tally = check_all(&cases(), &live);
    println!("{}\n{tally}", live.name());
    assert!(
        tally.failed.is_empty(),
        "{}:\n{}",
        live.name(),
        tally.failed.join(
            "
"
        )
    );
    assert!(tally.passed > 0, "every case was skipped");
}

#[test]
fn the_kernel_does_what_the_cases_say_to_a_guest_in_real_mode() {
    check(Mode::Real, Library::Rust);
}

#[test]
fn the_kernel_does_what_the_cases_say_to_a_guest_in_64_bit_mode() {
    check(Mode::Long, Library::Rust);
}

#[test]
fn a_plan_that_was_embedded_does_what_the_cases_say() {
    check(Mode::Real, Library::Embedded);
}

#[test]
fn the_library_in_c_does_what_the_cases_say() {
    check(Mode::Real, Library::C);
}
