//! Traces as inputs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::Path;

use indicatif::ProgressBarIter;
use msrgate_core::{Msr, Op};
use msrgate_plan::AccessCount;
use msrgate_trace::{Lines, Record, TraceError};

use crate::args::ProfileArgs;
use crate::exit::Failure;
use crate::{input, progress, words};

/// Why a trace gives no events.
pub(crate) enum Opened {
    Unreadable(String),
    Malformed(TraceError),
}

/// A trace as it is read, line by line.
pub(crate) type Reader = BufReader<ProgressBarIter<File>>;

pub(crate) type Trace = Lines<Reader>;

/// The trace of this path, `-` for standard input, with its header read.
pub(crate) fn open(path: &Path) -> Result<Trace, Opened> {
    let unreadable = |error| Opened::Unreadable(format!("cannot read `{}`: {error}", input::shown(path)));
    Lines::new(reader(path).map_err(unreadable)?).map_err(Opened::Malformed)
}

/// The trace or summary of this path, `-` for standard input.
pub(crate) fn reader(path: &Path) -> io::Result<Reader> {
    let file = input::open(path)?;
    let length = file.metadata()?.len();
    Ok(BufReader::with_capacity(
        1 << 16,
        progress::bytes(length).wrap_read(file),
    ))
}

/// How often the trace that the command line names has each MSR and direction; nothing without one.
pub(crate) fn profile(args: &ProfileArgs) -> Result<Vec<AccessCount>, Failure> {
    let Some(path) = &args.profile else {
        return Ok(Vec::new());
    };
    let name = input::shown(path);
    let lines = match open(path) {
        Ok(lines) => lines,
        Err(Opened::Unreadable(line)) => return Err(Failure::input(line)),
        Err(Opened::Malformed(error)) => return Err(Failure::input(format!("{name}: {error}"))),
    };
    let mut counts: BTreeMap<(Msr, Op), u64> = BTreeMap::new();
    let mut lost = 0u64;
    for record in lines {
        match record.map_err(|error| Failure::input(format!("{name}: {error}")))? {
            Record::Event(event) => *counts.entry((event.msr, event.op)).or_default() += 1,
            Record::Gap(gap) => lost = lost.saturating_add(gap.events),
        }
    }
    if lost > 0 {
        let lost = words::counted(lost, "access is", "accesses are");
        let note = format!("{name}: {lost} missing from it, so the profile counts fewer accesses than the guest makes");
        let _ = writeln!(std::io::stderr(), "msrgate: note: {}", words::plain(&note));
    }
    let touched = counts
        .into_iter()
        .map(|((msr, op), count)| AccessCount::new(msr, op, count));
    Ok(touched.collect())
}
