//! Programs that answer for the handlers that a policy names: asked a line at a time, and for so long only.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use msrgate_core::{Fault, Msr, ReadOutcome, WriteOutcome};
use msrgate_kvm::{Handler, Handlers, VcpuId};
use msrgate_policy::Provider;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::run::writer::Lines;

/// How long an answer may take: other calls of the VMM wait meanwhile. A busy machine may not run a program for seconds.
const LIMIT: Duration = Duration::from_secs(10);
/// How long, in bytes, a line of an answer may be.
const LONGEST: usize = 4096;

/// Programs by the names that they answer for.
#[derive(Default)]
pub(crate) struct Started(Vec<(String, Asked)>);

/// Who is asked.
struct Asked {
    stream: UnixStream,
    /// The process group of what was started.
    group: Option<Pid>,
}

/// Starts or reaches each. What was started ends where its input does.
pub(crate) fn start(providers: &BTreeMap<String, Provider>) -> Result<Started, Failure> {
    let reached = providers.iter().map(|(name, provider)| {
        let asked = match provider {
            Provider::Command(words) => spawned(words),
            Provider::Socket(path) => UnixStream::connect(path).map(|stream| Asked { stream, group: None }),
            _ => Err(io::ErrorKind::Unsupported.into()),
        };
        let asked = asked.and_then(|asked| asked.stream.set_write_timeout(Some(LIMIT)).map(|()| asked));
        let asked = asked.map_err(|error| {
            let what = match provider {
                Provider::Socket(path) => path.display().to_string(),
                Provider::Command(words) => words.join(" "),
                _ => String::new(),
            };
            Failure::input(format!("the handler `{name}` cannot be asked: `{what}`: {error}"))
        })?;
        Ok((name.clone(), asked))
    });
    reached.collect::<Result<_, Failure>>().map(Started)
}

fn spawned(words: &[String]) -> io::Result<Asked> {
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let (stream, theirs) = UnixStream::pair()?;
    let input = OwnedFd::from(theirs);
    let output = input.try_clone()?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(input).stdout(output);
    // A terminal's signals are for the VMM.
    let child = command.process_group(0).spawn()?;
    let group = Some(Pid::from_raw(child.id().cast_signed()));
    Ok(Asked { stream, group })
}

/// Whether those that a later policy names were started for the first one.
pub(crate) fn are_started(
    named: &BTreeMap<String, Provider>,
    started: &BTreeMap<String, Provider>,
) -> Result<(), String> {
    match named.iter().find(|(name, one)| started.get(*name) != Some(one)) {
        None => Ok(()),
        Some((name, _)) => Err(format!(
            "who answers for the handler `{name}` was not started with the first policy, and is not later: start msrgate anew"
        )),
    }
}

impl Started {
    /// As what the supervisor asks; what goes wrong is told.
    pub(crate) fn handlers(self, lines: &Lines) -> Handlers {
        let named = self.0.into_iter();
        named.fold(Handlers::new(), |handlers, (name, asked)| {
            let program = Program {
                name: name.clone(),
                asked: Mutex::new(Some(asked)),
                lines: lines.clone(),
            };
            handlers.with(&name, program)
        })
    }
}

struct Program {
    name: String,
    /// `None` from the first time on that there was no answer: a late one would be taken for the next one.
    asked: Mutex<Option<Asked>>,
    lines: Lines,
}

impl Handler for Program {
    fn read(&self, vcpu: VcpuId, msr: Msr) -> ReadOutcome {
        let question = json!({ "op": "read", "msr": msr.to_string(), "vm": vcpu.vm, "vcpu": vcpu.index });
        match self.ask(&question)? {
            Reply { value: Some(value), .. } => Ok(value),
            _ => Err(Fault),
        }
    }

    fn write(&self, vcpu: VcpuId, msr: Msr, value: u64) -> WriteOutcome {
        let question = json!({
            "op": "write",
            "msr": msr.to_string(),
            "value": format!("{value:#x}"),
            "vm": vcpu.vm,
            "vcpu": vcpu.index,
        });
        match self.ask(&question)? {
            Reply { done: true, .. } => Ok(()),
            _ => Err(Fault),
        }
    }
}

