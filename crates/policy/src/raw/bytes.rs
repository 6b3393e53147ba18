//! `struct kvm_msr_filter` as the bytes of a process, and dumps of them.

use msrgate_core::abi::{self, Layout, MAX_RANGE_MSRS};

use super::error::RawError;
use super::filter::{RawFilter, RawInput, RawRange};

/// Reads the structure, with the bitmaps behind it.
///
/// Where each used pointer is an offset into the bytes, behind the structure, the bitmaps lie there. Where none is, they
/// follow the structure in the order of the slots, in whole words of 8 bytes, and nothing follows them: so a process's
/// memory can be written out as it is, its pointers with it.
///
/// What is no structure of a 64-bit process may be one of a 32-bit process.
pub(super) fn read(bytes: &[u8]) -> Result<RawInput, RawError> {
    read_as(bytes, Layout::NATIVE).or_else(|error| {
        let mut given = read_as(bytes, Layout::COMPAT).map_err(|_| error)?;
        let remark = "these are read as the bytes of a 32-bit process, whose structure is smaller";
        given.remarks.insert(0, remark.to_owned());
        Ok(given)
    })
}

fn here(bytes: &[u8]) -> String {
    match bytes.len() {
        1 => "here is 1 byte".to_owned(),
        length => format!("here are {length} bytes"),
    }
}

fn read_as(bytes: &[u8], layout: Layout) -> Result<RawInput, RawError> {
    let Some(raw) = abi::RawFilter::from_bytes(bytes, layout) else {
        return Err(RawError::new(format!(
            "{}; `struct kvm_msr_filter` of a 64-bit process has {}, of a 32-bit process {}, and its bitmaps follow",
            here(bytes),
            Layout::NATIVE.filter_size,
            Layout::COMPAT.filter_size
        )));
    };
    let mut filter = RawFilter {
        flags: raw.flags,
        ranges: Vec::new(),
    };
    let mut pointers: Vec<(u64, usize)> = Vec::new();
    for range in raw.ranges {
        let pointer = range.bitmap;
        let range = RawRange {
            flags: range.flags,
            nmsrs: range.nmsrs,
            base: range.base,
            bitmap: Vec::new(),
        };
        // What the kernel copies; of a range that it refuses it copies nothing.
        let length = match range.nmsrs {
            0..=MAX_RANGE_MSRS => range.nmsrs.div_ceil(64) as usize * 8,
            _ => 0,
        };
        pointers.push((pointer, length));
        filter.ranges.push(range);
    }
    let within = |pointer: u64| {
        usize::try_from(pointer)
            .ok()
            .filter(|at| (layout.filter_size..bytes.len()).contains(at))
    };
    let used = || pointers.iter().filter(|(_, length)| *length > 0);
    let offsets = used().filter(|(pointer, _)| within(*pointer).is_some()).count();
    let mut next = layout.filter_size;
    if offsets == 0 {
        let needed: usize = layout.filter_size + used().map(|(_, length)| length).sum::<usize>();
        if needed != bytes.len() {
            return Err(RawError::new(format!(
                "{}, and the structure with the bitmaps that its ranges need, one after the other, has {needed}; or \
                 let the pointers be offsets into the file",
                here(bytes)
            )));
        }
    } else if offsets < used().count() {
        return Err(RawError::new(
            "some pointers to bitmaps are offsets into the file and others are not",
        ));
    }
    for (range, (pointer, length)) in filter.ranges.iter_mut().zip(&pointers) {
        if *length == 0 {
            continue;
        }
        let from = match offsets {
            0 => next,
            _ => within(*pointer).unwrap_or(bytes.len()),
        };
        range.bitmap = bytes.iter().skip(from).take(*length).copied().collect();
        next += length;
    }
    filter.given()
}

/// Whether a line is one of a dump: pairs of hexadecimal digits, or a text with escapes.
pub(super) fn looks_like_dump(line: &str) -> bool {
    let bytes = match row(line) {
        Ok(row) => row.is_some_and(|row| !row.is_empty()),
        Err(_) => true,
    };
    bytes || line.contains("\"\\") || line.starts_with("\\x")
}

