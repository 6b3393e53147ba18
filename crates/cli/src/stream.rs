//! Standard output and standard error: what is shown on them, in which colour, and how wide. What others wrote, such as the
//! name of a policy, is shown and does nothing to a terminal.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, StderrLock, StdoutLock, Write};
use std::os::fd::AsFd;
use std::sync::OnceLock;

use clap::ColorChoice;

/// What the command line says of colour.
pub(crate) static COLOUR: OnceLock<ColorChoice> = OnceLock::new();

/// Whether a stream gets colour: as the command line says, or as NO_COLOR and CLICOLOR_FORCE do; else a terminal does, unless
/// TERM says that it has none.
pub(crate) fn colour(stream: &impl IsTerminal) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    match COLOUR.get().copied().unwrap_or_default() {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto if set("NO_COLOR") => false,
        ColorChoice::Auto
            if std::env::var_os("CLICOLOR_FORCE").is_some_and(|value| !value.is_empty() && value != "0") =>
        {
            true
        }
        ColorChoice::Auto => stream.is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb"),
    }
}

/// The narrowest terminal on which lines are folded; a serial line reports no columns at all.
const NARROWEST: u16 = 20;

/// How many columns a terminal has.
fn columns(stream: &(impl IsTerminal + AsFd)) -> Option<usize> {
    let size = stream
        .is_terminal()
        .then(|| rustix::termios::tcgetwinsize(stream).ok())??;
    (size.ws_col >= NARROWEST).then_some(size.ws_col.into())
}

/// What a line or a row is to people.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tone {
    Plain,
    /// A title.
    Title,
    /// What needs no attention.
    Good,
    /// Not as without msrgate.
    Odd,
    /// A fault, a denial, a refusal.
    Bad,
}

impl Tone {
    /// The text in the colour of the tone.
    pub(crate) fn paint<'a>(self, text: &'a str, colour: bool) -> Cow<'a, str> {
        let code = match self {
            _ if !colour => return Cow::Borrowed(text),
            Tone::Plain => return Cow::Borrowed(text),
            Tone::Title => 1,
            Tone::Good => 32,
            Tone::Odd => 33,
            Tone::Bad => 31,
        };
        Cow::Owned(format!("\x1b[{code}m{text}\x1b[0m"))
    }
}

/// A stream on which characters that act on a terminal are escaped, as JSON and TOML escape them: so text in these languages
/// stays what it is.
///
/// Each write is to begin and end between characters, as those of `write!` and `serde_json` do.
pub(crate) struct Stream<W: Write> {
    to: W,
    /// How many columns lines are folded to, between words.
    pub(crate) width: Option<usize>,
    pub(crate) colour: bool,
    /// The line that is written, where lines are folded.
    line: String,
}

/// Standard output for documents and programs: lines stay as they are.
pub(crate) fn out() -> Stream<StdoutLock<'static>> {
    Stream::new(io::stdout().lock(), None, colour(&io::stdout()))
}

/// Standard output for people: lines are folded to a terminal's width.
pub(crate) fn page() -> Stream<StdoutLock<'static>> {
    Stream::new(io::stdout().lock(), columns(&io::stdout()), colour(&io::stdout()))
}

/// Standard error, for people.
pub(crate) fn err() -> Stream<StderrLock<'static>> {
    Stream::new(io::stderr().lock(), columns(&io::stderr()), colour(&io::stderr()))
}

/// Prints on standard error for people. Where it cannot be printed there is nobody to tell.
pub(crate) fn tell(text: &str) {
    let _ = err().write_all(text.as_bytes());
}

/// Prints on standard error for programs, in one line.
pub(crate) fn tell_programs(value: &serde_json::Value) {
    let _ = writeln!(Stream::new(io::stderr().lock(), None, false), "{value}");
}

impl<W: Write> Stream<W> {
    fn new(to: W, width: Option<usize>, colour: bool) -> Stream<W> {
        Stream {
            to,
            width,
            colour,
            line: String::new(),
        }
    }

    /// Writes text that has colour: an escape character is one of ours, since all that others wrote went through [`shown`].
    pub(crate) fn coloured(&mut self, text: &str) -> io::Result<()> {
        self.put(&shown(text, "\n\t\x1b"))
    }

    /// Writes a line in the colour of its tone.
    pub(crate) fn say(&mut self, tone: Tone, line: &str) -> io::Result<()> {
        let line = shown(line, "\n\t");
        self.coloured(&format!("{}\n", tone.paint(&line, self.colour)))
    }

