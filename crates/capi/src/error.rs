//! Errors as numbers and sentences.

use std::error::Error;
use std::ffi::{c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use msrgate_kvm::{InstallError, ProbeError, SaveError, StateError};
use msrgate_plan::PlanError;
use msrgate_policy::{CpuidNeeded, PolicyErrors};

/// The bytes of a message, with its NUL.
const MESSAGE: usize = 1024;

/// `struct msrgate_error`.
#[repr(C)]
pub struct ErrorBuffer {
    message: [c_char; MESSAGE],
}

impl ErrorBuffer {
    /// Stores the sentence, cut between two characters where it is too long.
    fn store(&mut self, sentence: &str) {
        let mut end = sentence.len().min(MESSAGE - 1);
        while !sentence.is_char_boundary(end) {
            end -= 1;
        }
        let bytes = sentence.bytes().take(end).map(|byte| match byte {
            0 => b' ',
            byte => byte,
        });
        for (place, byte) in self.message.iter_mut().zip(bytes.chain([0])) {
            *place = byte.cast_signed();
        }
    }
}

/// Why a call failed.
pub(crate) struct Failed {
    errno: c_int,
    sentence: String,
}

impl Failed {
    pub(crate) fn new(errno: c_int, sentence: impl Into<String>) -> Failed {
        let sentence = sentence.into();
        Failed { errno, sentence }
    }

    pub(crate) fn null(argument: &str) -> Failed {
        Failed::new(libc::EINVAL, format!("{argument} is NULL"))
    }

    fn of(errno: c_int, error: &dyn Error) -> Failed {
        let mut sentence = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            sentence = format!("{sentence}: {error}");
            source = error.source();
        }
        Failed::new(errno, sentence)
    }
}

impl From<PolicyErrors> for Failed {
    fn from(error: PolicyErrors) -> Failed {
        Failed::of(libc::EINVAL, &error)
    }
}

impl From<CpuidNeeded> for Failed {
    fn from(error: CpuidNeeded) -> Failed {
        Failed::of(libc::EINVAL, &error)
    }
}

impl From<PlanError> for Failed {
    fn from(error: PlanError) -> Failed {
        Failed::of(libc::E2BIG, &error)
    }
}

impl From<ProbeError> for Failed {
    fn from(error: ProbeError) -> Failed {
        let errno = match &error {
            ProbeError::NotKvm { source } | ProbeError::Open { source } => source.errno(),
            _ => libc::EOPNOTSUPP,
        };
        Failed::of(errno, &error)
    }
}

impl From<InstallError> for Failed {
    fn from(error: InstallError) -> Failed {
        let errno = match &error {
            InstallError::Kernel { source, .. }
            | InstallError::Io { source, .. }
            | InstallError::HostMsrs { source, .. } => source.errno(),
            InstallError::UnknownHandler { .. } => libc::ENOENT,
            _ => libc::EINVAL,
        };
        Failed::of(errno, &error)
    }
}

impl From<SaveError> for Failed {
    fn from(error: SaveError) -> Failed {
        let errno = match &error {
            SaveError::Unanswered => libc::EBUSY,
            SaveError::Exit => libc::EAGAIN,
            SaveError::Run(source) => source.errno(),
            SaveError::InHandler => libc::EDEADLK,
            _ => libc::EINVAL,
        };
        Failed::of(errno, &error)
    }
}

impl From<StateError> for Failed {
    fn from(error: StateError) -> Failed {
        let errno = match &error {
            StateError::OtherPolicy { .. } => libc::ESTALE,
            StateError::InHandler => libc::EDEADLK,
            _ => libc::EBADMSG,
        };
        Failed::of(errno, &error)
    }
}

/// A call's result as C has it: what it gives, or the negative error number with the sentence in `error`, which may be null.
pub(crate) fn guarded(error: *mut ErrorBuffer, call: impl FnOnce() -> Result<c_int, Failed>) -> c_int {
    // Unwind safe: what a call changes it changes at its end, as a whole.
    let failed = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(given)) => return given,
        Ok(Err(failed)) => failed,
        Err(_) => Failed::new(
            libc::EIO,
            "a bug of msrgate: please report it with what standard error says",
        ),
    };
    // SAFETY: `msrgate.h` asks the caller for NULL or a buffer that can be written.
    if let Some(error) = unsafe { error.as_mut() } {
        error.store(&failed.sentence);
    }
    -failed.errno
}
