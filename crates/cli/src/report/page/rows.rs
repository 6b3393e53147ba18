//! The table of accesses.

use maud::{Markup, html};
use msrgate_core::Op;
use msrgate_policy::Cause;
use msrgate_trace::report::{Counts, Kind, Moment, Row, Timeline};

use super::super::contents::Contents;
use super::super::print::{rules_of, time, vcpu, word};
use super::number::number;
use super::sign::{kinds, sign};
use crate::words::{self, plain};

/// How many rows the page has: a browser sorts and filters these at once.
const MOST_LISTED: usize = 4096;
/// How many different things a cell shows before it is opened.
const FEW: usize = 2;
/// Columns of a row's own timeline.
const COLUMNS: usize = 48;

/// The rows that the page has: by MSR, those with the most accesses.
pub(super) fn listed(contents: &Contents) -> Vec<&Row> {
    let mut rows: Vec<&Row> = contents.report.rows().collect();
    if rows.len() > MOST_LISTED {
        rows.sort_by_key(|row| std::cmp::Reverse(row.count));
        rows.truncate(MOST_LISTED);
        rows.sort_unstable_by_key(|row| (row.msr, row.op));
    }
    rows
}

/// That there are more.
pub(super) fn note(contents: &Contents) -> Option<String> {
    let all = contents.report.rows().len();
    (all > MOST_LISTED).then(|| {
        format!(
            "the table has the {} MSRs and directions with the most accesses, of {}; msrgate report --json has more",
            number(MOST_LISTED as u64),
            number(all as u64)
        )
    })
}

/// What a link to the row names.
pub(super) fn id(row: &Row) -> String {
    format!("{}-{}", row.op, row.msr)
}

/// Which columns there are something for.
struct Columns {
    time: bool,
    cost: bool,
    /// What numbers tell the vCPUs apart; empty where there is one.
    vcpu: &'static str,
    rips: bool,
    rules: bool,
    policy: bool,
}

pub(super) fn section(contents: &Contents) -> Markup {
    let report = &contents.report;
    let rows = listed(contents);
    let columns = Columns {
        time: report.timeline().buckets().len() > 1,
        cost: report.cost().count > 0,
        vcpu: match report.vcpus() {
            [] | [_] => "",
            _ if report.traces().len() > 1 => "Trace/VM/vCPU",
            vcpus if vcpus.iter().any(|vcpu| vcpu.vm != 0) => "VM/vCPU",
            _ => "vCPUs",
        },
        rips: rows.iter().any(|row| !row.rips.each().is_empty()),
        rules: rows
            .iter()
            .any(|row| row.got.each().iter().any(|(got, _)| got.rule.is_some())),
        policy: contents.policy.is_some(),
    };
    html! {
        section aria-labelledby="list" {
            h2 #list { "Accesses by MSR" }
            (tools(&columns))
            div.scroll.tall role="region" aria-labelledby="list" tabindex="0" {
                table #accesses {
                    thead {
                        tr {
                            th scope="col" data-sort="n" aria-sort="ascending" { "MSR" }
                            th scope="col" data-sort="t" { "Name" }
                            th scope="col" data-sort="t" { "Op" }
                            th.n scope="col" data-sort="n" { "Count" }
                            @if columns.time {
                                th scope="col" { "When" }
                                th.n scope="col" data-sort="n" { "First s" }
                                th.n scope="col" data-sort="n" { "Last s" }
                            }
                            th scope="col" data-sort="t" { "Got" }
                            th scope="col" { "Values" }
                            @if columns.cost { th.n scope="col" data-sort="n" { "Each" } }
                            @if !columns.vcpu.is_empty() { th scope="col" { (columns.vcpu) } }
                            @if columns.rips { th scope="col" { "From" } }
                            @if columns.rules { th scope="col" data-sort="t" { "Rule" } }
                            @if columns.policy { th scope="col" data-sort="t" { "Policy" } }
                        }
                    }
                    tbody {
                        @for row in rows {
                            (line(contents, row, &columns))
                        }
                    }
                }
            }
            p.none hidden { "No row is left." }
        }
    }
}

/// Hidden, since without the script they do nothing.
fn tools(columns: &Columns) -> Markup {
    html! {
        div.tools hidden {
            label.search {
                span { "Filter" }
                input #find type="search" autocomplete="off" spellcheck="false" placeholder="name, index, value, class, …";
            }
            fieldset {
                legend { "Direction" }
                @for op in Op::ALL {
                    label { input type="checkbox" name="op" value=(op) checked; (op) }
                }
            }
            fieldset {
                legend { "Got" }
                @for kind in Kind::ALL {
                    label { input type="checkbox" name="kind" value=(kind.name()) checked; (sign(kind)) (kind.name()) }
                }
            }
            @if columns.policy {
                fieldset {
                    legend { "Policy" }
                    label { input type="checkbox" name="broken"; "only what it denies and was served" }
                }
            }
            p #shown role="status" {}
        }
    }
}

