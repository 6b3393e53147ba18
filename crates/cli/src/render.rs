//! Findings and tables for people.

use std::io::{self, IsTerminal, Write};

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Element, Group, Level, Origin, Renderer, Snippet};
use comfy_table::{ContentArrangement, Table, presets};
use msrgate_policy::{Diagnostic, Place, Severity, Source};

use crate::{hint, stream, words};

/// Whether a stream gets colour: a terminal does, unless NO_COLOR is set or TERM says that the terminal has none.
pub(crate) fn colour(stream: &impl IsTerminal) -> bool {
    let unset = |name: &str| std::env::var_os(name).is_none_or(|value| value.is_empty());
    stream.is_terminal() && unset("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// How many findings people get at once.
const FINDINGS: usize = 20;

/// Prints findings on standard error, and how many more there are.
pub(crate) fn findings(found: &[&Diagnostic], sources: &[Source]) -> io::Result<()> {
    let mut stderr = stream::err();
    for found in found.iter().take(FINDINGS) {
        stderr.coloured(&format!("{}\n\n", diagnostic(found, sources)))?;
    }
    match found.len().saturating_sub(FINDINGS) {
        0 => Ok(()),
        more => writeln!(stderr, "and {more} more, which `msrgate check --json` lists\n"),
    }
}

/// A finding with the text underlined and what to write instead.
fn diagnostic(found: &Diagnostic, sources: &[Source]) -> String {
    let level = match found.severity() {
        Severity::Error => Level::ERROR,
        Severity::Warning => Level::WARNING,
        Severity::Note => Level::NOTE,
    };
    // The renderer shows what acts on a terminal in the text of a file, and nowhere else.
    let plain = |text: &str| stream::shown(text, "\n\t").into_owned();
    let title = level.primary_title(plain(&found.message)).id(found.code.code());
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
    if let Some(help) = hint::help(found) {
        group = group.element(Level::HELP.message(plain(&help)));
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

/// The longest lines of which the text is shown.
const SHOWN: usize = 4096;

/// The lines of a source that have these places, underlined; those with a label are beside the point. Only they are given to
/// the renderer, which reads all that it is given.
fn snippet<'a>(source: &'a Source, places: &[(&Place, Option<&'a String>)]) -> Element<'a> {
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
    let path = words::plain(&source.path().to_string_lossy());
    if end - begin > SHOWN {
        let first = places.first().map_or(begin, |(place, _)| place.span.start);
        let (line, column) = source.line_column(first);
        return Origin::path(path).line(line).char_column(column).into();
    }
    Snippet::source(text.get(begin..end).unwrap_or_default().trim_end_matches('\r'))
        .line_start(source.line_column(begin).0)
        .path(path)
        .annotations(annotations)
        .into()
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

/// The most characters of a cell that are shown: all rows are as wide as the widest.
const CELL: usize = 500;

/// Rows without the blanks that pad each to the table's width, and what is longer than [`CELL`] cut short.
pub(crate) fn text(table: &Table) -> String {
    let mut table = table.clone();
    for row in table.row_iter_mut() {
        if row.cell_iter().any(|cell| cell.content().len() > CELL) {
            let short = row.cell_iter().map(|cell| cut(&cell.content()));
            *row = short.collect::<Vec<String>>().into();
        }
    }
    table
        .to_string()
        .lines()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(CELL) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}
