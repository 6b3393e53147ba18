//! The kernel's calls with arguments that no `Gate` makes: of any bytes, at any address.
//!
//! For those who compare the kernel with another reading of its interface. An [`Arena`] is memory with known gaps, a
//! [`Caller`] makes the call, and nothing on the way looks at the argument.
//!
//! ```
//! use msrgate_guest::raw::Arena;
//!
//! let mut arena = Arena::new(1)?;
//! let page = arena.page(0).ok_or("one page")?;
//! page[Arena::PAGE - 8..].fill(0xff);
//! let end = arena.address(0).ok_or("one page")? + Arena::PAGE as u64;
//! // A call whose bitmap starts here reads eight bytes and no ninth.
//! assert!(arena.read(end - 8, &mut [0; 8]));
//! assert!(!arena.read(end - 8, &mut [0; 9]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![expect(unsafe_code, reason = "system calls, and memory that they may not read")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use msrgate_core::abi;

/// Pages that can be used, and behind each one a page that nobody can read.
///
/// The gaps stay mapped, without a right to them, so that no other mapping of the process fills them. All of it lies where
/// a pointer of 32 bits reaches.
#[derive(Debug)]
pub struct Arena {
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: an owned range of addresses, which belongs to no thread; it is written through `&mut` alone.
unsafe impl Send for Arena {}
// SAFETY: likewise; through `&` it is only read.
unsafe impl Sync for Arena {}

impl Arena {
    /// Bytes of a page.
    pub const PAGE: usize = 0x1000;

    /// So many pages of zeros, each with a gap behind it.
    pub fn new(pages: usize) -> io::Result<Arena> {
        let len = pages.checked_mul(2 * Self::PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let (rights, flags) = (
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
        );
        // SAFETY: a new mapping where the kernel likes; it replaces none.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, rights, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let arena = Arena { start, pages };
        for index in 0..pages {
            let page = arena.pointer(index).ok_or(io::ErrorKind::OutOfMemory)?;
            // SAFETY: a whole page of the mapping that was just made, and nothing refers to it yet.
            let result =
                unsafe { libc::mprotect(page.as_ptr().cast(), Self::PAGE, libc::PROT_READ | libc::PROT_WRITE) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(arena)
    }

    fn pointer(&self, index: usize) -> Option<NonNull<u8>> {
        if index >= self.pages {
            return None;
        }
        // SAFETY: the mapping is `pages` times two pages long, and `index` is less than `pages`.
        Some(unsafe { self.start.add(index * 2 * Self::PAGE) })
    }

    /// The bytes of one page, [`Self::PAGE`] of them.
    pub fn page(&mut self, index: usize) -> Option<&mut [u8]> {
        let page = self.pointer(index)?;
        // SAFETY: `new` made this page readable and writable and the kernel zeroed it; it is unmapped by `drop` alone,
        // and the borrow of `self` keeps any second reference away.
        Some(unsafe { std::slice::from_raw_parts_mut(page.as_ptr(), Self::PAGE) })
    }

    /// Where a page starts; its gap starts [`Self::PAGE`] bytes later.
    pub fn address(&self, index: usize) -> Option<u64> {
        Some(self.pointer(index)?.as_ptr().addr() as u64)
    }

    /// What the kernel's `copy_from_user` does, as far as addresses of the arena go: fills `to` from `address` on, or
    /// leaves it alone and gives false where a byte of it is in a gap or outside.
    #[must_use]
    pub fn read(&self, address: u64, to: &mut [u8]) -> bool {
        let within = address.checked_sub(self.start.as_ptr().addr() as u64);
        let Some(at) = within.and_then(|at| usize::try_from(at).ok()) else {
            return false;
        };
        let (index, offset) = (at / Self::PAGE, at % Self::PAGE);
        if !index.is_multiple_of(2) || to.len() > Self::PAGE - offset {
            return false;
        }
        let Some(page) = self.pointer(index / 2) else {
            return false;
        };
        // SAFETY: `new` made this page readable and the kernel zeroed it, so its bytes are values; who would write it
        // needs `&mut self`, which the borrow rules out.
        let page = unsafe { std::slice::from_raw_parts(page.as_ptr(), Self::PAGE) };
        if let Some(from) = page.get(offset..offset + to.len()) {
            to.copy_from_slice(from);
        }
        true
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, in its whole length; no reference into it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.pages * 2 * Self::PAGE) };
    }
}

/// The calls that can be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// KVM_X86_SET_MSR_FILTER: the kernel reads 392 bytes, then the bitmaps that they name.
    SetMsrFilter,
    /// The number that a 32-bit process has for it, with 260 bytes.
    SetMsrFilterCompat,
    /// KVM_ENABLE_CAP: the kernel reads 104 bytes.
    EnableCap,
}

impl Request {
    /// The number of the ioctl.
    pub const fn number(self) -> u32 {
        match self {
            Request::SetMsrFilter => abi::SET_MSR_FILTER,
            Request::SetMsrFilterCompat => abi::SET_MSR_FILTER_COMPAT,
            Request::EnableCap => abi::ENABLE_CAP,
        }
    }
}

/// Makes calls on one of KVM's descriptors: `/dev/kvm`, a VM or a vCPU.
#[derive(Debug)]
pub struct Caller(OwnedFd);

impl Caller {
    /// Owns a duplicate of the descriptor, so that whoever runs the VM's vCPUs is not kept from it.
    pub fn of(fd: &impl AsRawFd) -> io::Result<Caller> {
        // SAFETY: `fd` is borrowed, and with it its descriptor, which so stays open over the call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        fd.try_clone_to_owned().map(Caller)
    }

    /// Makes the call with any number for an address, and gives the kernel's error.
    ///
    /// KVM_ENABLE_CAP turns on what the bytes say, which for other capabilities than
    /// `KVM_CAP_X86_USER_SPACE_MSR` may make the VM another one.
    pub fn call(&self, request: Request, argp: u64) -> io::Result<()> {
        // SAFETY: on KVM's descriptors all three requests only read from `argp` and from the bitmaps that a filter
        // names; the kernel checks each address and gives EFAULT where this process has nothing. What it copies decides
        // what the VM does, and no memory of this process is written.
        let result = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::c_ulong::from(request.number()),
                argp as libc::c_ulong,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_between_the_pages_cannot_be_read() {
        let mut arena = Arena::new(2).unwrap();
        arena.page(1).unwrap().fill(7);
        assert!(arena.page(2).is_none());
        let (first, second) = (arena.address(0).unwrap(), arena.address(1).unwrap());
        assert_eq!(second - first, 2 * Arena::PAGE as u64);
        let mut bytes = [1; 4];
        assert!(arena.read(second + 0xffc, &mut bytes));
        assert_eq!(bytes, [7; 4]);
        for address in [
            0,
            first - 1,
            first + 0xffd,
            first + 0x1000,
            second - 1,
            second + 0xffd,
            second + 0x2000,
            u64::MAX,
        ] {
            assert!(!arena.read(address, &mut bytes), "{address:#x}");
        }
        assert_eq!(bytes, [7; 4]);
    }

    #[test]
    fn a_descriptor_of_something_else_gives_its_error() {
        let caller = Caller::of(&std::fs::File::open("/dev/null").unwrap()).unwrap();
        let error = caller.call(Request::SetMsrFilter, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }
}
