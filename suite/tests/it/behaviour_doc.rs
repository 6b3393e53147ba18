//! `docs/kvm-behaviour.md` names every test of `live/behaviour` and every case of raw calls, and no other.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use msrgate_suite::cases;

/// The sentences in `docs/kvm-behaviour.md`: tests between backquotes, as `module::name`, and cases between quotes.
fn named() -> (BTreeSet<String>, BTreeSet<String>) {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kvm-behaviour.md")).unwrap();
    let (mut tests, mut named) = (BTreeSet::new(), BTreeSet::new());
    for row in text.lines() {
        // Statement, shown by, five kernels, engine.
        let cells: Vec<&str> = row.split(" | ").collect();
        let [_, shown_by, _, _, _, _, _, _] = cells[..] else {
            continue;
        };
        let between = |mark| shown_by.split(mark).skip(1).step_by(2).map(str::to_owned);
        tests.extend(between('`'));
        named.extend(between('"'));
    }
    (tests, named)
}

/// The tests of `live/behaviour`, by its modules' text.
fn tests() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/live/behaviour");
    let mut tests = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(path).unwrap();
        for test in text.split("#[test]\nfn ").skip(1) {
            let name = test.split('(').next().unwrap();
            tests.insert(format!("{module}::{name}"));
        }
    }
    tests
}

#[test]
fn the_document_names_the_tests_that_there_are() {
    let (named, there) = (named().0, tests());
    assert!(!there.is_empty());
    assert_eq!(named.difference(&there).collect::<Vec<_>>(), [""; 0], "are named only");
    assert_eq!(there.difference(&named).collect::<Vec<_>>(), [""; 0], "are not named");
}

#[test]
fn the_document_names_the_cases_that_there_are() {
    let raw = cases().into_iter().filter(|case| case.policy.is_none());
    let (named, there): (_, BTreeSet<String>) = (named().1, raw.map(|case| case.name).collect());
    assert!(!there.is_empty());
    assert_eq!(named.difference(&there).collect::<Vec<_>>(), [""; 0], "are named only");
    assert_eq!(there.difference(&named).collect::<Vec<_>>(), [""; 0], "are not named");
}
