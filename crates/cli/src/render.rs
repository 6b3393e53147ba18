//! Findings and tables for people.

use std::io::{self, IsTerminal};

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{Annotation, AnnotationKind, Group, Level, Renderer, Snippet};
use comfy_table::{ContentArrangement, Table, presets};
use msrgate_policy::{Diagnostic, Place, Severity, Source};

/// Whether a stream gets colour: a terminal does, unless NO_COLOR says otherwise.
pub(crate) fn colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A finding with the text underlined and what to write instead.
pub(crate) fn diagnostic(found: &Diagnostic, sources: &[Source]) -> String {
    let level = match found.severity() {
        Severity::Error => Level::ERROR,
        Severity::Warning => Level::WARNING,
        Severity::Note => Level::NOTE,
    };
    let title = level.primary_title(&found.message).id(found.code.code());
    let mut report: Vec<Group<'_>> = Vec::new();
    let mut group = Group::with_title(title);
    let source = |place: &Place| sources.get(place.source);
    let first = found.place.as_ref().and_then(|place| Some((source(place)?, place)));
    let second = found
        .second
        .as_ref()
        .and_then(|(place, label)| Some((source(place)?, place, label)));
    if let Some((at, place)) = first {
        let primary = (place, None);
        match second {
            Some((_, second, label)) if near(place, second) => {
                group = group.element(snippet(at, &[primary, (second, Some(label))]));
            }
            Some((elsewhere, second, label)) => {
                group = group.element(snippet(at, &[primary]));
                group = group.element(snippet(elsewhere, &[(second, Some(label))]));
            }
            None => group = group.element(snippet(at, &[primary])),
        }
    }
    if let Some(help) = &found.help {
        group = group.element(Level::HELP.message(help));
    }
    report.push(group);
    let renderer = if colour(&io::stderr()) {
        Renderer::styled()
    } else {
        Renderer::plain()
    };
    renderer.decor_style(DecorStyle::Ascii).render(&report)
}

/// Whether two places are shown as one part of a file.
fn near(a: &Place, b: &Place) -> bool {
    const BYTES: usize = 4096;
    a.source == b.source && a.span.start.abs_diff(b.span.start) < BYTES
}

/// The lines of a source that have these places, underlined; those with a label are beside the point. Only they are given to the renderer, which reads all that it
/// is given.
fn snippet<'a>(source: &'a Source, places: &[(&Place, Option<&'a String>)]) -> Snippet<'a, Annotation<'a>> {
    let text = source.text();
    let spans = || places.iter().map(|(place, _)| visible(text, place));
    let begin = spans().map(|span| span.start).min().unwrap_or_default();
    let end = spans().map(|span| span.end).max().unwrap_or_default();
    let begin = text
        .get(..begin)
        .and_then(|before| before.rfind('\n'))
        .map_or(0, |end| end + 1);
    let end = text
        .get(end..)
        .and_then(|behind| behind.find('\n'))
        .map_or(text.len(), |line| end + line);
    let annotations = places.iter().map(|(place, label)| {
        let span = visible(text, place);
        let span = span.start - begin..span.end - begin;
        match label {
            Some(label) => AnnotationKind::Context.span(span).label(label.as_str()),
            None => AnnotationKind::Primary.span(span),
        }
    });
    Snippet::source(text.get(begin..end).unwrap_or_default().trim_end_matches('\r'))
        .line_start(source.line_column(begin).0)
        .path(source.path().to_string_lossy().into_owned())
        .annotations(annotations)
}

/// The part of a place that is shown: a rule is pointed at by its first line.
fn visible(text: &str, place: &Place) -> std::ops::Range<usize> {
    let part = text.get(place.span.clone()).unwrap_or_default();
    let first = part.lines().next().unwrap_or_default().trim_end();
    let start = place.span.start.min(text.len());
    start..start + first.len()
}

/// A table without lines, as wide as the terminal allows.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    // A serial line reports no columns at all; rows are broken only where there is room to read them broken.
    if table.width().is_some_and(|columns| columns >= 40) {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    if !colour(&io::stdout()) {
        table.force_no_tty();
    }
    table
}

/// Rows without the blanks that pad each to the table's width.
pub(crate) fn text(table: &Table) -> String {
    table
        .to_string()
        .lines()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}

/// A time as people read it.
pub(crate) fn duration(nanoseconds: u64) -> String {
    let float = nanoseconds as f64;
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.1} µs", float / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", float / 1e6),
        _ => format!("{:.1} s", float / 1e9),
    }
}

/// `1 access`, `2 accesses`.
pub(crate) fn counted(count: u64, one: &str, more: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { more })
}

/// A text from a trace or a policy, without characters that do something to a terminal.
pub(crate) fn plain(text: &str) -> String {
    let acts = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if acts(c) { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_told_in_the_unit_that_suits_it() {
        let told = [999, 1_500, 999_949, 2_000_000, 90_000_000_000].map(duration);
        assert_eq!(told, ["999 ns", "1.5 µs", "999.9 µs", "2.0 ms", "90.0 s"]);
    }
}