impl Program {
    fn ask(&self, question: &Value) -> Result<Reply, Fault> {
        let mut held = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = held.as_mut().ok_or(Fault)?;
        let is_read = question["op"] == "read";
        let reply = exchange(asked, question).and_then(|line| Reply::parse(&line, is_read));
        reply.map_err(|error| {
            use io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
            let ended = matches!(error.kind(), UnexpectedEof | BrokenPipe | ConnectionReset);
            if let Some(group) = held.take().and_then(|asked| asked.group).filter(|_| !ended) {
                // Where it ends by itself meanwhile nothing is to be done.
                let _ = killpg(group, Signal::SIGKILL);
            }
            let why = match error.kind() {
                _ if ended => "it has ended".to_owned(),
                WouldBlock | TimedOut => format!("no answer within {} s", LIMIT.as_secs()),
                _ => error.to_string(),
            };
            self.lines.say(format!(
                "the handler `{}` is asked no more: {why}; what it decides is #GP from here on",
                self.name
            ));
            Fault
        })
    }
}

/// Asks, and waits for a line.
fn exchange(asked: &mut Asked, question: &Value) -> io::Result<Vec<u8>> {
    let until = Instant::now() + LIMIT;
    let stream = &mut asked.stream;
    stream.write_all(format!("{question}\n").as_bytes())?;
    let mut line = Vec::new();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut part = [0; 512];
        let count = match stream.read(&mut part) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        line.extend_from_slice(part.get(..count).unwrap_or_default());
        match line.iter().position(|byte| *byte == b'\n') {
            Some(end) if end + 1 == line.len() => return Ok(line),
            Some(_) => return Err(io::Error::other("it answers with more than one line")),
            None if line.len() > LONGEST => return Err(io::Error::other("its answer is too long")),
            None => {}
        }
    }
}

/// An answer.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Reply {
    #[serde(default, deserialize_with = "number")]
    value: Option<u64>,
    #[serde(default)]
    done: bool,
    #[serde(default)]
    fault: bool,
}

impl Reply {
    /// One of `value`, `done` and `fault`, as it answers the question.
    fn parse(line: &[u8], is_read: bool) -> io::Result<Reply> {
        let reply: Option<Reply> = serde_json::from_slice(line).ok();
        let fits = |reply: &Reply| match (reply.value, reply.done, reply.fault) {
            (Some(_), false, false) => is_read,
            (None, true, false) => !is_read,
            (None, false, true) => true,
            _ => false,
        };
        reply.filter(fits).ok_or_else(|| {
            let wanted = match is_read {
                true => r#"{"value": "0x1"}"#,
                false => r#"{"done": true}"#,
            };
            let said: String = String::from_utf8_lossy(line).trim_end().chars().take(80).collect();
            io::Error::other(format!(r#"`{said}` is neither {wanted} nor {{"fault": true}}"#))
        })
    }
}

/// A number, or a string that holds one.
fn number<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let wrong = || serde::de::Error::custom("no number of 64 bits");
    match Value::deserialize(deserializer)? {
        Value::String(text) => msrgate_msrs::number::parse(&text).map(Some).map_err(|_| wrong()),
        value => value.as_u64().map(Some).ok_or_else(wrong),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_says_one_thing_that_fits_the_question() {
        let value = |line: &str| Reply::parse(line.as_bytes(), true).map(|reply| reply.value);
        assert_eq!(value(r#"{"value": "0xffffffffffffffff"}"#).unwrap(), Some(u64::MAX));
        assert_eq!(value(r#"{"value": 7}"#).unwrap(), Some(7));
        assert_eq!(value(r#"{"fault": true}"#).unwrap(), None);
        assert!(Reply::parse(br#"{"done": true}"#, false).is_ok());
        for wrong in [
            "",
            "7",
            "{}",
            r#"{"value": -1}"#,
            r#"{"value": "x"}"#,
            r#"{"value": 1, "fault": true}"#,
            r#"{"done": true}"#,
            r#"{"value": 1, "more": 2}"#,
        ] {
            assert!(value(wrong).is_err(), "{wrong}");
        }
        assert!(Reply::parse(br#"{"value": 1}"#, false).is_err());
    }
}
