//! C as tokens.

use crate::raw::error::RawError;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// A name, a keyword, or gdb's `$1`.
    Word,
    Number,
    /// A string literal or a character constant, with its quotes.
    Quoted,
    Sign,
    /// The `#` that begins a preprocessor directive.
    Directive,
}

/// One token, and the line where it stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token<'a> {
    pub(super) kind: Kind,
    pub(super) text: &'a str,
    pub(super) line: usize,
    /// Whether it is part of a directive.
    pub(super) directive: bool,
}

/// Why a text is refused.
pub(super) fn error(line: usize, message: &str) -> RawError {
    RawError::new(format!(
        "{message}; only a literal initialiser and its bitmaps are read: of a program, `msrgate capture` prints the filter \
             that the program gives KVM (docs/formats.md)"
    ))
    .at(line)
}

/// The tokens of a text. What would be joined or cut in another way by a compiler is refused.
pub(super) fn tokens(text: &str) -> Result<Vec<Token<'_>>, RawError> {
    let mut tokens: Vec<Token<'_>> = Vec::new();
    let mut rest = text;
    let mut line = 1;
    // Whether only blanks and comments stand before this place in its line, and whether a directive does.
    let (mut begins, mut directive) = (true, false);
    while let Some(c) = rest.chars().next() {
        let before = text.get(..text.len() - rest.len()).unwrap_or_default();
        let (length, kind) = match c {
            c if c.is_whitespace() => (Some(c.len_utf8()), None),
            '/' if rest.starts_with("//") => (rest.find('\n').or(Some(rest.len())), None),
            '/' if rest.starts_with("/*") => (
                rest.get(2..).and_then(|inner| inner.find("*/")).map(|end| end + 4),
                None,
            ),
            // C++'s raw strings end otherwise.
            '"' | '\'' => (quoted(rest, c).filter(|_| !before.ends_with('R')), Some(Kind::Quoted)),
            c if is_word(c) => {
                let number = c.is_ascii_digit();
                let end = rest.find(|c| !(is_word(c) || number && c == '.'));
                (
                    end.or(Some(rest.len())),
                    Some(if number { Kind::Number } else { Kind::Word }),
                )
            }
            '#' if begins => (Some(1), Some(Kind::Directive)),
            '.' if rest.starts_with("...") => (Some(3), Some(Kind::Sign)),
            c => (Some(c.len_utf8()), Some(Kind::Sign)),
        };
        let (token, after) = length
            .and_then(|length| rest.split_at_checked(length))
            .unwrap_or(("", rest));
        // A compiler joins a line that ends with `\`, or a trigraph for it, to the next.
        let seen = if c == '\\' {
            rest.lines().next()
        } else {
            Some(token).filter(|_| kind.is_none())
        };
        let joined = seen.is_some_and(|seen| seen.lines().any(|line| line.trim_end().ends_with('\\')));
        if token.is_empty() || joined || token.contains("??/") || rest.starts_with("??") {
            return Err(error(line, "a literal, a comment or a line does not end here"));
        }
        if let Some(kind) = kind {
            begins = false;
            directive |= kind == Kind::Directive;
            tokens.push(Token {
                kind,
                text: token,
                line,
                directive,
            });
        } else if token == "\n" {
            (begins, directive) = (true, false);
        }
        line += token.matches('\n').count();
        rest = after;
    }
    Ok(tokens)
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '$' || !c.is_ascii()
}

/// The length of the literal that begins here, with its quotes.
fn quoted(rest: &str, quote: char) -> Option<usize> {
    let mut escaped = true;
    for (at, c) in rest.char_indices() {
        match c {
            '\n' => return None,
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}
