//! The memory of the process that calls.

use core::fmt;

use crate::Errno;

/// The address space of the process that makes an ioctl: the kernel's `copy_from_user`.
///
/// A closure from address and buffer will do.
pub trait UserMemory {
    /// Fills `buf` from `address` on, or fails where a single byte of it cannot be read. Address 0 is not special, and
    /// `address + buf.len()` may wrap; both are merely unmapped in most address spaces.
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), Fault>;
}

impl<F: Fn(u64, &mut [u8]) -> Result<(), Fault>> UserMemory for F {
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), Fault> {
        self(address, buf)
    }
}

/// Some byte cannot be read: EFAULT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault;

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the address cannot be read")
    }
}

impl core::error::Error for Fault {}

impl From<Fault> for Errno {
    fn from(_: Fault) -> Errno {
        Errno::Efault
    }
}
