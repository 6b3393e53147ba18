//! Differences as a page for a browser.

use maud::html;
use msrgate_plan::{By, Differences};

use super::rows::{Row, fallbacks, rows};
use crate::args::DiffArgs;
use crate::page::number::{counted, number};
use crate::page::{self, MOST_ROWS, Page, Verdict, map};
use crate::stream::Tone;
use crate::{input, words};

fn id(row: &Row) -> String {
    map::id(row.range.first(), row.op)
}

pub(super) fn page(found: &Differences, by: By, args: &DiffArgs) -> Page {
    let mut rows = rows(found);
    let all = rows.len();
    let verdict = verdict(found, &rows);
    rows.truncate(MOST_ROWS);
    let names = [&args.a, &args.b].map(|path| input::shown(path));
    let [a, b] = &names;
    let fallbacks = fallbacks(found);
    let fallbacks = fallbacks.into_iter();
    let mut notes: Vec<String> = fallbacks
        .map(|(when, op, a, b)| format!("{op} {when} to the kernel: A {a}, B {b}"))
        .collect();
    if all > MOST_ROWS {
        notes.push(format!(
            "the table has the first {MOST_ROWS} ranges of {all}; msrgate diff --json has all"
        ));
    }
    let head = html! {
        th scope="col" data-sort="n" aria-sort="ascending" { "MSRs" }
        th scope="col" data-sort="t" { "Names" }
        th scope="col" data-sort="t" { "Op" }
        th scope="col" data-sort="t" { "A" }
        th scope="col" data-sort="t" { "B" }
    };
    let lines = html! {
        @for row in &rows {
            tr id=(id(row)) {
                td data-n=(row.range.first().0) { code { (row.range) } }
                th.wrap scope="row" { (words::names(row.range)) }
                td { code { (row.op) } }
                td.wrap { (row.a) }
                td.wrap { (row.b()) }
            }
        }
    };
    Page {
        subcommand: "diff",
        subject: format!("{a} {b}"),
        verdict,
        lead: Some(format!("A is {}, B is {}.", page::short(a), page::short(b))),
        notes,
        body: html! {
            @if !rows.is_empty() {
                section aria-labelledby="list" {
                    h2 #list { "What differs" }
                    (page::tools(html! {}))
                    (page::table("differences", "list", head, lines))
                }
            }
        },
        footer: match by {
            By::Actions => "Compared is what accesses get.",
            By::Verdicts => "Compared is which accesses are left to the kernel, since a raw filter says no more.",
        },
    }
}

fn verdict(found: &Differences, rows: &[Row]) -> Verdict {
    if found.is_empty() {
        return Verdict {
            tone: Tone::Good,
            text: "A and B are equal".to_owned(),
            about: Vec::new(),
        };
    }
    let accesses: u64 = rows.iter().map(|row| row.range.len()).sum();
    let ranges = counted(rows.len() as u64, "range", "ranges");
    let about = rows.iter().map(|row| {
        let name = words::name(row.range.first()).filter(|_| row.range.len() == 1);
        let name = name.map_or_else(|| row.range.to_string(), str::to_owned);
        (id(row), format!("{} {name}: {} → {}", row.op, row.a, row.b()))
    });
    Verdict {
        tone: Tone::Odd,
        text: match rows {
            [] => "A and B differ in what the kernel declines alone".to_owned(),
            _ => format!("A and B differ in {ranges}, {} of 2^33 accesses", number(accesses)),
        },
        about: about.collect(),
    }
}