    fn put(&mut self, text: &str) -> io::Result<()> {
        let Some(width) = self.width else {
            return self.to.write_all(text.as_bytes());
        };
        for part in text.split_inclusive('\n') {
            self.line.push_str(part);
            if let Some(line) = self.line.strip_suffix('\n') {
                self.to.write_all(fold(line, width).as_bytes())?;
                self.to.write_all(b"\n")?;
                self.line.clear();
            }
        }
        Ok(())
    }
}

impl<W: Write> Write for Stream<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        self.put(&shown(&text, "\n\t"))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.write_all(self.line.as_bytes())?;
        self.line.clear();
        self.to.flush()
    }
}

impl<W: Write> Drop for Stream<W> {
    fn drop(&mut self) {
        // A line without an end: whoever cares whether it is written flushes.
        let _ = self.to.write_all(self.line.as_bytes());
    }
}

/// How many columns a text takes, escape sequences apart.
fn length(text: &str) -> usize {
    let mut escape = false;
    let visible = text.chars().filter(|c| {
        let hidden = escape || *c == '\x1b';
        escape = hidden && *c != 'm';
        !hidden
    });
    visible.count()
}

/// A line in several of at most so many columns, broken between words alone; those that follow stand in under the text.
fn fold(line: &str, width: usize) -> Cow<'_, str> {
    if length(line) <= width {
        return Cow::Borrowed(line);
    }
    let leading = line.len() - line.trim_start_matches(' ').len();
    // Behind `  key      `.
    let key = line.get(leading..).and_then(|text| {
        let gap = text.find("  ")?;
        let behind = text.get(gap..)?.trim_start_matches(' ');
        Some(line.len() - behind.len()).filter(|at| *at <= width.min(60) / 3)
    });
    let hang = key.unwrap_or(if leading == 0 { 2 } else { leading.min(width / 2) });
    let mut folded = String::new();
    let (mut at, mut words) = (0, 0);
    for (number, word) in line.split(' ').enumerate() {
        let (space, length) = (usize::from(number > 0), length(word));
        match words > 0 && length > 0 && at + space + length > width {
            true => {
                folded.truncate(folded.trim_end_matches(' ').len());
                _ = write!(folded, "\n{:hang$}{word}", "");
                (at, words) = (hang + length, 1);
            }
            false => {
                folded.push_str(if space == 1 { " " } else { "" });
                folded.push_str(word);
                at += space + length;
                words += usize::from(length > 0);
            }
        }
    }
    Cow::Owned(folded)
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
        let mut stream = Stream::new(Vec::new(), None, false);
        write!(stream, "a\tb\n\x1b]0;x\x07é→😀\x7f\u{9b}31m\u{202e}\r").unwrap();
        let text = String::from_utf8(std::mem::take(&mut stream.to)).unwrap();
        assert_eq!(text, "a\tb\n\\u001b]0;x\\u0007é→😀\\u007f\\u009b31m\\u202e\\u000d");
        let json: String = serde_json::from_str(&format!("\"{}\"", shown("\u{7f}\u{9b}\u{2067}", ""))).unwrap();
        assert_eq!(json, "\u{7f}\u{9b}\u{2067}", "JSON says the same");
    }

    #[test]
    fn a_line_is_folded_between_words_and_no_word_is_broken() {
        for (line, folded) in [
            ("short", "short"),
            (
                "note: one two three four five six",
                "note: one two three four\n  five six",
            ),
            (
                "  rule  one two three four five six",
                "  rule  one two three\n        four five six",
            ),
            (
                "    a; b one two three four five",
                "    a; b one two three\n    four five",
            ),
            (
                "a  b  IA32_A_NAME_THAT_IS_LONGER is",
                "a  b\n   IA32_A_NAME_THAT_IS_LONGER\n   is",
            ),
            (
                "\x1b[31mone two three four five\x1b[0m",
                "\x1b[31mone two three four five\x1b[0m",
            ),
        ] {
            assert_eq!(fold(line, 24), folded, "{line}");
        }
    }

    #[test]
    fn what_is_written_in_parts_is_folded_by_lines_and_the_last_one_is_not_lost() {
        let mut stream = Stream::new(Vec::new(), Some(20), false);
        write!(stream, "one two three ").unwrap();
        write!(stream, "four five\nsix").unwrap();
        stream.flush().unwrap();
        assert_eq!(std::mem::take(&mut stream.to), b"one two three four\n  five\nsix");
    }
}
