//! Standard output and standard error. What others wrote, such as the name of a policy, is shown on them and does nothing to
//! a terminal.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, StderrLock, StdoutLock, Write};

/// A stream on which characters that act on a terminal are escaped, as JSON and TOML escape them: so text in these languages
/// stays what it is.
///
/// Each write is to begin and end between characters, as those of `write!` and `serde_json` do.
pub(crate) struct Stream<W>(W);

/// Standard output.
pub(crate) fn out() -> Stream<StdoutLock<'static>> {
    Stream(io::stdout().lock())
}

/// Standard error.
pub(crate) fn err() -> Stream<StderrLock<'static>> {
    Stream(io::stderr().lock())
}

/// Prints on standard error for people. Where it cannot be printed there is nobody to tell.
pub(crate) fn tell(text: &str) {
    let _ = err().write_all(text.as_bytes());
}

impl<W: Write> Stream<W> {
    /// Writes text that has colour: an escape character is one of ours, since all that others wrote went through [`shown`].
    pub(crate) fn coloured(&mut self, text: &str) -> io::Result<()> {
        self.0.write_all(shown(text, "\n\t\x1b").as_bytes())
    }
}

impl<W: Write> Write for Stream<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        self.0.write_all(shown(&text, "\n\t").as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A text with its characters escaped that do something to a terminal or to the order of what it shows, but for those of
/// `kept`.
pub(crate) fn shown<'a>(text: &'a str, kept: &str) -> Cow<'a, str> {
    let acts = |c: char| {
        let control = c.is_control() && !kept.contains(c);
        control || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{61c}')
    };
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::new();
    for c in text.chars() {
        match acts(c) {
            // Writing to a string does not fail.
            true => _ = write!(shown, "\\u{:04x}", u32::from(c)),
            false => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_shown() {
        let mut stream = Stream(Vec::new());
        write!(stream, "a\tb\n\x1b]0;x\x07é→😀\x7f\u{9b}31m\u{202e}\r").unwrap();
        let text = String::from_utf8(stream.0).unwrap();
        assert_eq!(text, "a\tb\n\\u001b]0;x\\u0007é→😀\\u007f\\u009b31m\\u202e\\u000d");
        let json: String = serde_json::from_str(&format!("\"{}\"", shown("\u{7f}\u{9b}\u{2067}", ""))).unwrap();
        assert_eq!(json, "\u{7f}\u{9b}\u{2067}", "JSON says the same");
    }
}
