//! The VMM as a child that nobody notices: its signals, its stops and its end are this process's own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use msrgate_hook::{Board, Notifier};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{self, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::exit::{Exit, Failure};
use crate::run::keeper::Keeper;
use crate::run::record::Record;
use crate::run::stranger;

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

fn number(signal: &siginfo) -> Option<Signal> {
    Signal::try_from(i32::try_from(signal.ssi_signo).ok()?).ok()
}

/// Whether the child has not got the signal by itself: what a terminal sends goes to both, as they are one group.
fn is_for(signal: &siginfo, child: Pid) -> bool {
    signal.ssi_code != SI_KERNEL && signal.ssi_pid.cast_signed() != child.as_raw()
}

/// Starts the VMM, and waits for its end and for that of all that it has left behind. The record is drained every so
/// often; SIGUSR1 has it summed up. Gives the status of the VMM where nobody else got it.
pub(crate) fn run(
    mut command: Command,
    program: &Path,
    every: Option<Duration>,
    board: &Board,
    record: &mut Record<'_>,
    keeper: &mut Keeper,
) -> Result<Option<WaitStatus>, Failure> {
    let machine = |error: Errno| Failure::Line(Exit::Machine, format!("signals cannot be watched: {error}"));
    // Before they are blocked: the child starts as this process did.
    let cannot = |error: io::Error| Failure::Line(Exit::Machine, error.to_string());
    msrgate_hook::bind(&mut command).map_err(cannot)?;
    let notifier = msrgate_hook::notify(&mut command).map_err(cannot)?;
    let signals = Signals::block().map_err(machine)?;

    let child = command.spawn().map_err(|error| {
        let exit = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => Exit::Input,
            _ => Exit::Machine,
        };
        let why = match error.kind() {
            io::ErrorKind::NotFound if program.exists() => "its interpreter, which its first line names, is not there",
            io::ErrorKind::PermissionDenied if program.is_dir() => "it is a folder",
            io::ErrorKind::PermissionDenied => "it is not executable for this user: see `chmod +x`",
            _ => "",
        };
        let line = match why {
            "" => format!("`{}` cannot be started: {error}", program.display()),
            _ => format!("`{}` cannot be started: {why}", program.display()),
        };
        Failure::Line(exit, line)
    })?;
    let child = Pid::from_raw(child.id().cast_signed());
    let notifier = notifier.notifier();
    if notifier.is_some() {
        record.watched();
    }
    watch(child, &signals, every, notifier, board, record, keeper).map_err(|error| {
        let line = format!("`{}` cannot be waited for: {error}", program.display());
        Failure::Line(Exit::Machine, line)
    })
}

/// Passes signals on until the child has ended, and stays until the last one has.
fn watch(
    child: Pid,
    signals: &Signals,
    every: Option<Duration>,
    mut asked: Option<Notifier>,
    board: &Board,
    record: &mut Record<'_>,
    keeper: &mut Keeper,
) -> io::Result<Option<WaitStatus>> {
    let timeout = every.and_then(|every| PollTimeout::try_from(every).ok());
    let (mut status, mut stays) = (None, false);
    loop {
        let mut ready = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        ready.extend(
            asked
                .iter()
                .map(|notifier| PollFd::new(notifier.as_fd(), PollFlags::POLLIN)),
        );
        match poll(&mut ready, timeout.unwrap_or(PollTimeout::NONE)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let asks = ready.get(1).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
        match &asked {
            Some(notifier) if asks.contains(PollFlags::POLLIN) => stranger::answer(notifier, board),
            // Nobody is left who could ask.
            Some(_) if !asks.is_empty() => asked = None,
            _ => {}
        }
        record.drain();
        let Some(signal) = signals.read()? else {
            continue;
        };
        match number(&signal) {
            Some(Signal::SIGCHLD) => {
                status = changed(child)?.or(status);
                let others = others(child, &mut status)?;
                match status {
                    None => {}
                    Some(_) if !others && stays => return Ok(None),
                    Some(_) if !others => return Ok(status),
                    Some(_) if stays => {}
                    Some(status) => {
                        stays = true;
                        record.drain();
                        record.goes_on();
                        keeper.stay(status)?;
                    }
                }
            }
            // What is in the background is nobody's terminal's, and ends when its processes do.
            _ if stays => {}
            Some(Signal::SIGUSR1) => record.summary(),
            _ => signals.pass_on(&signal, child),
        }
    }
}

/// What the child's change of state means; its status if that was its end.
pub(crate) fn changed(child: Pid) -> Result<Option<WaitStatus>, Errno> {
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
            Ok(WaitStatus::Stopped(..)) => {
                // The shell watches this process: it stops too, and whoever lets it go on lets the child go on.
                let _ = signal::raise(Signal::SIGSTOP);
                let _ = signal::kill(child, Signal::SIGCONT);
            }
            Ok(status @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..))) => return Ok(Some(status)),
            Ok(_) | Err(Errno::ECHILD) => return Ok(None),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Lets go of processes that have ended, and says whether there are more. The child may be among them.
fn others(child: Pid, status: &mut Option<WaitStatus>) -> Result<bool, Errno> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return Ok(true),
            Ok(ended) if ended.pid() == Some(child) => *status = Some(ended),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// Ends this process as the child ended.
pub(crate) fn end(status: WaitStatus) -> ! {
    let code = match status {
        WaitStatus::Signaled(_, signal, _) => {
            // A second core would only hide the first.
            let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
            let _ = SigSet::from(signal).thread_unblock();
            // Twice: the first of some is caught by the runtime, which then takes its handler away.
            let _ = signal::raise(signal);
            let _ = signal::raise(signal);
            128 + signal as i32
        }
        WaitStatus::Exited(_, code) => code,
        // No other state is an end.
        _ => Exit::Guest as i32,
    };
    std::process::exit(code)
}
