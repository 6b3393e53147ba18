//! Running a case on an implementation.

use std::collections::BTreeMap;
use std::fmt;

use crate::{AccessStep, Call, CallResult, Case, Process, Seen, Step};

/// Something that says what MSR accesses get.
pub trait Implementation {
    /// What reports call it.
    fn name(&self) -> &str;
    /// A fresh VM with the case's policy in force; `process` makes the calls.
    fn start(&self, case: &Case, process: Process) -> Result<Box<dyn Subject + '_>, Stop>;
}

/// A VM that runs one case.
pub trait Subject {
    /// What the access comes to, as far as the implementation can say.
    fn access(&mut self, step: &AccessStep) -> Result<Seen, Stop>;

    /// What the call gives; `None` where it means nothing here and changes nothing that could be said.
    fn call(&mut self, _: &Call) -> Result<Option<CallResult>, Stop> {
        Err(Stop::skip("it takes no calls"))
    }

    /// Puts another policy in force.
    fn replace(&mut self, _: &str) -> Result<(), Stop> {
        Err(Stop::skip("it remembers nothing from one policy to the next"))
    }

    /// The VM dies.
    fn kill(&mut self) -> Result<(), Stop> {
        Err(Stop::skip("it has no VM that could die"))
    }
}

/// Why a case ends early.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The implementation cannot run it, for this reason.
    Skip(String),
    /// The implementation is wrong, and how.
    Fail(String),
}

impl Stop {
    /// The implementation cannot.
    pub fn skip(reason: impl fmt::Display) -> Stop {
        Stop::Skip(reason.to_string())
    }

    /// Says how the implementation is wrong.
    pub fn fail(how: impl fmt::Display) -> Stop {
        Stop::Fail(how.to_string())
    }
}

/// What came of a case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Checked {
    /// As expected.
    Passed,
    /// The implementation cannot run it, or can say nothing of what it expects.
    Skipped(String),
    /// Not as expected, and what.
    Failed(String),
}

/// Runs a case and compares.
pub fn check(case: &Case, process: Process, implementation: &dyn Implementation) -> Checked {
    match checks(case, process, implementation) {
        Ok(0) => Checked::Skipped("it can say nothing of what the case expects".into()),
        Ok(_) => Checked::Passed,
        Err(Stop::Skip(reason)) => Checked::Skipped(reason),
        Err(Stop::Fail(how)) => Checked::Failed(how),
    }
}

/// Runs a case and tells what each access came to.
pub fn run(case: &Case, process: Process, implementation: &dyn Implementation) -> Result<Vec<Seen>, Stop> {
    let mut subject = implementation.start(case, process)?;
    let mut all = Vec::new();
    for step in &case.steps {
        match step {
            Step::Access(step) => all.push(subject.access(step)?),
            Step::Call(call) => drop(subject.call(call)?),
            Step::Replace(policy) => subject.replace(policy)?,
            Step::Kill => subject.kill()?,
        }
    }
    Ok(all)
}

/// How many expectations were compared.
fn checks(case: &Case, process: Process, implementation: &dyn Implementation) -> Result<usize, Stop> {
    let mut subject = implementation.start(case, process)?;
    let mut compared = 0;
    for (step, number) in case.steps.iter().zip(1..) {
        let at = |how: String| Stop::Fail(format!("step {number}, {{ {step} }}: {how}"));
        match step {
            Step::Access(access) => {
                let seen = subject.access(access).map_err(|stop| match stop {
                    Stop::Fail(how) => at(how),
                    skip => skip,
                })?;
                compared += compare(&access.expect, &seen).map_err(at)?;
            }
            Step::Call(call) => {
                let gives = subject.call(call)?;
                if let (Some(expected), Some(gives)) = (call.gives, gives) {
                    if expected != gives {
                        return Err(at(format!("it gives {gives}")));
                    }
                    compared += 1;
                }
            }
            Step::Replace(policy) => subject.replace(policy)?,
            Step::Kill => subject.kill()?,
        }
    }
    Ok(compared)
}

/// Makes a call in the midst of another step and compares what it gives.
pub fn perform(call: &Call, make: impl FnOnce(&Call) -> Result<Option<CallResult>, Stop>) -> Result<(), Stop> {
    match (call.gives, make(call)?) {
        (Some(expected), Some(gives)) if expected != gives => Err(Stop::fail(format!("{{ {call} }} gives {gives}"))),
        _ => Ok(()),
    }
}

/// How many of the expectations were compared, or the first that is not met.
fn compare(expected: &Seen, seen: &Seen) -> Result<usize, String> {
    fn one<T: PartialEq + fmt::Debug>(what: &str, expected: &Option<T>, seen: &Option<T>) -> Result<usize, String> {
        match (expected, seen) {
            (Some(expected), Some(seen)) if expected != seen => Err(format!("{what} is {seen:?}")),
            (Some(_), Some(_)) => Ok(1),
            _ => Ok(0),
        }
    }
    Ok(one("action", &expected.action, &seen.action)?
        + one("verdict", &expected.verdict, &seen.verdict)?
        + one("exit", &expected.exit, &seen.exit)?
        + one("sees", &expected.sees, &seen.sees)?)
}

/// What came of all cases.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Tally {
    /// How many passed, counting each calling process.
    pub passed: usize,
    /// Reasons for which cases were skipped, and which those are, once for each calling process.
    pub skipped: BTreeMap<String, Vec<String>>,
    /// Case and difference of those that failed.
    pub failed: Vec<String>,
}

/// Runs all of `cases`, each for the processes that it names.
pub fn check_all(cases: &[Case], implementation: &dyn Implementation) -> Tally {
    let mut tally = Tally::default();
    for case in cases {
        let processes = match case.process {
            Some(process) => vec![process],
            // A policy is not installed by a raw call, so the process makes no difference.
            None if case.policy.is_some() => vec![Process::Native],
            None => vec![Process::Native, Process::Compat],
        };
        for process in processes {
            match check(case, process, implementation) {
                Checked::Passed => tally.passed += 1,
                Checked::Skipped(reason) => tally.skipped.entry(reason).or_default().push(case.name.clone()),
                Checked::Failed(how) => tally.failed.push(format!("{} ({process:?}): {how}", case.name)),
            }
        }
    }
    tally
}

/// For people: what passed, what was skipped and why, what failed.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "passed: {}", self.passed)?;
        for (reason, cases) in &self.skipped {
            let more = match cases.len() {
                1 => String::new(),
                number => format!(" and {} more", number - 1),
            };
            let first = cases.first().map_or("", |name| name);
            writeln!(f, "skipped: {first:?}{more}: {reason}")?;
        }
        for line in &self.failed {
            writeln!(f, "FAILED: {line}")?;
        }
        Ok(())
    }
}
