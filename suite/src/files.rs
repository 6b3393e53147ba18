//! The case files, compiled in.

use crate::{Case, parse};

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../testdata/cases/", $name)))),*]
    };
}

/// Name and text of each file of `testdata/cases`.
pub(crate) const FILES: [(&str, &str); 9] = files![
    "set-msr-filter.toml",
    "bitmaps-in-memory.toml",
    "enable-cap.toml",
    "verdict.toml",
    "deflection.toml",
    "monitor.toml",
    "policy-decision.toml",
    "policy-actions.toml",
    "policy-conditions.toml",
];

/// All cases. Panics where a file is not one of cases, since it is part of the program.
pub fn cases() -> Vec<Case> {
    let read = |(name, text): &(&str, &str)| match parse(text) {
        Ok(cases) => cases,
        Err(error) => panic!("testdata/cases/{name}: {error}"),
    };
    FILES.iter().flat_map(read).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_file_is_compiled_in() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/cases");
        let there: BTreeSet<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let here: BTreeSet<String> = FILES.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(there, here);
    }

    #[test]
    fn a_printed_case_reads_as_the_same_case() {
        for case in cases() {
            let text = case.to_string();
            assert_eq!(
                parse(&text).map_err(|error| error.to_string()),
                Ok(vec![case]),
                "{text}"
            );
        }
    }

    #[test]
    fn a_name_is_one_case_s() {
        let mut names = BTreeSet::new();
        for case in cases() {
            assert!(names.insert(case.name.clone()), "{}", case.name);
        }
    }

    #[test]
    fn every_step_expects_something_where_it_can() {
        for case in cases() {
            for step in &case.steps {
                match step {
                    crate::Step::Access(step) => assert_ne!(step.expect, crate::Seen::default(), "{}", case.name),
                    crate::Step::Call(call) => assert!(call.gives.is_some(), "{}", case.name),
                    _ => {}
                }
            }
        }
    }
}
