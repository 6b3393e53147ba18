//! Why a file is not a filter.

use std::fmt;

/// Why a file is not a filter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RawError {
    message: String,
    line: Option<usize>,
    errno: Option<&'static str>,
}

impl RawError {
    pub(super) fn new(message: impl Into<String>) -> RawError {
        RawError {
            message: message.into(),
            line: None,
            errno: None,
        }
    }

    pub(super) fn errno(self, errno: &'static str) -> RawError {
        RawError {
            errno: Some(errno),
            ..self
        }
    }

    pub(super) fn at(self, line: usize) -> RawError {
        RawError {
            line: Some(line),
            ..self
        }
    }

    /// The line where it is wrong, from 1, where that can be told.
    pub fn line(&self) -> Option<usize> {
        self.line
    }

    /// With what the kernel would refuse it; `None` for what does not get so far.
    pub fn kernel_errno(&self) -> Option<&'static str> {
        self.errno
    }
}

impl fmt::Display for RawError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.message)?;
        match self.errno {
            Some(errno) => write!(f, " (KVM_X86_SET_MSR_FILTER gives {errno})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for RawError {}
