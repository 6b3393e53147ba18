//! When there were how many accesses: a lane for each kind, and one for each vCPU where there are several.

use maud::{Markup, html};
use msrgate_trace::report::Vcpu;

use super::super::contents::Contents;
use crate::page::number::{counted, number, since};
use crate::page::sign::{kinds, sign};

/// How high a lane is.
const HEIGHT: f64 = 40.0;
/// The lowest that a stretch of time with an access is drawn.
const LOWEST: f64 = 4.0;
/// How many vCPUs get a lane.
const VCPUS: usize = 8;
/// How many columns that has: a vCPU's own timeline is no finer.
const VCPU_COLUMNS: usize = 64;

pub(super) fn section(contents: &Contents) -> Markup {
    let report = &contents.report;
    let timeline = report.timeline();
    let columns = timeline.buckets().len();
    if columns < 2 {
        return html! {};
    }
    // Hostile times are further apart than integers hold. Times are from the first column on.
    let width = timeline.width() as f64;
    let wide = width * columns as f64 / columns.min(VCPU_COLUMNS) as f64;
    let buckets: Vec<[u64; 3]> = timeline.buckets().copied().collect();
    let mut busiest: Vec<(usize, &Vcpu)> = report.vcpus().iter().enumerate().collect();
    busiest.sort_by_key(|(_, vcpu)| std::cmp::Reverse(vcpu.count));
    let others = busiest.len().saturating_sub(VCPUS);
    busiest.truncate(VCPUS);
    busiest.sort_by_key(|(place, _)| *place);
    html! {
        section aria-labelledby="timeline" {
            h2 #timeline { "Timeline" }
            p.muted {
                "Each column is " (since(width))
                @if report.traces().len() > 1 { "; the traces are laid over each other from their first accesses on" }
                ". Each lane has its own height."
            }
            div.lanes {
                @for (place, (kind, count)) in kinds(report.kinds()).enumerate() {
                    @if count > 0 {
                        div.lane {
                            h3 { (sign(kind)) (kind.name()) }
                            (lane(
                                &buckets.iter().filter_map(|bucket| bucket.get(place).copied()).collect::<Vec<u64>>(),
                                kind.name(),
                                width,
                            ))
                        }
                    }
                }
                @if report.vcpus().len() > 1 {
                    @let several = report.vcpus().iter().any(|other| (other.trace, other.vm) != (0, 0));
                    @for (_, each) in busiest {
                        div.lane {
                            h3 {
                                "vCPU " (each.vcpu)
                                @if several { " " span.muted { "trace " (each.trace) ", VM " (each.vm) } }
                            }
                            (lane(&each.timeline.columns(timeline, columns.min(VCPU_COLUMNS)), "vcpu", wide))
                        }
                    }
                    @if others > 0 {
                        p.muted { (counted(others as u64, "vCPU has", "vCPUs have")) " fewer accesses than these and no lane." }
                    }
                }
                div.axis aria-hidden="true" {
                    @for quarter in 0..5 {
                        span { (since(width * columns as f64 * f64::from(quarter) / 4.0)) }
                    }
                }
            }
        }
    }
}

/// Columns that are so many nanoseconds wide.
fn lane(counts: &[u64], class: &str, width: f64) -> Markup {
    let most = counts.iter().copied().max().unwrap_or(0);
    let all: u64 = counts.iter().sum();
    let start = |place: usize| width * place as f64;
    let peak = counts.iter().position(|count| *count == most).unwrap_or(0);
    let label = format!(
        "{}, at most {} in one column, at {}",
        counted(all, "access", "accesses"),
        number(most),
        since(start(peak))
    );
    html! {
        svg.bars.(class) role="img" aria-label=(label) viewBox={ "0 0 " (counts.len()) " " (HEIGHT) } preserveAspectRatio="none" {
            @for (place, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                @let high = (*count as f64 / most as f64 * HEIGHT).max(LOWEST);
                g {
                    title {
                        (since(start(place))) " to " (since(start(place + 1))) ": "
                        (counted(*count, "access", "accesses"))
                    }
                    rect.hit x=(place) width="1" height=(HEIGHT) {}
                    rect.bar x={ (place) ".1" } y=(format!("{:.1}", HEIGHT - high)) width=".8" height=(format!("{high:.1}")) {}
                }
            }
        }
        p.peak { b { (number(all)) } " peak " (number(most)) }
    }
}
