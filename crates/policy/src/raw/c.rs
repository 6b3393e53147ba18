//! `struct kvm_msr_filter` in C: initialisers and assignments, not programs.

mod cursor;
mod expression;
mod fields;
mod token;
mod value;

use std::collections::{HashMap, HashSet};

use msrgate_core::abi::Layout;

use self::cursor::Cursor;
use self::fields::{Filter, Pointer};
pub(super) use self::token::string;
use self::token::{Kind, tokens};
use self::value::{Object, Objects};
use super::{Given, RawError, RawFilter, RawRange};

/// Words that begin a statement which is carried out or not.
const CONTROL: [&str; 9] = ["for", "while", "do", "if", "else", "switch", "case", "goto", "asm"];

/// Reads the one filter that a text in C sets up.
///
/// Understands object-like macros, KVM's names and the database's, arrays and variables of integers, designated
/// initialisers, and assignments to fields one by one. What it does not understand it passes over, unless it names the
/// filter, a bitmap of it, or what was made of them: a loop that fills a bitmap would be lost else.
pub(super) fn read(text: &str) -> Result<Given, RawError> {
    let (tokens, macros) = tokens(text)?;
    let mut reader = Reader {
        cursor: Cursor { tokens: &tokens, at: 0 },
        objects: Objects::new(macros),
        filters: Vec::new(),
        touched: HashMap::new(),
        others: Vec::new(),
        named_in: HashMap::new(),
        passed_over: None,
    };
    reader.file()?;
    reader.finish()
}

/// After more filters than these, each of which is looked for by name, the rest is not read.
const MOST_FILTERS: usize = 64;

struct Reader<'a> {
    cursor: Cursor<'a>,
    objects: Objects,
    filters: Vec<Filter>,
    /// The names in what was not understood, and the first that was not understood of each.
    touched: HashMap<String, Touch>,
    /// The variables of each declaration that is not understood.
    others: Vec<Vec<String>>,
    /// In which of these declarations a name is: the variables may be pointers to it.
    named_in: HashMap<String, Vec<usize>>,
    /// Why the first statement was not understood.
    passed_over: Option<RawError>,
}

