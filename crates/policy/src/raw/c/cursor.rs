//! The tokens that are not read yet.

use super::token::{Kind, Token};
use crate::raw::RawError;

/// The tokens that are not read yet.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    pub(super) tokens: &'a [Token],
    pub(super) at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn peek(&self) -> Option<&'a Kind> {
        self.ahead(0)
    }

    pub(super) fn ahead(&self, by: usize) -> Option<&'a Kind> {
        self.tokens.get(self.at + by).map(|token| &token.kind)
    }

    pub(super) fn next(&mut self) -> Option<&'a Kind> {
        let kind = self.peek();
        self.at += 1;
        kind
    }

    pub(super) fn line(&self) -> usize {
        let token = self.tokens.get(self.at).or(self.tokens.last());
        token.map_or(1, |token| token.line)
    }

    pub(super) fn is(&self, sign: &str) -> bool {
        matches!(self.peek(), Some(Kind::Sign(found)) if *found == sign)
    }

    pub(super) fn take(&mut self, sign: &str) -> bool {
        let taken = self.is(sign);
        self.at += usize::from(taken);
        taken
    }

    pub(super) fn want(&mut self, sign: &str) -> Result<(), RawError> {
        match self.take(sign) {
            true => Ok(()),
            false => Err(self.error(format!("`{sign}` is missing{}", self.before()))),
        }
    }

    pub(super) fn word(&mut self) -> Result<&'a str, RawError> {
        match self.peek() {
            Some(Kind::Word(word)) => {
                self.at += 1;
                Ok(word)
            }
            _ => Err(self.error(format!("a name is missing{}", self.before()))),
        }
    }

    /// A text, of several literals that stand beside each other too.
    pub(super) fn text(&mut self) -> Option<Vec<u8>> {
        let mut text: Option<Vec<u8>> = None;
        while let Some(Kind::Text(bytes)) = self.peek() {
            text.get_or_insert_default().extend(bytes);
            self.at += 1;
        }
        text
    }

    pub(super) fn before(&self) -> String {
        self.peek()
            .map_or(" at the end".to_owned(), |kind| format!(" before `{kind}`"))
    }

    pub(super) fn error(&self, message: String) -> RawError {
        RawError {
            line: Some(self.line()),
            ..RawError::new(message)
        }
    }

    /// Passes over a bracket that was opened just now, to behind where it closes.
    pub(super) fn skip(&mut self) {
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

    /// The names since a place, but for those whose size alone is asked.
    pub(super) fn names(&self, from: usize) -> Vec<String> {
        let mut names = Vec::new();
        let mut inner = Cursor {
            tokens: self.tokens.get(..self.at).unwrap_or(self.tokens),
            at: from,
        };
        while let Some(kind) = inner.next() {
            let Kind::Word(word) = kind else { continue };
            let size_of = word == "sizeof" || word == "ARRAY_SIZE";
            if !size_of {
                names.push(word.clone());
            } else if inner.take("(") {
                inner.skip();
            }
        }
        names
    }
}
