//! Numbers as a policy spells them.

/// Why a text is not a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NumberError {
    /// Not digits of the base that its prefix names.
    Malformed,
    /// More than 64 bits.
    TooLarge,
}

/// A number in decimal, or in the base that `0x`, `0o` or `0b` names; `_` between digits is allowed.
pub fn parse(text: &str) -> Result<u64, NumberError> {
    let (digits, radix) = match text.get(..2) {
        Some("0x" | "0X") => (text.get(2..).unwrap_or_default(), 16),
        Some("0o") => (text.get(2..).unwrap_or_default(), 8),
        Some("0b") => (text.get(2..).unwrap_or_default(), 2),
        _ => (text, 10),
    };
    parse_digits(digits, radix)
}

/// Digits of a base.
pub fn parse_digits(digits: &str, radix: u32) -> Result<u64, NumberError> {
    // Malformed goes before too large, so the digits are looked at to the last.
    let mut number = Some(0u64);
    let mut empty = true;
    for digit in digits.chars().filter(|c| *c != '_') {
        let value = digit.to_digit(radix).ok_or(NumberError::Malformed)?;
        number = number
            .and_then(|number| number.checked_mul(radix.into()))
            .and_then(|number| number.checked_add(value.into()));
        empty = false;
    }
    if empty || digits.starts_with('_') || digits.ends_with('_') {
        return Err(NumberError::Malformed);
    }
    number.ok_or(NumberError::TooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_a_base_and_at_most_64_bits() {
        for (text, value) in [
            ("0", 0),
            ("139", 139),
            ("0x8b", 0x8b),
            ("0XC0000080", 0xc000_0080),
            ("0xffff_ffff_ffff_ffff", u64::MAX),
            ("18446744073709551615", u64::MAX),
            ("0b101", 5),
            ("0o17", 15),
        ] {
            assert_eq!(parse(text), Ok(value), "{text}");
        }
        for text in ["", "0x", "8b", "0xg", "-1", "+1", "1 ", "0x_1", "1_", "0b2", "é", "0é"] {
            assert_eq!(parse(text), Err(NumberError::Malformed), "{text}");
        }
        for text in ["0x1_0000_0000_0000_0000", "18446744073709551616"] {
            assert_eq!(parse(text), Err(NumberError::TooLarge), "{text}");
        }
    }
}
