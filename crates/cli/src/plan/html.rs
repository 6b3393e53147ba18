//! A plan as a page for a browser: what a guest gets that is not the default, the map, and the rules.

use std::collections::BTreeSet;
use std::fmt::Display;

use maud::{Markup, html};
use msrgate_core::{Disposition, MsrRange, Op, Verdict};
use msrgate_plan::{Decision, Intervals};
use msrgate_policy::Diagnostic;
use msrgate_trace::report::Kind;

use crate::load::Loaded;
use crate::page::number::{counted, number};
use crate::page::sign::sign;
use crate::page::{self, MOST_ROWS, Page, map, rules};
use crate::stream::Tone;
use crate::{cause, words};

/// What all MSRs of a range get in one direction.
struct Row {
    range: MsrRange,
    op: Op,
    did: Disposition,
    gets: String,
    rule: Option<u32>,
}

impl Row {
    fn id(&self) -> String {
        map::id(self.range.first(), self.op)
    }
}

pub(super) fn page(loaded: &Loaded, notes: &[Diagnostic]) -> Page {
    let mut rows = rows(loaded);
    let counts = Op::ALL.map(|op| rows.iter().filter(|row| row.op == op).map(|row| row.range.len()).sum());
    let verdict = verdict(loaded, &rows, counts, notes);
    let all = rows.len();
    rows.truncate(MOST_ROWS);
    let mut notes: Vec<String> = notes
        .iter()
        .map(|note| format!("{}: {}", note.code, note.message))
        .collect();
    if all > MOST_ROWS {
        notes.push(format!(
            "the table has the first {MOST_ROWS} ranges of {all}; msrgate plan --json has all"
        ));
    }
    Page {
        subcommand: "plan",
        subject: loaded.policy.name.clone(),
        verdict,
        lead: None,
        notes,
        body: html! {
            (filter(loaded, counts))
            (accesses(loaded, &rows))
            (map::section(Some(loaded), None, &BTreeSet::new()))
            (rules::section(loaded, None))
        },
        footer: "What is allowed is the kernel’s own answer; what is denied is a #GP in the guest, or, where it says so, an answer \
                 from user space.",
    }
}

/// What differs from the policy's default, by MSR.
fn rows(loaded: &Loaded) -> Vec<Row> {
    fn each<A: Clone + Eq + Display>(
        op: Op,
        decided: &Intervals<Decision<A>>,
        did: impl Fn(&A) -> Disposition,
    ) -> Vec<Row> {
        let rows = decided.iter().map(|(range, decision)| Row {
            range,
            op,
            did: did(&decision.action),
            gets: decision.action.to_string(),
            rule: decision.rule,
        });
        rows.collect()
    }
    let map = loaded.plan.map();
    let mut rows = each(Op::Read, map.reads(), |action| action.did());
    rows.extend(each(Op::Write, map.writes(), |action| action.did()));
    rows.retain(|row| match loaded.policy.default {
        Verdict::Allow => row.did != Disposition::Allow,
        Verdict::Deny => row.did != Disposition::Deny,
    });
    rows.sort_by_key(|row| (row.range.first(), row.op));
    rows
}

fn verdict(loaded: &Loaded, rows: &[Row], [reads, writes]: [u64; 2], notes: &[Diagnostic]) -> page::Verdict {
    let name = &loaded.policy.name;
    let msrs = counted(reads, "MSR", "MSRs");
    let writes = number(writes);
    let text = match (loaded.policy.default, rows) {
        (Verdict::Allow, []) => format!("{name} leaves every access to the kernel"),
        (Verdict::Deny, []) => format!("{name} denies every access"),
        (Verdict::Allow, _) => {
            format!("{name} leaves to the kernel what a guest does, but for reads of {msrs} and writes of {writes}")
        }
        (Verdict::Deny, _) => {
            format!("{name} lets a guest read {msrs} and write {writes}; every other access faults")
        }
    };
    let notes = (!notes.is_empty()).then(|| {
        let notes = words::counted(notes.len() as u64, "note", "notes");
        ("note-0".to_owned(), format!("{notes} on what a filter cannot do"))
    });
    // First what user space answers, which is neither the kernel's word nor a fault.
    let answered = |row: &&Row| Kind::of(row.did) == Kind::Emulated;
    let (first, then): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(answered);
    let about = first.into_iter().chain(then).map(|row| {
        let name = words::name(row.range.first()).filter(|_| row.range.len() == 1);
        let name = name.map_or_else(|| row.range.to_string(), str::to_owned);
        (row.id(), format!("{} {name}: {}", row.op, row.gets))
    });
    page::Verdict {
        tone: Tone::Plain,
        text,
        about: notes.into_iter().chain(about).collect(),
    }
}

fn filter(loaded: &Loaded, [reads, writes]: [u64; 2]) -> Markup {
    let plan = &loaded.plan;
    let ranges = plan.filter().ranges();
    let bytes: usize = ranges.iter().map(|range| range.bitmap().len() * 8).sum();
    let reasons: Vec<&str> = plan.reasons().iter().map(|reason| reason.name()).collect();
    html! {
        section aria-labelledby="filter" {
            h2 #filter { "Filter" }
            dl.figures {
                div { dt { "Default" } dd { (plan.filter().default_verdict().name()) } }
                div { dt { "Ranges" } dd { (ranges.len()) small { " of 16" } } }
                div { dt { "Bitmaps" } dd { (number(bytes as u64)) small { " bytes" } } }
                div { dt { "Reads unlike the default" } dd { (number(reads)) } }
                div { dt { "Writes unlike the default" } dd { (number(writes)) } }
                div {
                    dt { "Exit reasons" }
                    dd.untold { @if reasons.is_empty() { "none: no access leaves the kernel" } @else { (reasons.join(", ")) } }
                }
            }
            p.muted {
                "The filter is proven equal to the policy for each of the 2^32 MSRs. Hash "
                code.hash { (words::hex(&plan.map().hash()).chars().take(16).collect::<String>()) "…" }
            }
        }
    }
}

fn accesses(loaded: &Loaded, rows: &[Row]) -> Markup {
    let head = html! {
        th scope="col" data-sort="n" aria-sort="ascending" { "MSRs" }
        th scope="col" data-sort="t" { "Names" }
        th scope="col" data-sort="t" { "Op" }
        th scope="col" data-sort="t" { "Gets" }
        th scope="col" data-sort="t" { "By" }
    };
    let lines = html! {
        @for row in rows {
            tr id=(row.id()) {
                td data-n=(row.range.first().0) { code { (row.range) } }
                th.wrap scope="row" { (words::names(row.range)) }
                td { code { (row.op) } }
                td.wrap { (sign(Kind::of(row.did))) (row.gets) }
                td {
                    @match row.rule {
                        Some(rule) => a href={ "#" (rules::id(rule)) } { "rule " (rule) },
                        None => (cause::without_rule(loaded, row.range).1),
                    }
                }
            }
        }
    };
    html! {
        @if !rows.is_empty() {
            section aria-labelledby="accesses" {
                h2 #accesses { "What is unlike the default" }
                (page::tools(html! {}))
                (page::table("decided", "accesses", head, lines))
            }
        }
    }
}
