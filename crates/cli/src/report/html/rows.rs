//! The table of accesses.

use maud::{Markup, html};
use msrgate_core::Op;
use msrgate_policy::Cause;
use msrgate_trace::report::{Counts, Kind, Moment, Row, Timeline};

use super::super::contents::Contents;
use super::super::print::{rules_of, vcpu, word};
use crate::page::number::{number, since};
use crate::page::sign::{kinds, sign};
use crate::page::{self, MOST_ROWS, map, rules};
use crate::words::{self, plain};

/// How many different things a cell shows before it is opened.
const FEW: usize = 2;
/// Columns of a row's own timeline.
const COLUMNS: usize = 48;

/// The rows that the page has: by MSR, those with the most accesses.
pub(super) fn listed(contents: &Contents) -> Vec<&Row> {
    let mut rows: Vec<&Row> = contents.report.rows().collect();
    if rows.len() > MOST_ROWS {
        rows.sort_by_key(|row| std::cmp::Reverse(row.count));
        rows.truncate(MOST_ROWS);
        rows.sort_unstable_by_key(|row| (row.msr, row.op));
    }
    rows
}

/// That there are more.
pub(super) fn note(contents: &Contents) -> Option<String> {
    let all = contents.report.rows().len();
    (all > MOST_ROWS).then(|| {
        format!(
            "the table has the {} MSRs and directions with the most accesses, of {}; msrgate report --json has more",
            number(MOST_ROWS as u64),
            number(all as u64)
        )
    })
}

/// Which columns there are something for.
struct Columns {
    time: bool,
    cost: bool,
    /// What numbers tell the vCPUs apart; empty where there is one.
    vcpu: &'static str,
    rips: bool,
    policy: bool,
}

pub(super) fn section(contents: &Contents, listed: &[&Row]) -> Markup {
    let report = &contents.report;
    let columns = Columns {
        time: report.timeline().buckets().len() > 1,
        cost: report.cost().count > 0,
        vcpu: match report.vcpus() {
            [] | [_] => "",
            _ if report.traces().len() > 1 => "trace/VM/vCPU",
            vcpus if vcpus.iter().any(|vcpu| vcpu.vm != 0) => "VM/vCPU",
            _ => "vCPU",
        },
        rips: listed.iter().any(|row| !row.rips.each().is_empty()),
        policy: contents.policy.is_some(),
    };
    let head = html! {
        th scope="col" data-sort="n" aria-sort="ascending" { "MSR" }
        th scope="col" data-sort="t" { "Name" }
        th scope="col" data-sort="t" { "Op" }
        th.n scope="col" data-sort="n" { "Count" }
        @if columns.time { th scope="col" data-sort="n" { "When" } }
        th scope="col" data-sort="t" { "Got" }
        th scope="col" { "Values" }
        @if columns.cost { th.n scope="col" data-sort="n" { "Each" } }
        @if columns.rips || !columns.vcpu.is_empty() { th scope="col" { "From" } }
        @if columns.policy { th scope="col" data-sort="t" { "Policy" } }
    };
    let rows = html! {
        @for row in listed {
            (line(contents, row, &columns))
        }
    };
    html! {
        section aria-labelledby="list" {
            h2 #list { "Accesses by MSR" }
            (page::tools(tools(&columns)))
            (page::table("accesses", "list", head, rows))
        }
    }
}

fn tools(columns: &Columns) -> Markup {
    html! {
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
    }
}

fn line(contents: &Contents, row: &Row, columns: &Columns) -> Markup {
    let entry = msrgate_msrs::by_msr(row.msr);
    let got: Vec<&str> = kinds(row.kinds)
        .filter(|(_, count)| *count > 0)
        .map(|(kind, _)| kind.name())
        .collect();
    let broken = contents.breaks(row);
    html! {
        tr id=(map::id(row.msr, row.op)) data-op=(row.op) data-got=(got.join(" ")) data-count=(row.count) data-broken[broken] {
            td data-n=(row.msr.0) { code { (row.msr) } }
            th scope="row" {
                (page::name(row.msr))
                @if let Some(entry) = entry {
                    @let classes: Vec<&str> = entry.classes().iter().map(|class| class.name()).collect();
                    div.muted { (classes.join(" ")) }
                }
            }
            td { code { (row.op) } }
            td.n data-n=(row.count) { (number(row.count)) }
            @if columns.time {
                @let (first, last) = (contents.report.first(row), contents.report.last(row));
                td data-n=(first.t) {
                    (spark(row, contents.report.timeline()))
                    div.muted {
                        (moment(contents, first))
                        @if first != last { " – " (moment(contents, last)) }
                    }
                }
            }
            td { (answers(row)) }
            td { (things(&row.values, |value| format!("{value:#x}"), |value| words::bits(row.msr, *value))) }
            @if columns.cost {
                @match row.cost.mean() {
                    Some(mean) => td.n data-n=(mean) {
                        (since(mean as f64))
                        @if row.cost.most > mean {
                            div.muted { "at most " span.one { (since(row.cost.most as f64)) } }
                        }
                    },
                    None => td.n data-n="-1" {},
                }
            }
            @if columns.rips || !columns.vcpu.is_empty() {
                td {
                    (things(&row.rips, |rip| format!("{rip:#x}"), |_| String::new()))
                    @if !columns.vcpu.is_empty() {
                        div.muted { (columns.vcpu) }
                        (things(&row.vcpus, |place| vcpu(contents, *place), |_| String::new()))
                    }
                }
            }
            @if columns.policy { td { (decision(contents, row, broken)) } }
        }
    }
}

/// A time, and in which trace where there are several. It is in one line.
fn moment(contents: &Contents, moment: Moment) -> Markup {
    html! {
        span.one {
            (since(moment.t as f64))
            @if contents.report.traces().len() > 1 { " in " (moment.trace) }
        }
    }
}

/// What the accesses got, each with its sign and, where there are several, its count.
fn answers(row: &Row) -> Markup {
    // Rules apart, which stand below.
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
        ul.plain.got {
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
        @if row.got.each().iter().any(|(got, _)| got.rule.is_some()) {
            div.muted { "by rule " (rules_of(row)) }
        }
    }
}

/// A few different things, each with what there is to say below it, and the others behind a click.
fn things<T: PartialEq, const MOST: usize>(
    counts: &Counts<T, MOST>,
    word: impl Fn(&T) -> String,
    below: impl Fn(&T) -> String,
) -> Markup {
    let mut each: Vec<&(T, u64)> = counts.each().iter().collect();
    each.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let alone = each.len() == 1 && counts.others() == 0;
    let item = |(thing, count): &(T, u64)| {
        html! {
            li {
                code { (word(thing)) }
                @if !alone { span.muted { " ×" (number(*count)) } }
                @let below = below(thing);
                @if !below.is_empty() { div.muted.bits { (below) } }
            }
        }
    };
    let (few, more) = each.split_at(each.len().min(FEW));
    let rest = more.len() as u64 + u64::from(counts.others() > 0);
    html! {
        ul.plain.things { @for thing in few { (item(thing)) } }
        @if rest > 0 {
            details {
                summary { (rest) " more" }
                ul.plain.things {
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
            Cause::Rule(number, _) => a href={ "#" (rules::id(number)) } { "rule " (number) },
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
