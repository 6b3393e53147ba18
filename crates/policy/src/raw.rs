//! Filters and plans as others hand them over: `struct kvm_msr_filter` as JSON, as an initialiser in C, as bytes or a dump of them, and
//! what `msrgate plan --json` prints and `msrgate capture` writes.
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

mod error;
mod filter;
mod bytes;
mod c;
mod json;
mod captured;

pub use error::RawError;
pub use filter::{RawFilter, RawInput, RawRange};

/// In what form a file tells what a guest's accesses get.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum RawFormat {
    /// A policy, in TOML.
    Policy,
    /// What `plan --json` prints, what `capture` writes, or a raw filter in JSON.
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
const RUST: &str = "this is Rust, which is not read: `msrgate capture -- VMM` prints the filter that the program gives KVM, or write it in JSON \
    (docs/formats.md)";

/// What is said of the Rust that msrgate prints.
const OWN_RUST: &str = "this is what `msrgate plan --emit rust` printed, which is not read: `msrgate plan --json` prints the same plan in \
    a form that is";

/// What is said of a system call in strace's words.
const STRACE: &str = "strace shows where the filter lies and not what is in it: `msrgate capture -- VMM` prints what is in it \
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

/// The error for a text that shows a filter in a format that is not read.
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
        return Some(match text.contains("made by msrgate") {
            true => OWN_RUST,
            false => RUST,
        });
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

/// Reads a plan or a raw filter in any form but [`RawFormat::Policy`]'s.
pub fn read(bytes: &[u8]) -> Result<RawInput, RawError> {
    let bytes = unmarked(bytes);
    match RawFormat::of(bytes) {
        RawFormat::Json => captured::read(bytes).unwrap_or_else(|| json::read(bytes)),
        RawFormat::C => c::read(&String::from_utf8_lossy(bytes)),
        RawFormat::Bytes => bytes::read(bytes),
        RawFormat::Dump => bytes::read(&bytes::undump(&String::from_utf8_lossy(bytes))?),
        RawFormat::Policy => Err(RawError::new("this is not a filter in any known form")),
        RawFormat::Other(what) => Err(RawError::new(what)),
    }
}

/// The text without the byte order mark that some editors put before UTF-8.
fn unmarked(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

#[cfg(test)]
mod tests;
