//! Filters and plans as others hand them over: `struct kvm_msr_filter` as JSON, as an initialiser in C, as bytes or a dump of them, and
//! what `msrgate plan --json` prints.
//!
//! ```
//! use msrgate_core::{Msr, Op, Verdict};
//! use msrgate_policy::raw;
//!
//! let text = r#"{ "default": "allow", "ranges": [
//!     { "base": "0x8b", "nmsrs": 1, "flags": 1, "bitmap": "0000000000000000" }
//! ] }"#;
//! let given = raw::read(text.as_bytes())?;
//! assert_eq!(given.filter.verdict(Msr(0x8b), Op::Read), Verdict::Deny);
//! # Ok::<(), raw::RawError>(())
//! ```
//!
//! What the kernel would refuse is refused, with the kernel's error number. What it takes is taken, and where that is
//! not what it looks like a remark says so.

mod bytes;
mod c;
mod json;

use std::fmt;

use msrgate_core::abi::{FILTER_DEFAULT_DENY, MAX_BITMAP_BYTES, MAX_RANGE_MSRS, MAX_RANGES};
use msrgate_core::{Filter, FilterRange, MsrRange, Ops, Verdict};
use msrgate_plan::{DecisionMap, Preset};

/// In what form a file tells what a guest's accesses get.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum RawFormat {
    /// A policy, in TOML.
    Policy,
    /// What `plan --json` prints, or a raw filter in JSON.
    Json,
    /// A literal initialiser of `struct kvm_msr_filter` in C, or what gdb prints of one.
    C,
    /// The bytes of the structure and its bitmaps.
    Bytes,
    /// Such bytes as a dump shows them.
    Dump,
    /// Something that is known and that does not tell it; what to take in its place.
    Other(&'static str),
}

/// What is said of Rust.
const RUST: &str = "this is Rust, which is not read: write the filter in JSON, print it in gdb, or have its bytes written out by the \
    program (docs/formats.md)";

/// What is said of a system call in strace's words.
const STRACE: &str = "strace shows where the filter lies and not what is in it: write its bytes out with gdb at this call \
    (docs/formats.md)";

impl RawFormat {
    /// The form of these bytes, by what they begin with. What is in no other form is taken for a policy.
    pub fn of(bytes: &[u8]) -> RawFormat {
        let text = match std::str::from_utf8(unmarked(bytes)) {
            Ok(text) if !text.contains('\0') => text.trim_start(),
            _ => return RawFormat::Bytes,
        };
        if let Some(rest) = text.strip_prefix('{') {
            return match rest.trim_start().chars().next() {
                Some('"' | '}') | None => RawFormat::Json,
                Some(_) => RawFormat::C,
            };
        }
        // gdb's.
        if text.starts_with('$') {
            return RawFormat::C;
        }
        if let Some(what) = other(text) {
            return RawFormat::Other(what);
        }
        // A line that begins with `#` is a comment to one language and a directive to the other.
        let mut lines = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let first = lines.next().unwrap_or_default();
        let c_names = text.contains("kvm_msr_filter");
        if !c_names && bytes::looks_like_dump(first) {
            return RawFormat::Dump;
        }
        let c = ["/*", "//", "static ", "const ", "unsigned char ", "uint8_t "]
            .iter()
            .any(|start| first.starts_with(start))
            || first.ends_with(';');
        let key = first.split('=').next().unwrap_or_default().trim_end();
        let toml = first.starts_with('[') || !key.is_empty() && !key.contains([' ', '\t', '(']);
        match c || !toml && c_names {
            true => RawFormat::C,
            false => RawFormat::Policy,
        }
    }
}

/// What is said of a text that shows a filter in a way that is not read.
fn other(text: &str) -> Option<&'static str> {
    if text
        .strip_prefix('[')
        .is_some_and(|inner| inner.trim_start().starts_with('{'))
    {
        return Some(
            "this is a list, and a filter has a default beside its ranges: { \"default\": \"deny\", \"ranges\": […] }",
        );
    }
    let filter =
        text.contains("kvm_msr_filter") && ["let ", "Default::default()"].iter().any(|word| text.contains(word));
    if filter || text.contains("MsrFilterRange") {
        return Some(RUST);
    }
    let of_strace = |line: &str| {
        let call = line.contains("KVM_X86_SET_MSR_FILTER") || line.contains("0xae, 0xc6");
        let result = line
            .rsplit_once(") = ")
            .is_some_and(|(_, result)| !result.contains([';', '"']));
        call && result && line.contains("ioctl(")
    };
    text.lines().any(of_strace).then_some(STRACE)
}

