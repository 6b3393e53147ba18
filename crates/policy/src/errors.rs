//! All that is wrong with a policy, as a text for a log.

use std::error::Error;
use std::fmt;

use crate::{Diagnostic, Place, PolicyErrors, Source};

/// How many findings are shown.
const FINDINGS: usize = 20;

/// The longest lines that are shown, in characters.
const COLUMNS: usize = 200;

impl Error for PolicyErrors {}

/// Each finding with its file, line and column, the line with the place underlined, and what to write instead.
impl fmt::Display for PolicyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, found) in self.diagnostics.iter().take(FINDINGS).enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            self.finding(f, found)?;
        }
        match self.diagnostics.len().saturating_sub(FINDINGS) {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

impl PolicyErrors {
    fn finding(&self, f: &mut fmt::Formatter<'_>, found: &Diagnostic) -> fmt::Result {
        let source = |place: &Place| self.sources.get(place.source);
        let at = found.place.as_ref().and_then(|place| Some((source(place)?, place)));
        if let Some((source, place)) = at {
            position(f, source, place)?;
        }
        write!(f, "{}: {}", found.code, plain(&found.message))?;
        if let Some((source, place)) = at {
            underlined(f, source, place)?;
        }
        if let Some((place, label)) = &found.second
            && let Some(source) = source(place)
        {
            f.write_str("\n")?;
            position(f, source, place)?;
            f.write_str(&plain(label))?;
            underlined(f, source, place)?;
        }
        match &found.help {
            Some(help) => write!(f, "\n    help: {}", plain(help)),
            None => Ok(()),
        }
    }
}

fn position(f: &mut fmt::Formatter<'_>, source: &Source, place: &Place) -> fmt::Result {
    let (line, column) = source.line_column(place.span.start);
    write!(f, "{}:{line}:{column}: ", plain(&source.path().to_string_lossy()))
}

/// The line of a place, and below it a mark under each character of the place that is on the line.
fn underlined(f: &mut fmt::Formatter<'_>, source: &Source, place: &Place) -> fmt::Result {
    let Some((before, after)) = source.text().split_at_checked(place.span.start) else {
        return Ok(());
    };
    let before = before.rsplit('\n').next().unwrap_or_default();
    let after = after.lines().next().unwrap_or_default();
    let marked = after.get(..place.span.len()).unwrap_or(after).trim_end();
    let (columns, marks) = (before.chars().count(), marked.chars().count());
    if columns + after.chars().count() > COLUMNS || marks == 0 {
        return Ok(());
    }
    write!(f, "\n    {}{}", plain(before), plain(after))?;
    write!(f, "\n    {:columns$}{}", "", "^".repeat(marks))
}

/// The text with a space for each character that a terminal would act on.
fn plain(text: &str) -> String {
    let acts = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{61c}')
    };
    text.replace(acts, " ")
}

#[cfg(test)]
mod tests {
    use crate::Policy;

    fn shown(text: &str) -> String {
        Policy::parse("p.toml", text).unwrap_err().to_string()
    }

    #[test]
    fn each_error_is_shown_with_its_place_and_its_text_underlined() {
        let text = shown("version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = \"IA32_LSTRA\"\nread\t= \"alow\"\n");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("p.toml:4:7: E"), "{text}");
        let underlined = ["    msr = \"IA32_LSTRA\"", "          ^^^^^^^^^^^^"];
        assert_eq!(lines[1..3], underlined, "{text}");
        let second = lines.iter().position(|line| line.starts_with("p.toml:5:8: E")).unwrap();
        // The tab takes one column.
        let underlined = ["    read = \"alow\"", "           ^^^^^^"];
        assert_eq!(lines[second + 1..second + 3], underlined, "{text}");
    }

    #[test]
    fn an_error_about_the_whole_a_long_line_and_what_acts_on_a_terminal_are_shown_without_harm() {
        assert!(shown("version = 1\n").contains("default"));
        let long = format!("version = 1\ndefault = \"deny{}\"\n", "y".repeat(1000));
        assert!(!shown(&long).contains('^'));
        assert!(!shown("version = 1\ndefault = \"\u{1b}[31m\u{202e}\"\n").contains(['\u{1b}', '\u{202e}']));
        assert!(shown("version = 1\ndefault = \"é\"\n").contains("\n              ^^^\n"));
    }

    #[test]
    fn more_errors_than_fit_are_counted() {
        let text = format!(
            "version = 1\ndefault = \"deny\"\n{}",
            "[[rule]]\nmsr = \"NONE\"\nread = \"deny\"\n".repeat(30)
        );
        let text = shown(&text);
        assert_eq!(text.matches(": E").count(), 20, "{text}");
        assert!(text.ends_with("\nand 10 more"), "{text}");
    }
}
