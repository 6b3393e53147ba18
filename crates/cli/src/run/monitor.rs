//! Two processes: the front is the one that was started, and ends as the VMM's first process ends. The monitor starts the
//! VMM, and stays with what goes on in the background: a policy is asked for, and a trace is read, as long as a guest runs.

use std::fs::OpenOptions;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;

use msrgate_supervise::Forked;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::{Pid, getppid, setsid};

use crate::exit::{Exit, Failure};
use crate::run::end::{changed, end};
use crate::run::signals::Signals;

/// The monitor's way to its front.
#[derive(Debug)]
pub(crate) struct Monitor {
    front: PipeWriter,
    process: Pid,
}

impl Monitor {
    /// Leaves the front behind, which ends by itself; what returns is the monitor.
    pub(crate) fn part() -> Result<Monitor, Failure> {
        let (reader, front) = io::pipe().map_err(|error| machine(&error))?;
        let before = nix::unistd::getpid();
        // Before there is a VMM that could be seen to run: who sees it may send signals.
        let mask = SigSet::thread_get_mask().map_err(|error| machine(&error.into()))?;
        let signals = Signals::block().map_err(|error| machine(&error.into()))?;
        match msrgate_supervise::fork().map_err(|error| machine(&error))? {
            Forked::Parent(monitor) => {
                drop(front);
                let status = wait(Pid::from_raw(monitor), reader, &signals).map_err(|error| machine(&error.into()))?;
                end(status)
            }
            Forked::Child => {
                drop(signals);
                mask.thread_set_mask().map_err(|error| machine(&error.into()))?;
                // Whoever kills the front means the VMM.
                prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| machine(&error.into()))?;
                // Processes that lose their parent are this one's, not init's.
                prctl::set_child_subreaper(true).map_err(|error| machine(&error.into()))?;
                if getppid() != before {
                    return Err(machine(&io::ErrorKind::Interrupted.into()));
                }
                Ok(Monitor { front, process: before })
            }
        }
    }

    /// Has the front stop or go on as the VMM does: a shell watches the front. The monitor itself never stops, since whoever lets the
    /// VMM alone go on expects it to run.
    pub(crate) fn show(&self, signal: Signal) {
        // One that has been killed takes this process along.
        let _ = kill(self.process, signal);
    }

    /// Has the front end with this status, and lets go of its terminal, of who reads what it prints, and of its end.
    pub(crate) fn stay(&mut self, status: WaitStatus) -> io::Result<()> {
        let nowhere = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(&nowhere)?;
        rustix::stdio::dup2_stdout(&nowhere)?;
        rustix::stdio::dup2_stderr(&nowhere)?;
        setsid()?;
        // No folder is kept from being unmounted.
        std::env::set_current_dir("/")?;
        prctl::set_pdeathsig(None)?;
        self.front.write_all(&encode(status).to_le_bytes())
    }
}

fn machine(error: &io::Error) -> Failure {
    let line = format!("cannot start the process that stays with the VMM: {error}");
    Failure::Line(Exit::Machine, line)
}

/// Passes signals on to the monitor until it has ended, or stays.
fn wait(monitor: Pid, mut told: PipeReader, signals: &Signals) -> Result<WaitStatus, Errno> {
    let mut open = true;
    loop {
        // It may have ended before signals were watched.
        if let Some(status) = changed(monitor, |_| ())? {
            return Ok(status);
        }
        let mut ready = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(told.as_fd(), PollFlags::POLLIN),
        ];
        let count = if open { 2 } else { 1 };
        match poll(ready.get_mut(..count).unwrap_or_default(), PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        let tells = open && ready[1].any() == Some(true);
        if tells {
            let mut bytes = [0; 4];
            if told.read_exact(&mut bytes).is_ok() {
                return Ok(decode(monitor, i32::from_le_bytes(bytes)));
            }
            // It ends, which SIGCHLD tells.
            open = false;
        }
        while let Some(signal) = signals.read()? {
            signals.pass_on(&signal, monitor);
        }
    }
}

/// A status as `wait(2)` has it, as far as it matters here.
fn encode(status: WaitStatus) -> i32 {
    match status {
        WaitStatus::Signaled(_, signal, _) => signal as i32,
        WaitStatus::Exited(_, code) => code << 8,
        _ => 0,
    }
}

fn decode(process: Pid, status: i32) -> WaitStatus {
    WaitStatus::from_raw(process, status).unwrap_or(WaitStatus::Exited(process, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_arrives_as_it_was_sent() {
        let process = Pid::from_raw(7);
        for status in [
            WaitStatus::Exited(process, 0),
            WaitStatus::Exited(process, 255),
            WaitStatus::Signaled(process, Signal::SIGTERM, false),
        ] {
            assert_eq!(decode(process, encode(status)), status);
        }
    }
}
