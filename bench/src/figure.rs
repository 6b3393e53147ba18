//! One figure and what it is measured against.

use serde::Serialize;

/// What something costs. Less is better.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    /// The work that is measured.
    pub(crate) what: String,
    /// The unit of the costs.
    pub(crate) unit: &'static str,
    /// msrgate's cost.
    pub(crate) ours: f64,
    /// The work that `ours` is compared with.
    pub(crate) baseline_is: Option<&'static str>,
    /// The baseline's cost.
    pub(crate) baseline: Option<f64>,
    /// `ours` divided by `baseline`.
    pub(crate) ratio: Option<f64>,
    /// The target, where there is one.
    pub(crate) aim: Option<Aim>,
    /// Whether the target is met.
    pub(crate) met: Option<bool>,
}

/// A target for a figure.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Aim {
    /// The ratio is at most this.
    Ratio(f64),
    /// Ours is at most this.
    Ours(f64),
}

impl Figure {
    pub(crate) fn new(what: impl Into<String>, unit: &'static str, ours: f64) -> Figure {
        Figure {
            what: what.into(),
            unit,
            ours,
            baseline_is: None,
            baseline: None,
            ratio: None,
            aim: None,
            met: None,
        }
    }

    pub(crate) fn beside(self, baseline_is: &'static str, baseline: f64) -> Figure {
        Figure {
            baseline_is: Some(baseline_is),
            baseline: Some(baseline),
            ratio: Some(self.ours / baseline),
            ..self
        }
    }

    pub(crate) fn aim(self, aim: Aim) -> Figure {
        let met = match aim {
            Aim::Ratio(most) => self.ratio.is_some_and(|ratio| ratio <= most),
            Aim::Ours(most) => self.ours <= most,
        };
        Figure {
            aim: Some(aim),
            met: Some(met),
            ..self
        }
    }
}
