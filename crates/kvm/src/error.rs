//! Why a plan is not in force.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use msrgate_core::Msr;
use msrgate_plan::Preset;

/// An error number of Linux, which says what [`io::Error`] says of it and can be compared.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OsError(i32);

impl OsError {
    /// The number, of `errno(3)`.
    pub const fn errno(self) -> i32 {
        self.0
    }

    pub(crate) fn last() -> OsError {
        io::Error::last_os_error().into()
    }
}

impl From<io::Error> for OsError {
    /// An error that is none of the system's becomes EIO.
    fn from(error: io::Error) -> OsError {
        OsError(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl fmt::Display for OsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::error::Error for OsError {}

/// What was being done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Step {
    /// Duplicating the descriptor that the caller gave.
    Duplicate,
    /// KVM_ENABLE_CAP of `KVM_CAP_X86_USER_SPACE_MSR`.
    Mask,
    /// KVM_X86_SET_MSR_FILTER.
    Filter,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Duplicate => "duplicating the descriptor",
            Step::Mask => "enabling KVM_CAP_X86_USER_SPACE_MSR",
            Step::Filter => "KVM_X86_SET_MSR_FILTER",
        })
    }
}

/// Why a plan was not installed, replaced or removed. What was in force before still is.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum InstallError {
    /// The kernel does not accept what it should: it lacks a reason or the call (EINVAL, ENOTTY).
    Kernel {
        /// What was being done.
        step: Step,
        /// The kernel's error.
        source: OsError,
    },
    /// The plan names a handler that is not registered.
    UnknownHandler {
        /// The name.
        name: Arc<str>,
    },
    /// The plan reads the physical CPU's registers, and they cannot be opened.
    HostMsrs {
        /// Which device.
        path: PathBuf,
        /// The kernel's error.
        source: OsError,
    },
    /// The descriptor is not that of a vCPU.
    NotAVcpu {
        /// What the kernel says to a vCPU's call.
        source: OsError,
    },
    /// The vCPU's register does not hold a preset, which another kernel or another vCPU was found to do.
    PresetNotHeld {
        /// What was to be held.
        preset: Preset,
        /// What the kernel gives instead; `None` where it gives nothing.
        holds: Option<u64>,
    },
    /// The plan has a preset that the gate was not made with, and running vCPUs cannot be given it.
    PresetTooLate {
        /// The register.
        msr: Msr,
    },
    /// The plan lets the guest reach a register that holds a preset of the plan that the gate was made with.
    PresetLeft {
        /// The register.
        msr: Msr,
    },
    /// Another failure of a call: no memory, a VM of another process, a descriptor that is none.
    Io {
        /// What was being done.
        step: Step,
        /// The kernel's error.
        source: OsError,
    },
}

impl InstallError {
    pub(crate) fn of(step: Step) -> impl FnOnce(OsError) -> InstallError {
        move |source| match source.errno() {
            libc::EINVAL | libc::ENOTTY => InstallError::Kernel { step, source },
            _ => InstallError::Io { step, source },
        }
    }
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InstallError::Kernel { step, .. } => {
                write!(f, "the kernel refuses {step}: is the descriptor that of a VM?")
            }
            InstallError::UnknownHandler { name } => write!(f, "no handler `{name}` is registered"),
            InstallError::HostMsrs { path, .. } => write!(
                f,
                "{} does not open, which `host` reads: load the msr module (`modprobe msr`) and run with CAP_SYS_RAWIO",
                path.display()
            ),
            InstallError::NotAVcpu { .. } => f.write_str("the descriptor is not that of a vCPU"),
            InstallError::PresetNotHeld { preset, holds } => {
                write!(f, "the vCPU does not hold {:#x} in {}, but ", preset.value, preset.msr)?;
                match holds {
                    Some(value) => write!(f, "{value:#x}")?,
                    None => f.write_str("the kernel does not read it")?,
                }
                f.write_str(": compile the plan without presets, or for the vCPU's own CPUID")
            }
            InstallError::PresetTooLate { msr } => write!(
                f,
                "{msr} is preset in the new plan and was not in the first, and vCPUs that run cannot be given it: \
                 compile the plan without presets"
            ),
            InstallError::PresetLeft { msr } => write!(
                f,
                "{msr} holds a preset of the first plan, and the new one lets the guest reach it: \
                 install the plan before the VM's vCPUs are made"
            ),
            InstallError::Io { step, source } if source.errno() == libc::EIO => {
                write!(f, "{step} failed: the VM belongs to another process")
            }
            InstallError::Io { step, .. } => write!(f, "{step} failed"),
        }
    }
}

impl std::error::Error for InstallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            InstallError::Kernel { source, .. }
            | InstallError::NotAVcpu { source }
            | InstallError::HostMsrs { source, .. }
            | InstallError::Io { source, .. } => Some(source),
            InstallError::UnknownHandler { .. }
            | InstallError::PresetNotHeld { .. }
            | InstallError::PresetTooLate { .. }
            | InstallError::PresetLeft { .. } => None,
        }
    }
}
