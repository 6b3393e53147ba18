//! A scan, and what differs between two, as pages for a browser.

use maud::{Markup, html};
use msrgate_core::{Msr, MsrRange, Op};
use msrgate_guest::scan::{Broken, Difference};

use super::rows::{CHANGES, REGISTERS, broken, changes, registers};
use super::{Facts, Found};
use crate::page::number::{counted, number};
use crate::page::{self, MOST_ROWS, Page, Verdict, map};
use crate::stream::Tone;
use crate::words;

/// What the MSRs of a range gave: cells in the order of the titles.
type Row = (MsrRange, [String; 4]);

const FOOTER: &str = "A real guest read every MSR, and wrote what it had read back where that is no command. #GP is a fault in the guest.";

fn id(msr: Msr) -> String {
    map::id(msr, Op::Read)
}

/// The page of a scan, or of what differs from the one that it is compared with.
pub(crate) fn page(found: &Found) -> Page {
    if let Some((before, differences)) = &found.against {
        return differing("scan", (before, &found.facts), differences, &found.scan.broken);
    }
    let rows = registers(&found.scan);
    let tried: u64 = found.scan.ranges.iter().map(|range| range.len()).sum();
    let text = format!(
        "A guest can read {} of {} here, and write {} back",
        number(found.scan.readable.len() as u64),
        counted(tried, "MSR", "MSRs"),
        number(found.scan.writable.len() as u64),
    );
    let verdict = Verdict {
        tone: Tone::Plain,
        text,
        // Of a scan alone nothing stands out.
        about: Vec::new(),
    };
    made(
        "scan",
        &found.facts,
        None,
        verdict,
        ("What a guest can see", REGISTERS, rows),
        &found.scan.broken,
    )
}

/// The page of what differs between two scans.
pub(crate) fn compared_page(facts: (&Facts, &Facts), differences: &[Difference]) -> Page {
    differing("diff", facts, differences, &[])
}

fn differing(
    subcommand: &'static str,
    (before, after): (&Facts, &Facts),
    differences: &[Difference],
    broken: &[Broken],
) -> Page {
    let rows = changes(differences);
    let mut msrs: Vec<Msr> = differences.iter().map(|found| found.msr).collect();
    msrs.dedup();
    let (tone, text) = match msrs.len() as u64 {
        0 => (Tone::Good, "A guest sees what it saw before".to_owned()),
        1 => (Tone::Odd, "1 MSR differs".to_owned()),
        count => (Tone::Odd, format!("{} MSRs differ", number(count))),
    };
    let about = rows.iter().map(|(range, [read, write, _, kvm])| {
        let name = words::name(range.first()).map_or_else(|| range.to_string(), str::to_owned);
        let parts = [("read", read), ("write back", write), ("KVM", kvm)];
        let parts = parts.iter().filter(|(_, cell)| !cell.is_empty());
        let parts: Vec<String> = parts.map(|(title, cell)| format!("{title} {cell}")).collect();
        (id(range.first()), format!("{name}: {}", parts.join(", ")))
    });
    let verdict = Verdict {
        tone,
        text,
        about: about.collect(),
    };
    made(
        subcommand,
        after,
        Some(before),
        verdict,
        ("What differs", CHANGES, rows),
        broken,
    )
}

fn made(
    subcommand: &'static str,
    facts: &Facts,
    before: Option<&Facts>,
    verdict: Verdict,
    (heading, titles, mut rows): (&'static str, [&'static str; 4], Vec<Row>),
    breaks: &[Broken],
) -> Page {
    let all = rows.len();
    rows.truncate(MOST_ROWS);
    let mut notes: Vec<String> = breaks.iter().map(broken).collect();
    if all > MOST_ROWS {
        notes.push(format!(
            "the table has the first {MOST_ROWS} rows of {all}; msrgate {subcommand} --json has all"
        ));
    }
    let broke = (!breaks.is_empty()).then(|| {
        let broken = counted(breaks.len() as u64, "access", "accesses");
        ("note-0".to_owned(), format!("{broken} broke the guest"))
    });
    Page {
        subcommand,
        subject: host(facts),
        verdict: Verdict {
            tone: if broke.is_some() { Tone::Bad } else { verdict.tone },
            text: verdict.text,
            about: broke.into_iter().chain(verdict.about).collect(),
        },
        lead: before.map(|before| format!("Before: {}.", page::short(&host(before)))),
        notes,
        body: section(heading, titles, &rows),
        footer: FOOTER,
    }
}

fn section(heading: &str, titles: [&str; 4], rows: &[Row]) -> Markup {
    // A column without a word is left out.
    let columns = [0, 1, 2, 3].map(|column| {
        rows.iter()
            .any(|(_, cells)| cells.get(column).is_some_and(|cell| !cell.is_empty()))
    });
    let titles = titles.map(|title| heading_of(if title.is_empty() { "remark" } else { title }));
    let head = html! {
        th scope="col" data-sort="n" aria-sort="ascending" { "MSR" }
        th scope="col" data-sort="t" { "Name" }
        @for (title, _) in titles.iter().zip(columns).filter(|(_, there)| *there) {
            th scope="col" data-sort="t" { (title) }
        }
    };
    let lines = html! {
        @for (range, cells) in rows {
            tr id=(id(range.first())) {
                td data-n=(range.first().0) { code { (range) } }
                th scope="row" { (page::name(range.first())) }
                @for (cell, _) in cells.iter().zip(columns).filter(|(_, there)| *there) { td.cell { (cell) } }
            }
        }
    };
    html! {
        @if !rows.is_empty() {
            section aria-labelledby="list" {
                h2 #list { (heading) }
                (page::tools(html! {}))
                (page::table("registers", "list", head, lines))
            }
        }
    }
}

/// A column's title as a page has it.
fn heading_of(title: &str) -> String {
    let mut chars = title.chars();
    let first = chars.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(chars).collect()
}

fn host(facts: &Facts) -> String {
    let policy = facts.policy.as_ref().map(|policy| format!("under {}", policy.name));
    let parts = [facts.host.clone(), facts.kernel.clone(), policy];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    parts.join(", ")
}
