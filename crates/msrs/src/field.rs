//! The fields of a register, as the table has them: `8 LME; 0-7 TYPE 0=UC 6=WB; 12-51@ BASE`.
//!
//! `build.rs` reads `msrs.toml` with this module too, so it names nothing else of the crate.

/// Bits of a register that have one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Field {
    /// The lowest bit.
    pub first: u32,
    /// The highest bit.
    pub last: u32,
    /// The manual's name.
    pub name: &'static str,
    /// Whether it is part of an address, whose value is told with the zeros below it.
    pub is_address: bool,
    words: &'static str,
}

impl Field {
    /// The field that an item of the table's text is.
    pub(crate) fn parse(item: &'static str) -> Option<Field> {
        let (bits, rest) = item.trim().split_once(' ')?;
        let (name, words) = rest.split_once(' ').unwrap_or((rest, ""));
        let address = bits.strip_suffix('@');
        let bits = address.unwrap_or(bits);
        let (first, last) = bits.split_once('-').unwrap_or((bits, bits));
        Some(Field {
            first: first.parse().ok()?,
            last: last.parse().ok()?,
            name,
            is_address: address.is_some(),
            words,
        })
    }

    /// The bits of a register that the field is.
    pub fn mask(&self) -> u64 {
        let width = self.last.saturating_sub(self.first).saturating_add(1);
        let ones = u64::MAX.checked_shr(64u32.saturating_sub(width)).unwrap_or_default();
        ones.checked_shl(self.first).unwrap_or_default()
    }

    /// The field's value in a register's: a number of its own, or of an address the bits where they stand.
    pub fn of(&self, value: u64) -> u64 {
        let bits = value & self.mask();
        match self.is_address {
            true => bits,
            false => bits.checked_shr(self.first).unwrap_or_default(),
        }
    }

    /// The values that have a word, and the words.
    pub fn words(&self) -> impl Iterator<Item = (u64, &'static str)> + use<> {
        self.words.split_whitespace().filter_map(|pair| {
            let (value, word) = pair.split_once('=')?;
            let value = match value.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => value.parse(),
            };
            Some((value.ok()?, word))
        })
    }

    /// The manual's word for a value of the field.
    pub fn word(&self, value: u64) -> Option<&'static str> {
        self.words().find(|(of, _)| *of == value).map(|(_, word)| word)
    }
}

/// The fields of a text of the table.
pub(crate) fn fields(text: &'static str) -> impl Iterator<Item = Field> {
    text.split(';').filter_map(Field::parse)
}
