//! The text of traces: JSON Lines, a header and then one record a line: an event, or a gap where events are missing.
//!
//! ```
//! use msrgate_trace::{Lines, Record};
//!
//! let text = "{\"msrgate_trace\":1,\"guest\":\"Linux\"}\n\
//!             {\"t\":5,\"vm\":0,\"vcpu\":0,\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"0x1\",\"did\":\"value\"}\n";
//! let mut lines = Lines::new(text.as_bytes())?;
//! assert_eq!(lines.header().guest.as_deref(), Some("Linux"));
//! match lines.next().expect("a record")? {
//!     Record::Event(event) => assert_eq!((event.msr.0, event.value), (0x8b, 1)),
//!     Record::Gap(gap) => panic!("{} events are missing", gap.events),
//! }
//! # Ok::<(), msrgate_trace::TraceError>(())
//! ```
//!
//! The text of the kernel's tracepoint `kvm:kvm_msr`, as perf, trace-cmd and ftrace print it, and [logs](log) are read as
//! traces too.
//! [`Lines`] holds one line at a time, whatever the trace's length.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod learn;
pub mod report;
pub mod log;
mod canonical;
mod error;
mod header;
mod line;
mod lines;
mod unrecognised;
mod tracepoint;

pub use canonical::{write_event, write_gap, write_policy};
pub use error::TraceError;
pub use header::{Coverage, Header, VERSION};
pub use line::Record;
pub use lines::Lines;

/// Whether a file that begins with these bytes, and may be a policy too, is a trace or a summary of some.
pub fn is_trace(head: &[u8]) -> bool {
    let head = String::from_utf8_lossy(head);
    // Both may begin with comments.
    let mut lines = head.trim_start_matches('\u{feff}').lines();
    match lines.find(|line| !line.starts_with('#')) {
        Some(line) => {
            let line = line.get(lines::quoted(line.as_bytes())..).unwrap_or_default();
            line.starts_with('{') || !line.starts_with("version") && (log::begins(line) || tracepoint::begins(line))
        }
        None => head.starts_with("# tracer:"),
    }
}

/// What a file that begins with these bytes is, if it is not text, and which command makes text of it.
pub fn is_binary(head: &[u8]) -> Option<&'static str> {
    unrecognised::binary(head)
}
