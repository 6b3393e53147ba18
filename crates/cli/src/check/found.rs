//! What was found about policies, and where.

use msrgate_policy::{Diagnostic, Place, Source};

use crate::exit::Exit;
use crate::load::Loaded;
use crate::refusal::TooMany;

/// What was found about one policy.
pub(crate) struct Checked {
    pub(super) exit: Exit,
    pub(super) sources: Vec<Source>,
    pub(super) findings: Vec<Diagnostic>,
    /// On the plan.
    pub(super) notes: Vec<Diagnostic>,
    pub(super) loaded: Option<Loaded>,
    pub(super) too_many: Option<Box<TooMany>>,
}

/// A place as editors have it: lines and columns from 1, the end behind the last character.
pub(super) struct Location {
    pub(super) file: String,
    pub(super) begin: (usize, usize),
    pub(super) end: (usize, usize),
}

impl Checked {
    /// All that was found, and the notes.
    pub(super) fn all(&self) -> impl Iterator<Item = &Diagnostic> {
        self.findings.iter().chain(&self.notes)
    }

    pub(super) fn place(&self, found: &Diagnostic) -> Option<Location> {
        self.where_is(found.place.as_ref()?)
    }

    pub(super) fn where_is(&self, place: &Place) -> Option<Location> {
        let source = self.sources.get(place.source)?;
        Some(Location {
            file: source.path().display().to_string(),
            begin: source.line_column(place.span.start),
            end: source.line_column(place.span.end),
        })
    }
}
