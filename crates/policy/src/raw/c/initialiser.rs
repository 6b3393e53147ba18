//! Literal initialisers of a filter and of arrays of integers, and what gdb prints of a filter.

use std::collections::HashMap;

use msrgate_core::abi::{Layout, MAX_BITMAP_BYTES, MAX_RANGES};

use super::token::{Kind, Token, error};
use crate::raw::bytes::string;
use crate::raw::error::RawError;
use crate::raw::filter::{RawFilter, RawRange, kernel_name};

/// The most bytes of an array: as many as a filter with all its bitmaps has.
const MOST_BYTES: usize = Layout::NATIVE.filter_size + MAX_RANGES * MAX_BITMAP_BYTES as usize;

/// The most bytes of all variables.
const MOST_TOTAL: usize = 1 << 22;

/// How deep brackets may go.
const DEEPEST: u32 = 32;

/// Reads initialisers.
pub(super) struct Reader<'a> {
    pub(super) tokens: &'a [Token<'a>],
    pub(super) at: usize,
    /// Whether gdb wrote it: fields have no dots, bitmaps are shown behind their addresses, and names are no numbers.
    pub(super) gdb: bool,
    /// What is defined: a number, or something else.
    pub(super) macros: HashMap<&'a str, Option<u64>>,
    /// The bytes of the variables, and whether they are arrays.
    pub(super) variables: HashMap<&'a str, (Vec<u8>, bool)>,
    total: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn of(tokens: &'a [Token<'a>], at: usize, gdb: bool) -> Reader<'a> {
        Reader {
            tokens,
            at,
            gdb,
            macros: HashMap::new(),
            variables: HashMap::new(),
            total: 0,
        }
    }

    pub(super) fn peek(&self) -> Option<&'a Token<'a>> {
        self.tokens.get(self.at)
    }

    pub(super) fn is(&self, kind: Kind) -> bool {
        self.peek().is_some_and(|token| token.kind == kind)
    }

    pub(super) fn take(&mut self, text: &str) -> bool {
        let taken = self.peek().is_some_and(|token| token.text == text);
        self.at += usize::from(taken);
        taken
    }

    pub(super) fn want(&mut self, text: &str) -> Result<(), RawError> {
        match self.take(text) {
            true => Ok(()),
            false => {
                self.at += 1;
                Err(self.error(&format!("`{text}` is missing")))
            }
        }
    }

    /// An error about the token just read.
    pub(super) fn error(&self, message: &str) -> RawError {
        let last = self.tokens.get(self.at.saturating_sub(1)).or(self.tokens.last());
        error(last.map_or(1, |token| token.line), message)
    }

    /// A word that stands for itself.
    fn word(&mut self) -> Result<&'a str, RawError> {
        let word = self.peek().filter(|token| token.kind == Kind::Word);
        self.at += 1;
        match word {
            None => Err(self.error("a name is missing")),
            Some(word) if self.macros.contains_key(word.text) => {
                Err(self.error(&format!("`{}` is a macro", word.text)))
            }
            Some(word) => Ok(word.text),
        }
    }

    pub(super) fn words(&mut self) -> Result<Vec<&'a str>, RawError> {
        let mut words = Vec::new();
        while self.is(Kind::Word) {
            words.push(self.word()?);
        }
        Ok(words)
    }

    fn number(&mut self, most: u64) -> Result<u64, RawError> {
        self.any_of(most, DEEPEST)
    }

    /// A constant of at most so much: numbers with `|` between them.
    fn any_of(&mut self, most: u64, depth: u32) -> Result<u64, RawError> {
        let mut value = self.constant(most, depth)?;
        while self.take("|") {
            value |= self.constant(most, depth)?;
        }
        Ok(value)
    }

    pub(super) fn constant(&mut self, most: u64, depth: u32) -> Result<u64, RawError> {
        let depth = depth.checked_sub(1).ok_or_else(|| self.error("brackets go too deep"))?;
        if self.take("(") {
            let value = self.any_of(most, depth)?;
            self.want(")")?;
            return Ok(value);
        }
        let token = self.peek().map(|token| (token.kind, token.text));
        self.at += 1;
        let value = match token {
            Some((Kind::Number, text)) => literal(text),
            Some((Kind::Word, name)) if !self.gdb && !self.variables.contains_key(name) => {
                let known = || kernel_name(name).or_else(|| linux_name(name));
                self.macros.get(name).copied().unwrap_or_else(known)
            }
            _ => None,
        };
        value.filter(|value| *value <= most).ok_or_else(|| {
            let text = token.map_or("the end", |(_, text)| text);
            self.error(&format!("`{text}` is not known as a number of at most {most:#x}"))
        })
    }

    /// The elements of a list in braces; `[n] =` leads on and never back.
    fn list<T: Clone + Default>(
        &mut self,
        most: usize,
        element: impl Fn(&mut Self) -> Result<T, RawError>,
    ) -> Result<Vec<T>, RawError> {
        let mut found = Vec::new();
        self.want("{")?;
        while !self.take("}") {
            if self.take("[") {
                let index = self.number(most as u64)? as usize;
                self.want("]")?;
                self.want("=")?;
                if index < found.len() {
                    return Err(self.error("an index leads back"));
                }
                found.resize(index, T::default());
            }
            let value = element(self)?;
            let count = found.len() + self.repeats()?;
            if count > most {
                return Err(self.error(&format!("this list has room for {most}")));
            }
            found.resize(count, value);
            if !self.take(",") {
                self.want("}")?;
                break;
            }
        }
        Ok(found)
    }

    /// The fields in braces: in their order, each once, named or not.
    fn fields(
        &mut self,
        names: &[&str],
        mut field: impl FnMut(&mut Self, usize) -> Result<(), RawError>,
    ) -> Result<(), RawError> {
        let mut next = 0;
        self.want("{")?;
        while !self.take("}") {
            if self.gdb || self.take(".") {
                let name = self.word()?;
                let found = names.iter().skip(next).position(|known| *known == name);
                next += found.ok_or_else(|| self.error(&format!("`{name}` is not a field that may stand here")))?;
                self.want("=")?;
            }
            field(self, next)?;
            next += 1;
            if !self.take(",") {
                self.want("}")?;
                break;
            }
        }
        Ok(())
    }

    pub(super) fn filter(&mut self) -> Result<RawFilter, RawError> {
        let (mut flags, mut ranges) = (0, Vec::new());
        self.fields(&["flags", "ranges"], |reader, at| {
            match at {
                0 => flags = reader.number(u32::MAX.into())? as u32,
                1 => ranges = reader.list(MAX_RANGES, Self::range)?,
                _ => return Err(reader.error("a filter has two fields")),
            }
            Ok(())
        })?;
        Ok(RawFilter { flags, ranges })
    }

    fn range(&mut self) -> Result<RawRange, RawError> {
        let mut range = RawRange::default();
        self.fields(&["flags", "nmsrs", "base", "bitmap"], |reader, at| {
            match at {
                0 => range.flags = reader.number(u32::MAX.into())? as u32,
                1 => range.nmsrs = reader.number(u32::MAX.into())? as u32,
                2 => range.base = reader.number(u32::MAX.into())? as u32,
                3 if reader.gdb => range.bitmap = reader.shown(range.nmsrs.div_ceil(8) as usize)?,
                3 => range.bitmap = reader.bitmap()?,
                _ => return Err(reader.error("a range has four fields")),
            }
            Ok(())
        })?;
        Ok(range)
    }

    /// `(__u8 *)&bits`, `bits` or `(__u8[8]){ 0x01 }`.
    fn bitmap(&mut self) -> Result<Vec<u8>, RawError> {
        while self.take("(") {
            let words = self.words()?;
            if self.take("[") {
                let length = self.length()?;
                self.want(")")?;
                return self.array(&words, length);
            }
            self.want("*")?;
            self.want(")")?;
        }
        if self.take("NULL") || self.take("0") {
            return Ok(Vec::new());
        }
        let address = self.take("&");
        let name = self.word()?;
        match self.variables.get(name) {
            Some((bytes, array)) if *array || address => Ok(bytes.clone()),
            _ => Err(self.error(&format!(
                "`{name}` is neither an array of integers nor `&` of an integer, defined before"
            ))),
        }
    }

    /// What follows the name of a variable: its bytes, and whether it is an array.
    pub(super) fn variable(&mut self, words: &[&str]) -> Result<(Vec<u8>, bool), RawError> {
        let array = self.take("[");
        let length = if array { self.length()? } else { Some(1) };
        let (width, most) = self.width(words)?;
        let bytes = match self.take("=") {
            true if array => self.array(words, length)?,
            true => self.number(most)?.to_le_bytes().into_iter().take(width).collect(),
            false if words.contains(&"static") => vec![0; length.unwrap_or(0) * width],
            false => return Err(self.error("a variable has no initialiser here")),
        };
        self.total += bytes.len();
        match self.total > MOST_TOTAL {
            true => Err(self.error("the variables come to too much here")),
            false => Ok((bytes, array)),
        }
    }

    /// `8]` or `]`.
    fn length(&mut self) -> Result<Option<usize>, RawError> {
        if self.take("]") {
            return Ok(None);
        }
        let length = self.number(MOST_BYTES as u64)?;
        self.want("]")?;
        Ok(Some(length as usize))
    }

    /// The bytes of a list of integers.
    fn array(&mut self, words: &[&str], length: Option<usize>) -> Result<Vec<u8>, RawError> {
        let (width, most) = self.width(words)?;
        let mut list = self.list(length.unwrap_or(MOST_BYTES), |reader| reader.number(most))?;
        list.resize(length.unwrap_or(list.len()), 0);
        let bytes = list
            .iter()
            .flat_map(|value| value.to_le_bytes().into_iter().take(width));
        Ok(bytes.collect())
    }

    /// Bytes of an integer type, and the greatest value of as many.
    fn width(&self, words: &[&str]) -> Result<(usize, u64), RawError> {
        let mut kind = words.to_vec();
        kind.retain(|word| !["static", "const"].contains(word));
        match kind.as_slice() {
            ["unsigned", "char"] | ["uint8_t" | "__u8" | "u8"] => Ok((1, u8::MAX.into())),
            ["unsigned", "int"] | ["uint32_t" | "__u32" | "u32" | "unsigned"] => Ok((4, u32::MAX.into())),
            ["unsigned", "long"] | ["unsigned", "long", "long"] | ["uint64_t" | "__u64" | "u64"] => Ok((8, u64::MAX)),
            _ => Err(self.error(&format!(
                "`{}` is neither a type of unsigned integers nor a filter",
                words.join(" ")
            ))),
        }
    }

    /// gdb's `<repeats 14 times>`, if it is next; once without.
    fn repeats(&mut self) -> Result<usize, RawError> {
        if !self.gdb || !self.take("<") {
            return Ok(1);
        }
        self.want("repeats")?;
        let count = self.number(MOST_BYTES as u64)? as usize;
        self.want("times")?;
        self.want(">")?;
        Ok(count)
    }

    /// A bitmap as gdb shows it, `0x7ffe… <bits> "\t", '\377' <repeats 20 times>...`: up to the first zero byte, which is
    /// known too unless gdb shows no more.
    fn shown(&mut self, needed: usize) -> Result<Vec<u8>, RawError> {
        self.number(u64::MAX)?;
        while self.take("<") {
            self.at += self
                .tokens
                .iter()
                .skip(self.at)
                .take_while(|token| token.text != ">")
                .count();
            self.want(">")?;
        }
        let mut bytes = Vec::new();
        let mut ends = false;
        while let Some(quoted) = self
            .peek()
            .filter(|token| token.kind == Kind::Quoted && token.text.is_ascii())
        {
            self.at += 1;
            let inner = quoted.text.get(1..quoted.text.len() - 1).unwrap_or_default();
            let text = string(&format!("{inner}\"")).map(|(text, _)| text).unwrap_or_default();
            let count = if text.len() == 1 { self.repeats()? } else { 1 };
            bytes.extend(
                std::iter::repeat_n(text, count)
                    .flatten()
                    .take(MOST_BYTES - bytes.len()),
            );
            ends = !self.take("...");
            if !self.take(",") {
                break;
            }
        }
        bytes.extend(ends.then_some(0));
        let ended = self.peek().is_some_and(|token| token.text == "}");
        match ended && bytes.len() >= needed {
            true => Ok(bytes),
            false => Err(self.error(&format!(
                "gdb shows {} of the bitmap's {needed} bytes; it goes on to the first zero byte after `set print elements 0` \
                 and `set charset ASCII`",
                bytes.len()
            ))),
        }
    }
}

/// A number of 64 bits with C's prefixes and suffixes.
fn literal(word: &str) -> Option<u64> {
    let lower = word.to_ascii_lowercase();
    let digits = lower.trim_end_matches(['u', 'l']);
    let (digits, radix) = match digits.as_bytes() {
        [b'0', b'x', ..] => (digits.get(2..)?, 16),
        [b'0', b'b', ..] => (digits.get(2..)?, 2),
        [b'0', _, ..] => (digits.get(1..)?, 8),
        _ => (digits, 10),
    };
    u64::from_str_radix(digits, radix).ok()
}

/// An MSR by the name that Linux or the manual gives it, as it is spelt there, but for the one that they do not agree on.
fn linux_name(name: &str) -> Option<u64> {
    let of_manual = name.strip_prefix("MSR_").unwrap_or(name);
    let entry = msrgate_msrs::by_name(name).filter(|_| name != "MSR_IA32_PMC0")?;
    let spelt = entry.names().any(|known| known == name || known == of_manual);
    spelt.then_some(entry.msr.0.into())
}
