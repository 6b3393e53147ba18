//! What logs say of MSRs, added up.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use msrgate_core::{Msr, Op};
use msrgate_trace::log::{Cause, Line, Log, Said, Speaker};

use crate::exit::Failure;
use crate::input;

/// The longest line that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// How many different accesses are told apart.
const MOST: usize = 1 << 14;

/// How much of a line is kept, in characters.
const KEPT: usize = 500;

/// How many different values of an access are kept.
const VALUES: usize = 8;

/// What logs say, added up.
#[derive(Default)]
pub(crate) struct Logs {
    pub(super) said: BTreeMap<(Msr, Option<Op>, Cause, Speaker), Times>,
    /// How many lines there are, but for blank ones.
    pub(super) lines: u64,
    /// How many of them are about MSRs.
    pub(super) about: u64,
    /// How many have a log's words, and not what these are about.
    pub(super) broken: u64,
    /// How many messages the kernel left out.
    pub(super) suppressed: u64,
    /// How many accesses have no row, since there were too many before.
    pub(super) unlisted: u64,
    /// Whether a VMM says that KVM refused a register, and not which.
    pub(super) nameless: bool,
}

/// How often something was said.
pub(super) struct Times {
    pub(super) count: u64,
    /// What was written or read, and how often; at most [`VALUES`].
    pub(super) values: Vec<(u64, u64)>,
    /// How often another value.
    pub(super) others: u64,
    /// The first line that says it, or its beginning.
    pub(super) line: String,
}

/// Whether a VMM says that KVM refused registers, and not which: `Failed to set all KVM MSRs`, `KVM_SET_MSRS failed`.
fn is_nameless(line: &str) -> bool {
    let has = |words: &[&str]| words.iter().any(|word| line.contains(word));
    let fails = ["fail", "Fail", "FAIL", "Not all", "Could not", "could not"];
    line.contains("kvm_msr_buf") || has(&["MSRs", "MSRS", "MsrEntries", "Msr entries"]) && has(&fails)
}

/// What to ask where a register is named, in the command line, and nothing is said of it.
pub(super) fn register(given: &[PathBuf]) -> String {
    let given: Vec<_> = given.iter().map(|path| path.to_string_lossy()).collect();
    let words = given.iter().flat_map(|text| text.split_whitespace());
    let mut names = words.filter(|word| word.starts_with("0x") || word.contains('_'));
    let named = names.find_map(|word| match msrgate_msrs::search(word).as_slice() {
        [one] => Some(one.name()),
        _ => None,
    });
    named.map_or_else(String::new, |name| {
        format!("; `msrgate msr {name}` says what is known of the register")
    })
}

impl Logs {
    /// What the command line names: files, lines, or the words of one line that no quotes hold together.
    pub(super) fn given(&mut self, given: &[PathBuf]) -> Result<(), Failure> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let is_file = |path: &Path| path == Path::new("-") || path.exists();
        let says = |line: &str| {
            let mut logs = Logs::default();
            logs.read(Cursor::new(line)).is_ok() && logs.about > 0
        };
        let together: Vec<String> = given.iter().map(|path| text(path)).collect();
        let together = together.join(" ");
        if given.len() > 1 && !given.iter().any(|path| is_file(path) || says(&text(path))) && says(&together) {
            return self.read(Cursor::new(together)).map_err(Failure::input);
        }
        for path in given {
            let line = text(path);
            match () {
                () if is_file(path) => self.file(path)?,
                () if says(&line) || line.contains(char::is_whitespace) => {
                    self.read(Cursor::new(line)).map_err(Failure::input)?;
                }
                () => {
                    let known = register(given);
                    return Err(Failure::input(format!(
                        "`{line}` is neither a file nor a line that says something of an MSR{known}"
                    )));
                }
            }
        }
        Ok(())
    }

    pub(super) fn file(&mut self, path: &Path) -> Result<(), Failure> {
        let name = input::shown(path);
        let failed = |error: String| Failure::input(format!("cannot read `{name}`: {error}"));
        let file = input::open(path).map_err(|error| failed(error.to_string()))?;
        let mut from = BufReader::with_capacity(1 << 16, file);
        let head = from.fill_buf().map_err(|error| failed(error.to_string()))?;
        if let Some(what) = msrgate_trace::is_binary(head) {
            return Err(Failure::input(
                format!("{name}: {what}").replace("msrgate … -", "msrgate why"),
            ));
        }
        if head.trim_ascii_start().starts_with(b"{\"msrgate_") {
            return Err(Failure::input(format!(
                "{name}: this is a trace: `msrgate report` and `msrgate learn` read it"
            )));
        }
        self.read(from).map_err(failed)
    }

    fn read(&mut self, mut from: impl BufRead) -> Result<(), String> {
        let mut log = Log::default();
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = Read::take(&mut from, LONGEST).read_until(b'\n', &mut line);
            let read = read.map_err(|error| error.to_string())?;
            if read == 0 {
                break;
            }
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            if text.is_empty() {
                continue;
            }
            self.lines += 1;
            self.nameless |= is_nameless(text);
            let mut said = log.line(text);
            if said.is_err() {
                self.broken += 1;
                // What is wrong may be the line before, and then this one was not read.
                said = log.line(text);
            }
            match said {
                Ok(Some(Line::Access(said))) => self.add(&said, text),
                Ok(Some(Line::Missing(gap))) => {
                    self.about += 1;
                    self.suppressed = self.suppressed.saturating_add(gap.events);
                }
                Ok(None) | Err(_) => {}
            }
        }
        self.broken += u64::from(log.finish().is_err());
        Ok(())
    }

    fn add(&mut self, said: &Said, line: &str) {
        self.about += 1;
        let key = (said.msr, said.op, said.cause, said.by);
        if self.said.len() >= MOST && !self.said.contains_key(&key) {
            self.unlisted += 1;
            return;
        }
        let times = self.said.entry(key).or_insert_with(|| Times {
            count: 0,
            values: Vec::new(),
            others: 0,
            line: line.trim_start().chars().take(KEPT).collect(),
        });
        times.count += 1;
        let Some(value) = said.value else { return };
        // Of a CPU model's bits each has its line.
        if let (Cause::Lacking, Some((bits, _))) = (said.cause, times.values.first_mut()) {
            *bits |= value;
            return;
        }
        let room = times.values.len() < VALUES;
        match times.values.iter_mut().find(|(known, _)| *known == value) {
            Some((_, count)) => *count += 1,
            None if room => times.values.push((value, 1)),
            None => times.others += 1,
        }
    }

    /// Whether a host's KVM answered for what it does not know.
    pub(super) fn ignores(&self) -> bool {
        self.said
            .keys()
            .any(|(_, _, cause, by)| (*cause, *by) == (Cause::Ignored, Speaker::Kvm))
    }
}
