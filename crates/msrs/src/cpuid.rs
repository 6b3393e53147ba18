//! A guest's CPUID: what it says of vendor, model and features.
//!
//! An MSR may be valid on one CPU model and not on another, so a policy may ask. The text form is
//! what `cpuid -r` prints, so that a recorded machine can be named on the command line.
//!
//! ```
//! # use msrgate_msrs::cpuid::Cpuid;
//! let text = "   0x00000001 0x00: eax=0x000306c3 ebx=0x00100800 ecx=0x7ffafbbf edx=0xbfebfbff\n";
//! let cpuid = Cpuid::parse_raw(text)?;
//! assert_eq!((cpuid.family(), cpuid.model()), (Some(6), Some(0x3c)));
//! assert_eq!(cpuid.has("mtrr"), Some(true));
//! # Ok::<(), msrgate_msrs::cpuid::CpuidError>(())
//! ```

mod features;
mod place;

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use core::fmt;

pub use place::{Feature, Owner, Place, Register};

/// The values that CPUID gives, by leaf and subleaf.
///
/// A leaf that is not listed reads as all zeros. (Intel processors answer a leaf above their highest
/// with the data of the highest; recorders leave such leaves out, and so does this.)
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpuid {
    entries: BTreeMap<(u32, u32), [u32; 4]>,
}

/// Who made the processor, by the text in leaf 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CpuVendor {
    /// `GenuineIntel`.
    Intel,
    /// `AuthenticAMD`.
    Amd,
    /// `HygonGenuine`, which follows AMD's manual.
    Hygon,
    /// Any other text.
    Other,
}

impl fmt::Display for CpuVendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CpuVendor::Intel => "intel",
            CpuVendor::Amd => "amd",
            CpuVendor::Hygon => "hygon",
            CpuVendor::Other => "other",
        })
    }
}

/// All features that [`Cpuid::has`] knows.
pub fn features() -> &'static [Feature] {
    features::FEATURES
}

/// Whether a feature has this name, in any case.
pub fn is_feature(name: &str) -> bool {
    feature(name).is_some()
}

/// Where CPUID tells of a feature: any of these places says that it is there. Empty if no feature has this name.
pub fn places(name: &str) -> &'static [Place] {
    feature(name).map_or(&[], |feature| feature.places)
}

/// Why a text is not what `cpuid -r` prints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuidError {
    /// The line, counted from 1; 0 if it is the text as a whole.
    pub line: usize,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Empty,
    Line(String),
    Number(String),
    Twice { leaf: u32, subleaf: u32 },
}

impl fmt::Display for CpuidError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line != 0 {
            write!(f, "line {}: ", self.line)?;
        }
        match &self.kind {
            Kind::Empty => f.write_str("no CPUID leaf in the text; expected what `cpuid -r -1` prints"),
            Kind::Line(text) => {
                write!(f, "expected `LEAF SUBLEAF: eax=… ebx=… ecx=… edx=…`, found `{text}`")
            }
            Kind::Number(text) => write!(
                f,
                "`{text}` is not a 32-bit number in hexadecimal, such as `0x0000000d`"
            ),
            Kind::Twice { leaf, subleaf } => {
                write!(f, "leaf {leaf:#010x} subleaf {subleaf:#04x} is given twice")
            }
        }
    }
}

impl core::error::Error for CpuidError {}

impl Cpuid {
    /// From `(leaf, subleaf, [eax, ebx, ecx, edx])`; of two with the same leaf and subleaf the later counts.
    pub fn from_entries(entries: impl IntoIterator<Item = (u32, u32, [u32; 4])>) -> Cpuid {
        Cpuid {
            entries: entries
                .into_iter()
                .map(|(leaf, subleaf, values)| ((leaf, subleaf), values))
                .collect(),
        }
    }

