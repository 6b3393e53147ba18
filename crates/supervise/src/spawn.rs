//! Processes that the command makes: one of its own, and the VMM's, as its child-to-be leaves it.

#![expect(unsafe_code, reason = "fork, and system calls between fork and exec")]

use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::{fs, io};

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
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: integers, a set of bits and an address that is not called (SIG_DFL is 0), of which all zeros are values.
    let action = unsafe { action.assume_init_mut() };
    action.sa_flags = libc::SA_NOCLDSTOP;
    // SAFETY: the kernel reads an action that lives over the call, and what it says is done by the kernel alone.
    let result = unsafe { libc::sigaction(libc::SIGCHLD, action, ptr::null_mut()) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has the child start with the signals blocked that the calling thread has blocked at this call, and not with those
/// that it blocks afterwards; and has it killed where the thread that starts it ends before it does.
///
/// # Errors
/// The kernel's.
pub fn bind(command: &mut Command) -> io::Result<()> {
    let mut mask = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: with no set to apply the call only writes the old one, to where it is told.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, ptr::null(), mask.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    // SAFETY: the call succeeded, so it filled the set.
    let mask = unsafe { mask.assume_init() };
    let parent = std::process::id();
    let before_exec = move || {
        // SAFETY: reads a set that lives over the call, and is async-signal-safe, as all must be after a fork.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: takes numbers and touches no memory of ours.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
            return Err(io::Error::last_os_error());
        }
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
