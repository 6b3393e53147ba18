//! Test binaries: those that cargo built, and what a run of one says.
//!
//! Tests that need a live KVM are the integration tests whose names start with `live`, and those that boot Linux in a
//! VM the ones whose names start with `nested`. They run in the lanes and nowhere else. Those whose names start with
//! `browser` or `bare` run in stages of their own. Such a test prints `skipped: ` and a reason where it cannot run.

use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

use crate::process;

/// An executable that cargo built from a package of this workspace.
pub(crate) struct Binary {
    /// The package and the target, as in `msrgate-kvm::live_filter`.
    pub(crate) name: String,
    pub(crate) executable: PathBuf,
    /// The package's folder, where cargo runs tests.
    pub(crate) package: PathBuf,
    pub(crate) kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// A test that runs on any machine.
    Test,
    LiveTest,
    NestedTest,
    BrowserTest,
    BareTest,
    Program,
}

/// The arguments that give every cargo command of the tests the same units to build.
pub(crate) const SCOPE: [&str; 2] = ["--workspace", "--all-features"];

/// For builds in which few policies are read: to optimise the crate takes longer than that.
pub(crate) const POLICY_UNOPTIMISED: [&str; 2] = ["--config", "profile.dev.package.msrgate-policy.opt-level=0"];

/// Builds the workspace's tests and the programs that they run.
///
/// # Errors
/// That they do not compile; the compiler has spoken by then.
pub(crate) fn tests() -> Result<Vec<Binary>, String> {
    built(&[&["test", "--no-run"], &SCOPE[..]].concat())
}

/// What builds the command as it is released.
pub(crate) const RELEASE: [&str; 6] = ["build", "--release", "--package", "msrgate-cli", "--bin", "msrgate"];

/// Builds the command as it is released.
///
/// # Errors
/// That it does not compile, or that there is none.
pub(crate) fn released() -> Result<PathBuf, String> {
    let programs = built(&RELEASE)?;
    let program = programs.into_iter().next().ok_or("cargo built no msrgate")?;
    Ok(program.executable)
}

/// Runs a cargo command and says what it built.
///
/// # Errors
/// That it does not compile; the compiler has spoken by then.
pub(crate) fn built(arguments: &[&str]) -> Result<Vec<Binary>, String> {
    Ok(messages(arguments)?.iter().filter_map(binary).collect())
}

/// Runs a cargo command and gives its messages.
///
/// # Errors
/// That it does not compile; the compiler has spoken by then.
pub(crate) fn messages(arguments: &[&str]) -> Result<Vec<Value>, String> {
    let mut command = process::bound("cargo");
    command.args(arguments).arg("--message-format=json-render-diagnostics");
    command.current_dir(crate::root()).stderr(Stdio::inherit());
    let lines = process::output(&mut command)?;
    Ok(lines
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}

fn binary(message: &Value) -> Option<Binary> {
    let executable = message.get("executable")?.as_str()?;
    let package = Path::new(message.get("manifest_path")?.as_str()?).parent()?;
    let target = message.get("target")?;
    let name = target.get("name")?.as_str()?;
    let integration = target.get("kind")?.get(0)?.as_str()? == "test";
    let test = message.get("profile")?.get("test")?.as_bool()?;
    let kind = match (test, integration) {
        (true, true) if name.starts_with("live") => Kind::LiveTest,
        (true, true) if name.starts_with("nested") => Kind::NestedTest,
        (true, true) if name.starts_with("browser") => Kind::BrowserTest,
        (true, true) if name.starts_with("bare") => Kind::BareTest,
        (true, _) => Kind::Test,
        (false, _) => Kind::Program,
    };
    Some(Binary {
        name: format!("{}::{name}", package.file_name()?.to_string_lossy()),
        executable: executable.into(),
        package: package.to_path_buf(),
        kind,
    })
}

/// How many tests ended in which way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    /// The names of the failed tests and what each of them wrote.
    pub(crate) failures: String,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.push_str(&other.failures);
    }
}

