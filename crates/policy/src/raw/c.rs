//! `struct kvm_msr_filter` in C: initialisers and assignments, not programs.

mod cursor;
mod fields;
mod token;
mod value;

use std::collections::HashMap;

use self::cursor::Cursor;
use self::fields::{Filter, Pointer};
pub(super) use self::token::string;
use self::token::{Kind, tokens};
use self::value::{Object, Objects};
use super::{Given, RawError, RawFilter, RawRange};

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
