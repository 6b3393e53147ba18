//! What signal has killed the VMM, and what the kernel says of one that its own sandbox has killed.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::time::SystemTime;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

/// What killed the VMM.
pub(crate) struct Killed {
    pub(crate) signal: Signal,
    /// A line for people.
    pub(crate) line: String,
}

impl Killed {
    /// What ended a VMM that was started then; `None` if that was no signal.
    pub(crate) fn by(status: WaitStatus, started: SystemTime) -> Option<Killed> {
        let WaitStatus::Signaled(process, signal, _) = status else {
            return None;
        };
        let line = match signal {
            Signal::SIGSYS => by_sandbox(process, started),
            signal => format!("the VMM died of {signal}"),
        };
        Some(Killed { signal, line })
    }
}

/// One line for people on a VMM that died of SIGSYS. The kernel's log has the call and the thread, as an audit record of
/// type 1326 (AUDIT_SECCOMP), where no audit daemon takes it and the log may be read.
fn by_sandbox(process: Pid, started: SystemTime) -> String {
    let said = record(process, started).map_or_else(
        || ": which call it was, the kernel's audit log says".to_owned(),
        |(thread, call)| format!(": thread `{thread}` made system call {call}"),
    );
    format!("the VMM's own seccomp sandbox killed it (SIGSYS){said}")
}

/// The thread's name and the call, as the newest record of the process has them.
fn record(process: Pid, started: SystemTime) -> Option<(String, String)> {
    let mut log = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .ok()?;
    let age = started.elapsed().ok()?;
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let since = uptime - age.as_secs_f64() - 1.0;
    let mut found = None;
    let mut buffer = vec![0; 8192];
    // Each read gives one record: priority, number, microseconds, flags; text.
    while let Some(text) = log.read(&mut buffer).ok().and_then(|len| buffer.get(..len)) {
        if text.is_empty() {
            break;
        }
        let text = String::from_utf8_lossy(text);
        let micros: Option<f64> = text.split(',').nth(2).and_then(|micros| micros.parse().ok());
        let field = |name: &str| {
            let rest = text.split_once(&format!(" {name}="))?.1;
            rest.split_whitespace()
                .next()
                .map(|value| value.trim_matches('"').to_owned())
        };
        if micros.is_some_and(|micros| micros / 1e6 >= since)
            && text.contains("type=1326 ")
            && field("pid").as_deref() == Some(process.to_string().as_str())
            && field("sig").as_deref() == Some("31")
        {
            found = field("comm")
                .zip(field("syscall"))
                .map(|(thread, call)| match call.as_str() {
                    "16" => (thread, "16 (ioctl)".to_owned()),
                    _ => (thread, call),
                });
        }
    }
    found
}
