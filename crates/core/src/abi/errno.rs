//! Error numbers.

use core::fmt;

/// A Linux error number that KVM returns for MSR filtering. `as i32` is the number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
#[repr(i32)]
pub enum Errno {
    /// Interrupted: a signal or `immediate_exit`.
    Eintr = 4,
    /// The VM is dead, or belongs to another process.
    Eio = 5,
    /// No memory.
    Enomem = 12,
    /// An address that cannot be read.
    Efault = 14,
    /// An argument that is refused.
    Einval = 22,
    /// A request that this descriptor does not know.
    Enotty = 25,
}

impl Errno {
    /// The name in `errno(3)`.
    pub const fn name(self) -> &'static str {
        match self {
            Errno::Eintr => "EINTR",
            Errno::Eio => "EIO",
            Errno::Enomem => "ENOMEM",
            Errno::Efault => "EFAULT",
            Errno::Einval => "EINVAL",
            Errno::Enotty => "ENOTTY",
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl core::error::Error for Errno {}
