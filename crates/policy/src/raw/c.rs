//! `struct kvm_msr_filter` in C: initialisers and assignments, not programs.

mod token;
mod value;

use std::collections::HashMap;

pub(super) use self::token::string;
use self::token::{Kind, Token, tokens};
use self::value::{Object, Objects};
use super::{Given, RawError, RawFilter, RawRange};

/// The most ranges that are looked at, so that an index in a damaged text fills no memory; more than the kernel's 16.
const MOST_RANGES: usize = 64;

/// Reads the one filter that a text in C sets up.
///
/// Understands object-like macros, KVM's names and the database's, arrays and variables of integers, designated
/// initialisers, and assignments to fields one by one. What it does not understand and may change the filter is an
/// error: a loop that fills a bitmap would be lost else.
pub(super) fn read(text: &str) -> Result<Given, RawError> {
    let (tokens, macros) = tokens(text)?;
    let mut reader = Reader {
        cursor: Cursor { tokens: &tokens, at: 0 },
        objects: Objects::new(macros),
        filters: Vec::new(),
        handed: HashMap::new(),
    };
    reader.file()?;
    reader.finish()
}

/// The tokens that are not read yet.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    tokens: &'a [Token],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn peek(&self) -> Option<&'a Kind> {
        self.ahead(0)
    }

    fn ahead(&self, by: usize) -> Option<&'a Kind> {
        self.tokens.get(self.at + by).map(|token| &token.kind)
    }

    fn next(&mut self) -> Option<&'a Kind> {
        let kind = self.peek();
        self.at += 1;
        kind
    }

    fn line(&self) -> usize {
        let token = self.tokens.get(self.at).or(self.tokens.last());
        token.map_or(1, |token| token.line)
    }

    fn is(&self, sign: &str) -> bool {
        matches!(self.peek(), Some(Kind::Sign(found)) if *found == sign)
    }

    fn take(&mut self, sign: &str) -> bool {
        let taken = self.is(sign);
        self.at += usize::from(taken);
        taken
    }

    fn want(&mut self, sign: &str) -> Result<(), RawError> {
        match self.take(sign) {
            true => Ok(()),
            false => Err(self.error(format!("`{sign}` is missing{}", self.before()))),
        }
    }

    fn word(&mut self) -> Result<&'a str, RawError> {
        match self.peek() {
            Some(Kind::Word(word)) => {
                self.at += 1;
                Ok(word)
            }
            _ => Err(self.error(format!("a name is missing{}", self.before()))),
        }
    }

    fn before(&self) -> String {
        self.peek()
            .map_or(" at the end".to_owned(), |kind| format!(" before `{kind}`"))
    }

    fn error(&self, message: String) -> RawError {
        RawError {
            line: Some(self.line()),
            ..RawError::new(message)
        }
    }

    /// Passes over a bracket that was opened just now, to behind where it closes.
    fn skip(&mut self) {
        let mut depth = 1u32;
        while depth > 0 {
            match self.next() {
                Some(Kind::Sign("(" | "[" | "{")) => depth += 1,
                Some(Kind::Sign(")" | "]" | "}")) => depth -= 1,
                Some(_) => {}
                None => return,
            }
        }
    }
}

/// A filter that is being set up.
#[derive(Default)]
struct Filter {
    name: String,
    flags: u32,
    ranges: Vec<Range>,
}

#[derive(Clone, Default)]
struct Range {
    flags: u32,
    nmsrs: u32,
    base: u32,
    bitmap: Option<Pointer>,
}

/// Where a bitmap lies.
#[derive(Clone)]
enum Pointer {
    /// In a variable, so many bytes from its start.
    Into(String, usize),
    /// In the text itself.
    Bytes(Vec<u8>),
}

struct Reader<'a> {
    cursor: Cursor<'a>,
    objects: Objects,
    filters: Vec<Filter>,
    /// What was handed to functions that are not known, and in which line.
    handed: HashMap<String, (String, usize)>,
}

