//! Findings and tables for people.

use std::cmp::Reverse;
use std::io::{self, Write};

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Element, Group, Level, Origin, Renderer, Snippet};
use msrgate_policy::{Diagnostic, Place, Severity, Source};

use crate::args::{ListArgs, SortArg};
use crate::stream::{Stream, Tone};
use crate::{hint, stream, words};

/// How many findings people get at once.
const FINDINGS: usize = 20;

/// Prints findings on standard error, and how many more there are.
pub(crate) fn findings(found: &[&Diagnostic], sources: &[Source]) -> io::Result<()> {
    let mut stderr = stream::err();
    for found in found.iter().take(FINDINGS) {
        let text = diagnostic(found, sources, stderr.colour, stderr.width);
        stderr.coloured(&format!("{text}\n\n"))?;
    }
    match found.len().saturating_sub(FINDINGS) {
        0 => Ok(()),
        more => writeln!(stderr, "and {more} more, which `msrgate check --json` lists\n"),
    }
}

/// A finding with the text underlined and what to write instead.
fn diagnostic(found: &Diagnostic, sources: &[Source], colour: bool, width: Option<usize>) -> String {
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
    let renderer = match colour {
        true => Renderer::styled(),
        false => Renderer::plain(),
    };
    let renderer = match width {
        Some(width) => renderer.term_width(width),
        None => renderer,
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

/// A table without lines. Its columns are in the order of their importance: where they do not all fit beside each other, those
/// that do stay, and the others stand in a line of their own below each row.
pub(crate) struct Table {
    titles: Vec<&'static str>,
    rows: Vec<(Tone, Vec<String>)>,
}

/// Between columns.
const GAP: usize = 2;

/// The most characters of a cell that are shown: all rows are as wide as the widest.
const CELL: usize = 500;

impl Table {
    pub(crate) fn new(titles: &[&'static str]) -> Table {
        Table {
            titles: titles.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn add_row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        self.add(Tone::Plain, cells);
    }

    pub(crate) fn add(&mut self, tone: Tone, cells: impl IntoIterator<Item = impl Into<String>>) {
        let cells = cells.into_iter().map(|cell| cut(words::plain(&cell.into())));
        self.rows.push((tone, cells.collect()));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(crate) fn print(&self, out: &mut Stream<impl Write>) -> io::Result<()> {
        out.coloured(&self.text(out.width, out.colour))
    }

    /// The table in so many columns; in as many as it takes where that is `None`. A column without a word is left out.
    pub(crate) fn text(&self, width: Option<usize>, colour: bool) -> String {
        let lengths: Vec<usize> = (0..self.titles.len()).map(|column| self.length(column)).collect();
        let beside = beside(&lengths, width.unwrap_or(usize::MAX));
        let columns = || {
            lengths
                .iter()
                .zip(&beside)
                .enumerate()
                .filter(|(_, (length, _))| **length > 0)
        };
        let cell = |cells: &[String], column: usize| cells.get(column).cloned().unwrap_or_default();
        let line = |tone: Tone, cells: &[String]| {
            let beside = columns().filter(|(_, (_, beside))| **beside);
            let line: String = beside
                .map(|(column, (length, _))| format!("{:1$}", cell(cells, column), length + GAP))
                .collect();
            format!("{}\n", tone.paint(line.trim_end(), colour))
        };
        let titles: Vec<String> = self.titles.iter().map(|title| (*title).to_owned()).collect();
        let mut text = line(Tone::Title, &titles);
        for (tone, cells) in &self.rows {
            text.push_str(&line(*tone, cells));
            let below = columns().filter(|(_, (_, beside))| !**beside);
            let below = below.map(|(column, _)| (cell(&titles, column), cell(cells, column)));
            let below = below.filter(|(_, cell)| !cell.is_empty());
            let below: Vec<String> = below.map(|(title, cell)| format!("{title} {cell}")).collect();
            if !below.is_empty() {
                text.push_str(&format!("    {}\n", below.join("; ").trim_start()));
            }
        }
        text
    }

    /// How wide a column is; 0 where nothing is in it.
    fn length(&self, column: usize) -> usize {
        let cells = self.rows.iter().filter_map(|(_, cells)| cells.get(column));
        match cells.map(|cell| cell.chars().count()).max().unwrap_or_default() {
            0 => 0,
            length => self.titles.get(column).map_or(0, |title| title.len()).max(length),
        }
    }
}

/// Which columns stand beside each other in so much room: the first, and of the others as many as fit, in their order.
fn beside(lengths: &[usize], room: usize) -> Vec<bool> {
    let mut used = 0;
    let fits = lengths.iter().map(|length| {
        if *length == 0 {
            return false;
        }
        let with = if used == 0 { *length } else { used + GAP + length };
        let fits = used == 0 || with <= room;
        used = if fits { with } else { used };
        fits
    });
    fits.collect()
}

/// How many rows a terminal gets at once.
const ROWS: usize = 40;

/// The rows that people get in the order that they asked for, and how many there are beside. `key` says of a row how much is
/// not as it was, how many accesses it is of, and where it stands by MSR.
pub(crate) fn list<T, K: Ord>(
    mut rows: Vec<T>,
    args: &ListArgs,
    terminal: bool,
    key: impl Fn(&T) -> (Effect, u64, K),
) -> (Vec<T>, usize) {
    rows.sort_by_cached_key(|row| {
        let (effect, count, place) = key(row);
        let (effect, count) = match args.sort {
            SortArg::Effect => (effect, count),
            SortArg::Count => (Effect::None, count),
            SortArg::Msr => (Effect::None, 0),
        };
        (Reverse(effect), Reverse(count), place)
    });
    let most = args.top.unwrap_or(match args.all || !terminal {
        true => usize::MAX,
        false => ROWS,
    });
    let rest = rows.len().saturating_sub(most);
    rows.truncate(most);
    (rows, rest)
}

/// How much is not as it was, in ascending order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Effect {
    None,
    /// Not the kernel's answer, or not this one.
    Other,
    /// A fault, as it was.
    Fault,
    /// Something was taken from the guest.
    Broken,
}

impl Effect {
    pub(crate) fn tone(self) -> Tone {
        match self {
            Effect::None => Tone::Plain,
            Effect::Other => Tone::Odd,
            Effect::Fault | Effect::Broken => Tone::Bad,
        }
    }
}

/// Says how many rows are not shown.
pub(crate) fn rest(out: &mut impl Write, rest: usize, what: [&str; 2]) -> io::Result<()> {
    let [one, more] = what.map(|what| format!("more {what}"));
    match rest {
        0 => Ok(()),
        rest => writeln!(out, "and {}; --all shows all", words::counted(rest as u64, &one, &more)),
    }
}

fn cut(text: String) -> String {
    match text.char_indices().nth(CELL) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}
