//! The report as a page for a browser.

mod rows;
mod timeline;

use maud::{Markup, html};
use msrgate_trace::report::{Row, Trace};

use super::contents::Contents;
use crate::load::Loaded;
use crate::page::number::{counted, number, percent, since};
use crate::page::sign::{kinds, sign};
use crate::page::{Page, Verdict, map, rules, short};
use crate::stream::Tone;
use crate::words::{self, plain};

pub(super) fn page(contents: &Contents) -> Page {
    let report = &contents.report;
    let names: Vec<String> = contents.files.iter().map(|(name, _)| short(name)).collect();
    let listed = rows::listed(contents);
    let keys = listed.iter().map(|row| (row.msr, row.op)).collect();
    let policy = contents.policy.as_ref();
    let notes = contents.missing().into_iter().chain(contents.notes());
    Page {
        subcommand: "report",
        subject: match names.as_slice() {
            [name] => name.clone(),
            names => format!("{} traces", names.len()),
        },
        verdict: verdict(contents, &listed),
        lead: match report.traces() {
            [trace] => Some(description(trace)),
            _ => None,
        },
        notes: notes.chain(rows::note(contents)).collect(),
        body: html! {
            (summary(contents))
            @if report.traces().len() > 1 {
                (traces(contents))
            }
            @if report.accesses() > 0 {
                (rows::section(contents, &listed))
                (timeline::section(contents))
                (map::section(policy, Some(&mut report.rows()), &keys))
            }
            @if let Some(loaded) = policy {
                (rules::section(loaded, Some(&contents.decided())))
            }
        },
        footer: "Allowed is what the kernel’s own register answered, emulated what the policy put in its place, faulted a #GP in \
                 the guest.",
    }
}

/// What the policy takes from the guest; without a policy, what faulted.
fn verdict(contents: &Contents, listed: &[&Row]) -> Verdict {
    let report = &contents.report;
    let [_, _, faulted] = report.kinds();
    let all = report.accesses();
    let served = all - faulted;
    let (tone, mut text) = match &contents.policy {
        _ if all == 0 => (Tone::Plain, "No access is in the traces".to_owned()),
        Some(loaded) => match contents.broken() {
            0 => (
                Tone::Good,
                format!(
                    "{} denies nothing that the guest was served with",
                    plain(&loaded.policy.name)
                ),
            ),
            broken => (
                Tone::Bad,
                format!(
                    "{} denies {} of the {} that the guest was served with",
                    plain(&loaded.policy.name),
                    number(broken),
                    counted(served, "access", "accesses")
                ),
            ),
        },
        None => match faulted {
            0 => (Tone::Good, "No access faulted in the guest".to_owned()),
            faulted => (
                Tone::Odd,
                format!(
                    "{} of {} faulted in the guest",
                    number(faulted),
                    counted(all, "access", "accesses")
                ),
            ),
        },
    };
    // What is missing may be what the policy denies.
    if contents.policy.is_some() && all > 0 && !contents.missing().is_empty() {
        text.push_str(", as far as the traces tell");
    }
    if report.lost() > 0 {
        text.push_str(&format!("; {} missing", counted(report.lost(), "more is", "more are")));
    }
    // Under a policy what it breaks; else what faulted.
    let broken = contents.broken() > 0;
    let count = |row: &Row| {
        let [_, _, faulted] = row.kinds;
        match (broken, contents.breaks(row)) {
            (true, true) => row.served(),
            (true, false) => 0,
            (false, _) => faulted,
        }
    };
    let mut about: Vec<(u64, &Row)> = listed.iter().map(|row| (count(row), *row)).collect();
    about.retain(|(count, _)| *count > 0);
    about.sort_by_key(|(count, row)| (std::cmp::Reverse(*count), row.msr, row.op));
    let about = about.into_iter().map(|(count, row)| {
        let name = words::name(row.msr).map_or_else(|| row.msr.to_string(), str::to_owned);
        let what = if broken { "denied" } else { "faulted" };
        (
            map::id(row.msr, row.op),
            format!("{} {name}, {} {what}", row.op, number(count)),
        )
    });
    Verdict {
        tone,
        text,
        about: about.collect(),
    }
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
                div { dt { "Over" } dd { (since(longest.unwrap_or(0) as f64)) } }
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
                p.muted {
                    "Held against the policy " b { (plain(&policy.name)) } ", hash "
                    code.hash { (words::hex(&plan.map().hash()).chars().take(16).collect::<String>()) "…" }
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
                table aria-labelledby="traces" {
                    thead {
                        tr {
                            th scope="col" { "No." }
                            th scope="col" { "File" }
                            th scope="col" { "What ran" }
                            th.n scope="col" { "Accesses" }
                            th.n scope="col" { "Over" }
                        }
                    }
                    tbody {
                        @for (place, ((name, _), trace)) in contents.files.iter().zip(contents.report.traces()).enumerate() {
                            tr {
                                td.n { (place) }
                                th scope="row" { (short(name)) }
                                td.wrap { (description(trace)) }
                                td.n { (number(trace.events)) }
                                td.n { (since(trace.duration() as f64)) }
                            }
                        }
                    }
                }
            }
        }
    }
}
