//! Why a guest does not run.

use std::fmt;
use std::io;

use msrgate_core::Access;

/// Why a guest does not run.
#[derive(Debug)]
#[non_exhaustive]
pub enum GuestError {
    /// KVM refused something while the guest was set up or reset.
    Kvm {
        /// What was being done.
        doing: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// No such vCPU, or more than the guest has room for.
    NoVcpu {
        /// Which, counted from 0.
        vcpu: usize,
    },
    /// The guest cannot go on from an access. It was reset and can run others.
    GuestDied {
        /// Position of the access in the list, from 0.
        position: usize,
        /// The access.
        access: Access,
        /// What happened.
        how: GuestDied,
    },
}

/// How a guest broke.
#[derive(Debug)]
#[non_exhaustive]
pub enum GuestDied {
    /// Triple fault: KVM_EXIT_SHUTDOWN.
    Shutdown,
    /// KVM_EXIT_FAIL_ENTRY.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalError,
    /// An exception that is not #GP.
    Exception,
    /// KVM_RUN failed.
    Run {
        /// The kernel's error.
        source: io::Error,
    },
    /// An exit that nothing here causes.
    Exit {
        /// What kvm-ioctls says of it.
        exit: String,
    },
}

impl GuestError {
    pub(crate) fn of(doing: &'static str) -> impl Fn(kvm_ioctls::Error) -> GuestError {
        move |error| GuestError::Kvm {
            doing,
            source: io::Error::from_raw_os_error(error.errno()),
        }
    }
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestError::Kvm { doing, .. } => write!(f, "{doing} failed"),
            GuestError::NoVcpu { vcpu } => write!(f, "the guest has no vCPU {vcpu}"),
            GuestError::GuestDied { position, access, how } => {
                write!(f, "access {position}, {} {}", access.op(), access.msr())?;
                if let Access::Write { value, .. } = access {
                    write!(f, " = {value:#x}")?;
                }
                write!(f, ", broke the guest: {how}")
            }
        }
    }
}

impl fmt::Display for GuestDied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestDied::Shutdown => f.write_str("triple fault"),
            GuestDied::FailEntry { reason } => write!(f, "the processor refuses to enter it, reason {reason:#x}"),
            GuestDied::InternalError => f.write_str("KVM cannot emulate it"),
            GuestDied::Exception => f.write_str("an exception other than #GP"),
            GuestDied::Run { source } => write!(f, "KVM_RUN failed: {source}"),
            GuestDied::Exit { exit } => write!(f, "it left with {exit}"),
        }
    }
}

impl std::error::Error for GuestError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            GuestError::Kvm { source, .. } => Some(source),
            _ => None,
        }
    }
}
