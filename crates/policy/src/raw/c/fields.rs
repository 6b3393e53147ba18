//! The fields of a filter and of its ranges: in an initialiser, or assigned one by one.

use super::Reader;
use super::token::Kind;
use super::value;
use crate::raw::RawError;

/// The most ranges that are looked at, so that an index in a damaged text fills no memory; more than the kernel's 16.
const MOST_RANGES: usize = 64;

/// A filter that is being set up.
#[derive(Default)]
pub(super) struct Filter {
    pub(super) name: String,
    pub(super) flags: u32,
    pub(super) ranges: Vec<Range>,
}

#[derive(Clone, Default)]
pub(super) struct Range {
    pub(super) flags: u32,
    pub(super) nmsrs: u32,
    pub(super) base: u32,
    pub(super) bitmap: Option<Pointer>,
}

/// Where a bitmap lies.
#[derive(Clone)]
pub(super) enum Pointer {
    /// In a variable, so many bytes from its start.
    Into(String, usize),
    /// In the text itself.
    Bytes(Vec<u8>),
}

impl Reader<'_> {
    /// The fields of a filter, up to where they end.
    pub(super) fn filter_fields(&mut self, filter: &mut Filter, braced: bool) -> Result<(), RawError> {
        let mut position = 0;
        loop {
            if braced && self.cursor.take("}") {
                return Ok(());
            }
            if !braced && self.cursor.peek().is_none() {
                return Ok(());
            }
            if self.cursor.take(".") {
                self.filter_field(filter)?;
                position = 2;
            } else {
                match position {
                    0 => filter.flags = self.number()?,
                    1 => self.ranges(&mut filter.ranges)?,
                    _ => {
                        return Err(self
                            .cursor
                            .error("a filter has two fields, `flags` and `ranges`".to_owned()));
                    }
                }
                position += 1;
            }
            if !self.cursor.take(",") && braced {
                self.cursor.want("}")?;
                return Ok(());
            }
        }
    }

    /// `flags = …`, `ranges = {…}`, `ranges[0] = {…}` or `ranges[0].base = …`.
    pub(super) fn filter_field(&mut self, filter: &mut Filter) -> Result<(), RawError> {
        let name = self.cursor.word()?;
        match name {
            "flags" => {
                self.cursor.want("=")?;
                filter.flags = self.number()?;
                Ok(())
            }
            "ranges" if self.cursor.take("[") => {
                let index = self.index()?;
                if filter.ranges.len() <= index {
                    filter.ranges.resize(index + 1, Range::default());
                }
                let mut range = filter.ranges.get(index).cloned().unwrap_or_default();
                if self.cursor.take(".") {
                    self.range_field(&mut range)?;
                } else {
                    self.cursor.want("=")?;
                    range = self.range()?;
                }
                if let Some(place) = filter.ranges.get_mut(index) {
                    *place = range;
                }
                Ok(())
            }
            "ranges" => {
                self.cursor.want("=")?;
                self.ranges(&mut filter.ranges)
            }
            other => Err(self.cursor.error(format!("a filter has no field `{other}`"))),
        }
    }

    /// An index behind its bracket, to behind the closing one.
    fn index(&mut self) -> Result<usize, RawError> {
        let index = self.objects.number(&mut self.cursor)?;
        self.cursor.want("]")?;
        let index = usize::try_from(index).ok().filter(|index| *index < MOST_RANGES);
        index.ok_or_else(|| self.cursor.error("there is no such range: a filter has 16".to_owned()))
    }

    fn ranges(&mut self, ranges: &mut Vec<Range>) -> Result<(), RawError> {
        self.cursor.want("{")?;
        let mut at = 0;
        while !self.cursor.take("}") {
            if self.cursor.take("[") {
                at = self.index()?;
                self.cursor.want("=")?;
            }
            if at >= MOST_RANGES {
                return Err(self
                    .cursor
                    .error("a filter has 16 ranges, and here are more".to_owned()));
            }
            let range = match self.cursor.is("{") {
                true => self.range()?,
                // `{ 0 }`: no ranges at all.
                false if self.number()? == 0 => Range::default(),
                false => return Err(self.cursor.error("a range is written in braces here".to_owned())),
            };
            if ranges.len() <= at {
                ranges.resize(at + 1, Range::default());
            }
            if let Some(place) = ranges.get_mut(at) {
                *place = range;
            }
            at += 1;
            if !self.cursor.take(",") {
                return self.cursor.want("}");
            }
        }
        Ok(())
    }

    fn range(&mut self) -> Result<Range, RawError> {
        self.cursor.want("{")?;
        let mut range = Range::default();
        let mut position = 0;
        while !self.cursor.take("}") {
            if self.cursor.take(".") {
                self.range_field(&mut range)?;
                position = 4;
            } else {
                match position {
                    0 => range.flags = self.number()?,
                    1 => range.nmsrs = self.number()?,
                    2 => range.base = self.number()?,
                    3 => range.bitmap = self.pointer()?,
                    _ => return Err(self.cursor.error("a range has four fields, all before this".to_owned())),
                }
                position += 1;
            }
            if !self.cursor.take(",") {
                self.cursor.want("}")?;
                break;
            }
        }
        Ok(range)
    }

    fn range_field(&mut self, range: &mut Range) -> Result<(), RawError> {
        let name = self.cursor.word()?;
        self.cursor.want("=")?;
        match name {
            "flags" => range.flags = self.number()?,
            "nmsrs" => range.nmsrs = self.number()?,
            "base" => range.base = self.number()?,
            "bitmap" => range.bitmap = self.pointer()?,
            other => return Err(self.cursor.error(format!("a range has no field `{other}`"))),
        }
        Ok(())
    }

    fn number(&mut self) -> Result<u32, RawError> {
        let number = self.objects.number(&mut self.cursor)?;
        // As C converts `~0` to a field of 32 bits.
        match u32::try_from(number).or(u32::try_from(!number).map(|inverted| !inverted)) {
            Ok(number) => Ok(number),
            Err(_) => Err(self.cursor.error(format!("{number:#x} has more than 32 bits"))),
        }
    }

    /// A pointer to a bitmap; `None` for the null pointer.
    fn pointer(&mut self) -> Result<Option<Pointer>, RawError> {
        while self.cursor.is("(") {
            let mut ahead = self.cursor.clone();
            ahead.at += 1;
            let mut words: Vec<&str> = Vec::new();
            while let Some(Kind::Word(word)) = ahead.peek() {
                words.push(word);
                ahead.at += 1;
            }
            let array = ahead.is("[");
            if array {
                // A compound literal.
                let Some(width) = value::width(&words) else {
                    return Err(ahead.error("this is no array of integers".to_owned()));
                };
                let object = self.objects.literal(&mut ahead, width)?;
                self.cursor = ahead;
                return Ok(Some(Pointer::Bytes(object.bytes)));
            }
            while ahead.take("*") {}
            if ahead.is(")") && !words.is_empty() && !self.objects.knows(words.last().unwrap_or(&"")) {
                // A cast changes no address.
                ahead.at += 1;
                self.cursor = ahead;
            } else {
                self.cursor.at += 1;
                let pointer = self.pointer()?;
                self.cursor.want(")")?;
                return Ok(pointer);
            }
        }
        self.cursor.take("&");
        if let Some(mut bytes) = self.cursor.text() {
            bytes.push(0); // C ends it with one
            return Ok(Some(Pointer::Bytes(bytes)));
        }
        match self.cursor.peek() {
            Some(Kind::Word(word)) if word == "NULL" => {
                self.cursor.at += 1;
                Ok(None)
            }
            Some(Kind::Word(word)) => {
                self.cursor.at += 1;
                let offset = self.objects.offset(word, &mut self.cursor)?;
                Ok(Some(Pointer::Into(word.clone(), offset)))
            }
            _ => match self.objects.number(&mut self.cursor)? {
                0 => Ok(None),
                _ => Err(self
                    .cursor
                    .error("what lies at an address cannot be told here".to_owned())),
            },
        }
    }
}
