//! The signals of this process, which are the VMM's.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::signal::{self, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::unistd::Pid;

/// What is caught, and sent on. SIGSTOP and SIGKILL cannot be caught: the first leaves the VMM running, the second takes
/// it along.
const CAUGHT: [Signal; 10] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGWINCH,
    Signal::SIGTSTP,
    Signal::SIGCONT,
];

/// `si_code` of a signal that the kernel sent, such as a terminal's.
const SI_KERNEL: i32 = 0x80;

/// Signals as they arrive.
#[derive(Debug)]
pub(crate) struct Signals(SignalFd);

impl Signals {
    /// From here on they do nothing else.
    pub(crate) fn block() -> Result<Signals, Errno> {
        let mut signals: SigSet = CAUGHT.into_iter().collect();
        signals.add(Signal::SIGCHLD);
        let mut blocked = signals;
        // A trace that grows beyond the limit on a file's size cannot be written; that is no reason to end.
        blocked.add(Signal::SIGXFSZ);
        blocked.thread_block()?;
        SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map(Signals)
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    pub(crate) fn read(&self) -> Result<Option<siginfo>, Errno> {
        self.0.read_signal()
    }

    /// Sends it to a child that has not got it by itself.
    pub(crate) fn pass_on(&self, signal: &siginfo, child: Pid) {
        if let Some(which) = number(signal)
            && which != Signal::SIGCHLD
            && is_for(signal, child)
        {
            // It may have ended meanwhile, which SIGCHLD tells.
            let _ = signal::kill(child, which);
        }
    }
}

pub(super) fn number(signal: &siginfo) -> Option<Signal> {
    Signal::try_from(i32::try_from(signal.ssi_signo).ok()?).ok()
}

/// Whether the kernel sent it, as for a terminal that hangs up.
pub(super) fn is_terminals(signal: &siginfo) -> bool {
    signal.ssi_code == SI_KERNEL
}

/// Whether the child has not got the signal by itself: what a terminal sends goes to both, as they are one group.
fn is_for(signal: &siginfo, child: Pid) -> bool {
    signal.ssi_code != SI_KERNEL && signal.ssi_pid.cast_signed() != child.as_raw()
}
