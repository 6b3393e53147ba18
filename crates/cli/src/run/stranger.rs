//! Processes that ask for a VM past the library: they get none.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;

use msrgate_hook::{Asking, Board, Notifier};

/// Answers the one that waits, and says so where it gets no VM.
pub(crate) fn answer(notifier: &Notifier, board: &Board) {
    // It may have been killed meanwhile.
    let Ok(asking) = notifier.next() else { return };
    let thread = asking.thread;
    if asking.marked || !is_kvm(&asking) {
        asking.allow();
        return;
    }
    let program = fs::read_link(format!("/proc/{thread}/exe")).unwrap_or_default();
    let line = format!(
        "msrgate: no VM is made by `{}` (process {thread}): the call did not come through the policy's library, since the \
         program makes system calls by itself and not through glibc, gains rights when it starts, or was started \
         without LD_PRELOAD and {} in its environment\n",
        program.display(),
        msrgate_hook::VARIABLE
    );
    // Where it cannot be printed the summary counts it.
    let _ = io::stderr().lock().write_all(line.as_bytes());
    board.refused();
    asking.refuse();
}

fn is_kvm(asking: &Asking<'_>) -> bool {
    let file = fs::metadata(format!("/proc/{}/fd/{}", asking.thread, asking.descriptor));
    // `KVM_MINOR` in `include/linux/miscdevice.h`. One that cannot be looked at may be it.
    file.map_or(true, |file| file.rdev() == rustix::fs::makedev(10, 232))
}
