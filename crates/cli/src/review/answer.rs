//! Answers as people and scripts write them.

use std::fmt;

use msrgate_core::Op;
use msrgate_msrs::number;

/// What becomes of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    Allow,
    Deny,
    /// Of reads.
    Zero,
    /// Of reads.
    Value(u64),
    /// Of writes.
    Ignore,
    /// Of both directions.
    Shadow,
    /// It stays as it is.
    Skip,
    /// So do all that follow.
    Quit,
}

/// The words that can be the answer, as the prompt lists them.
pub(super) fn choices(op: Op) -> &'static [&'static str] {
    match op {
        Op::Read => &["allow", "deny", "zero", "value", "shadow", "skip", "quit"],
        Op::Write => &["allow", "deny", "ignore", "shadow", "skip", "quit"],
    }
}

/// Reads one line; an empty one skips.
pub(super) fn parse(line: &str, op: Op) -> Result<Answer, String> {
    let mut words = line.split_whitespace();
    let (Some(word), argument) = (words.next(), words.next()) else {
        return Ok(Answer::Skip);
    };
    let all = choices(op).join(", ");
    if words.next().is_some() {
        return Err(format!(
            "`{}` is more than one answer, which is one of {all}",
            line.trim()
        ));
    }
    let begins = choices(op)
        .iter()
        .filter(|choice| choice.starts_with(&word.to_ascii_lowercase()));
    let begins: Vec<&str> = begins.copied().collect();
    let choice = match begins.as_slice() {
        [one] => one,
        [] => return Err(format!("`{word}` is not an answer to a {op}, which is one of {all}")),
        several => return Err(format!("`{word}` is ambiguous: it can be {}", several.join(" or "))),
    };
    let answer = match (*choice, argument) {
        ("value", Some(value)) => {
            return number::parse(value)
                .map(Answer::Value)
                .map_err(|_| format!("`{value}` is not a number of 64 bits, such as 0x8b or 139"));
        }
        ("value", None) => return Err("`value` takes a number, as in `value 0x10`".to_owned()),
        ("allow", None) => Answer::Allow,
        ("deny", None) => Answer::Deny,
        ("zero", None) => Answer::Zero,
        ("ignore", None) => Answer::Ignore,
        ("shadow", None) => Answer::Shadow,
        ("skip", None) => Answer::Skip,
        ("quit", None) => Answer::Quit,
        (choice, _) => return Err(format!("`{choice}` takes no argument")),
    };
    Ok(answer)
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Answer::Value(value) => return write!(f, "value {value:#x}"),
            Answer::Allow => "allow",
            Answer::Deny => "deny",
            Answer::Zero => "zero",
            Answer::Ignore => "ignore",
            Answer::Shadow => "shadow",
            Answer::Skip => "skip",
            Answer::Quit => "quit",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_word_or_a_beginning_of_one_alone() {
        let read = |line| parse(line, Op::Read);
        assert_eq!(read(" allow \n"), Ok(Answer::Allow));
        assert_eq!(read("A"), Ok(Answer::Allow));
        assert_eq!(read("v 0x10"), Ok(Answer::Value(16)));
        assert_eq!(read("\n"), Ok(Answer::Skip));
        assert_eq!(read("sh"), Ok(Answer::Shadow));
        assert_eq!(parse("i", Op::Write), Ok(Answer::Ignore));
        for (line, op) in [
            ("s", Op::Read),
            ("ignore", Op::Read),
            ("zero", Op::Write),
            ("value", Op::Read),
            ("value x", Op::Read),
            ("allow it", Op::Read),
            ("deny all of it", Op::Read),
            ("yes", Op::Read),
        ] {
            assert!(parse(line, op).is_err(), "{line}");
        }
    }
}
