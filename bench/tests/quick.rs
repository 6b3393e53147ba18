//! The benches that need no KVM build and run. No figure is looked at.

mod run;

#[test]
fn what_needs_no_kvm_is_measured() {
    for entry in run::quick(&["lookup", "replace", "plan", "trace"]) {
        assert_eq!(run::skipped(&entry), None);
    }
}
