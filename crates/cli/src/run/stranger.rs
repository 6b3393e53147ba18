//! Processes that ask for a VM and have not loaded the library: they get none.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use msrgate_hook::{Asking, Board, Notifier};

/// Looks at who asks.
#[derive(Debug)]
pub(crate) struct Strangers<'a> {
    board: &'a Board,
    /// The library's file name.
    library: OsString,
}

impl<'a> Strangers<'a> {
    pub(crate) fn new(board: &'a Board, library: &Path) -> Strangers<'a> {
        let library = library.file_name().unwrap_or_default().to_owned();
        Strangers { board, library }
    }

    /// Answers the one that waits, and says so where it gets no VM.
    pub(crate) fn answer(&self, notifier: &Notifier) {
        // It may have been killed meanwhile.
        let Ok(asking) = notifier.next() else { return };
        let thread = asking.thread;
        if !is_kvm(&asking) || self.has_library(thread) {
            asking.allow();
            return;
        }
        let program = fs::read_link(format!("/proc/{thread}/exe")).unwrap_or_default();
        let line = format!(
            "msrgate: no VM is made by `{}` (process {thread}): it has not loaded the policy's library, since it is linked \
             statically or to another C library than glibc, gains rights when it starts, or was started without \
             LD_PRELOAD and {} in its environment\n",
            program.display(),
            msrgate_hook::VARIABLE
        );
        // Where it cannot be printed the summary counts it.
        let _ = io::stderr().lock().write_all(line.as_bytes());
        self.board.refused();
        asking.refuse();
    }

    fn has_library(&self, thread: u32) -> bool {
        let maps = fs::read(format!("/proc/{thread}/maps")).unwrap_or_default();
        let name = self.library.as_encoded_bytes();
        maps.split(|byte| *byte == b'\n').any(|line| line.ends_with(name))
    }
}

fn is_kvm(asking: &Asking<'_>) -> bool {
    let file = fs::metadata(format!("/proc/{}/fd/{}", asking.thread, asking.descriptor));
    // `KVM_MINOR` in `include/linux/miscdevice.h`. One that cannot be looked at may be it.
    file.map_or(true, |file| file.rdev() == rustix::fs::makedev(10, 232))
}
