//! The thread that writes: nothing that a VMM or a signal waits for waits for it.

use std::collections::HashMap;
use std::io::{PipeWriter, Write};
use std::mem;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use msrgate_plan::Preset;
use msrgate_supervise::{Ledger, Mode, Reader};
use serde_json::{Map, Value};

use crate::metrics::{self, Metrics};
use crate::output::{self, Existing};
use crate::run::killed::Killed;
use crate::run::summary::{Besides, Summary};
use crate::run::trace::Trace;
use crate::stream;
use crate::words::counted;

/// How often events are taken from the vCPUs' rings: a ring holds what a vCPU can do in some 20 ms.
const DRAIN: Duration = Duration::from_millis(5);
/// How often where nobody waits for an event: only what is over is let go of.
const REST: Duration = Duration::from_secs(1);
/// How many lines of a kind are told.
const LINES: u64 = 10;

/// What the thread is told to do.
pub(crate) enum Output {
    /// A line for people.
    Line(String),
    /// Sums up what there was so far.
    Summary,
    /// Gives what there was so far.
    State(Sender<Value>),
    /// Another policy is in force from here on.
    Policy { hash: String, rules: usize, logs: bool },
    /// Has the summary say this too.
    Besides(Besides),
    /// Sums up, since the rest is in the background.
    Background,
    /// Sums up, and ends. A signal that killed the VMM is named.
    End(Option<Killed>),
}

/// Where others leave what is to be told.
#[derive(Clone)]
pub(crate) struct Lines(Sender<Output>);

impl Lines {
    /// And where they come out.
    pub(crate) fn new() -> (Lines, Receiver<Output>) {
        let (sender, told) = channel();
        (Lines(sender), told)
    }

    pub(crate) fn say(&self, line: String) {
        self.tell(Output::Line(line));
    }

    pub(crate) fn tell(&self, told: Output) {
        // Nobody is there where all is over.
        let _ = self.0.send(told);
    }
}

/// A file with metrics.
struct MetricsFile {
    path: PathBuf,
    metrics: Metrics,
    last: Option<Instant>,
    /// It was said that it cannot be written.
    failed: bool,
}

/// What the thread works with.
pub(crate) struct Writer {
    told: Receiver<Output>,
    ledger: Arc<Ledger>,
    reader: Reader,
    trace: Trace,
    summary: Summary,
    every: Duration,
    /// What is known of the run from the start on, for who asks.
    about: Map<String, Value>,
    metrics: Option<MetricsFile>,
    /// How many lines of each kind there were.
    kinds: HashMap<String, u64>,
}

impl Writer {
    pub(crate) fn new(
        ledger: Arc<Ledger>,
        trace: Trace,
        mode: Mode,
        presets: &[Preset],
        json: bool,
    ) -> (Writer, Lines) {
        let (lines, told) = Lines::new();
        let writer = Writer {
            told,
            reader: Reader::new(Arc::clone(&ledger)),
            ledger,
            trace,
            summary: Summary::new(mode, presets, json),
            every: REST,
            about: Map::new(),
            metrics: None,
            kinds: HashMap::new(),
        };
        (writer, lines)
    }

    /// Whether somebody waits for events.
    pub(crate) fn every(self, tells: bool) -> Writer {
        let every = if tells { DRAIN } else { REST };
        Writer { every, ..self }
    }

    /// What those who ask are told of the run.
    pub(crate) fn about(self, about: Map<String, Value>) -> Writer {
        Writer { about, ..self }
    }

    /// A file that has what there is.
    pub(crate) fn metrics(self, file: Option<PathBuf>) -> Writer {
        let metrics = file.map(|path| MetricsFile {
            path,
            metrics: Metrics::default(),
            last: None,
            failed: false,
        });
        Writer { metrics, ..self }
    }

    /// All that there is to say of the run.
    fn state(&self) -> Value {
        let mut state = self.summary.json(&self.reader, &self.trace, None);
        if let Value::Object(state) = &mut state {
            state.extend(self.about.clone());
            state.insert("t".to_owned(), self.reader.now().0.into());
            if let Some(hash) = self.summary.policy() {
                state.insert("policy".to_owned(), hash.into());
            }
        }
        state
    }

    /// Writes metrics into their file where it is time, or all is over.
    fn write_metrics(&mut self, end: bool) {
        let is_due = |file: &MetricsFile| end || file.last.is_none_or(|last| last.elapsed() >= metrics::EVERY);
        let Some(mut file) = self.metrics.take_if(|file| is_due(file)) else {
            return;
        };
        let text = file.metrics.text(&self.state());
        file.last = Some(Instant::now());
        if let Err(error) = output::put(&file.path, &text, None, Existing::Replaced)
            && !mem::replace(&mut file.failed, true)
        {
            self.line(format!("`{}` cannot be written: {error}", file.path.display()));
        }
        self.metrics = Some(file);
    }

    /// Writes until it is told to end; `done` gets a byte where a summary is out that somebody waits for.
    pub(crate) fn write(mut self, mut done: PipeWriter) {
        loop {
            let told = self.told.recv_timeout(self.every);
            if let Ok(Output::End(_)) = told {
                self.ledger.end();
            }
            self.drain();
            self.write_metrics(matches!(told, Ok(Output::End(_))));
            match told {
                Ok(Output::Line(line)) => self.line(line),
                Ok(Output::Besides(besides)) => self.summary.besides = Some(besides),
                Ok(Output::Summary) => self.summary.print(&self.reader, &self.trace, None),
                Ok(Output::State(asked)) => {
                    // Who asked may have gone.
                    let _ = asked.send(self.state());
                }
                Ok(Output::Policy { hash, rules, logs }) => {
                    if logs {
                        self.every = DRAIN;
                    }
                    self.trace.another_policy(self.reader.now(), &hash, rules);
                    self.summary.another_policy(self.reader.now(), hash);
                }
                Ok(Output::Background) => {
                    self.summary.background();
                    self.summary.print(&self.reader, &self.trace, None);
                    let _ = done.write_all(&[0]);
                }
                Ok(Output::End(killed)) => {
                    self.trace.end();
                    self.more_lines();
                    self.summary.print(&self.reader, &self.trace, killed);
                    let _ = done.write_all(&[0]);
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn drain(&mut self) {
        let (trace, ledger) = (&mut self.trace, &self.ledger);
        let begin = |trace: &mut Trace| {
            if let Some(cpuid) = ledger.first_run() {
                trace.begin(cpuid);
            }
        };
        begin(trace);
        let taken = self.reader.drain(&mut |entry| {
            // The vCPU may run since that look only.
            begin(trace);
            trace.take(&entry);
        });
        if taken > 0 {
            self.trace.flush();
        }
    }

    /// Prints a line, unless there were many of its kind. A kind is what stands before the program's name.
    fn line(&mut self, line: String) {
        let kind = line.split(" (`").next().unwrap_or_default().to_owned();
        let count = self.kinds.entry(kind).or_insert(0);
        *count += 1;
        if *count <= LINES {
            stream::tell(&format!("msrgate: {}\n", line));
        }
    }

    fn more_lines(&self) {
        for (kind, count) in self.kinds.iter().filter(|(_, count)| **count > LINES) {
            stream::tell(&format!(
                "msrgate: {} more: {kind}\n",
                counted(count - LINES, "time", "times")
            ));
        }
    }
}
