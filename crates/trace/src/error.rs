//! A trace that cannot be read on.

use std::fmt;
use std::io;

/// A trace that cannot be read on.
#[derive(Debug)]
pub struct TraceError {
    /// The line, from 1; 0 where the whole text is meant.
    pub line: u64,
    pub(crate) message: String,
    pub(crate) source: Option<io::Error>,
}

impl TraceError {
    pub(crate) fn at(line: u64, message: impl Into<String>) -> TraceError {
        TraceError {
            line,
            message: message.into(),
            source: None,
        }
    }
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.message),
            line => write!(f, "line {line}: {}", self.message),
        }
    }
}

impl std::error::Error for TraceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|error| error as _)
    }
}