/// What was read.
#[derive(Clone, Debug)]
pub struct RawInput {
    /// What the kernel makes of it.
    pub filter: Filter,
    /// What a plan says beside that of user space's answers; `None` for a raw filter, which says nothing of them.
    pub plan: Option<DecisionMap>,
    /// The presets of a plan, which the filter leaves to the kernel.
    pub presets: Vec<Preset>,
    /// What the kernel takes for something else than it looks like, in sentences.
    pub remarks: Vec<String>,
}

/// Reads a plan or a raw filter in any form but [`RawFormat::Policy`]'s.
pub fn read(bytes: &[u8]) -> Result<RawInput, RawError> {
    let bytes = unmarked(bytes);
    match RawFormat::of(bytes) {
        RawFormat::Json => json::read(bytes),
        RawFormat::C => c::read(&String::from_utf8_lossy(bytes)),
        RawFormat::Bytes => bytes::read(bytes),
        RawFormat::Dump => bytes::read(&bytes::undump(&String::from_utf8_lossy(bytes))?),
        RawFormat::Policy => Err(RawError::new("this is no filter in any form that is known here")),
        RawFormat::Other(what) => Err(RawError::new(what)),
    }
}

/// `struct kvm_msr_filter`, not yet looked at by anyone. Ranges with `nmsrs` 0 are empty slots.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct RawFilter {
    /// `KVM_MSR_FILTER_DEFAULT_DENY`, or nothing.
    pub flags: u32,
    /// The slots.
    pub ranges: Vec<RawRange>,
}

/// `struct kvm_msr_filter_range`, with the memory that its pointer leads to.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct RawRange {
    /// `KVM_MSR_FILTER_READ` and `KVM_MSR_FILTER_WRITE`.
    pub flags: u32,
    /// How many MSRs.
    pub nmsrs: u32,
    /// The first one.
    pub base: u32,
    /// What is known to lie where the pointer leads, at least a bit for each MSR. The kernel copies whole words of 8 bytes,
    /// and the bits behind the last MSR decide nothing.
    pub bitmap: Vec<u8>,
}

impl RawFilter {
    /// What KVM_X86_SET_MSR_FILTER makes of it, checked in the kernel's order (`kvm_vm_ioctl_set_msr_filter`,
    /// `kvm_add_msr_filter`, Linux 6.12): the first fault decides the error.
    pub fn filter(&self) -> Result<Filter, RawError> {
        if self.ranges.len() > MAX_RANGES {
            let message = format!(
                "there are {} ranges, and `struct kvm_msr_filter` has room for {MAX_RANGES}",
                self.ranges.len()
            );
            return Err(RawError::new(message));
        }
        if self.flags & !FILTER_DEFAULT_DENY != 0 {
            let message = format!(
                "the filter's flags {:#x} have a bit that the kernel does not know: \
                 KVM_MSR_FILTER_DEFAULT_DENY ({FILTER_DEFAULT_DENY:#x}) is the only one",
                self.flags
            );
            return Err(RawError::new(message).errno("EINVAL"));
        }
        let default = self.default();
        let used = || (0..).zip(&self.ranges).filter(|(_, range)| range.nmsrs != 0);
        if used().next().is_none() && default == Verdict::Deny {
            let message = "the kernel refuses to deny by default without a range that has MSRs";
            return Err(RawError::new(message).errno("EINVAL"));
        }
        let ranges = used()
            .map(|(slot, range)| range.range(slot))
            .collect::<Result<Vec<_>, _>>()?;
        Filter::new(default, ranges).map_err(|error| RawError::new(error.to_string()).errno("EINVAL"))
    }

    /// What the kernel takes, and for something else than it looks like.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        let default = self.default();
        for (slot, range) in (0..).zip(&self.ranges) {
            let Ok(checked) = range.range(slot) else { continue };
            let copied = checked.bitmap().len() * 8;
            if range.bitmap.len() < copied {
                remarks.push(format!(
                    "range {slot}: its bitmap has {} bytes, and the kernel copies {copied}, whole words of 8: the bytes behind \
                     it decide nothing, but must be readable",
                    range.bitmap.len()
                ));
            }
            match checked.span() {
                None => remarks.push(format!(
                    "range {slot} ends behind 0xffffffff: its end wraps to zero, and the kernel matches no MSR with it"
                )),
                Some(_) if default == Verdict::Allow && denies_x2apic(&checked) => remarks.push(format!(
                    "range {slot} denies MSRs of {}: no filter stops the x2APIC's registers",
                    MsrRange::X2APIC
                )),
                Some(_) => {}
            }
        }
        remarks
    }

    fn default(&self) -> Verdict {
        match self.flags & FILTER_DEFAULT_DENY {
            0 => Verdict::Allow,
            _ => Verdict::Deny,
        }
    }

    /// Itself as what is given.
    fn given(&self) -> Result<RawInput, RawError> {
        Ok(RawInput {
            filter: self.filter()?,
            plan: None,
            presets: Vec::new(),
            remarks: self.remarks(),
        })
    }
}

