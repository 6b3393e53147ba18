//! C as tokens.

use std::collections::HashMap;
use std::fmt;

use crate::raw::RawError;

/// One token, and the line where it stands.
#[derive(Clone, Debug)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) line: usize,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Word(String),
    Number(u64),
    /// What a string literal holds, without its zero.
    Text(Vec<u8>),
    Sign(&'static str),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Word(word) => f.write_str(word),
            Kind::Number(number) => write!(f, "{number:#x}"),
            Kind::Text(_) => f.write_str("\"…\""),
            Kind::Sign(sign) => f.write_str(sign),
        }
    }
}

/// What object-like macros stand for.
pub(super) type Macros = HashMap<String, Vec<Token>>;

/// The longest first.
const SIGNS: [&str; 28] = [
    "...", "->", "<<", ">>", "{", "}", "(", ")", "[", "]", ".", ",", ";", ":", "=", "|", "&", "^", "~", "+", "-", "*",
    "/", "%", "!", "<", ">", "?",
];

/// The tokens of a text, and its macros.
pub(super) fn tokens(text: &str) -> Result<(Vec<Token>, Macros), RawError> {
    let mut found = Vec::new();
    let mut macros = Macros::new();
    let mut rest = text;
    let mut line = 1;
    let mut begins = true;
    while let Some(c) = rest.chars().next() {
        if c == '\n' {
            line += 1;
            begins = true;
            rest = rest.get(1..).unwrap_or_default();
        } else if c.is_whitespace() || rest.starts_with("\\\n") {
            rest = rest.get(c.len_utf8()..).unwrap_or_default();
        } else if let Some((comment, after)) = comment(rest) {
            line += comment.matches('\n').count();
            rest = after;
        } else if c == '#' && begins {
            let (directive, after) = directive(rest);
            define(directive, line, &mut macros)?;
            line += directive.matches('\n').count();
            rest = after;
        } else {
            begins = false;
            let (kind, after) = token(rest, line)?;
            found.push(Token { kind, line });
            rest = after;
        }
    }
    Ok((found, macros))
}

fn comment(rest: &str) -> Option<(&str, &str)> {
    if rest.starts_with("//") {
        return Some(rest.split_at(rest.find('\n').unwrap_or(rest.len())));
    }
    let inner = rest.strip_prefix("/*")?;
    let end = inner.find("*/").map_or(rest.len(), |end| end + 4);
    rest.split_at_checked(end)
}

/// A line that begins with `#`, with those that it goes on in.
fn directive(rest: &str) -> (&str, &str) {
    let mut end = 0;
    for line in rest.split_inclusive('\n') {
        end += line.len();
        if !line.trim_end().ends_with('\\') {
            // Its own end of line is not part of it.
            end -= usize::from(line.ends_with('\n'));
            break;
        }
    }
    rest.split_at_checked(end).unwrap_or((rest, ""))
}

fn define(directive: &str, line: usize, macros: &mut Macros) -> Result<(), RawError> {
    let error = |message: String| RawError {
        line: Some(line),
        ..RawError::new(message)
    };
    let body = directive.trim_start_matches('#').trim_start();
    let name = body
        .split(|c: char| !c.is_ascii_alphanumeric())
        .next()
        .unwrap_or_default();
    match name {
        "define" => {}
        "include" | "pragma" | "ifndef" | "endif" | "undef" => return Ok(()),
        other => return Err(error(format!("`#{other}` is not carried out here: leave what holds"))),
    }
    let rest = body.strip_prefix("define").unwrap_or_default().trim_start();
    let end = rest
        .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .unwrap_or(rest.len());
    let (name, rest) = rest.split_at_checked(end).unwrap_or((rest, ""));
    if rest.starts_with('(') {
        // Whoever uses it gets an error for its name.
        return Ok(());
    }
    let text = rest.replace("\\\n", " ").replace("\\\r\n", " ");
    // No directive within, so no macro either.
    let (found, _) = tokens(&text.replace('#', " "))?;
    let found = found.into_iter().map(|token| Token { line, ..token }).collect();
    macros.insert(name.to_owned(), found);
    Ok(())
}

