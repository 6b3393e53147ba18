//! The cases on every implementation that needs no KVM.

use msrgate_suite::{CoreFilter, Engine, Flat, Implementation, Map, Oracle, Planned, Svm, Vmx, cases, check_all};

/// All cases pass or are skipped, with their reasons printed.
fn check(implementation: &dyn Implementation) {
    let tally = check_all(&cases(), implementation);
    println!("{}\n{tally}", implementation.name());
    assert!(
        tally.failed.is_empty(),
        "{}:\n{}",
        implementation.name(),
        tally.failed.join(
            "
"
        )
    );
    assert!(tally.passed > 0, "every case was skipped");
}

#[test]
fn the_oracle_does_what_the_cases_say() {
    check(&Oracle);
}

#[test]
fn the_decision_map_does_what_the_cases_say() {
    check(&Map);
}

#[test]
fn the_plan_does_what_the_cases_say() {
    check(&Planned);
}

#[test]
fn the_filter_does_what_the_cases_say() {
    check(&CoreFilter);
}

#[test]
fn the_flat_filter_does_what_the_cases_say() {
    check(&Flat);
}

#[test]
fn the_vmx_bitmap_does_what_the_cases_say() {
    check(&Vmx);
}

#[test]
fn the_svm_permissions_map_does_what_the_cases_say() {
    check(&Svm);
}

#[test]
fn the_engine_does_what_the_cases_say_by_vm_exit() {
    check(&Engine::VM_EXIT);
}

#[test]
fn the_engine_does_what_the_cases_say_by_emulator() {
    check(&Engine::EMULATOR);
}
