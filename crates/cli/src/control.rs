//! The control socket: what another process of its owner asks of an msrgate that keeps a policy in force. One request a
//! connection, a line of JSON each way.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use std::{fs, io};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::exit::{Exit, Failure};

mod place;
mod server;

pub(crate) use place::Running;
pub(crate) use server::{Answer, Offered, Server};

/// What can be asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "lowercase")]
pub(crate) enum Request {
    /// What there is, and what the guests did so far.
    State,
    /// Another policy, as text with all that it extends.
    Reload { policy: String },
    /// Leave the VMM to itself.
    Detach,
}

/// What is answered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reply {
    Done(Value),
    /// One line for people.
    Error(String),
}

/// How long a request may take to arrive, what there is to be told by whoever writes, whose reader may pause, and an answer to be
/// taken. A busy machine may not run a process for seconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long is waited for one that is asked what there is, and may say that it cannot say.
pub(crate) const ASKS: Duration = Duration::from_secs(20);

/// The most bytes of a request, and of an answer.
const MOST: u64 = 16 << 20;

/// Why nothing was answered.
#[derive(Debug)]
pub(crate) enum NoAnswer {
    /// It has ended.
    Gone,
    /// One line for people: it refuses, or does not answer.
    Line(String),
}

impl Running {
    /// All on this machine that this user may ask, in the order of their processes. Sockets of processes that have ended are
    /// taken away.
    pub(crate) fn all() -> Vec<Running> {
        let mut all: Vec<Running> = place::sockets();
        all.sort_by_key(|running| running.process);
        all
    }

    /// The one that a process is or belongs to: msrgate's own, or the VMM's; without, the only one.
    pub(crate) fn find(process: Option<i32>) -> Result<Running, Failure> {
        let mut all = Running::all();
        let Some(process) = process else {
            return match (all.pop(), all.is_empty()) {
                (Some(only), true) => Ok(only),
                (None, _) => Err(Failure::input(
                    "no VMM runs under msrgate here, or it is another user's: see `msrgate run`",
                )),
                (Some(last), false) => {
                    let all = all.iter().chain([&last]).map(|running| running.process.to_string());
                    Err(Failure::input(format!(
                        "several VMMs run under msrgate here, name the process of one: {}",
                        all.collect::<Vec<_>>().join(", ")
                    )))
                }
            };
        };
        let mut next = Some(process);
        while let Some(this) = next.filter(|this| *this > 1) {
            if let Some(found) = all.iter().find(|running| running.process == this) {
                return Ok(found.clone());
            }
            next = parent(this);
        }
        let front = |running: &&Running| parent(running.process) == Some(process);
        // A VMM that msrgate did not start is no descendant of it.
        let attached = |running: &&Running| {
            let state = running.ask(&Request::State, ASKS);
            state.is_ok_and(|state| state["attached"] == process)
        };
        let found = all.iter().find(front).or_else(|| all.iter().find(attached));
        found.cloned().ok_or_else(|| {
            Failure::input(format!(
                "process {process} does not run under msrgate, or is another user's: `msrgate top` shows which do"
            ))
        })
    }

    /// Asks, and waits so long at most.
    pub(crate) fn ask(&self, request: &Request, patience: Duration) -> Result<Value, NoAnswer> {
        let line = |error: io::Error| match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => NoAnswer::Gone,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                NoAnswer::Line(format!("msrgate's process {} does not answer", self.process))
            }
            _ => NoAnswer::Line(format!(
                "msrgate's process {} does not take questions: {error}",
                self.process
            )),
        };
        let mut stream = UnixStream::connect(&self.path).map_err(line)?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|error| line(error.into()))?;
        if peer.uid.as_raw() != self.user {
            return Err(NoAnswer::Line(format!("`{}` is another user's", self.path.display())));
        }
        let until = Instant::now() + patience;
        let mut bytes = serde_json::to_vec(request).map_err(|error| line(error.into()))?;
        bytes.push(b'\n');
        stream.set_write_timeout(Some(patience)).map_err(line)?;
        stream.write_all(&bytes).map_err(line)?;
        let answer = read_line(&mut stream, until).map_err(line)?;
        if answer.is_empty() {
            // It ended meanwhile.
            return Err(NoAnswer::Gone);
        }
        match serde_json::from_slice(&answer) {
            Ok(Reply::Done(value)) => Ok(value),
            Ok(Reply::Error(line)) => Err(NoAnswer::Line(line)),
            Err(error) => Err(NoAnswer::Line(format!(
                "msrgate's process {} is of another version: {error}",
                self.process
            ))),
        }
    }
}

impl From<NoAnswer> for Failure {
    fn from(why: NoAnswer) -> Failure {
        match why {
            NoAnswer::Gone => Failure::Line(Exit::Guest, "the VMM has ended".to_owned()),
            NoAnswer::Line(line) => Failure::Line(Exit::No, line),
        }
    }
}

/// A line, without its end; nothing where none was sent.
fn read_line(stream: &mut UnixStream, until: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut part = [0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let read = match stream.read(&mut part) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        let Some(bytes) = part.get(..read).filter(|bytes| !bytes.is_empty()) else {
            return Ok(Vec::new());
        };
        if let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            line.extend(bytes.iter().take(end));
            return Ok(line);
        }
        line.extend(bytes);
        if line.len() as u64 > MOST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
}

/// The parent of a process.
fn parent(process: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field may have blanks in it, and ends at the last parenthesis.
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}
