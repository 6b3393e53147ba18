//! Processes that the command makes: one of its own, and the VMM's, as its child-to-be leaves it.

#![expect(unsafe_code, reason = "fork, and system calls between fork and exec")]

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::{fs, io};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Which of two processes this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Forked {
    /// The one that was there; the number is the other's.
    Parent(i32),
    /// The one that is new.
    Child,
}

/// `fork(2)`.
///
/// # Errors
/// The kernel's; and where this process has more than one thread, since others are not in the child, and what they have
/// locked stays locked there.
pub fn fork() -> io::Result<Forked> {
    let threads = fs::read_dir("/proc/self/task");
    let threads = threads
        .map_err(|error| io::Error::other(format!("/proc/self/task: {error}")))?
        .count();
    if threads != 1 {
        let line = format!("this process has {threads} threads");
        return Err(io::Error::other(line));
    }
    // SAFETY: there is no other thread, so that the child is a copy in which nothing is amiss, and may do all.
    match unsafe { libc::fork() } {
        0 => Ok(Forked::Child),
        child if child > 0 => Ok(Forked::Parent(child)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has SIGCHLD come for the end of a child and not for each stop of one: the supervisor stops a VMM's threads often, and
/// waits for that by itself.
///
/// # Errors
/// The kernel's.
pub fn no_signal_for_stops() -> io::Result<()> {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::SA_NOCLDSTOP, SigSet::empty());
    // SAFETY: no handler is called.
    unsafe { sigaction(Signal::SIGCHLD, &action) }?;
    Ok(())
}

/// Has the child start with the signals blocked that the calling thread has blocked at this call, and not with those
/// that it blocks afterwards; and has it killed where the thread that starts it ends before it does.
///
/// # Errors
/// The kernel's.
pub fn bind(command: &mut Command) -> io::Result<()> {
    let blocked = SigSet::thread_get_mask()?;
    let parent = std::process::id();
    let before_exec = move || {
        blocked.thread_set_mask()?;
        set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have ended before that.
        if std::os::unix::process::parent_id() != parent {
            return Err(io::ErrorKind::Interrupted.into());
        }
        Ok(())
    };
    // SAFETY: the closure makes three system calls, takes no lock and allocates nothing: its errors are plain numbers.
    unsafe { command.pre_exec(before_exec) };
    Ok(())
}
