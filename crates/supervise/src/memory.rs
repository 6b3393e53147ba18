//! Memory that this process shares with a VMM's, as words.

#![expect(unsafe_code, reason = "mmap")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};

/// A mapping of a whole memfd, to read and to write.
///
/// What another process does to it shows in the words' values and in nothing else: whoever reads one checks it.
#[derive(Debug)]
pub(crate) struct Words {
    start: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is made of atomics.
unsafe impl Send for Words {}
// SAFETY: likewise.
unsafe impl Sync for Words {}

impl Words {
    /// So many words of zeros, and the file that they are. Where `alone`, no mapping that is made of the file from here
    /// on can be written to, in whichever process.
    pub(crate) fn new(count: usize, alone: bool) -> io::Result<(Words, File)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("msrgate", flags)?);
        Ok((Words::of(&file, count, alone)?, file))
    }

    /// Maps a memfd that is new and allows seals, whoever made it.
    pub(crate) fn of(file: &File, count: usize, alone: bool) -> io::Result<Words> {
        let bytes = count * size_of::<AtomicU64>();
        file.set_len(bytes as u64)?;
        let (null, rights) = (std::ptr::null_mut(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping where the kernel likes; it replaces none.
        let start = unsafe { libc::mmap(null, bytes, rights, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let words = Words { start, count };
        let mut seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        if alone {
            seals |= SealFlags::FUTURE_WRITE;
        }
        rustix::fs::fcntl_add_seals(file, seals)?;
        Ok(words)
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is this long, starts at a page and so is aligned, and is unmapped by `drop` alone. The
        // file is sealed against shrinking, so every page of it is there. All bits are an `AtomicU64`, and shared
        // writes to atomics are no data race, whichever process makes them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }

    /// A word; what lies beyond the end reads as 0 and is written nowhere.
    pub(crate) fn at(&self, number: usize) -> &AtomicU64 {
        static NOWHERE: AtomicU64 = AtomicU64::new(0);
        self.words().get(number).unwrap_or(&NOWHERE)
    }

    pub(crate) fn get(&self, number: usize) -> u64 {
        self.at(number).load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, number: usize, value: u64) {
        self.at(number).store(value, Ordering::Relaxed);
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, in its whole length; no reference into it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * size_of::<AtomicU64>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_this_process_alone_writes_cannot_be_mapped_to_be_written() {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        for (alone, errno) in [(true, Some(libc::EPERM)), (false, None)] {
            let (words, file) = Words::new(512, alone).unwrap();
            words.set(3, 7);
            let null = std::ptr::null_mut();
            // SAFETY: a new mapping where the kernel likes; it replaces none, and is not used.
            let mapped = unsafe { libc::mmap(null, 4096, rights, libc::MAP_SHARED, file.as_raw_fd(), 0) };
            let error = (mapped == libc::MAP_FAILED).then(io::Error::last_os_error);
            assert_eq!(error.and_then(|error| error.raw_os_error()), errno);
            assert_eq!((words.get(3), words.get(512)), (7, 0));
        }
    }
}
