//! `struct kvm_msr_filter` in C, as a literal initialiser or as gdb prints it.
//!
//! Nothing is carried out. What is read has nothing but the filter, the integers that are its bitmaps, and `#define`s of
//! numbers, so that nothing in it can make the filter another than its initialiser says. All else is refused.

mod initialiser;
mod token;

use initialiser::Reader;
use token::{Kind, error};

use super::error::RawError;
use super::filter::{RawFilter, RawInput};

pub(super) fn read(text: &str) -> Result<RawInput, RawError> {
    let tokens = token::tokens(text)?;
    let first: Vec<&str> = tokens.iter().take(3).map(|token| token.text).collect();
    let (at, gdb) = match first.as_slice() {
        [value, "=", "{"] if value.starts_with('$') => (2, true),
        ["{", _, "="] => (0, true),
        _ => (0, false),
    };
    let mut reader = Reader::of(&tokens, at, gdb);
    if gdb || first.first() == Some(&"{") {
        let filter = reader.filter()?;
        reader.take(";");
        return match reader.peek() {
            None => filter.given(),
            Some(token) => Err(error(token.line, "something follows the filter")),
        };
    }
    let mut found: Option<(&str, RawFilter)> = None;
    let mut constant = true;
    guard(&mut reader);
    while let Some(token) = reader.peek() {
        if token.kind == Kind::Directive {
            match directive(&mut reader)? {
                ANSWERS if constant => break,
                ANSWERS => {
                    return Err(reader.error("what follows could change a filter or a bitmap that is not `const`"));
                }
                _ => continue,
            }
        }
        let mut words = reader.words()?;
        constant &= words.contains(&"const");
        let begins = || error(token.line, &format!("`{}` begins no definition", token.text));
        let name = words.pop().ok_or_else(begins)?;
        if words.contains(&"kvm_msr_filter") {
            if let Some((other, _)) = found {
                return Err(reader.error(&format!("here are several filters, `{other}` and `{name}`")));
            }
            // C++ needs no `=`.
            reader.take("=");
            found = Some((name, reader.filter()?));
        } else {
            let variable = reader.variable(&words)?;
            if reader.variables.insert(name, variable).is_some() {
                return Err(reader.error(&format!("`{name}` is defined twice")));
            }
        }
        reader.want(";")?;
    }
    // Without a filter, the bytes of a file as `xxd -i` shows them.
    let mut arrays = reader.variables.values().filter(|(_, array)| *array);
    match (found, arrays.next(), arrays.next()) {
        (Some((_, filter)), ..) => filter.given(),
        (None, Some((bytes, _)), None) => super::bytes::read(bytes),
        _ => Err(error(1, "nothing here is a `struct kvm_msr_filter`")),
    }
}

/// The macro behind which `plan --emit c` has the code that answers exits: it cannot change what is `const`.
const ANSWERS: &str = "MSRGATE_ANSWERS";

/// Passes over the two directives of an include guard, at the beginning.
fn guard(reader: &mut Reader<'_>) {
    let begins = reader.tokens.get(..6).unwrap_or_default();
    if let [_, ifndef, name, _, define, same] = begins
        && begins.iter().filter(|token| token.kind == Kind::Directive).count() == 2
        && (ifndef.text, define.text, name.text) == ("ifndef", "define", same.text)
        && reader
            .tokens
            .get(6)
            .is_none_or(|next| !next.directive || next.kind == Kind::Directive)
    {
        reader.at = begins.len();
    }
}

/// Reads a directive: `#include` is passed over, and `#define` noted. The macro that it defines, if any.
fn directive<'a>(reader: &mut Reader<'a>) -> Result<&'a str, RawError> {
    let behind = reader.tokens.get(reader.at + 1..).unwrap_or_default();
    let own = behind
        .iter()
        .take_while(|token| token.directive && token.kind != Kind::Directive)
        .count();
    reader.at += 1 + own;
    match behind.get(..own).unwrap_or_default() {
        [include, ..] if include.text == "include" => Ok(""),
        [define, name, body @ ..] if define.text == "define" => {
            let mut number = Reader::of(body, 0, true);
            let value = number.constant(u64::MAX, 8).ok().filter(|_| number.peek().is_none());
            match reader.macros.insert(name.text, value) {
                None => Ok(name.text),
                Some(_) => Err(reader.error(&format!("`{}` is defined twice", name.text))),
            }
        }
        _ => Err(reader.error("this directive is not carried out")),
    }
}
