//! Who answers for a handler where the VMM has no code of that name.

use std::path::PathBuf;

/// A process that answers for a handler; `docs/policy.md` says what it is asked and how it answers.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Provider {
    /// A program and its arguments, which is asked on its standard input and answers on its standard output.
    Command(Vec<String>),
    /// A Unix stream socket on which another program listens.
    Socket(PathBuf),
}
