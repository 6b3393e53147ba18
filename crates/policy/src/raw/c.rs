//! `struct kvm_msr_filter` in C, as a literal initialiser or as gdb prints it.
//!
//! Nothing is carried out. A filter is what its initialiser says only if nothing else in the text has a say in it: each
//! name that the initialiser rests upon may stand only where it is defined, and the filter's in the `ioctl` that installs
//! it. All else is refused.

mod initialiser;
mod token;

use std::collections::HashMap;

use initialiser::Reader;
use token::{Kind, Token};

use super::{Given, RawError};

/// The structure's tag.
const TAG: &str = "kvm_msr_filter";

/// The call that installs a filter.
const INSTALL: &str = "KVM_X86_SET_MSR_FILTER";

fn error(line: usize, message: &str) -> RawError {
    RawError {
        line: Some(line),
        ..RawError::new(format!(
            "{message}; only a literal initialiser is read: print any other filter in gdb where ioctl is called, or dump its \
             bytes (docs/formats.md)"
        ))
    }
}

pub(super) fn read(text: &str) -> Result<Given, RawError> {
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
            Some(token) => Err(error(token.line, "the text goes on behind the filter")),
        };
    }
    reader.macros = macros(&tokens);
    let Some(name) = only_filter(&tokens)? else {
        // As `xxd -i` shows the bytes of a file.
        let name = tokens.windows(2).find_map(|pair| match pair {
            [name, bracket] if bracket.text == "[" => Some(name.text),
            _ => None,
        });
        reader.at = tokens.len() + 1;
        let bytes = reader.variable(
            name.ok_or_else(|| error(1, "nothing here is a `struct kvm_msr_filter`"))?,
            false,
        )?;
        alone(&reader, "")?;
        return super::bytes::read(&bytes);
    };
    reader.at = name + 1;
    // C++ needs no `=`.
    reader.take("=");
    let filter = reader.filter()?;
    reader.want(";")?;
    reader.read.push(name - 1..reader.at);
    let name = tokens.get(name).map_or("", |token| token.text);
    reader.names.insert(name);
    alone(&reader, name)?;
    filter.given()
}

/// The directive that begins here.
fn directive<'a>(tokens: &'a [Token<'a>], at: usize) -> &'a [Token<'a>] {
    let behind = tokens.get(at + 1..).unwrap_or_default();
    let own = |token: &&Token<'_>| token.directive && token.kind != Kind::Directive;
    behind.get(..behind.iter().take_while(own).count()).unwrap_or_default()
}

/// The macros: their number, if they are defined as one, once, whatever holds.
fn macros<'a>(tokens: &'a [Token<'a>]) -> HashMap<&'a str, Option<u64>> {
    let mut macros = HashMap::new();
    for (at, hash) in tokens
        .iter()
        .enumerate()
        .filter(|(_, token)| token.kind == Kind::Directive)
    {
        if let [define, name, body @ ..] = directive(tokens, at)
            && define.text == "define"
        {
            let mut body = Reader::of(body, 0, true);
            let value = body
                .constant(u64::MAX, 8)
                .ok()
                .filter(|_| body.peek().is_none() && !hash.conditional);
            macros
                .entry(name.text)
                .and_modify(|value| *value = None)
                .or_insert(value);
        }
    }
    macros
}

/// Where the name of the only variable is that is a filter; `None` if the structure is not named at all.
fn only_filter(tokens: &[Token<'_>]) -> Result<Option<usize>, RawError> {
    let mut found = Vec::new();
    let mut named = None;
    for (at, tag) in tokens.iter().enumerate().filter(|(_, token)| token.text == TAG) {
        named.get_or_insert(tag.line);
        let behind = tokens.get(at + 1..).unwrap_or_default();
        let words = behind
            .iter()
            .take(8)
            .take_while(|token| token.kind == Kind::Word)
            .count();
        let next = |at: usize| behind.get(at).map_or("", |token| token.text);
        if tag.directive || next(0) == "{" || next(0) == ")" && next(1) == "{" {
            return Err(error(
                tag.line,
                "this may be a filter, and is no variable with an initialiser",
            ));
        }
        found.extend((words > 0).then_some((at + words, next(words.saturating_sub(1)), tag.line)));
    }
    match (found.as_slice(), named) {
        ([(at, ..)], _) => Ok(Some(*at)),
        ([], None) => Ok(None),
        ([], Some(line)) => Err(error(line, "no variable is a `struct kvm_msr_filter` here")),
        ([.., (_, _, line)], _) => {
            let names: Vec<String> = found
                .iter()
                .take(8)
                .map(|(_, name, line)| format!("`{name}` in line {line}"))
                .collect();
            Err(error(*line, &format!("here are several filters, {}", names.join(", "))))
        }
    }
}

/// Nothing else in the text has a say in what was read.
fn alone(reader: &Reader<'_>, filter: &str) -> Result<(), RawError> {
    let mut installed = None;
    for (at, token) in reader.tokens.iter().enumerate() {
        let near = |by: isize| at.checked_add_signed(by).and_then(|at| reader.tokens.get(at));
        let word = |by: isize| near(by).map_or("", |token| token.text);
        let read = reader.read.iter().any(|read| read.contains(&at));
        // `#define NAME` and `#ifdef NAME`.
        let named = word(-2) == "#" && ["define", "ifdef", "ifndef"].contains(&word(-1));
        let used = reader.names.contains(token.text) && !read && !named && installed != Some(at);
        let function = ["ioctl", "vm_ioctl", "kvm_vm_ioctl"];
        let typed = near(-1).is_some_and(|before| before.kind == Kind::Word || before.text == "*");
        let what = if read && token.conditional {
            "an `#if` decides on this definition"
        } else if token.text == INSTALL && !named {
            let bracket = (-6..0).rev().find(|by| word(*by) == "(").unwrap_or(0);
            let ours = [",", "&", filter, ")"] == [1, 2, 3, 4].map(word) && function.contains(&word(bracket - 1));
            if ours && !token.directive {
                installed = Some(at + 3);
                continue;
            }
            "this may install another filter, or change this one"
        } else if function.contains(&token.text) && typed && !["return", "else"].contains(&word(-1)) {
            "this `ioctl` may do anything"
        } else if token.directive && token.text == "#" && word(1) == "#" && word(-1) != "," {
            "a macro makes names of parts"
        } else if [";", "="].contains(&word(1)) && reader.width(&[token.text]).is_ok() {
            "a type is defined here"
        } else if used {
            "what the filter rests upon is used here"
        } else {
            continue;
        };
        return Err(error(token.line, &format!("`{}`: {what}", token.text)));
    }
    Ok(())
}
