//! Where in the space of MSRs the accesses were, and what a policy decides there.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};
use msrgate_core::{Msr, MsrRange, Op};
use msrgate_plan::Intervals;
use msrgate_trace::report::{Kind, Row};

use super::number::{counted, number};
use super::sign::{kinds, outline, sign};
use crate::load::Loaded;
use crate::words;

/// How many squares of 256 MSRs are drawn.
const MOST_DRAWN: usize = 48;
/// How wide an MSR is.
const CELL: u32 = 11;

/// Where processors and hypervisors have their MSRs.
const WINDOWS: [(&str, u32, u32); 5] = [
    ("Intel’s and common", 0x0, 0x3fff),
    ("Hyper-V’s and Xen’s", 0x4000_0000, 0x4000_11ff),
    ("KVM’s", 0x4b56_4d00, 0x4b56_4dff),
    ("x86-64’s and AMD’s", 0xc000_0000, 0xc000_3fff),
    ("AMD’s", 0xc001_0000, 0xc001_3fff),
];

/// What a policy decides, as far as a filter can.
struct Decided {
    reads: Intervals<Kind>,
    writes: Intervals<Kind>,
}

impl Decided {
    fn new(loaded: &Loaded) -> Decided {
        let map = loaded.plan.map();
        Decided {
            reads: map.reads().map(|decision| Kind::of(decision.action.did())),
            writes: map.writes().map(|decision| Kind::of(decision.action.did())),
        }
    }

    fn of(&self, op: Op) -> &Intervals<Kind> {
        match op {
            Op::Read => &self.reads,
            Op::Write => &self.writes,
        }
    }

    /// How many MSRs of a range get what.
    fn count(&self, range: MsrRange, op: Op) -> [u64; 3] {
        Kind::ALL.map(|kind| {
            let parts = self.of(op).within(range);
            parts
                .filter(|(_, other)| **other == kind)
                .map(|(part, _)| part.len())
                .sum()
        })
    }

    fn is_mixed(&self, range: MsrRange) -> bool {
        Op::ALL.into_iter().any(|op| self.of(op).within(range).nth(1).is_some())
    }
}

type AccessCount<'a> = BTreeMap<(Msr, Op), &'a Row>;

/// What a link to the row of an access names.
pub(crate) fn id(msr: Msr, op: Op) -> String {
    format!("{op}-{msr}")
}

/// The map of what was touched, with what a policy decides behind it. Of what was touched, what is `listed` is linked to; where
/// nothing could be touched, `touched` is `None`.
pub(crate) fn section(
    policy: Option<&Loaded>,
    touched: Option<&mut dyn Iterator<Item = &Row>>,
    listed: &BTreeSet<(Msr, Op)>,
) -> Markup {
    let decided = policy.map(Decided::new);
    let touches = touched.is_some();
    let touched: AccessCount<'_> = touched
        .into_iter()
        .flatten()
        .map(|row| ((row.msr, row.op), row))
        .collect();
    let mut squares: BTreeMap<u32, u64> = BTreeMap::new();
    let msrs: BTreeSet<Msr> = touched.keys().map(|(msr, _)| *msr).collect();
    for msr in msrs {
        *squares.entry(msr.0 >> 8).or_default() += 1;
    }
    if let Some(decided) = &decided {
        for (_, first, last) in WINDOWS {
            let mixed = (first >> 8..=last >> 8).filter(|square| decided.is_mixed(range(*square)));
            mixed.for_each(|square| _ = squares.entry(square).or_default());
        }
    }
    let mut drawn: Vec<(u32, u64)> = squares.iter().map(|(square, count)| (*square, *count)).collect();
    drawn.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let left_out = drawn.len().saturating_sub(MOST_DRAWN);
    drawn.truncate(MOST_DRAWN);
    drawn.sort_unstable();
    html! {
        section aria-labelledby="map" {
            h2 #map { "Map of the MSR space" }
            p.muted {
                "Each square is 256 MSRs, sixteen in a line; a line’s first index is beside it."
                @if touches { " A sign is an MSR that was touched, and what it got." }
                @if decided.is_some() { " The ground is what the policy decides." }
            }
            ul.legend {
                @if touches {
                    @for kind in Kind::ALL {
                        li { (sign(kind)) (kind.name()) }
                    }
                }
                @if decided.is_some() {
                    @for (kind, word) in Kind::ALL.into_iter().zip(["allows", "emulates", "denies"]) {
                        li {
                            svg.ground width="18" height="12" aria-hidden="true" { rect.tint.(kind.name()) width="18" height="12" {} }
                            "policy " (word)
                        }
                    }
                }
            }
            (windows(policy, decided.as_ref(), touches.then_some(&touched)))
            div.squares {
                @for (square, count) in drawn {
                    (card(square, touches.then_some(count), decided.as_ref(), &touched, listed))
                }
            }
            @if left_out > 0 {
                p.muted { (counted(left_out as u64, "square", "squares")) " more, where less was touched, are not drawn." }
            }
        }
    }
}

