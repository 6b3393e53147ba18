//! Why a comparison does not come to its end.

use std::error::Error;
use std::fmt;
use std::io;

use msrgate_guest::GuestError;
use msrgate_kvm::{InstallError, ProbeError};

/// Why a comparison does not come to its end.
#[derive(Debug)]
#[non_exhaustive]
pub enum VerifyError {
    /// This machine has no KVM that can be used.
    Probe(ProbeError),
    /// The kernel refuses a call that sets a VM up.
    Setup {
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel does not take a plan.
    Install(InstallError),
    /// A guest fails in a way that is no difference between kernel and engine.
    Guest(GuestError),
    /// A thread panicked.
    Panicked,
}

impl fmt::Display for VerifyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VerifyError::Probe(error) => error.fmt(f),
            VerifyError::Setup { .. } => f.write_str("setting a VM up failed"),
            VerifyError::Install(error) => error.fmt(f),
            VerifyError::Guest(error) => error.fmt(f),
            VerifyError::Panicked => f.write_str("a thread panicked"),
        }
    }
}

impl Error for VerifyError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            VerifyError::Probe(error) => error.source(),
            VerifyError::Setup { source } => Some(source),
            VerifyError::Install(error) => error.source(),
            VerifyError::Guest(error) => error.source(),
            VerifyError::Panicked => None,
        }
    }
}

impl From<ProbeError> for VerifyError {
    fn from(error: ProbeError) -> VerifyError {
        VerifyError::Probe(error)
    }
}

impl From<io::Error> for VerifyError {
    fn from(source: io::Error) -> VerifyError {
        VerifyError::Setup { source }
    }
}

impl From<InstallError> for VerifyError {
    fn from(error: InstallError) -> VerifyError {
        VerifyError::Install(error)
    }
}

impl From<GuestError> for VerifyError {
    fn from(error: GuestError) -> VerifyError {
        VerifyError::Guest(error)
    }
}
