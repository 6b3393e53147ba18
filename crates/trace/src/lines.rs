//! A trace, one line at a time.

use std::io::{self, BufRead};

use crate::error::TraceError;
use crate::header::{Coverage, Header, VERSION};
use crate::line::{Line, Record};
use crate::log::{self, Log};
use crate::tracepoint::{self, Threads};
use crate::{canonical, unrecognised};

/// The longest line that is read: an event takes some 200 bytes, a header with a CPUID some 10,000.
const LONGEST: u64 = 1 << 20;

/// What is said of a last line that is not all there.
const BREAKS_OFF: &str = "the line breaks off: the trace was cut short";

/// What the lines of a trace are.
#[derive(Debug)]
enum Format {
    /// JSON.
    Own,
    /// The tracepoint's text.
    Tracepoint(Threads),
    /// A log, the kernel's or another's.
    Log(Log),
}

/// The records of a trace, one line at a time. After the first error there are no more.
#[derive(Debug)]
pub struct Lines<R> {
    from: R,
    header: Header,
    line: Vec<u8>,
    number: u64,
    bytes: u64,
    ended: bool,
    format: Format,
    /// Whether the first line, which is read already, may be an event.
    first: bool,
    /// Whether there was an access in a log.
    any: bool,
}

impl<R: BufRead> Lines<R> {
    /// Reads the header.
    pub fn new(from: R) -> Result<Lines<R>, TraceError> {
        let mut lines = Lines {
            from,
            header: Header::default(),
            line: Vec::new(),
            number: 0,
            bytes: 0,
            ended: false,
            format: Format::Own,
            first: false,
            any: false,
        };
        if !lines.advance()? {
            return Err(TraceError::at(
                1,
                "the trace is empty; its first line should be a header: `{\"msrgate_trace\":1}`",
            ));
        }
        if lines.line.starts_with(b"\xef\xbb\xbf") {
            lines.line.drain(..3); // the mark that some editors put before UTF-8
        }
        let text = String::from_utf8_lossy(&lines.line);
        let log = || Some((Format::Log(Log::default()), "a log", Some(Coverage::Logged)));
        let read = match () {
            () if log::begins(&text) => log(),
            () if text.starts_with('{') => None,
            () if tracepoint::begins(&text) => {
                let format = Format::Tracepoint(Threads::default());
                Some((format, "the tracepoint kvm:kvm_msr", None))
            }
            // Logs begin with anything.
            () => {
                let head = String::from_utf8_lossy(lines.from.fill_buf().unwrap_or_default());
                log::is_log(std::iter::once(&*text).chain(head.lines()))
                    .then(log)
                    .flatten()
            }
        };
        if let Some((format, mode, coverage)) = read {
            lines.header = Header {
                msrgate_trace: VERSION,
                mode: Some(mode.to_owned()),
                coverage,
                ..Header::default()
            };
            lines.format = format;
            lines.first = true;
            return Ok(lines);
        }
        let no_trace = |error: &serde_json::Error| TraceError::at(1, unrecognised::message(&lines.line, &plain(error)));
        // A list would do for a structure.
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&lines.line).map_err(|error| no_trace(&error))?;
        let Some(version) = object.get("msrgate_trace") else {
            return Err(TraceError::at(
                1,
                unrecognised::message(&lines.line, "`msrgate_trace` is missing"),
            ));
        };
        if version.as_u64() != Some(VERSION) {
            let message = format!("version {version} of the format is not known here; {VERSION} is");
            return Err(TraceError::at(1, message));
        }
        lines.header = serde_json::from_slice(&lines.line)
            .map_err(|error| TraceError::at(1, format!("the header is malformed: {}", plain(&error))))?;
        Ok(lines)
    }

    /// What the trace says of itself. A log says with its lines whether the host has `kvm.ignore_msrs`, so that it is known when
    /// they are read.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How many bytes have been read, for showing progress.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads the next line that is not blank; false at the end.
    fn advance(&mut self) -> Result<bool, TraceError> {
        loop {
            self.line.clear();
            self.number += 1;
            let mut limited = io::Read::take(&mut self.from, LONGEST);
            let read = limited.read_until(b'\n', &mut self.line).map_err(|error| TraceError {
                line: self.number,
                message: format!("cannot be read: {error}"),
                source: Some(error),
            })?;
            if read == 0 {
                return Ok(false);
            }
            self.bytes += read as u64;
            self.line.drain(..quoted(&self.line));
            if read as u64 == LONGEST {
                return Err(TraceError::at(
                    self.number,
                    format!("the line is longer than {LONGEST} bytes"),
                ));
            }
            if !self.line.trim_ascii().is_empty() {
                return Ok(true);
            }
        }
    }

    /// The record of the line; `None` if it is of something else.
    fn record(&mut self) -> Result<Option<Record>, TraceError> {
        let line = String::from_utf8_lossy(&self.line);
        let (record, breaks_off) = match &mut self.format {
            Format::Own => return self.own_record(),
            Format::Tracepoint(threads) => {
                let event = threads.event(line.trim_end());
                (
                    event.map(|event| event.map(Record::Event)),
                    tracepoint::breaks_off(&line),
                )
            }
            Format::Log(log) => {
                let record = log.line(line.trim_end()).map(|line| match line? {
                    log::Line::Access(said) => {
                        if (said.by, said.cause) == (log::Speaker::Kvm, log::Cause::Ignored) {
                            self.header.ignore_msrs = Some(true);
                        }
                        said.event().map(Record::Event)
                    }
                    log::Line::Missing(gap) => Some(Record::Gap(gap)),
                });
                // The last line goes on nowhere.
                let record = match line.ends_with('\n') {
                    true => record,
                    false => record.and_then(|record| log.finish().map(|()| record)),
                };
                self.any |= matches!(record, Ok(Some(Record::Event(_))));
                (record, false)
            }
        };
        if !line.ends_with('\n') && (record.is_err() || breaks_off) {
            return Err(TraceError::at(self.number, BREAKS_OFF));
        }
        record.map_err(|message| TraceError::at(self.number, message))
    }

    /// What is wrong with a text that ended: its last line breaks off, or it has no access and is of something else.
    fn nothing(&mut self) -> Option<TraceError> {
        if let Format::Log(log) = &mut self.format
            && let Err(message) = log.finish()
        {
            return Some(TraceError::at(self.number.saturating_sub(1), message));
        }
        let message = match &self.format {
            Format::Tracepoint(threads) if threads.is_empty() => {
                "no event of kvm:kvm_msr, msr:read_msr or msr:write_msr is in it: record on the host with `perf record -e \
                 kvm:kvm_msr`, or in the guest with `perf record -e 'msr:*'`"
            }
            Format::Log(_) if !self.any => {
                "no line of this log is about an MSR that a guest accessed: KVM logs those that it does not know where \
                 `kvm.ignore_msrs` is set, and a guest's kernel what faulted unexpectedly; `msrgate why` reads what a VMM says too"
            }
            _ => return None,
        };
        Some(TraceError::at(0, message))
    }

    fn own_record(&self) -> Result<Option<Record>, TraceError> {
        match canonical::read(&self.line) {
            Some(event) => Ok(Some(Record::Event(event))),
            None => self.any_record(),
        }
    }

    /// A record as JSON may spell it.
    fn any_record(&self) -> Result<Option<Record>, TraceError> {
        if self.line.starts_with(b"{\"msrgate_trace\"") {
            return Err(TraceError::at(
                self.number,
                "another trace begins here, and each has a file of its own: `csplit -z FILE '/^{\"msrgate_trace\"/' '{*}'` \
                 cuts them apart",
            ));
        }
        let parsed: Result<Line<'_>, _> = serde_json::from_slice(&self.line);
        match parsed {
            Ok(line) => line.record().map_err(|message| TraceError::at(self.number, message)),
            Err(error) if error.is_eof() && !self.line.ends_with(b"\n") => Err(TraceError::at(self.number, BREAKS_OFF)),
            Err(error) => Err(TraceError::at(
                self.number,
                format!("this is not an event: {}", plain(&error)),
            )),
        }
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<Record, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = loop {
            let there = match std::mem::take(&mut self.first) {
                true => Ok(true),
                false => self.advance(),
            };
            match there {
                Ok(true) => match self.record().transpose() {
                    Some(record) => break Some(record),
                    None => continue,
                },
                Ok(false) => break self.nothing().map(Err),
                Err(error) => break Some(Err(error)),
            }
        };
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

/// A JSON error's text without its own line number, which would be 1 for every line.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line ") {
        Some((what, _)) => format!("{what} (column {})", error.column()),
        None => text,
    }
}

/// How many bytes of a line are marks of a mail that quotes it: `> > `.
pub(crate) fn quoted(line: &[u8]) -> usize {
    let marks = line.iter().take_while(|byte| matches!(byte, b'>' | b' ')).count();
    let last = line.iter().take(marks).rposition(|byte| *byte == b'>');
    last.map_or(0, |last| last + 1 + usize::from(marks > last + 1))
}

#[cfg(test)]
mod tests;
