//! How a child ends, and this process as the child did.

use nix::errno::Errno;
use nix::sys::signal::{self, SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::exit::Exit;

/// What the child's change of state means; its status if that was its end. `tell` gets SIGSTOP where it was stopped, and SIGCONT
/// where it goes on.
pub(crate) fn changed(child: Pid, tell: impl Fn(Signal)) -> Result<Option<WaitStatus>, Errno> {
    let states = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED | WaitPidFlag::WCONTINUED;
    loop {
        match waitpid(child, Some(states)) {
            Ok(WaitStatus::Stopped(..)) => tell(Signal::SIGSTOP),
            Ok(WaitStatus::Continued(_)) => tell(Signal::SIGCONT),
            Ok(status @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..))) => return Ok(Some(status)),
            Ok(_) | Err(Errno::ECHILD) => return Ok(None),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Lets go of processes that have ended, and says whether there are more. The child may be among them.
pub(super) fn others(child: Pid, status: &mut Option<WaitStatus>) -> Result<bool, Errno> {
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