/// Whether a range has a bit that would close a register of the x2APIC.
fn denies_x2apic(range: &FilterRange) -> bool {
    let bits = range
        .bitmap()
        .iter()
        .flat_map(|word| (0..64).map(move |bit| word >> bit & 1 == 1));
    let msrs = range.span().into_iter().flat_map(|span| span.iter());
    msrs.zip(bits)
        .any(|(msr, allows)| MsrRange::X2APIC.contains(msr) && !allows)
}

impl RawRange {
    fn range(&self, slot: u32) -> Result<FilterRange, RawError> {
        let ops = Ops::from_bits(self.flags).filter(|ops| !ops.is_empty()).ok_or_else(|| {
            let message = format!(
                "range {slot}: its flags are {:#x}; the kernel takes KVM_MSR_FILTER_READ (1), KVM_MSR_FILTER_WRITE (2) \
                 or both (3)",
                self.flags
            );
            RawError::new(message).errno("EINVAL")
        })?;
        if self.nmsrs == 0 || self.nmsrs > MAX_RANGE_MSRS {
            let message = format!(
                "range {slot}: it has {} MSRs; a range holds 1 to {MAX_RANGE_MSRS}",
                self.nmsrs
            );
            return Err(RawError::new(message).errno("EINVAL"));
        }
        let needed = self.nmsrs.div_ceil(8) as usize;
        if self.bitmap.len() < needed {
            let message = format!(
                "range {slot}: its bitmap has {} bytes, and {} MSRs need {needed}: what lies behind the bitmap decides, or \
                 nothing does",
                self.bitmap.len(),
                self.nmsrs
            );
            return Err(RawError::new(message).errno("EFAULT"));
        }
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            u64::from_le_bytes(word)
        };
        let words = self.nmsrs.div_ceil(64) as usize;
        let bitmap: Vec<u64> = self.bitmap.chunks(8).take(words).map(word).collect();
        FilterRange::new(self.base, self.nmsrs, ops, bitmap)
            .map_err(|error| RawError::new(format!("range {slot}: {error}")).errno("EINVAL"))
    }
}

/// Why a file is no filter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RawError {
    message: String,
    line: Option<usize>,
    errno: Option<&'static str>,
}

impl RawError {
    fn new(message: impl Into<String>) -> RawError {
        RawError {
            message: message.into(),
            line: None,
            errno: None,
        }
    }

    fn errno(self, errno: &'static str) -> RawError {
        RawError {
            errno: Some(errno),
            ..self
        }
    }

    /// The line where it is wrong, from 1, where that can be told.
    pub fn line(&self) -> Option<usize> {
        self.line
    }

    /// With what the kernel would refuse it; `None` for what does not get so far.
    pub fn kernel_errno(&self) -> Option<&'static str> {
        self.errno
    }
}

impl fmt::Display for RawError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.message)?;
        match self.errno {
            Some(errno) => write!(f, " (KVM_X86_SET_MSR_FILTER gives {errno})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for RawError {}

/// What a name of the kernel's header stands for.
fn kernel_name(name: &str) -> Option<u64> {
    Some(match name {
        "KVM_MSR_FILTER_READ" => 1,
        "KVM_MSR_FILTER_WRITE" => 2,
        "KVM_MSR_FILTER_RANGE_VALID_MASK" => 3,
        "KVM_MSR_FILTER_DEFAULT_ALLOW" => 0,
        "KVM_MSR_FILTER_DEFAULT_DENY" | "KVM_MSR_FILTER_VALID_MASK" => u64::from(FILTER_DEFAULT_DENY),
        "KVM_MSR_FILTER_MAX_RANGES" => MAX_RANGES as u64,
        "KVM_MSR_FILTER_MAX_BITMAP_SIZE" => u64::from(MAX_BITMAP_BYTES),
        _ => return None,
    })
}

/// A text without the mark that some editors put before UTF-8.
fn unmarked(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// Bytes from pairs of hexadecimal digits.
fn hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let (pairs, rest) = digits.as_chunks::<2>();
    let digit = |byte: u8| (byte as char).to_digit(16);
    if !rest.is_empty() {
        return None;
    }
    pairs
        .iter()
        .map(|[high, low]| u8::try_from(digit(*high)? << 4 | digit(*low)?).ok())
        .collect()
}

#[cfg(test)]
mod tests;
