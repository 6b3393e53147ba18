//! How the command ends.

use std::fmt;
use std::io;
use std::process::ExitCode;

use crate::refusal::TooMany;

/// The exit codes, the same for every subcommand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Exit {
    /// Yes, or done.
    Yes = 0,
    /// No: findings, a difference, a guest that would break.
    No = 1,
    /// Wrong usage, or unreadable input.
    Input = 2,
    /// This machine cannot: no KVM, no permission.
    Machine = 3,
    /// The guest or the VMM failed.
    Guest = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a subcommand did not get to its answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Standard output cannot be written.
    Output(io::Error),
    /// Told already, with its place.
    Reported(Exit),
    /// The policy needs more ranges than a filter has, which was told already.
    TooMany(Box<TooMany>),
    /// One line that says what is wrong and what to do.
    Line(Exit, String),
}

impl Failure {
    pub(crate) fn input(line: impl Into<String>) -> Failure {
        Failure::Line(Exit::Input, line.into())
    }

    pub(crate) fn exit(&self) -> Exit {
        match self {
            Failure::Output(_) => Exit::Input,
            Failure::TooMany(_) => Exit::No,
            Failure::Reported(exit) | Failure::Line(exit, _) => *exit,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Output(error) => write!(f, "the output cannot be written: {error}"),
            Failure::Reported(_) | Failure::TooMany(_) => f.write_str("not done, for the reasons above"),
            Failure::Line(_, line) => f.write_str(line),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Output(error)
    }
}

/// An error with what caused it.
pub(crate) fn with_source(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