impl Reader<'_> {
    fn file(&mut self) -> Result<(), RawError> {
        // A snippet: the initialiser alone, with its braces or without.
        if self.cursor.is("{") || self.cursor.is(".") {
            let mut filter = Filter::default();
            let closed = self.cursor.take("{");
            self.filter_fields(&mut filter, closed)?;
            self.filters.push(filter);
        }
        while self.cursor.peek().is_some() {
            self.statement()?;
        }
        Ok(())
    }

    fn statement(&mut self) -> Result<(), RawError> {
        if self.cursor.take(";") || self.cursor.take("{") || self.cursor.take("}") || self.cursor.take(",") {
            return Ok(());
        }
        match (self.cursor.peek(), self.cursor.ahead(1)) {
            (Some(Kind::Word(word)), _) if ["for", "while", "do", "if", "switch", "goto"].contains(&word.as_str()) => {
                Err(self.cursor.error(format!(
                    "`{word}` is not carried out here: only initialisers and assignments are read"
                )))
            }
            (Some(Kind::Word(word)), _) if word == "return" || word == "typedef" => {
                while self.cursor.peek().is_some() && !self.cursor.is(";") {
                    match self.cursor.take("{") {
                        true => self.cursor.skip(),
                        false => self.cursor.at += 1,
                    }
                }
                Ok(())
            }
            (Some(Kind::Word(_)), Some(Kind::Sign("." | "->" | "[" | "=" | "|" | "&"))) => self.assignment(),
            (Some(Kind::Word(_)), Some(Kind::Sign("("))) => self.call(),
            (Some(Kind::Word(_)), _) => self.declaration(),
            _ => Err(self
                .cursor
                .error(format!("this is not understood{}", self.cursor.before()))),
        }
    }

    /// `struct kvm_msr_filter f = {…};`, `static __u64 bitmap[2] = {…};`, the head of a function, or another's type.
    fn declaration(&mut self) -> Result<(), RawError> {
        let mut words: Vec<&str> = Vec::new();
        let mut pointer = false;
        loop {
            match self.cursor.peek() {
                Some(Kind::Word(word)) => {
                    words.push(word);
                    self.cursor.at += 1;
                    // An attribute's argument.
                    if word.starts_with("__attribute") && self.cursor.take("(") {
                        words.pop();
                        self.cursor.skip();
                    }
                }
                Some(Kind::Sign("*")) => {
                    pointer = true;
                    self.cursor.at += 1;
                }
                _ => break,
            }
        }
        if self.cursor.take("{") {
            // The members of a type, not of a variable.
            self.cursor.skip();
            return Ok(());
        }
        if self.cursor.take("(") {
            // A function: its body follows, if it is not only declared.
            self.cursor.skip();
            return Ok(());
        }
        let Some((name, kind)) = words.split_last() else {
            return Err(self
                .cursor
                .error(format!("this is not understood{}", self.cursor.before())));
        };
        if kind.contains(&"kvm_msr_filter") {
            if self.cursor.take("=") && !pointer {
                let mut filter = Filter {
                    name: (*name).to_owned(),
                    ..Filter::default()
                };
                self.cursor.want("{")?;
                self.filter_fields(&mut filter, true)?;
                self.filters.push(filter);
            }
            return self.rest_of_declaration();
        }
        if let (Some(width), false) = (value::width(kind), pointer) {
            let object = self.objects.declared(&mut self.cursor, width)?;
            self.objects.insert(name, object);
        }
        self.rest_of_declaration()
    }

    /// To behind what is left of a declaration.
    fn rest_of_declaration(&mut self) -> Result<(), RawError> {
        while let Some(kind) = self.cursor.peek() {
            match kind {
                Kind::Sign(";" | "}") => return Ok(()),
                Kind::Sign(",") => {
                    return Err(self
                        .cursor
                        .error("one declaration sets up one variable here".to_owned()));
                }
                Kind::Sign("{" | "(" | "[") => {
                    self.cursor.at += 1;
                    self.cursor.skip();
                }
                _ => self.cursor.at += 1,
            }
        }
        Ok(())
    }

    /// `filter->ranges[0].base = 0x10;` or `bitmap[3] = 0xff;`.
    fn assignment(&mut self) -> Result<(), RawError> {
        let name = self.cursor.word()?.to_owned();
        if self.objects.knows(&name) {
            return self.objects.assign(&name, &mut self.cursor);
        }
        let mut filter = match self.filters.iter().position(|filter| filter.name == name) {
            Some(at) => self.filters.swap_remove(at),
            None => Filter {
                name: name.clone(),
                ..Filter::default()
            },
        };
        if !(self.cursor.take(".") || self.cursor.take("->")) {
            return Err(self.cursor.error(format!(
                "`{name}` is neither a filter nor a bitmap that is declared here"
            )));
        }
        self.filter_field(&mut filter)?;
        self.filters.push(filter);
        Ok(())
    }

    fn call(&mut self) -> Result<(), RawError> {
        let line = self.cursor.line();
        let function = self.cursor.word()?.to_owned();
        self.cursor.want("(")?;
        if function == "memset" {
            return self.memset();
        }
        let from = self.cursor.at;
        self.cursor.skip();
        if !function.contains("ioctl") && !function.contains("assert") {
            let arguments = self.cursor.tokens.get(from..self.cursor.at).unwrap_or_default();
            for token in arguments {
                if let Kind::Word(word) = &token.kind {
                    self.handed.insert(word.clone(), (function.clone(), line));
                }
            }
        }
        Ok(())
    }

    /// `memset(filter, 0, sizeof(*filter))` or `memset(bitmap, 0xff, sizeof(bitmap))`, behind its bracket.
    fn memset(&mut self) -> Result<(), RawError> {
        while self.cursor.take("&") || self.cursor.take("*") {}
        let name = self.cursor.word()?.to_owned();
        self.cursor.want(",")?;
        let byte = self.objects.number(&mut self.cursor)?;
        self.cursor.want(",")?;
        if !self.objects.knows(&name) {
            self.cursor.skip();
            self.filters.retain(|filter| filter.name != name);
            return match byte {
                0 => Ok(()),
                _ => Err(self
                    .cursor
                    .error(format!("memset of `{name}` with {byte:#x} makes no filter"))),
            };
        }
        let length = self.objects.number(&mut self.cursor)?;
        self.cursor.want(")")?;
        self.objects
            .fill(&name, byte, length)
            .map_err(|what| self.cursor.error(what))
    }

    /// The fields of a filter, up to where they end.
    fn filter_fields(&mut self, filter: &mut Filter, braced: bool) -> Result<(), RawError> {
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
    fn filter_field(&mut self, filter: &mut Filter) -> Result<(), RawError> {
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
        match self.cursor.peek() {
            Some(Kind::Text(bytes)) => {
                self.cursor.at += 1;
                // C ends it with a zero.
                let bytes = bytes.iter().copied().chain([0]).collect();
                Ok(Some(Pointer::Bytes(bytes)))
            }
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

    fn finish(mut self) -> Result<Given, RawError> {
        let filter = match self.filters.len() {
            0 => return Err(RawError::new("nothing here sets a `struct kvm_msr_filter` up")),
            1 => self.filters.remove(0),
            _ => {
                let mut names: Vec<&str> = self.filters.iter().map(|filter| filter.name.as_str()).collect();
                names.sort_unstable();
                let message = format!("here are several filters: {}; leave one", names.join(", "));
                return Err(RawError::new(message));
            }
        };
        self.not_handed(&filter.name)?;
        let mut ranges = Vec::new();
        for range in filter.ranges {
            let bitmap = match range.bitmap {
                None => Vec::new(),
                Some(Pointer::Bytes(bytes)) => bytes,
                Some(Pointer::Into(name, offset)) => {
                    self.not_handed(&name)?;
                    let Some(Object { bytes, .. }) = self.objects.get(&name) else {
                        return Err(RawError::new(format!("the bitmap `{name}` is not here")));
                    };
                    bytes.get(offset..).unwrap_or_default().to_vec()
                }
            };
            ranges.push(RawRange {
                flags: range.flags,
                nmsrs: range.nmsrs,
                base: range.base,
                bitmap,
            });
        }
        let filter = RawFilter {
            flags: filter.flags,
            ranges,
        };
        filter.given()
    }

    /// Nobody else has changed it.
    fn not_handed(&self, name: &str) -> Result<(), RawError> {
        match self.handed.get(name) {
            None => Ok(()),
            Some((function, line)) => Err(RawError {
                line: Some(*line),
                ..RawError::new(format!("what `{function}` does to `{name}` cannot be told here"))
            }),
        }
    }
}
