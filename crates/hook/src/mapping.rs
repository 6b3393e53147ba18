//! Memory that two processes share, as words.

#![expect(unsafe_code, reason = "mmap")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// A part of a file that both processes have mapped.
///
/// What the other process does to it shows in the words' values and in nothing else: whoever reads one checks it.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is made of atomics.
unsafe impl Send for Mapping {}
// SAFETY: likewise.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `bytes` from `offset` on, both multiples of a page.
    pub(crate) fn new(file: &File, offset: u64, bytes: usize) -> io::Result<Mapping> {
        // What the file does not have would fault when it is touched.
        if file.metadata()?.len() < offset.saturating_add(bytes as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (null, rights) = (std::ptr::null_mut(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping where the kernel likes; it replaces none.
        let start = unsafe { libc::mmap(null, bytes, rights, libc::MAP_SHARED, file.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping {
            start,
            words: bytes / size_of::<AtomicU64>(),
        })
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is this long, starts at a page and so is aligned, and is unmapped by `drop` alone. The
        // file is sealed against shrinking, so every page of it is there. All bits are an `AtomicU64`, and shared
        // writes to atomics are no data race, whichever process makes them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, in its whole length; no reference into it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}

/// A word of a list that is long enough by construction; a list that is not is written nowhere.
pub(crate) fn word(words: &[AtomicU64], at: usize) -> &AtomicU64 {
    static NOWHERE: AtomicU64 = AtomicU64::new(0);
    words.get(at).unwrap_or(&NOWHERE)
}

/// What a word holds.
pub(crate) fn get(words: &[AtomicU64], at: usize) -> u64 {
    word(words, at).load(Ordering::Relaxed)
}

/// Changes a word.
pub(crate) fn set(words: &[AtomicU64], at: usize, value: u64) {
    word(words, at).store(value, Ordering::Relaxed);
}
