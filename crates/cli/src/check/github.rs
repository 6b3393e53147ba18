//! Findings as GitHub's workflow commands, which mark the lines of a change.

use std::io::{self, Write};

use msrgate_policy::Severity;

use super::found::{Checked, Location};
use crate::hint;

/// A line for each finding that is open, and for each note.
pub(super) fn write(out: &mut impl Write, checked: &Checked, path: &str) -> io::Result<()> {
    for found in checked.all().filter(|found| found.accepted.is_none()) {
        let kind = match found.severity() {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Note => "notice",
        };
        let place = match checked.place(found) {
            Some(Location { file, begin, end }) => format!(
                "file={},line={},col={},endLine={},endColumn={}",
                property(&file),
                begin.0,
                begin.1,
                end.0,
                end.1
            ),
            None => format!("file={}", property(path)),
        };
        let title = format!("{}: {}", found.code, found.code.title());
        let help = hint::help(found)
            .map(|help| format!("\nhelp: {help}"))
            .unwrap_or_default();
        let message = data(&format!("{}{help}", found.message));
        writeln!(out, "::{kind} {place},title={}::{message}", property(&title))?;
    }
    Ok(())
}

/// A message: it ends with its line.
fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// A property: it ends with a comma or a colon.
fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}