fn range(square: u32) -> MsrRange {
    let first = square << 8;
    MsrRange::new(Msr(first), Msr(first | 0xff)).unwrap_or(MsrRange::ALL)
}

/// In numbers: what was touched in each window, and what the policy decides in it.
fn windows(policy: Option<&Loaded>, decided: Option<&Decided>, touched: Option<&AccessCount<'_>>) -> Markup {
    let windows =
        WINDOWS.map(|(name, first, last)| (name, MsrRange::new(Msr(first), Msr(last)).unwrap_or(MsrRange::ALL)));
    let elsewhere = |msr: &Msr| windows.iter().all(|(_, window)| !window.contains(*msr));
    let touched_in = |within: &dyn Fn(&Msr) -> bool| {
        let rows = || {
            touched
                .into_iter()
                .flat_map(BTreeMap::values)
                .filter(|row| within(&row.msr))
        };
        let msrs: BTreeSet<Msr> = rows().map(|row| row.msr).collect();
        (msrs.len() as u64, rows().map(|row| row.count).sum::<u64>())
    };
    let outside = touched_in(&elsewhere);
    html! {
        div.scroll role="region" aria-label="Windows of the MSR space" tabindex="0" {
            table aria-label="Windows of the MSR space" {
                thead {
                    tr {
                        th scope="col" { "Window" }
                        th scope="col" { "MSRs" }
                        @if touched.is_some() {
                            th.n scope="col" { "Touched" }
                            th.n scope="col" { "Accesses" }
                        }
                        @if decided.is_some() {
                            th scope="col" { "Policy on reads" }
                            th scope="col" { "Policy on writes" }
                        }
                    }
                }
                tbody {
                    @for (name, window) in &windows {
                        @let (msrs, accesses) = touched_in(&|msr| window.contains(*msr));
                        tr {
                            th scope="row" { (name) }
                            td { code { (window.first()) "–" (window.last()) } }
                            @if touched.is_some() {
                                td.n { (number(msrs)) }
                                td.n { (number(accesses)) }
                            }
                            @if let Some(decided) = decided {
                                @for op in Op::ALL {
                                    td { (words(decided.count(*window, op))) }
                                }
                            }
                        }
                    }
                    @if outside.0 > 0 {
                        tr {
                            th scope="row" { "Elsewhere" }
                            td {}
                            td.n { (number(outside.0)) }
                            td.n { (number(outside.1)) }
                            @if let Some(loaded) = policy {
                                td colspan="2" { span.muted { "what no rule names: " (loaded.policy.default.name()) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// `212 allowed, 16172 denied`.
fn words(counts: [u64; 3]) -> String {
    let words = kinds(counts).filter(|(_, count)| *count > 0).map(|(kind, count)| {
        let word = match kind {
            Kind::Faulted => "denied",
            kind => kind.name(),
        };
        format!("{} {word}", number(count))
    });
    words.collect::<Vec<_>>().join(", ")
}

fn card(
    square: u32,
    count: Option<u64>,
    decided: Option<&Decided>,
    touched: &AccessCount<'_>,
    listed: &BTreeSet<(Msr, Op)>,
) -> Markup {
    let range = range(square);
    html! {
        figure.square {
            figcaption {
                code { (range.first()) "–" (range.last()) }
                span.muted {
                    @if range.first() == MsrRange::X2APIC.first() {
                        "x2APIC: no filter stops it"
                    } @else if count == Some(0) {
                        "not touched"
                    } @else if let Some(count) = count {
                        (number(count)) " touched"
                    }
                }
            }
            div.pair {
                @for op in Op::ALL {
                    div {
                        p.op { (op) }
                        (grid(range, op, decided, touched, listed))
                    }
                }
            }
        }
    }
}

fn grid(
    range: MsrRange,
    op: Op,
    decided: Option<&Decided>,
    touched: &AccessCount<'_>,
    listed: &BTreeSet<(Msr, Op)>,
) -> Markup {
    let side = 16 * CELL;
    let from = (range.first(), op);
    let to = (range.last(), op);
    // Between these are rows of the other direction too.
    let signs = touched
        .range((from.0, Op::Read)..=(to.0, Op::Write))
        .filter(|((_, other), _)| *other == op);
    html! {
        svg.grid viewBox={ "-23 0 " (side + 23) " " (side) } aria-hidden="true" {
            @for line in [0_u32, 4, 8, 12] {
                text x="-4" y=(line * CELL + 9) text-anchor="end" { (format!("{:02x}", line * 16)) }
            }
            rect.back width=(side) height=(side) {}
            @if let Some(decided) = decided {
                @for kind in Kind::ALL {
                    @let ground = ground(range, op, kind, decided);
                    @if !ground.is_empty() {
                        path.tint.(kind.name()) d=(ground) {}
                    }
                }
            }
            path.lines d=(lines()) {}
            @for (key, row) in signs {
                @let (x, y) = place(row.msr);
                @let kind = worst(row);
                @let title = title(row);
                @if listed.contains(key) {
                    a href={ "#" (id(row.msr, row.op)) } tabindex="-1" {
                        rect.hit x=(x) y=(y) width=(CELL) height=(CELL) { title { (title) } }
                        path class=(kind.name()) d=(outline(kind, x, y)) { title { (title) } }
                    }
                } @else {
                    path class=(kind.name()) d=(outline(kind, x, y)) { title { (title) } }
                }
            }
        }
    }
}

fn place(msr: Msr) -> (u32, u32) {
    (msr.0 % 16 * CELL, msr.0 % 256 / 16 * CELL)
}

/// The lines between MSRs.
fn lines() -> String {
    let side = 16 * CELL;
    let all = (1..16).map(|line| line * CELL);
    all.map(|at| format!("M0 {at}h{side}M{at} 0v{side}")).collect()
}

/// The MSRs of a square for which the policy decides so, as an outline of runs.
fn ground(range: MsrRange, op: Op, kind: Kind, decided: &Decided) -> String {
    let mut path = String::new();
    let parts = if range.first() == MsrRange::X2APIC.first() {
        // Whatever the policy says.
        vec![(range, Kind::Allowed)]
    } else {
        decided.of(op).within(range).map(|(part, kind)| (part, *kind)).collect()
    };
    for (part, _) in parts.into_iter().filter(|(_, other)| *other == kind) {
        let (mut first, last) = (part.first().0 % 256, part.last().0 % 256);
        while first <= last {
            // To the end of the line, or whole lines at once.
            let (wide, high) = if first % 16 == 0 && last - first >= 15 {
                (16, (last - first + 1) / 16)
            } else {
                ((16 - first % 16).min(last - first + 1), 1)
            };
            let (x, y) = (first % 16 * CELL, first / 16 * CELL);
            path.push_str(&format!("M{x} {y}h{0}v{1}h-{0}z", wide * CELL, high * CELL));
            first += wide * high;
        }
    }
    path
}

/// What is drawn of accesses that got several things: the gravest.
fn worst(row: &Row) -> Kind {
    let got = kinds(row.kinds).filter(|(_, count)| *count > 0);
    got.map(|(kind, _)| kind).max().unwrap_or(Kind::Allowed)
}

fn title(row: &Row) -> String {
    let name = words::name(row.msr).map(|name| format!(" {name}")).unwrap_or_default();
    let got: Vec<String> = kinds(row.kinds)
        .filter(|(_, count)| *count > 0)
        .map(|(kind, count)| format!("{} {}", number(count), kind.name()))
        .collect();
    format!("{} {}{name}: {}", row.op, row.msr, got.join(", "))
}
