//! The VMM as a child that nobody notices: its signals, its stops and its end are this process's own.

use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::SystemTime;

use msrgate_supervise::{Cookies, Listener};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::control::Offered;
use crate::exit::{Exit, Failure};
use crate::run::end::{changed, end, others};
use crate::run::killed::Killed;
use crate::run::monitor::Monitor;
use crate::run::signals::{Signals, is_terminals, number};
use crate::run::writer::{Lines, Output};

/// What is started.
pub(crate) struct Vmm<'a> {
    pub(crate) command: Command,
    pub(crate) program: &'a Path,
    pub(crate) started: SystemTime,
    pub(crate) no_new_privs: bool,
}

/// What answers calls.
type Serve = Box<dyn FnOnce(&Listener) -> io::Result<()> + Send>;

/// What is done with its calls.
pub(crate) struct Service {
    /// The ioctls that wait.
    pub(crate) requests: Vec<u32>,
    /// Locked while a thread of the VMM stands still: its stops are for whoever serves to wait for.
    pub(crate) tracing: Arc<Mutex<()>>,
    /// Answers them, in a thread of its own.
    pub(crate) serve: Serve,
    /// Writes what is told, in another: a byte in the pipe says that it is out.
    pub(crate) write: Box<dyn FnOnce(PipeWriter) + Send>,
    /// SIGUSR1 asks for a summary, and is not the VMM's.
    pub(crate) sums_up: bool,
    /// Starts what answers others, with the signals of the thread that does.
    pub(crate) beside: Box<dyn FnOnce() -> io::Result<Option<Offered>>>,
    /// What SIGHUP does, and then it is not the VMM's.
    pub(crate) reads_again: Option<Arc<dyn Fn() + Send + Sync>>,
}

/// Whether the VMM has to start with `no_new_privs`: to others than root the kernel gives a filter of calls only so.
pub(crate) fn needs_no_new_privs(allow: bool) -> Result<bool, Failure> {
    let needed = !msrgate_supervise::may_administer();
    if needed && allow {
        let line = "without CAP_SYS_ADMIN the kernel lets a policy be kept only where the VMM cannot gain privileges \
                    (no_new_privs): leave --allow-new-privs out, or run msrgate as root";
        return Err(Failure::Line(Exit::Machine, line.to_owned()));
    }
    Ok(needed)
}

/// Starts the VMM, and waits for its end and for that of all that it has left behind. Then
/// this process ends as the VMM did, unless its front has.
pub(crate) fn run(
    mut vmm: Vmm<'_>,
    service: Service,
    cookies: &Cookies,
    lines: &Lines,
    monitor: &mut Monitor,
) -> Result<Exit, Failure> {
    let machine = |line: String| Failure::Line(Exit::Machine, line);
    // Before they are blocked: the child starts as this process did.
    let cannot = |error: io::Error| machine(error.to_string());
    msrgate_supervise::bind(&mut vmm.command).map_err(cannot)?;
    msrgate_supervise::no_signal_for_stops().map_err(cannot)?;
    let expected = msrgate_supervise::notify(&mut vmm.command, &service.requests, cookies, vmm.no_new_privs);
    let expected = expected.map_err(cannot)?;
    let signals = Signals::block().map_err(|error| machine(format!("signals cannot be watched: {error}")))?;
    let (summed_up, done) = io::pipe().map_err(cannot)?;

    let child = vmm.command.spawn();
    let (child, listener) = match (child, expected.listener()) {
        (Ok(child), Ok(listener)) => (child, listener),
        (Err(error), Ok(_)) => return Err(not_started(vmm.program, &error)),
        // It got as far as to its filter, or did not.
        (_, Err(error)) if error.kind() != io::ErrorKind::WouldBlock => return Err(machine(no_filter(&error))),
        (Err(error), Err(_)) | (Ok(_), Err(error)) => return Err(not_started(vmm.program, &error)),
    };
    if vmm.no_new_privs {
        lines.say(
            "no_new_privs is set for the VMM, since it is not root's: what it starts gains no rights (setuid)"
                .to_owned(),
        );
    }
    let child = Pid::from_raw(child.id().cast_signed());
    let (serve, write) = (service.serve, service.write);
    // They start with this thread's signals blocked.
    let spawn = |name: &str| thread::Builder::new().name(name.to_owned());
    let written = spawn("writer").spawn(move || write(done)).map_err(cannot)?;
    let served = spawn("supervisor").spawn(move || serve(&listener)).map_err(cannot)?;
    let offered = (service.beside)().unwrap_or_else(|error| {
        lines.say(no_control(&error));
        None
    });
    let mut watch = Watch {
        child,
        signals,
        tracing: &service.tracing,
        sums_up: service.sums_up,
        reads_again: service.reads_again,
        summed_up,
        lines,
        started: vmm.started,
        status: None,
        stays: false,
    };
    let status = watch.run(monitor, served, written).map_err(|error| {
        let line = format!("`{}` cannot be waited for: {error}", vmm.program.display());
        machine(line)
    })?;
    drop(offered);
    match status {
        Some(status) => end(status),
        // The front has ended long ago.
        None => Ok(Exit::Yes),
    }
}