fn line(contents: &Contents, row: &Row, columns: &Columns) -> Markup {
    let entry = msrgate_msrs::by_msr(row.msr);
    let got: Vec<&str> = kinds(row.kinds)
        .filter(|(_, count)| *count > 0)
        .map(|(kind, _)| kind.name())
        .collect();
    let several = contents.report.traces().len() > 1;
    let broken = contents.breaks(row);
    html! {
        tr id=(id(row)) data-op=(row.op) data-got=(got.join(" ")) data-count=(row.count) data-broken[broken] {
            td data-n=(row.msr.0) { code { (row.msr) } }
            th scope="row" {
                (words::name(row.msr).unwrap_or("unknown"))
                @if let Some(entry) = entry {
                    @let classes: Vec<&str> = entry.classes().iter().map(|class| class.name()).collect();
                    div.muted { (classes.join(" ")) }
                }
            }
            td { code { (row.op) } }
            td.n data-n=(row.count) { (number(row.count)) }
            @if columns.time {
                td { (spark(row, contents.report.timeline())) }
                @for when in [contents.report.first(row), contents.report.last(row)] {
                    td.n data-n=(when.t) { (moment(when, several)) }
                }
            }
            td { (answers(row)) }
            td { (things(&row.values, |value| format!("{value:#x}"))) }
            @if columns.cost {
                @match row.cost.mean() {
                    Some(mean) => td.n data-n=(mean) {
                        (words::duration(mean))
                        @if row.cost.most > mean {
                            div.muted { "at most " (words::duration(row.cost.most)) }
                        }
                    },
                    None => td.n data-n="-1" {},
                }
            }
            @if !columns.vcpu.is_empty() { td { (things(&row.vcpus, |place| vcpu(contents, *place))) } }
            @if columns.rips { td { (things(&row.rips, |rip| format!("{rip:#x}"))) } }
            @if columns.rules { td { (rules_of(row)) } }
            @if columns.policy { td.wrap { (decision(contents, row, broken)) } }
        }
    }
}

/// Seconds, and in which trace where there are several.
fn moment(moment: Moment, several: bool) -> Markup {
    html! {
        (time(moment, false))
        @if several {
            div.muted { "trace " (moment.trace) }
        }
    }
}

/// What the accesses got, each with its sign and, where there are several, its count.
fn answers(row: &Row) -> Markup {
    // Rules apart, which have their own column.
    let mut words: Vec<(Kind, String, u64)> = Vec::new();
    for (got, count) in row.got.each() {
        let word = word(got);
        match words.iter_mut().find(|(_, known, _)| *known == word) {
            Some((_, _, sum)) => *sum += count,
            None => words.push((Kind::of(got.did), word, *count)),
        }
    }
    let several = words.len() > 1 || row.got.others() > 0;
    html! {
        ul.plain {
            @for (kind, word, count) in words {
                li {
                    (sign(kind)) (word)
                    @if several { span.muted { " ×" (number(count)) } }
                }
            }
            @if row.got.others() > 0 {
                li.muted { "otherwise ×" (number(row.got.others())) }
            }
        }
    }
}

/// A few different things, and the others behind a click.
fn things<T: PartialEq, const MOST: usize>(counts: &Counts<T, MOST>, word: impl Fn(&T) -> String) -> Markup {
    let mut each: Vec<&(T, u64)> = counts.each().iter().collect();
    each.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let alone = each.len() == 1 && counts.others() == 0;
    let item = |(thing, count): &(T, u64)| {
        html! {
            li {
                code { (word(thing)) }
                @if !alone { span.muted { " ×" (number(*count)) } }
            }
        }
    };
    let (few, more) = each.split_at(each.len().min(FEW));
    let rest = more.len() as u64 + u64::from(counts.others() > 0);
    html! {
        ul.plain { @for thing in few { (item(thing)) } }
        @if rest > 0 {
            details {
                summary { (rest) " more" }
                ul.plain {
                    @for thing in more { (item(thing)) }
                    @if counts.others() > 0 {
                        li.muted { "others ×" (number(counts.others())) }
                    }
                }
            }
        }
    }
}

/// What the policy decides, and why.
fn decision(contents: &Contents, row: &Row, broken: bool) -> Markup {
    let Some(explained) = contents.explain(row.msr, row.op) else {
        return html! {};
    };
    html! {
        (sign(contents.decides(row)))
        (explained.action.to_string()) ", "
        @match explained.cause {
            Cause::Rule(number, _) => a href={ "#rule-" (number) } { "rule " (number) },
            Cause::Valid(_) => "by valid",
            _ => "by default",
        }
        @if let Some(why) = explained.cause.rule().and_then(|(_, rule)| rule.why.as_deref()) {
            div.muted { (plain(why)) }
        }
        @if broken {
            div.broken { "denies what was served" }
        }
    }
}

/// When, as a small picture.
fn spark(row: &Row, span: &Timeline<3>) -> Markup {
    const HEIGHT: f64 = 16.0;
    let counts = row.timeline.columns(span, COLUMNS);
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let bars: String = counts
        .iter()
        .enumerate()
        .filter(|(_, count)| **count > 0)
        .map(|(place, count)| {
            let high = (*count as f64 / most as f64 * HEIGHT).max(3.0);
            format!("M{place} {HEIGHT}v-{high:.0}h1v{high:.0}z")
        })
        .collect();
    html! {
        svg.spark viewBox={ "0 0 " (COLUMNS) " " (HEIGHT) } preserveAspectRatio="none" aria-hidden="true" { path d=(bars) {} }
    }
}