/// The bytes that a dump shows: of `xxd`, `xxd -p`, `hexdump -C`, `od -t x1`, gdb's `x`; or a text with C's escapes, as
/// strace and bpftrace print memory.
pub(super) fn undump(text: &str) -> Result<Vec<u8>, RawError> {
    if let Some(at) = text.find("\"\\") {
        let inner = text.get(at + 1..).unwrap_or_default();
        let (bytes, rest) = string(inner).ok_or_else(|| RawError::new("the string does not end"))?;
        if rest.starts_with("...") {
            return Err(RawError::new("the string was cut off (`...`); strace takes `-s 99999`"));
        }
        return Ok(bytes);
    }
    if text.trim_start().starts_with("\\x") {
        let closed = format!("{}\"", text.trim());
        let (bytes, _) = string(&closed).ok_or_else(|| RawError::new("the string has an unknown escape"))?;
        return Ok(bytes);
    }
    let mut bytes = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let error = |message: &str| RawError::new(message).at(number);
        if line.trim() == "*" {
            return Err(error("`*` stands for lines that were left out: print all, with `-v`"));
        }
        match row(line.trim()) {
            Ok(Some(row)) => bytes.extend(row),
            Ok(None) => return Err(error("this is not a line of a dump")),
            Err(what) => return Err(error(what)),
        }
    }
    Ok(bytes)
}

/// The bytes that one line shows; `None` if the line is no part of a dump, an error if it shows words in place of bytes.
fn row(line: &str) -> Result<Option<Vec<u8>>, &'static str> {
    // `hexdump -C` shows the characters behind a bar.
    let line = line.split('|').next().unwrap_or_default().trim();
    let (line, addressed) = match line.split_once(':') {
        // An address, of gdb's with a symbol; `xxd` shows the characters behind two blanks.
        Some((address, rest)) if address.starts_with(|c: char| c.is_ascii_hexdigit()) => {
            (rest.trim_start().split("  ").next().unwrap_or_default(), true)
        }
        Some(_) => return Ok(None),
        None => (line, false),
    };
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let is_hex = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    if let (false, Some(first)) = (addressed, words.first()) {
        // An offset of `hexdump` and `od`; the last line has nothing else.
        let offset = (6..=8).contains(&first.len()) && is_hex(first);
        let pairs = words.iter().skip(1).all(|word| word.len() == 2);
        if offset && pairs {
            words.remove(0);
        } else if offset && words.len() > 1 {
            return Err("these are words and not bytes: use `hexdump -v -C`, `xxd` or `od -v -t x1`");
        }
    }
    let mut bytes = Vec::new();
    for word in words {
        match word.strip_prefix("0x") {
            // gdb shows numbers, whose last byte comes first in memory.
            Some(digits) => match hex(digits) {
                Some(number) => bytes.extend(number.iter().rev()),
                None => return Ok(None),
            },
            None if !is_hex(word) => return Ok(None),
            None => match hex(word) {
                Some(pairs) => bytes.extend(pairs),
                None => return Ok(None),
            },
        }
    }
    Ok(Some(bytes))
}

/// The bytes of a string literal behind its quote, and what follows the closing one. Escapes are C's, with at most two
/// digits after `\x`, as dumps write them.
pub(super) fn string(mut rest: &str) -> Option<(Vec<u8>, &str)> {
    let mut bytes = Vec::new();
    loop {
        let c = rest.chars().next()?;
        rest = rest.get(c.len_utf8()..)?;
        match c {
            '"' => return Some((bytes, rest)),
            '\\' => {
                let escape = rest.chars().next()?;
                rest = rest.get(escape.len_utf8()..)?;
                let digits = |rest: &str, radix, most| {
                    let digits = rest
                        .bytes()
                        .take(most)
                        .take_while(|byte| (*byte as char).is_digit(radix))
                        .count();
                    rest.split_at_checked(digits).map(|(digits, _)| digits.to_owned())
                };
                match escape {
                    'x' => {
                        let hex = digits(rest, 16, 2)?;
                        rest = rest.get(hex.len()..)?;
                        bytes.push(u8::from_str_radix(&hex, 16).ok()?);
                    }
                    '0'..='7' => {
                        let octal = format!("{escape}{}", digits(rest, 8, 2)?);
                        rest = rest.get(octal.len() - 1..)?;
                        bytes.push(u8::try_from(u32::from_str_radix(&octal, 8).ok()?).ok()?);
                    }
                    'n' => bytes.push(b'\n'),
                    't' => bytes.push(b'\t'),
                    'r' => bytes.push(b'\r'),
                    'a' => bytes.push(7),
                    'b' => bytes.push(8),
                    'v' => bytes.push(11),
                    'f' => bytes.push(12),
                    'e' => bytes.push(27),
                    other => bytes.extend(other.to_string().bytes()),
                }
            }
            other => bytes.extend(other.to_string().bytes()),
        }
    }
}

/// Bytes from pairs of hexadecimal digits.
pub(super) fn hex(text: &str) -> Option<Vec<u8>> {
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
