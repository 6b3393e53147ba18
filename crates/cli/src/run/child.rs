//! The VMM as a child that nobody notices: its signals, its stops and its end are this process's own.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{self, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::exit::{Exit, Failure};
use crate::run::record::Record;

/// What is caught, and sent on but for SIGUSR1. SIGSTOP and SIGKILL cannot be caught: the first leaves the VMM running,
/// the second takes it along.
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

/// Starts the VMM and waits for its end. The record is drained every so often; SIGUSR1 has it summed up.
pub(crate) fn run(
    mut command: Command,
    program: &Path,
    every: Option<Duration>,
    record: &mut Record<'_>,
) -> Result<WaitStatus, Failure> {
    let machine = |error: Errno| Failure::Line(Exit::Machine, format!("signals cannot be watched: {error}"));
    let mut signals: SigSet = CAUGHT.into_iter().collect();
    signals.add(Signal::SIGCHLD);
    let mut blocked = signals;
    // A trace that grows beyond the limit on a file's size cannot be written; that is no reason to end.
    blocked.add(Signal::SIGXFSZ);
    // Before they are blocked: the child starts as this process did.
    msrgate_hook::bind(&mut command).map_err(|error| Failure::Line(Exit::Machine, error.to_string()))?;
    blocked.thread_block().map_err(machine)?;
    let arrived = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(machine)?;

    let child = command.spawn().map_err(|error| {
        let exit = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => Exit::Input,
            _ => Exit::Machine,
        };
        Failure::Line(exit, format!("`{}` cannot be started: {error}", program.display()))
    })?;
    let child = Pid::from_raw(child.id().cast_signed());
    watch(child, &arrived, every, record).map_err(|error| {
        let line = format!("`{}` cannot be waited for: {error}", program.display());
        Failure::Line(Exit::Machine, line)
    })
}

/// Passes signals on until the child has ended.
fn watch(
    child: Pid,
    arrived: &SignalFd,
    every: Option<Duration>,
    record: &mut Record<'_>,
) -> Result<WaitStatus, Errno> {
    let timeout = every.and_then(|every| PollTimeout::try_from(every).ok());
    loop {
        let mut ready = [PollFd::new(arrived.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, timeout.unwrap_or(PollTimeout::NONE)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        record.drain();
        let Some(signal) = arrived.read_signal()? else {
            continue;
        };
        let number = i32::try_from(signal.ssi_signo).ok();
        match number.and_then(|number| Signal::try_from(number).ok()) {
            Some(Signal::SIGCHLD) => {
                if let Some(status) = changed(child)? {
                    return Ok(status);
                }
            }
            Some(Signal::SIGUSR1) => record.summary(),
            Some(which) if is_for(&signal, child) => {
                // It may have ended meanwhile, which SIGCHLD tells.
                let _ = signal::kill(child, which);
            }
            _ => {}
        }
    }
}

/// Whether the child has not got the signal by itself: what a terminal sends goes to both, as they are one group.
fn is_for(signal: &siginfo, child: Pid) -> bool {
    signal.ssi_code != SI_KERNEL && signal.ssi_pid.cast_signed() != child.as_raw()
}

/// What the child's change of state means; its status if that was its end.
fn changed(child: Pid) -> Result<Option<WaitStatus>, Errno> {
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
            Ok(WaitStatus::Stopped(..)) => {
                // The shell watches this process: it stops too, and whoever lets it go on lets the child go on.
                let _ = signal::raise(Signal::SIGSTOP);
                let _ = signal::kill(child, Signal::SIGCONT);
            }
            Ok(status @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..))) => return Ok(Some(status)),
            Ok(_) => return Ok(None),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Ends this process as the child ended.
pub(crate) fn end(status: WaitStatus) -> Result<Exit, Failure> {
    let code = match status {
        WaitStatus::Exited(_, code) => code,
        WaitStatus::Signaled(_, signal, _) => {
            // A second core would only hide the first.
            let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
            let _ = SigSet::from(signal).thread_unblock();
            // Twice: the first of some is caught by the runtime, which then takes its handler away.
            let _ = signal::raise(signal);
            let _ = signal::raise(signal);
            128 + signal as i32
        }
        _ => return Err(Failure::Line(Exit::Guest, "the VMM's end is not known".to_owned())),
    };
    std::process::exit(code)
}
