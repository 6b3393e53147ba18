//! The report as one HTML page: it asks nothing of any network, and can be read without its script.

mod map;
mod number;
mod rows;
mod sign;
mod timeline;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use msrgate_trace::report::Trace;
use sha2::{Digest, Sha256};

use super::contents::Contents;
use crate::load::Loaded;
use crate::words::{self, plain};
use number::{counted, number};
use sign::{kinds, patterns, sign};

const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");

/// The longest text of a trace's header that is shown, in characters.
const LONGEST: usize = 200;

pub(super) fn page(contents: &Contents) -> String {
    let report = &contents.report;
    let names: Vec<String> = contents.files.iter().map(|(name, _)| short(name)).collect();
    let title = match names.as_slice() {
        [name] => name.clone(),
        names => format!("{} traces", names.len()),
    };
    // Only this style and this script are carried out, whatever a trace has smuggled in.
    let security = format!(
        "default-src 'none'; style-src '{}'; script-src '{}'; base-uri 'none'; form-action 'none'",
        source(STYLE),
        source(SCRIPT)
    );
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(security);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="generator" content={ "msrgate " (env!("CARGO_PKG_VERSION")) };
                title { "MSR accesses: " (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                (patterns())
                header {
                    p.eyebrow { "msrgate report" }
                    h1 { (title) }
                    @if let [trace] = report.traces() {
                        p.lead { (description(trace)) }
                    }
                }
                main {
                    (summary(contents))
                    (notes(contents))
                    @if report.traces().len() > 1 {
                        (traces(contents))
                    }
                    @if report.accesses() > 0 {
                        (timeline::section(contents))
                        (map::section(contents))
                        (rows::section(contents))
                    }
                    (rules(contents))
                }
                footer {
                    p {
                        "Made by msrgate " (env!("CARGO_PKG_VERSION"))
                        ". Allowed is what the kernel’s own register answered, emulated what the policy put in its place, \
                         faulted a #GP in the guest."
                    }
                }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    page.into_string()
}

/// What a security policy calls an inline text.
fn source(text: &str) -> String {
    format!("sha256-{}", BASE64_STANDARD.encode(Sha256::digest(text)))
}

/// A text of a trace or a policy, with an end.
fn short(text: &str) -> String {
    let mut shown: String = text.chars().take(LONGEST).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    plain(&shown)
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 * 100.0 / whole as f64
}

fn description(trace: &Trace) -> String {
    let header = &trace.header;
    let parts = [&header.guest, &header.vmm, &header.host, &header.kernel, &header.cpu];
    let parts: Vec<String> = parts.into_iter().flatten().map(|part| short(part)).collect();
    match parts.is_empty() {
        true => "The trace says nothing of its guest.".to_owned(),
        false => parts.join(" · "),
    }
}

fn summary(contents: &Contents) -> Markup {
    let report = &contents.report;
    let all = report.accesses();
    let mut msrs: Vec<_> = report.rows().map(|row| row.msr).collect();
    msrs.dedup();
    let cost = report.cost();
    let mode = match report.traces() {
        [trace] => trace.header.mode.as_deref(),
        _ => None,
    };
    let longest = report.traces().iter().map(Trace::duration).max();
    // Where each kind's part of the bar begins.
    let [allowed, emulated, _] = report.kinds();
    let starts = [0, allowed, allowed + emulated];
    html! {
        section aria-labelledby="summary" {
            h2 #summary { "Summary" }
            dl.figures {
                div { dt { "Accesses" } dd { (number(all)) } }
                div { dt { "MSRs" } dd { (number(msrs.len() as u64)) } }
                div { dt { "vCPUs" } dd { (number(report.vcpus().len() as u64)) } }
                div { dt { "Over" } dd { (words::duration(longest.unwrap_or(0))) } }
                div {
                    dt { "Left the kernel" }
                    dd { (number(report.exits())) small { (format!(" {:.0} %", percent(report.exits(), all))) } }
                }
                div {
                    dt { "Time in user space" }
                    @match cost.mean() {
                        Some(mean) => dd {
                            (words::duration(cost.sum))
                            small { " " (words::duration(mean)) " each" }
                        },
                        None => dd.untold { "not in the " (if report.traces().len() > 1 { "traces" } else { "trace" }) },
                    }
                }
            }
            @if all > 0 {
                svg.share width="100%" height="14" aria-hidden="true" {
                    @for ((kind, count), start) in kinds(report.kinds()).zip(starts) {
                        @let (x, width) = (percent(start, all), percent(count, all));
                        @if count > 0 {
                            rect.area.(kind.name()) x=(format!("{x:.3}%")) width=(format!("{width:.3}%")) height="14" {}
                        }
                    }
                }
                ul.shares {
                    @for (kind, count) in kinds(report.kinds()) {
                        li {
                            (sign(kind)) b { (number(count)) } " " (kind.name())
                            span.muted { (format!(" {:.1} %", percent(count, all))) }
                        }
                    }
                }
            }
            @if let Some(mode) = mode {
                p.muted { "How it was seen: " (short(mode)) "." }
            }
            @if let Some(Loaded { policy, plan, .. }) = &contents.policy {
                p {
                    "Held against the policy " b { (plain(&policy.name)) } " "
                    code.hash { (words::hex(&plan.map().hash()).chars().take(16).collect::<String>()) "…" }
                    @let broken = contents.broken();
                    @if broken > 0 {
                        ", which denies " b { (counted(broken, "access", "accesses")) } " that the guest was served with."
                    } @else {
                        ", which denies nothing that the guest was served with."
                    }
                }
            }
        }
    }
}

fn notes(contents: &Contents) -> Markup {
    let notes = contents.missing().into_iter().chain(contents.notes());
    let mut notes: Vec<String> = notes.map(|note| short(&note)).collect();
    notes.extend(rows::note(contents));
    html! {
        @if !notes.is_empty() {
            ul.notes aria-label="Notes" {
                @for note in notes {
                    li { (note) }
                }
            }
        }
    }
}

fn traces(contents: &Contents) -> Markup {
    html! {
        section aria-labelledby="traces" {
            h2 #traces { "Traces" }
            div.scroll role="region" aria-labelledby="traces" tabindex="0" {
                table {
                    thead {
                        tr {
                            th scope="col" { "No." }
                            th scope="col" { "File" }
                            th scope="col" { "What ran" }
                            th.n scope="col" { "Accesses" }
                            th.n scope="col" { "Seconds" }
                        }
                    }
                    tbody {
                        @for (place, ((name, _), trace)) in contents.files.iter().zip(contents.report.traces()).enumerate() {
                            tr {
                                td.n { (place) }
                                th scope="row" { (short(name)) }
                                td.wrap { (description(trace)) }
                                td.n { (number(trace.events)) }
                                td.n { (format!("{:.3}", trace.duration() as f64 / 1e9)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn rules(contents: &Contents) -> Markup {
    let Some(Loaded { policy, .. }) = &contents.policy else {
        return html! {};
    };
    html! {
        section aria-labelledby="rules" {
            h2 #rules { "Rules of the policy" }
            p.muted { "The first rule that names an MSR decides. What no rule names gets the default, " b { (policy.default.name()) } "." }
            div.scroll role="region" aria-labelledby="rules" tabindex="0" {
                table {
                    thead {
                        tr {
                            th.n scope="col" { "No." }
                            th scope="col" { "Rule" }
                            th scope="col" { "Why" }
                            th.n scope="col" { "Accesses" }
                        }
                    }
                    tbody {
                        @for ((number, rule), count) in policy.rules.iter().enumerate().zip(contents.decided()) {
                            tr id={ "rule-" (number) } {
                                th.n scope="row" { (number) }
                                td { pre { (plain_lines(&rule.to_string())) } }
                                td.wrap {
                                    (rule.why.as_deref().map(plain).unwrap_or_default())
                                    @if let Some(source) = policy.sources.get(rule.place.source) {
                                        div.muted {
                                            (short(&source.path().display().to_string())) ":"
                                            (source.line_column(rule.place.span.start).0)
                                        }
                                    }
                                }
                                td.n { (number::number(count)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The lines of a rule without its heading and its reason, which stand apart.
fn plain_lines(rule: &str) -> String {
    let lines = rule
        .trim()
        .lines()
        .filter(|line| *line != "[[rule]]" && !line.starts_with("why "));
    let lines: Vec<String> = lines.map(plain).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_its_thousands_apart() {
        let shown = [0, 999, 1_000, 12_345, 1_234_567].map(number);
        assert_eq!(shown, ["0", "999", "1,000", "12,345", "1,234,567"]);
    }

    #[test]
    fn a_long_text_has_an_end_and_a_short_one_is_whole() {
        assert_eq!(short(&"ä".repeat(LONGEST)), "ä".repeat(LONGEST));
        assert_eq!(short(&"ä".repeat(LONGEST + 1)).chars().count(), LONGEST + 1);
        assert_eq!(short("a\u{202e}b\u{0}"), "a\\u202eb\\u0000");
    }
}
