//! The tutorial, done from its first command to its last.

use std::fs;
use std::process::Command;

use crate::command::{Folder, Ran, program, without_times};
use crate::kvm::{kvm_opens, qemu_runs};
use crate::run::bare;

const TUTORIAL: &str = include_str!("../../../../docs/tutorial.md");

/// A command of the tutorial, and what it shows there.
struct Step {
    line: String,
    shown: String,
}

/// The steps of the blocks in this language, in order; lines that end with `\` go on.
fn steps(language: &str) -> Vec<Step> {
    let blocks = TUTORIAL.split("```").skip(1).step_by(2);
    let blocks = blocks.filter_map(|block| block.strip_prefix(language)?.strip_prefix('\n'));
    let mut steps: Vec<Step> = Vec::new();
    for block in blocks {
        for line in block.replace("\\\n", " ").lines() {
            match (line.strip_prefix("$ "), steps.last_mut()) {
                (Some(line), _) => steps.push(Step {
                    line: line.to_owned(),
                    shown: String::new(),
                }),
                (None, Some(step)) => step.shown.push_str(&format!("{line}\n")),
                (None, None) => panic!("{line}: before a command"),
            }
        }
    }
    steps
}

/// The command of a line, without what is behind `>`. What the line calls `small_vmm` is this test's own program.
fn command(folder: &Folder, line: &str) -> Command {
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut words = words.as_slice();
    let (first, rest) = words.split_first().expect("a program");
    assert_eq!(*first, "msrgate", "{line}");
    words = rest;
    let mut command = folder.command(&[]);
    if let Some(at) = words.iter().position(|word| *word == "small_vmm") {
        let vmm = bare(&words[at + 1..].join(" "));
        command.args(&words[..at]).arg(vmm.get_program()).args(vmm.get_args());
        for (name, value) in vmm.get_envs() {
            command.env(name, value.expect("a value"));
        }
    } else {
        command.args(words);
    }
    command
}

/// Whether lines are those that are shown: `...` stands for words of a line, and alone in its line for lines.
fn fits(shown: &[String], printed: &[String]) -> bool {
    match (shown.split_first(), printed.split_first()) {
        (None, None) => true,
        (Some((first, rest)), _) if first == "..." => {
            (0..=printed.len()).any(|skipped| fits(rest, &printed[skipped..]))
        }
        (Some((first, rest)), Some((line, others))) => {
            let mut parts = first.split("...");
            let begin = parts.next().unwrap_or_default();
            let Some(mut left) = line.strip_prefix(begin) else {
                return false;
            };
            let mut open = false;
            for part in parts {
                open = true;
                match left.find(part) {
                    Some(at) => left = &left[at + part.len()..],
                    None => return false,
                }
            }
            (left.is_empty() || open && first.ends_with("...")) && fits(rest, others)
        }
        _ => false,
    }
}

/// What a command printed on any host, without what it says of the MSRs that no filter stops on this host's kernel.
fn on_any_host(printed: &str) -> Vec<String> {
    let mut lines = without_times(printed);
    lines.retain(|line| !line.starts_with("msrgate: on Linux "));
    lines
}

fn walk(folder: &Folder, language: &str, expected: usize) {
    let steps = steps(language);
    assert_eq!(steps.len(), expected, "the tutorial's steps in {language}");
    for Step { line, shown } in steps {
        let (line, file) = match line.split_once(" > ") {
            Some((line, file)) => (line.to_owned(), Some(file.to_owned())),
            None => (line, None),
        };
        if let Some(name) = line.strip_prefix("cat ") {
            let text = fs::read_to_string(folder.path().join(name)).expect("a file");
            assert!(
                fits(&without_times(&shown), &without_times(&text)),
                "{line} shows\n{text}"
            );
            continue;
        }
        let ran = Ran::of(&mut command(folder, &line)).code(0);
        match file {
            Some(file) => folder.write(&file, &ran.out),
            None => {
                // The test runner's own line is before what this program prints as a VMM.
                let printed = ran.out.replace("running 1 test\n", "") + &ran.err;
                let (shown, printed) = (without_times(&shown), on_any_host(&printed));
                assert!(
                    fits(&shown, &printed),
                    "$ {line}\nshows\n{}\nand not\n{}",
                    printed.join("\n"),
                    shown.join("\n")
                );
            }
        }
    }
}

#[test]
fn a_newcomer_comes_to_a_policy_on_a_guest_in_five_commands() {
    if !kvm_opens() {
        return;
    }
    assert!(program().exists());
    walk(&Folder::new(), "console", 7);
}

#[test]
fn the_same_goes_for_qemu() {
    if !qemu_runs() {
        return;
    }
    walk(&Folder::new(), "console qemu", 4);
}

#[test]
fn what_is_shown_is_compared_but_for_what_is_left_out() {
    let lines = |text: &str| without_times(text);
    let printed = lines("a 1 b\nc\nd e f\ng 4.5 µs");
    for shown in [
        "a 1 b\n...\ng 9 ms",
        "a ...\nc\nd ... f\ng 4.5 s",
        "...",
        "...\nd e f\n...",
    ] {
        assert!(fits(&lines(shown), &printed), "{shown}");
    }
    for shown in ["a 1 b", "a 2 b\n...", "...\nd e\n...", "a ... c\n...", ""] {
        assert!(!fits(&lines(shown), &printed), "{shown}");
    }
}