/// What is said where others cannot ask.
pub(crate) fn no_control(error: &io::Error) -> String {
    format!("`msrgate reload` and `msrgate top` do not reach this VMM, since there is no control socket: {error}")
}

fn not_started(program: &Path, error: &io::Error) -> Failure {
    let exit = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => Exit::Input,
        _ => Exit::Machine,
    };
    let why = match error.kind() {
        io::ErrorKind::NotFound if program.exists() => "its interpreter, which its first line names, is not there",
        io::ErrorKind::PermissionDenied if program.is_dir() => "it is a directory",
        io::ErrorKind::PermissionDenied => "it is not executable for this user: see `chmod +x`",
        _ => "",
    };
    let line = match why {
        "" => format!("`{}` cannot be started: {error}", program.display()),
        _ => format!("`{}` cannot be started: {why}", program.display()),
    };
    Failure::Line(exit, line)
}

/// Why the kernel does not let the VMM's calls wait.
fn no_filter(error: &io::Error) -> String {
    let why = match error.raw_os_error() {
        Some(nix::libc::EBUSY) => {
            "another supervisor lets calls wait here already, such as an outer `msrgate run` or a container's runtime, and \
             the kernel takes one: put policies into one by `extends`, or run msrgate outside"
        }
        Some(nix::libc::EINVAL | nix::libc::ENOSYS) => {
            "this kernel has no seccomp listeners, which it takes (Linux 5.10)"
        }
        _ => "",
    };
    match why {
        "" => format!("the kernel does not let the VMM's calls wait: {error}"),
        _ => format!("the VMM's calls cannot wait for msrgate: {why}"),
    }
}

/// How soon, in milliseconds, a child is looked at again that a signal tells of while a thread stands still.
const SOON: u8 = 5;
/// How often it is looked at whether a child was stopped, of which no signal tells.
const STOPS: u8 = 200;

/// What is waited for.
struct Watch<'a> {
    child: Pid,
    signals: Signals,
    tracing: &'a Mutex<()>,
    sums_up: bool,
    reads_again: Option<Arc<dyn Fn() + Send + Sync>>,
    summed_up: PipeReader,
    lines: &'a Lines,
    started: SystemTime,
    status: Option<WaitStatus>,
    /// The front has ended, and what is left is in the background.
    stays: bool,
}

impl Watch<'_> {
    /// Passes signals on until the child has ended, and stays until the last process has.
    fn run(
        &mut self,
        monitor: &mut Monitor,
        served: JoinHandle<io::Result<()>>,
        written: JoinHandle<()>,
    ) -> io::Result<Option<WaitStatus>> {
        let mut changes = false;
        loop {
            let mut ready = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::from(if changes { SOON } else { STOPS });
            match poll(&mut ready, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            while let Some(signal) = self.signals.read()? {
                match number(&signal) {
                    Some(Signal::SIGCHLD) => changes = true,
                    Some(Signal::SIGHUP) if self.reads_again.is_some() && !is_terminals(&signal) => {
                        if let Some(read) = self.reads_again.clone() {
                            // No other signal waits for it. Where there is no thread it is as if none had come.
                            let named = thread::Builder::new().name("reload".to_owned());
                            let _ = named.spawn(move || read());
                        }
                    }
                    // What is in the background is nobody's terminal's, and ends when its processes do.
                    _ if self.stays => {}
                    Some(Signal::SIGUSR1) if self.sums_up => self.lines.tell(Output::Summary),
                    _ => self.signals.pass_on(&signal, self.child),
                }
            }
            let Ok(not_traced) = self.tracing.try_lock() else {
                continue;
            };
            self.status = changed(self.child, |signal| monitor.show(signal))?.or(self.status);
            let others = others(self.child, &mut self.status)?;
            drop(not_traced);
            changes = false;
            match self.status {
                None => {}
                Some(_) if !others => break,
                Some(_) if self.stays => {}
                Some(status) => {
                    self.stays = true;
                    self.lines.tell(Output::Background);
                    wait_for_summary(&self.summed_up, &self.signals)?;
                    monitor.stay(status)?;
                }
            }
        }
        // Nobody is left who could call.
        let served = served.join();
        let killed = self.status.and_then(|status| Killed::by(status, self.started));
        if let Ok(Err(error)) = served {
            self.lines.say(format!("the supervisor ended: {error}"));
        }
        self.lines.tell(Output::End(killed));
        if wait_for_summary(&self.summed_up, &self.signals)? {
            // It has ended, or is about to.
            let _ = written.join();
        }
        Ok(self.status.filter(|_| !self.stays))
    }
}

/// Waits until a summary is out, or somebody wants an end: whoever reads it may not go on. Tells whether it is out.
pub(crate) fn wait_for_summary(mut summed_up: &PipeReader, signals: &Signals) -> io::Result<bool> {
    loop {
        let mut ready = [
            PollFd::new(summed_up.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if ready[0].any() == Some(true) {
            return Ok(summed_up.read(&mut [0])? > 0);
        }
        while let Some(signal) = signals.read()? {
            if is_end(number(&signal)) {
                return Ok(false);
            }
        }
    }
}

/// Whether a signal asks for an end.
pub(crate) fn is_end(signal: Option<Signal>) -> bool {
    matches!(
        signal,
        Some(Signal::SIGHUP | Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM)
    )
}
