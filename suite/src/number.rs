//! Numbers, bitmaps, outcomes and errors as a case writes them.

use msrgate_core::Outcome;
use serde::Deserialize;

/// A number: a TOML integer, or text where 63 bits do not hold it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "Written")]
pub(crate) struct Number(pub(crate) u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Integer(i64),
    Text(String),
}

impl TryFrom<Written> for Number {
    type Error = String;

    fn try_from(written: Written) -> Result<Number, String> {
        match written {
            Written::Integer(number) => u64::try_from(number)
                .map(Number)
                .map_err(|_| format!("`{number}` is negative")),
            Written::Text(text) => number(&text).map(Number),
        }
    }
}

impl Number {
    pub(crate) fn u32(self) -> Result<u32, String> {
        u32::try_from(self.0).map_err(|_| format!("`{:#x}` has more than 32 bits", self.0))
    }
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is no number"))
}

/// Bytes in hexadecimal; `HEX*COUNT` repeats, spaces separate.
pub(crate) fn bytes(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    for term in text.split_whitespace() {
        let (digits, count) = match term.split_once('*') {
            Some((digits, count)) => (digits, number(count)?),
            None => (term, 1),
        };
        if !digits.is_ascii() || digits.len() % 2 != 0 || count > 0x1000 {
            return Err(format!("`{term}` is no bytes"));
        }
        let mut once = Vec::new();
        for pair in digits.as_bytes().chunks(2) {
            let pair = std::str::from_utf8(pair).unwrap_or_default();
            once.push(u8::from_str_radix(pair, 16).map_err(|_| format!("`{term}` is no bytes"))?);
        }
        for _ in 0..count {
            bytes.extend_from_slice(&once);
        }
    }
    Ok(bytes)
}

/// `0x…`, `done` or `fault`.
pub(crate) fn outcome(text: &str) -> Result<Outcome, String> {
    match text {
        "done" => Ok(Outcome::Done),
        "fault" => Ok(Outcome::Fault),
        _ => number(text).map(Outcome::Value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_repeats() {
        assert_eq!(bytes("01ff 00*3 02"), Ok(vec![1, 0xff, 0, 0, 0, 2]));
        assert!(bytes("0").is_err());
        assert!(bytes("zz").is_err());
    }
}
