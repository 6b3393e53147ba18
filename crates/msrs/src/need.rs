//! What operating systems need of MSRs: accesses that they make unguarded, so that #GP stops them or leaves them crippled.
//!
//! A row says which access, of whom, what becomes of it without, and where that can be read. Accesses that a system guards,
//! as Linux does with `rdmsrl_safe`, have none.

use core::fmt;

use msrgate_core::{Msr, Op};

use self::System::{Freebsd, Linux, Macos, Windows};

/// An operating system, of 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum System {
    /// Linux.
    Linux,
    /// Windows.
    Windows,
    /// FreeBSD.
    Freebsd,
    /// macOS, whose kernel is XNU.
    Macos,
}

impl System {
    /// All systems.
    pub const ALL: [System; 4] = [Linux, Windows, Freebsd, Macos];
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Linux => "Linux",
            Windows => "Windows",
            Freebsd => "FreeBSD",
            Macos => "macOS",
        })
    }
}

/// An access without which an operating system fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// The register. Where the guest's CPUID says that it is not there, the system leaves it alone.
    pub msr: Msr,
    /// The direction.
    pub op: Op,
    /// Whose need it is.
    pub system: System,
    /// What it is for, and what happens without.
    pub why: &'static str,
    /// Where this can be read.
    pub source: &'static str,
}
