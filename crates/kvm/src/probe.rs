//! What this kernel can do.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use msrgate_core::abi;

use crate::{OsError, ioctl};

/// Where KVM is.
const DEV_KVM: &str = "/dev/kvm";

/// Proof that the kernel has MSR filters and hands accesses to user space. [`Capabilities::install`] goes on from here.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities(());

impl Capabilities {
    /// After a gate was removed.
    pub(crate) fn again() -> Capabilities {
        Capabilities(())
    }
}

/// Opens `/dev/kvm`, for callers that have no descriptor of it yet.
pub fn open() -> Result<File, ProbeError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEV_KVM)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ProbeError::NoKvm,
            io::ErrorKind::PermissionDenied => ProbeError::NoPermission,
            _ => ProbeError::Open { source: source.into() },
        })
}

/// Asks `kvm`, a descriptor of `/dev/kvm` or of a VM, what it can do: by KVM_CHECK_EXTENSION, never by a version, since
/// distributions carry features back.
pub fn probe(kvm: &impl AsRawFd) -> Result<Capabilities, ProbeError> {
    for capability in [Capability::UserSpaceMsr, Capability::MsrFilter] {
        match ioctl::check_extension(kvm, capability.number()) {
            Ok(true) => {}
            Ok(false) => return Err(ProbeError::Missing { capability }),
            Err(source) => return Err(ProbeError::NotKvm { source }),
        }
    }
    Ok(Capabilities(()))
}

/// What msrgate needs of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Capability {
    /// `KVM_CAP_X86_USER_SPACE_MSR`: accesses that fail can be answered from user space.
    UserSpaceMsr,
    /// `KVM_CAP_X86_MSR_FILTER`: a VM can hold a filter.
    MsrFilter,
}

impl Capability {
    /// The kernel's number.
    pub const fn number(self) -> u32 {
        match self {
            Capability::UserSpaceMsr => abi::CAP_X86_USER_SPACE_MSR,
            Capability::MsrFilter => abi::CAP_X86_MSR_FILTER,
        }
    }

    /// The kernel's name.
    pub const fn name(self) -> &'static str {
        match self {
            Capability::UserSpaceMsr => "KVM_CAP_X86_USER_SPACE_MSR",
            Capability::MsrFilter => "KVM_CAP_X86_MSR_FILTER",
        }
    }
}

/// Why this machine cannot.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ProbeError {
    /// There is no `/dev/kvm`.
    NoKvm,
    /// `/dev/kvm` is there, and this user may not open it.
    NoPermission,
    /// `/dev/kvm` does not open for another reason.
    Open {
        /// The kernel's error.
        source: OsError,
    },
    /// The descriptor is not one of `/dev/kvm`.
    NotKvm {
        /// The kernel's error.
        source: OsError,
    },
    /// The kernel lacks a capability.
    Missing {
        /// Which.
        capability: Capability,
    },
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbeError::NoKvm => write!(
                f,
                "{DEV_KVM} does not exist: load kvm_intel or kvm_amd, and turn virtualization on in the firmware"
            ),
            ProbeError::NoPermission => {
                write!(f, "this user may not open {DEV_KVM}: join the group that owns it")
            }
            ProbeError::Open { .. } => write!(f, "{DEV_KVM} does not open"),
            ProbeError::NotKvm { .. } => write!(f, "the descriptor is not one of {DEV_KVM}"),
            ProbeError::Missing { capability } => write!(
                f,
                "the kernel has no {} ({}): Linux 5.10 and newer do on x86",
                capability.name(),
                capability.number()
            ),
        }
    }
}

impl std::error::Error for ProbeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ProbeError::Open { source } | ProbeError::NotKvm { source } => Some(source),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_of_something_else_is_not_kvm() {
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(probe(&null), Err(ProbeError::NotKvm { .. })));
    }
}
