//! The text of traces.

use msrgate_policy::Policy;
use msrgate_trace::learn::{Generalize, Learned, Summary};
use msrgate_trace::{Header, Lines, Record, write_event, write_gap};

pub(crate) fn check(bytes: &[u8]) {
    learn(bytes);
    let Ok(mut lines) = Lines::new(bytes) else { return };
    let header = lines.header().clone();
    if let Some(Err(error)) = header.parse_cpuid() {
        assert_eq!(error.line, 1, "{error}");
    }
    let mut records = Vec::new();
    let mut ended = false;
    for line in &mut lines {
        assert!(!ended, "a trace goes on behind an error");
        match line {
            Ok(record) => records.push(record),
            Err(_) => ended = true,
        }
    }
    assert!(lines.bytes() <= bytes.len() as u64, "more was read than is there");
    let (header_again, records_again) = read(&written(&header, &records));
    assert_eq!(header_again, header);
    assert_eq!(records_again, records);
}

/// From a trace or a summary.
fn learn(bytes: &[u8]) {
    let Ok(summary) = Summary::read("trace", bytes) else {
        return;
    };
    let mut text = Vec::new();
    summary.write(&mut text).expect("memory");
    let again = Summary::read("summary", text.as_slice()).expect("a summary that was written");
    assert_eq!(again, summary);
    let mut twice = summary.clone();
    if twice.merge(&again).is_ok() {
        assert_eq!(twice.seen.len(), summary.seen.len());
    }
    let text = Learned::from(&summary, &Generalize::default()).to_string();
    Policy::parse("learned.toml", &text).expect("a policy");
}

fn written(header: &Header, records: &[Record]) -> Vec<u8> {
    let mut text = Vec::new();
    header.write(&mut text).expect("memory");
    for record in records {
        match record {
            Record::Event(event) => write_event(event, &mut text),
            Record::Gap(gap) => write_gap(gap, &mut text),
        }
        .expect("memory");
    }
    text
}

fn read(text: &[u8]) -> (Header, Vec<Record>) {
    let lines = Lines::new(text).expect("a header that was written");
    let header = lines.header().clone();
    (
        header,
        lines.map(|record| record.expect("a record that was written")).collect(),
    )
}