/// What may have changed a variable.
enum Touch {
    /// A function, called in a line.
    Call(String, usize),
    /// A statement that is not understood.
    Statement(RawError),
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
            if self.filters.len() > MOST_FILTERS {
                return Err(self.cursor.error("here are many filters; leave one".to_owned()));
            }
            let from = self.cursor.at;
            if let Err(error) = self.statement() {
                self.cursor.at = from;
                self.pass_over(error)?;
            }
        }
        Ok(())
    }

    /// To behind a statement that is not understood. One that declares a filter is not passed over.
    fn pass_over(&mut self, error: RawError) -> Result<(), RawError> {
        let from = self.cursor.at;
        loop {
            match self.cursor.peek() {
                Some(Kind::Sign("}")) if self.cursor.at > from => break,
                None => break,
                Some(_) => {}
            }
            match self.cursor.next() {
                Some(Kind::Sign(";")) => break,
                Some(Kind::Sign("{")) => {
                    self.cursor.skip();
                    break;
                }
                Some(Kind::Sign("(" | "[")) => self.cursor.skip(),
                _ => {}
            }
        }
        let names = self.cursor.names(from);
        if names.iter().any(|name| name == "kvm_msr_filter") {
            // What it uses was perhaps not understood before.
            let statement = self.cursor.tokens.get(from..self.cursor.at).unwrap_or_default();
            let cause = statement.iter().find_map(|token| match &token.kind {
                Kind::Word(name) => match self.touched.get(name) {
                    Some(Touch::Statement(cause)) => Some(cause.clone()),
                    _ => None,
                },
                _ => None,
            });
            return Err(cause.unwrap_or(error));
        }
        for name in names {
            self.objects.doubt(&name);
            self.touched
                .entry(name)
                .or_insert_with(|| Touch::Statement(error.clone()));
        }
        self.passed_over.get_or_insert(error);
        Ok(())
    }

    fn statement(&mut self) -> Result<(), RawError> {
        if self.cursor.take(";") || self.cursor.take("{") || self.cursor.take("}") || self.cursor.take(",") {
            return Ok(());
        }
        match (self.cursor.peek(), self.cursor.ahead(1)) {
            (Some(Kind::Word(word)), _) if CONTROL.contains(&word.as_str()) => Err(self.cursor.error(format!(
                "`{word}` is not carried out here: only initialisers and assignments are read"
            ))),
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
        if kind.contains(&"kvm_msr_filter") && !pointer {
            if self.cursor.take("=") {
                let mut filter = Filter {
                    name: (*name).to_owned(),
                    ..Filter::default()
                };
                self.cursor.want("{")?;
                self.filter_fields(&mut filter, true)?;
                self.filters.push(filter);
            }
            if self.cursor.is(",") {
                return Err(self.cursor.error("one declaration sets up one filter here".to_owned()));
            }
            return self.end_of_declaration();
        }
        // A pointer to a text is as good as an array of it.
        let text = matches!(self.cursor.ahead(1), Some(Kind::Text(_)));
        let (Some(width), true) = (value::width(kind), !pointer || text) else {
            return self.other_variable(name);
        };
        let mut name = *name;
        loop {
            let object = self.objects.declared(&mut self.cursor, width)?;
            self.objects.insert(name, object);
            if !self.cursor.take(",") {
                return self.end_of_declaration();
            }
            name = self.cursor.word()?;
        }
    }

    /// A declaration ends where it is read.
    fn end_of_declaration(&mut self) -> Result<(), RawError> {
        while let Some(Kind::Word(word)) = self.cursor.peek() {
            // An attribute.
            if !word.starts_with("__") {
                break;
            }
            self.cursor.at += 1;
            if self.cursor.take("(") {
                self.cursor.skip();
            }
        }
        match self.cursor.peek() {
            None | Some(Kind::Sign(";" | "}")) => Ok(()),
            _ => self.cursor.want(";"),
        }
    }

    /// A variable of a type that is not looked into, or a pointer: what it begins with it may lead to.
    fn other_variable(&mut self, name: &str) -> Result<(), RawError> {
        if !(self.cursor.peek().is_none() || ["=", ";", "[", ","].iter().any(|sign| self.cursor.is(sign))) {
            return Err(self
                .cursor
                .error(format!("this is not understood{}", self.cursor.before())));
        }
        let from = self.cursor.at;
        let mut variables = vec![name.to_owned()];
        while self.cursor.peek().is_some() && !self.cursor.is(";") && !self.cursor.is("}") {
            match self.cursor.next() {
                Some(Kind::Sign("{" | "(" | "[")) => self.cursor.skip(),
                Some(Kind::Sign(",")) => {
                    while self.cursor.take("*") {}
                    variables.extend(self.cursor.word().ok().map(str::to_owned));
                }
                _ => {}
            }
        }
        for name in self.cursor.names(from) {
            self.objects.doubt(&name);
            self.named_in.entry(name).or_default().push(self.others.len());
        }
        self.others.push(variables);
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
            for name in self.cursor.names(from) {
                self.objects.doubt(&name);
                self.touched
                    .entry(name)
                    .or_insert_with(|| Touch::Call(function.clone(), line));
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
            0 => {
                // As `xxd -i` shows the bytes of a file.
                let array = self.objects.only_bytes();
                if let Some(bytes) = array.filter(|bytes| bytes.len() >= Layout::COMPAT.filter_size) {
                    return super::bytes::read(bytes);
                }
                let nothing = || RawError::new("nothing here sets a `struct kvm_msr_filter` up");
                return Err(self.passed_over.take().unwrap_or_else(nothing));
            }
            1 => self.filters.remove(0),
            _ => {
                let mut names: Vec<&str> = self.filters.iter().map(|filter| filter.name.as_str()).collect();
                names.sort_unstable();
                let message = format!("here are several filters: {}; leave one", names.join(", "));
                return Err(RawError::new(message));
            }
        };
        self.untouched(&filter.name)?;
        let mut ranges = Vec::new();
        for range in filter.ranges {
            let bitmap = match range.bitmap {
                None => Vec::new(),
                Some(Pointer::Bytes(bytes)) => bytes,
                Some(Pointer::Into(name, offset)) => {
                    self.untouched(&name)?;
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

    /// Nothing that is not understood has changed it.
    fn untouched(&self, name: &str) -> Result<(), RawError> {
        let mut names = vec![name];
        let mut known = HashSet::from([name]);
        let mut at = 0;
        while let Some(of) = names.get(at).copied() {
            at += 1;
            let others = self.named_in.get(of).into_iter().flatten();
            let variables = others.filter_map(|other| self.others.get(*other)).flatten();
            names.extend(variables.map(String::as_str).filter(|name| known.insert(*name)));
        }
        match names.into_iter().find_map(|name| self.touched.get(name)) {
            None => Ok(()),
            Some(Touch::Statement(error)) => Err(error.clone()),
            Some(Touch::Call(function, line)) => Err(RawError {
                line: Some(*line),
                ..RawError::new(format!("what `{function}` does to `{name}` cannot be told here"))
            }),
        }
    }
}