fn token(rest: &str, line: usize) -> Result<(Kind, &str), RawError> {
    let error = |message: String| RawError {
        line: Some(line),
        ..RawError::new(message)
    };
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let word = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
    let (word, after) = rest.split_at_checked(word).unwrap_or((rest, ""));
    match word.chars().next() {
        Some(c) if c.is_ascii_digit() => {
            let number = number(word).ok_or_else(|| error(format!("`{word}` is no number of 64 bits")))?;
            return Ok((Kind::Number(number), after));
        }
        Some(_) => return Ok((Kind::Word(word.to_owned()), after)),
        None => {}
    }
    if let Some(inner) = rest.strip_prefix('"') {
        let (bytes, after) = string(inner).ok_or_else(|| error("a text does not end".to_owned()))?;
        return Ok((Kind::Text(bytes), after));
    }
    if let Some((byte, after)) = character(rest) {
        return Ok((Kind::Number(byte.into()), after));
    }
    let sign = SIGNS.iter().find(|sign| rest.starts_with(**sign));
    let sign = sign.ok_or_else(|| {
        let c = rest.chars().next().unwrap_or_default();
        error(format!("`{}` is not understood", c.escape_default()))
    })?;
    Ok((Kind::Sign(sign), rest.get(sign.len()..).unwrap_or_default()))
}

/// A character as a constant, `'A'` or `'\\n'`, of one byte.
fn character(rest: &str) -> Option<(u8, &str)> {
    let inner = rest.strip_prefix('\'')?;
    let length = match inner.strip_prefix('\\') {
        Some(escape) => escape.get(1..)?.find('\'')? + 2,
        None => inner.find('\'')?,
    };
    let (literal, after) = inner.split_at_checked(length)?;
    let (bytes, _) = string(&format!("{literal}\""))?;
    match bytes.as_slice() {
        [byte] => Some((*byte, after.get(1..)?)),
        _ => None,
    }
}

/// A literal with C's prefixes and suffixes.
fn number(word: &str) -> Option<u64> {
    let lower = word.to_ascii_lowercase();
    let digits = lower.trim_end_matches(['u', 'l']);
    if let Some(digits) = digits.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok();
    }
    if let Some(digits) = digits.strip_prefix("0b") {
        return u64::from_str_radix(digits, 2).ok();
    }
    match digits.strip_prefix('0') {
        Some(octal) if !octal.is_empty() => u64::from_str_radix(octal, 8).ok(),
        _ => digits.parse().ok(),
    }
}

/// The bytes of a string literal behind its quote, and what follows the closing one. Escapes are C's, with at most two
/// digits after `\x`, as dumps write them.
pub(in crate::raw) fn string(mut rest: &str) -> Option<(Vec<u8>, &str)> {
    let mut bytes = Vec::new();
    loop {
        let c = rest.chars().next()?;
        rest = rest.get(c.len_utf8()..)?;
        match c {
            '"' => return Some((bytes, rest)),
            '\\' => {
                let escape = rest.chars().next()?;
                rest = rest.get(escape.len_utf8()..)?;
                let digits = |rest: &str, radix, most| {
                    let digits = rest
                        .bytes()
                        .take(most)
                        .take_while(|byte| (*byte as char).is_digit(radix))
                        .count();
                    rest.split_at_checked(digits).map(|(digits, _)| digits.to_owned())
                };
                match escape {
                    'x' => {
                        let hex = digits(rest, 16, 2)?;
                        rest = rest.get(hex.len()..)?;
                        bytes.push(u8::from_str_radix(&hex, 16).ok()?);
                    }
                    '0'..='7' => {
                        let octal = format!("{escape}{}", digits(rest, 8, 2)?);
                        rest = rest.get(octal.len() - 1..)?;
                        bytes.push(u8::try_from(u32::from_str_radix(&octal, 8).ok()?).ok()?);
                    }
                    'n' => bytes.push(b'\n'),
                    't' => bytes.push(b'\t'),
                    'r' => bytes.push(b'\r'),
                    'a' => bytes.push(7),
                    'b' => bytes.push(8),
                    'v' => bytes.push(11),
                    'f' => bytes.push(12),
                    'e' => bytes.push(27),
                    other => bytes.extend(other.to_string().bytes()),
                }
            }
            other => bytes.extend(other.to_string().bytes()),
        }
    }
}
