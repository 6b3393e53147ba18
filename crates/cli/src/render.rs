//! Findings and tables for people.

use std::io::{self, IsTerminal};

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
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
    if let Some((place, at)) = found.place.as_ref().and_then(|place| Some((place, source(place)?))) {
        let mut snippet = Snippet::source(&at.text)
            .path(at.path.to_string_lossy().into_owned())
            .annotation(AnnotationKind::Primary.span(visible(at, place)));
        let mut elsewhere = None;
        if let Some((second, label)) = &found.second {
            if second.source == place.source {
                snippet = snippet.annotation(AnnotationKind::Context.span(visible(at, second)).label(label));
            } else {
                elsewhere = source(second).map(|at| (second, at, label));
            }
        }
        group = group.element(snippet);
        if let Some((second, at, label)) = elsewhere {
            let snippet = Snippet::source(&at.text)
                .path(at.path.to_string_lossy().into_owned())
                .annotation(AnnotationKind::Context.span(visible(at, second)).label(label));
            group = group.element(snippet);
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

/// The part of a place that is shown: a rule is pointed at by its first line.
fn visible(source: &Source, place: &Place) -> std::ops::Range<usize> {
    let text = source.text.get(place.span.clone()).unwrap_or_default();
    let first = text.lines().next().unwrap_or_default().trim_end();
    let end = place.span.start + first.len();
    place.span.start..end.min(source.text.len())
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
