//! What passes a KVM filter that stops RDMSR and WRMSR.

use alloc::format;
use alloc::string::String;
use core::fmt;
use core::str::FromStr;

use crate::cpuid::Cpuid;

/// A way past the filter: a row of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Bypass {
    /// What lets it pass.
    pub kind: BypassKind,
    /// What passes.
    pub passes: Passes,
    /// Names of registers, in which `?` and `*` stand for any characters, and classes such as `@lbr`; none where it is any.
    pub of: &'static [&'static str],
    /// What passes: a clause, or of [`BypassKind::Instruction`] how a clause begins that ends in registers.
    pub says: &'static str,
    /// The first version of Linux that lets it pass; `None` for the first that has filters.
    pub from: Option<Linux>,
    /// The last version of Linux that lets it pass; `None` where none is known that does not.
    pub to: Option<Linux>,
    /// The feature, of [`crate::cpuid::features`], without which a guest has no such way.
    pub guest: Option<&'static str>,
    /// A function of KVM, or a document and the title of a section.
    pub source: &'static str,
}

/// What lets something pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum BypassKind {
    /// KVM never asks the filter about these registers.
    Exempt,
    /// The processor, with instructions other than RDMSR and WRMSR or by itself.
    Instruction,
    /// KVM's fast path of VM exits.
    Fastpath,
    /// The interface by which an encrypted guest talks to its hypervisor.
    Ghcb,
    /// The processor, which does not intercept the access.
    Hardware,
    /// A gap of some versions of Linux.
    Kernel,
    /// What hides a confidential guest from its hypervisor.
    Confidential,
}

/// What passes the filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Passes {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Reads and writes.
    Any,
    /// The processor goes by the register, which RDMSR need not show.
    Use,
    /// Nothing passes, but the host does not reach the register either.
    Host,
}

impl Bypass {
    /// Whether this version of Linux lets it pass.
    pub fn is_of(&self, linux: Linux) -> bool {
        self.from.is_none_or(|from| from <= linux) && self.to.is_none_or(|to| linux <= to)
    }

    /// Whether a guest with this CPUID has the way.
    pub fn is_open_to(&self, guest: &Cpuid) -> bool {
        self.guest.is_none_or(|feature| guest.has(feature) == Some(true))
    }

    /// The versions that let it pass: `Linux 5.18 to 6.11`; `None` for all.
    pub fn versions(&self) -> Option<String> {
        match (self.from, self.to) {
            (None, None) => None,
            (Some(from), None) => Some(format!("from Linux {from}")),
            (None, Some(to)) => Some(format!("up to Linux {to}")),
            (Some(from), Some(to)) => Some(format!("Linux {from} to {to}")),
        }
    }

    /// The sentence, with the versions where the kernel is not known.
    pub fn says_of(&self, kernel: Option<Linux>, registers: &str) -> String {
        let versions = self.versions().filter(|_| kernel.is_none());
        let (space, versions) = (
            if registers.is_empty() { "" } else { " " },
            versions.map(|text| format!(" ({text})")),
        );
        format!("{}{space}{registers}{}", self.says, versions.unwrap_or_default())
    }
}

/// A version of Linux: major and minor number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Linux(pub u32, pub u32);

impl fmt::Display for Linux {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// A text does not begin with a version, as `6.12`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoVersion;

impl fmt::Display for NoVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("write a version of Linux as `uname -r` does, such as 6.12")
    }
}

impl core::error::Error for NoVersion {}

impl FromStr for Linux {
    type Err = NoVersion;

    /// The version that a release, as `uname -r` prints it, begins with: 6.1 of `6.1.0-48-amd64`.
    fn from_str(release: &str) -> Result<Linux, NoVersion> {
        let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok(Linux(major, minor)),
            _ => Err(NoVersion),
        }
    }
}
