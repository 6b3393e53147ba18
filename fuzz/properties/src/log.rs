//! The lines of logs.

use msrgate_trace::log::{Line, Log, Said};
use msrgate_trace::{Lines, Record};

pub(crate) fn check(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut log = Log::default();
    let mut accesses = 0;
    for line in text.lines() {
        // An error is about the line before: this one is read anew.
        let said = log.line(line).or_else(|_| log.line(line));
        if let Ok(Some(Line::Access(said))) = said {
            accesses += u64::from(said.event().is_some());
        }
        around(line);
    }
    let _ = log.finish();
    records(bytes, accesses);
}

/// What stands around a line does not matter.
fn around(line: &str) {
    let Some(bare) = said(line) else { return };
    for (before, behind) in [
        ("> ", ""),
        ("`", "`"),
        ("Nov 21 10:00:01 host kernel: ", " |"),
        ("é ", "\r"),
    ] {
        let around = said(&format!("{before}{line}{behind}"));
        let key = |said: Said| (said.by, said.cause, said.op, said.msr, said.value);
        assert_eq!(around.map(key), Some(key(bare)), "{before}{line}{behind}");
    }
}

fn said(line: &str) -> Option<Said> {
    // A line of the journal in JSON is one as a whole.
    if line.contains("\"MESSAGE\"") {
        return None;
    }
    match Log::default().line(line) {
        Ok(Some(Line::Access(said))) => Some(said),
        _ => None,
    }
}

/// As a trace it has no more accesses than as a log, and ends with an error or with all.
fn records(bytes: &[u8], accesses: u64) {
    let Ok(lines) = Lines::new(bytes) else { return };
    if lines.header().mode.as_deref() != Some("a log") {
        return;
    }
    let mut events = 0;
    for record in lines {
        match record {
            Ok(Record::Event(_)) => events += 1,
            Ok(Record::Gap(gap)) => assert!(gap.events > 0),
            Err(_) => return assert!(events <= accesses, "{events} of {accesses}"),
        }
    }
    assert_eq!(events, accesses);
}
