//! What was run, and what was found.

use msrgate_core::{Msr, Op};

/// What was run, and what was found.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub struct Report {
    /// Random calls that were made up.
    pub candidates: u64,
    /// Filters that were installed.
    pub filters: u64,
    /// Calls whose acceptance was compared.
    pub calls: u64,
    /// Accesses that were compared.
    pub accesses: u64,
    /// Writes of TSC_DEADLINE that this kernel carries out ahead of the filter.
    pub bypasses: u64,
    /// What could not be compared, and why.
    pub skipped: Vec<String>,
    /// What the hardware passed through.
    pub interception: Vec<Interception>,
    /// What reads gave while filters were replaced.
    pub swapped: Vec<Swapped>,
    /// Where kernel and engine differ.
    pub disagreements: Vec<Disagreement>,
}

impl Report {
    /// Adds what another run found.
    pub fn add(&mut self, other: Report) {
        self.candidates += other.candidates;
        self.filters += other.filters;
        self.calls += other.calls;
        self.accesses += other.accesses;
        self.bypasses += other.bypasses;
        self.skipped.extend(other.skipped);
        self.interception.extend(other.interception);
        self.swapped.extend(other.swapped);
        self.disagreements.extend(other.disagreements);
    }
}

/// A difference between the live kernel and the engine.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Disagreement {
    /// At what.
    pub what: String,
    /// What the kernel did.
    pub live: String,
    /// What the engine did.
    pub engine: String,
    /// Which of the random calls, from 0.
    pub candidate: Option<u64>,
    /// The smallest case that shows it, in the format of the case files.
    pub case: Option<String>,
}

impl Disagreement {
    pub(crate) fn new(what: String, live: String, engine: String) -> Disagreement {
        Disagreement {
            what,
            live,
            engine,
            candidate: None,
            case: None,
        }
    }
}

/// Exits of one MSR in one direction: before there is a filter, under one that denies the access, and when all is
/// allowed again.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Interception {
    /// The register.
    pub msr: Msr,
    /// The register's name.
    pub name: &'static str,
    /// The direction.
    pub op: Op,
    /// Exits of any kind, each time of [`Interception::TIMES`] accesses.
    pub exits: [u64; 3],
    /// Exits that user space was asked about, in all.
    pub asked: u64,
    /// Whether the engine's bitmap intercepts the access, each time.
    pub intercepted: [bool; 3],
}

impl Interception {
    /// Accesses of one count.
    pub const TIMES: u64 = 200;
}

/// What reads of one MSR gave while two filters took turns.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Swapped {
    /// The register.
    pub msr: Msr,
    /// Whether the first filter denies it, and the second.
    pub denied_by: [bool; 2],
    /// Reads that were denied.
    pub denied: u64,
    /// Reads that gave what the kernel gives without a filter.
    pub allowed: u64,
    /// Reads that gave anything else.
    pub neither: u64,
}
