//! The signs of what accesses got, the same wherever they are drawn.

use maud::{Markup, html};
use msrgate_trace::report::Kind;

/// Each with its place in `[u64; 3]`.
pub(crate) fn kinds(counts: [u64; 3]) -> impl Iterator<Item = (Kind, u64)> {
    Kind::ALL.into_iter().zip(counts)
}

/// The sign of a kind, the same wherever it is drawn: a square, a diamond, a cross.
pub(crate) fn sign(kind: Kind) -> Markup {
    html! {
        svg.sign.(kind.name()) viewBox="0 0 10 10" aria-hidden="true" {
            path d=(outline(kind, 0, 0)) {}
        }
    }
}

/// The sign within a square of 10 at a place.
pub(crate) fn outline(kind: Kind, x: u32, y: u32) -> String {
    match kind {
        Kind::Allowed => format!("M{} {}h8v8h-8z", x + 1, y + 1),
        Kind::Emulated => format!("M{} {}l5 5l-5 5l-5 -5z", x + 5, y),
        Kind::Faulted => format!(
            "M{} {}l3.5 3.5l3.5 -3.5l1.5 1.5l-3.5 3.5l3.5 3.5l-1.5 1.5l-3.5 -3.5l-3.5 3.5l-1.5 -1.5l3.5 -3.5l-3.5 -3.5z",
            f64::from(x) + 1.5,
            y
        ),
    }
}

/// What areas are filled with, so that no kind is told by its colour alone.
pub(crate) fn patterns() -> Markup {
    html! {
        svg.patterns width="0" height="0" aria-hidden="true" {
            defs {
                pattern #hatch-emulated width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)" {
                    rect.emulated width="6" height="6" {}
                    rect.gap width="1.5" height="6" {}
                }
                pattern #hatch-faulted width="5" height="5" patternUnits="userSpaceOnUse" {
                    rect.faulted width="5" height="5" {}
                    rect.gap width="1.5" height="1.5" {}
                }
                pattern #tint-emulated width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)" {
                    rect.emulated width="1.2" height="4" {}
                }
                pattern #tint-faulted width="5" height="5" patternUnits="userSpaceOnUse" {
                    rect.dot width="1" height="1" {}
                }
            }
        }
    }
}