impl std::fmt::Display for Count {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
            ..
        } = self;
        write!(formatter, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// Counts what test binaries say when they run with `--show-output`, one after the other.
///
/// A test that says that it skips itself has not passed, though its binary counts it so.
pub(crate) fn counted(text: &str) -> Count {
    let mut count = Count::default();
    let mut skips = 0;
    let mut heading = false;
    for line in text.lines() {
        if let Some(result) = line.strip_prefix("test result: ") {
            count += Count {
                passed: number_before(result, " passed"),
                failed: number_before(result, " failed"),
                skipped: number_before(result, " ignored"),
                failures: String::new(),
            };
        } else if heading && line.starts_with("skipped: ") {
            skips += 1;
        }
        heading = line.starts_with("---- ") && line.ends_with(" stdout ----");
    }
    count.passed = count.passed.saturating_sub(skips);
    count.skipped += skips;
    count.failures = failures(text);
    count
}

/// What the failed tests of a libtest output wrote, the last lines of each, without those of the tests that passed.
fn failures(text: &str) -> String {
    const LINES: usize = 30;
    let mut kept = String::new();
    let mut lines = text.lines().map(str::trim_end);
    while lines.by_ref().any(|line| line.trim_start() == "failures:") {
        let mut test: Vec<&str> = Vec::new();
        for line in lines.by_ref() {
            let end = matches!(line.trim_start(), "failures:" | "successes:");
            if end || line.trim_start().starts_with("---- ") || line.contains("test result: ") {
                for line in test
                    .iter()
                    .take(1)
                    .chain(test.iter().skip(1.max(test.len().saturating_sub(LINES))))
                {
                    kept.push_str(line);
                    kept.push('\n');
                }
                test.clear();
            }
            if end {
                break;
            }
            if !(line.is_empty() && test.is_empty()) {
                test.push(line);
            }
        }
        // The list of names that follows repeats what stands above each test's output.
        lines.by_ref().find(|line| line.contains("test result: "));
    }
    kept
}

/// Counts what `cargo nextest run` sums up: `5 tests run: 4 passed (1 slow), 1 failed, 2 skipped`.
/// What it calls skipped are also tests that were left out on purpose, so these are not counted.
pub(crate) fn summed(text: &str) -> Count {
    let Some(line) = text.lines().rfind(|line| line.trim_start().starts_with("Summary [")) else {
        return Count::default();
    };
    let run = number_before(line, " tests run") + number_before(line, " test run");
    let passed = number_before(line, " passed");
    Count {
        passed,
        failed: run.saturating_sub(passed),
        skipped: 0,
        failures: failures_of_nextest(text),
    }
}

/// The failed tests of nextest's output, and why each panicked.
fn failures_of_nextest(text: &str) -> String {
    let mut kept = String::new();
    let mut panicked = false;
    let each = text
        .lines()
        .take_while(|line| !line.trim_start().starts_with("Summary ["));
    for line in each.map(str::trim) {
        panicked = (panicked || line.starts_with("thread '") && line.contains(" panicked at "))
            && line != "stack backtrace:"
            && !line.starts_with("note: ");
        if line.starts_with("FAIL [") || panicked && !kept.is_empty() {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

fn number_before(text: &str, word: &str) -> u64 {
    let Some((before, _)) = text.split_once(word) else {
        return 0;
    };
    let digits = before.len()
        - before
            .trim_end_matches(|character: char| character.is_ascii_digit())
            .len();
    before.split_at(before.len() - digits).1.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_skips_itself_has_not_passed() {
        let text = "\
running 3 tests
test a ... ok
test b ... ok

successes:

---- a stdout ----
skipped: no KVM

successes:
    a
    b

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        assert_eq!(
            counted(text),
            Count {
                passed: 1,
                failed: 0,
                skipped: 2,
                ..Count::default()
            }
        );
    }

    #[test]
    fn results_of_several_binaries_add_up() {
        let text =
            "test result: ok. 2 passed; 0 failed; 0 ignored\ntest result: FAILED. 10 passed; 3 failed; 0 ignored\n";
        assert_eq!(
            counted(text),
            Count {
                passed: 12,
                failed: 3,
                ..Count::default()
            }
        );
    }

    #[test]
    fn what_a_failed_test_wrote_is_kept_and_what_others_wrote_is_not() {
        let text = "\
running 3 tests
test a ... ok
test b ... FAILED

successes:

---- a stdout ----
all is well

successes:
    a

failures:

---- b stdout ----
thread 'b' panicked at x.rs:1:1:
too late

failures:
    b

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        let kept = "---- b stdout ----\nthread 'b' panicked at x.rs:1:1:\ntoo late\n";
        assert_eq!(counted(text).failures.trim_end(), kept.trim_end());
        assert_eq!(counted(&text.repeat(2)).failures.matches("too late").count(), 2);
    }

    #[test]
    fn the_end_says_which_of_nextests_tests_failed_and_why() {
        let text = "\
        PASS [   0.005s] (1/2) it a
        FAIL [   0.735s] (2/2) it b
  stderr ───

    thread 'b' (19456) panicked at x.rs:1:1:
    too late
    stack backtrace:
       0: __rustc::rust_begin_unwind
────────────
     Summary [   0.012s] 2 tests run: 1 passed, 1 failed, 0 skipped
        FAIL [   0.735s] (2/2) it b
";
        let kept = "FAIL [   0.735s] (2/2) it b\nthread 'b' (19456) panicked at x.rs:1:1:\ntoo late\n";
        assert_eq!(summed(text).failures, kept);
    }

    #[test]
    fn a_summary_of_nextest_is_read() {
        let text = "     Summary [   0.012s] 25 tests run: 24 passed (1 slow), 1 failed, 2 skipped\n";
        assert_eq!(
            summed(text),
            Count {
                passed: 24,
                failed: 1,
                ..Count::default()
            }
        );
    }

    #[test]
    fn an_integration_test_is_what_its_name_says_and_a_unit_test_is_not() {
        let message = |kind: &str, name: &str| {
            serde_json::json!({
                "executable": "/t/x",
                "manifest_path": "/w/kvm/Cargo.toml",
                "target": { "name": name, "kind": [kind] },
                "profile": { "test": true },
            })
        };
        let kind = |kind: &str, name: &str| binary(&message(kind, name)).map(|binary| (binary.name, binary.kind));
        assert_eq!(
            kind("test", "live_filter"),
            Some(("kvm::live_filter".into(), Kind::LiveTest))
        );
        for (of, name, expected) in [
            ("test", "nested_qemu", Kind::NestedTest),
            ("test", "browser_report", Kind::BrowserTest),
            ("lib", "lively", Kind::Test),
            ("test", "filter", Kind::Test),
        ] {
            assert_eq!(kind(of, name).map(|(_, kind)| kind), Some(expected), "{name}");
        }
    }
}
