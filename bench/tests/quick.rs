//! The benches that need no KVM build and run. No figure is looked at.

mod run;

#[test]
fn what_needs_no_kvm_is_measured() {
    for entry in run::quick(&["lookup", "replace", "plan", "trace"]) {
        assert_eq!(run::skipped(&entry), None);
    }
}

#[test]
fn instructions_are_counted_where_there_is_valgrind() {
    for entry in run::quick(&["instructions"]) {
        if let Some(why) = run::skipped(&entry) {
            println!("skipped: {why}");
            continue;
        }
        for figure in entry["figures"].as_array().unwrap() {
            assert!(figure["ours"].as_f64().unwrap() > 1.0, "{figure}");
        }
    }
}