    /// Reads what `cpuid -r` and `cpuid -r -1` print; of several CPUs the first.
    ///
    /// # Errors
    /// Names the first line that is neither a leaf, a `CPU:` heading nor blank, or gives a leaf twice.
    pub fn parse_raw(text: &str) -> Result<Cpuid, CpuidError> {
        let mut entries = BTreeMap::new();
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.trim();
            if text.is_empty() {
                continue;
            }
            if text.starts_with("CPU") && text.ends_with(':') {
                if entries.is_empty() {
                    continue;
                }
                break;
            }
            let fail = |kind| CpuidError { line, kind };
            let (leaf, subleaf, values) = leaf(text).map_err(fail)?;
            if entries.insert((leaf, subleaf), values).is_some() {
                return Err(fail(Kind::Twice { leaf, subleaf }));
            }
        }
        if entries.is_empty() {
            return Err(CpuidError {
                line: 0,
                kind: Kind::Empty,
            });
        }
        Ok(Cpuid { entries })
    }

    /// The text that `cpuid -r -1` would print; [`Cpuid::parse_raw`] reads it back.
    pub fn to_raw(&self) -> String {
        let mut text = String::from("CPU:\n");
        for (leaf, subleaf, [eax, ebx, ecx, edx]) in self.entries() {
            text += &format!(
                "   {leaf:#010x} {subleaf:#04x}: eax={eax:#010x} ebx={ebx:#010x} ecx={ecx:#010x} edx={edx:#010x}\n"
            );
        }
        text
    }

    /// All leaves, in order: `(leaf, subleaf, [eax, ebx, ecx, edx])`.
    pub fn entries(&self) -> impl Iterator<Item = (u32, u32, [u32; 4])> + '_ {
        self.entries
            .iter()
            .map(|(&(leaf, subleaf), &values)| (leaf, subleaf, values))
    }

    /// The four registers of a leaf, `[eax, ebx, ecx, edx]`, if it is listed.
    pub fn leaf(&self, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
        self.entries.get(&(leaf, subleaf)).copied()
    }

    /// Who made the processor; `None` without leaf 0.
    pub fn vendor(&self) -> Option<CpuVendor> {
        let [_, ebx, ecx, edx] = self.leaf(0, 0)?;
        Some(match &bytes([ebx, edx, ecx]) {
            b"GenuineIntel" => CpuVendor::Intel,
            b"AuthenticAMD" => CpuVendor::Amd,
            b"HygonGenuine" => CpuVendor::Hygon,
            _ => CpuVendor::Other,
        })
    }

    /// The family, the extended family added where the manuals say so; `None` without leaf 1.
    pub fn family(&self) -> Option<u32> {
        let version = self.version()?;
        let base = (version >> 8) & 0xf;
        Some(if base == 0xf {
            base + ((version >> 20) & 0xff)
        } else {
            base
        })
    }

    /// The model, the extended model as its upper half where the manuals say so; `None` without leaf 1.
    pub fn model(&self) -> Option<u32> {
        let version = self.version()?;
        let (base, extended) = ((version >> 4) & 0xf, (version >> 16) & 0xf);
        Some(if matches!((version >> 8) & 0xf, 6 | 0xf) {
            extended << 4 | base
        } else {
            base
        })
    }

    /// The stepping; `None` without leaf 1.
    pub fn stepping(&self) -> Option<u32> {
        Some(self.version()? & 0xf)
    }

    /// Whether the CPU has a feature; `None` if no feature has this name.
    pub fn has(&self, name: &str) -> Option<bool> {
        Some(feature(name)?.places.iter().any(|place| self.says(place)))
    }

    /// EAX of leaf 1.
    fn version(&self) -> Option<u32> {
        self.leaf(1, 0).map(|[eax, ..]| eax)
    }

    fn says(&self, place: &Place) -> bool {
        let value = self
            .base(place.owner)
            .and_then(|base| self.leaf(place.leaf.wrapping_add(base), place.subleaf));
        let Some([eax, ebx, ecx, edx]) = value else {
            return false;
        };
        let register = match place.register {
            Register::Eax => eax,
            Register::Ebx => ebx,
            Register::Ecx => ecx,
            Register::Edx => edx,
        };
        // In 64 bits, so that a field of all 32 needs no case of its own.
        let field = (u64::from(register) >> place.bit) & ((1_u64 << place.width) - 1);
        field >= u64::from(place.at_least)
    }

    /// How far above 0x4000_0000 the leaves of this hypervisor start; 0 for the processor's own.
    fn base(&self, owner: Owner) -> Option<u32> {
        let signature = |wanted: &[u8; 12]| {
            let mut bases = (0..0x1_0000).step_by(0x100);
            bases.find(|base| {
                self.leaf(0x4000_0000 + base, 0)
                    .is_some_and(|[_, ebx, ecx, edx]| &bytes([ebx, ecx, edx]) == wanted)
            })
        };
        match owner {
            Owner::Processor => Some(0),
            Owner::Kvm => signature(b"KVMKVMKVM\0\0\0"),
            Owner::Xen => signature(b"XenVMMXenVMM"),
            Owner::HyperV => {
                let [interface, ..] = self.leaf(0x4000_0001, 0)?;
                (interface == u32::from_le_bytes(*b"Hv#1")).then_some(0)
            }
        }
    }
}

fn feature(name: &str) -> Option<&'static Feature> {
    features()
        .iter()
        .find(|feature| feature.name.eq_ignore_ascii_case(name))
}

/// The twelve characters that three registers spell.
fn bytes(registers: [u32; 3]) -> [u8; 12] {
    let mut text = [0; 12];
    for (four, register) in text.chunks_exact_mut(4).zip(registers) {
        four.copy_from_slice(&register.to_le_bytes());
    }
    text
}

/// One line: `0x00000001 0x00: eax=0x… ebx=0x… ecx=0x… edx=0x…`.
fn leaf(text: &str) -> Result<(u32, u32, [u32; 4]), Kind> {
    let malformed = || Kind::Line(text.to_owned());
    let mut words = text.split_whitespace();
    let mut word = || words.next().ok_or_else(malformed);
    let leaf = hexadecimal(word()?)?;
    let subleaf = hexadecimal(word()?.strip_suffix(':').ok_or_else(malformed)?)?;
    let mut values = [0; 4];
    for (value, name) in values.iter_mut().zip(["eax=", "ebx=", "ecx=", "edx="]) {
        *value = hexadecimal(word()?.strip_prefix(name).ok_or_else(malformed)?)?;
    }
    if words.next().is_some() {
        return Err(malformed());
    }
    Ok((leaf, subleaf, values))
}

fn hexadecimal(text: &str) -> Result<u32, Kind> {
    // `from_str_radix` takes a sign, which is no hexadecimal digit.
    text.strip_prefix("0x")
        .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .ok_or_else(|| Kind::Number(text.to_owned()))
}

#[cfg(test)]
mod tests;
