//! Lines of programs whose forms are not known: an access, a word of trouble, and the number of a register behind the access.

use msrgate_core::{Msr, Op};

use super::cause::{Cause, Found, Speaker};

/// Words that a line may have between the access and the register's number.
const BETWEEN: [&str; 28] = [
    "access",
    "addr",
    "address",
    "at",
    "code",
    "ecx",
    "exit",
    "for",
    "from",
    "id",
    "illegal",
    "index",
    "invalid",
    "is",
    "msr",
    "number",
    "of",
    "offset",
    "on",
    "rcx",
    "read",
    "reg",
    "register",
    "the",
    "to",
    "unknown",
    "write",
    "unexpected",
];

/// Words for what nobody has made; they too may stand before the number.
const UNKNOWN: [&str; 8] = [
    "unexpected",
    "unhandled",
    "unimplemented",
    "unknown",
    "unrecognised",
    "unrecognized",
    "unsupported",
    "undefined",
];

const IGNORED: [&str; 11] = [
    "dropped",
    "dropping",
    "faking",
    "ignored",
    "ignoring",
    "read as zero",
    "reads as zero",
    "return 0",
    "returning 0",
    "returns 0",
    "sinking",
];

const NOT_MADE: [&str; 5] = [
    "does not know",
    "not emulated",
    "not handled",
    "not implemented",
    "not supported",
];

const FAULT: [&str; 20] = [
    "#gp",
    "bad",
    "blocked",
    "cannot",
    "can't",
    "denied",
    "error",
    "fail",
    "failed",
    "failure",
    "fault",
    "faulted",
    "general protection",
    "gp(0)",
    "illegal",
    "invalid",
    "refused",
    "rejected",
    "should not",
    "unable",
];

/// Without leave to read or write, nothing was read or written; and the tracepoint is read by itself.
const NO_ACCESS: [&str; 5] = [
    "callbacks suppressed",
    "kvm_msr:",
    "no such file",
    "permission",
    "permitted",
];

/// Reads a line in lower case.
pub(super) fn read(line: &str) -> Option<Found> {
    if NO_ACCESS.iter().any(|words| line.contains(words)) {
        return None;
    }
    let words = words(line);
    let cause = cause(line, &words)?;
    let (place, msr) = (0..words.len()).find_map(|place| {
        let _ = access(words.get(place)?.1)?;
        register(line, &words, place)
    })?;
    let (start, _) = *words.get(place)?;
    let op = op(&words);
    let value = match op {
        Some(Op::Write) => value(line, &words, place),
        _ => None,
    };
    Some(Found {
        start,
        by: Speaker::Other,
        cause,
        op,
        msr,
        value,
    })
}

/// The words of a line, each with where it begins.
pub(super) fn words(line: &str) -> Vec<(usize, &str)> {
    let mut words = Vec::new();
    let mut rest = line;
    while let Some(begin) = rest.find(is_word) {
        let word = rest.get(begin..).unwrap_or_default();
        let end = word.find(|c| !is_word(c)).unwrap_or(word.len());
        let (word, behind) = word.split_at(end);
        words.push((line.len() - behind.len() - word.len(), word));
        rest = behind;
    }
    words
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// What became of the access: the first words that say it, in this order.
fn cause(line: &str, words: &[(usize, &str)]) -> Option<Cause> {
    let said = |phrases: &[&str]| {
        phrases
            .iter()
            .any(|phrase| match phrase.bytes().all(|byte| byte.is_ascii_alphabetic()) {
                true => words.iter().any(|(_, word)| word == phrase),
                false => line.contains(phrase),
            })
    };
    let causes: [(&[&str], Cause); 4] = [
        (&IGNORED, Cause::Ignored),
        (&UNKNOWN, Cause::Unknown),
        (&NOT_MADE, Cause::Unknown),
        (&FAULT, Cause::Fault),
    ];
    causes
        .into_iter()
        .find(|(phrases, _)| said(phrases))
        .map(|(_, cause)| cause)
}

/// Whether a word is of an access to an MSR, by an instruction, a function or a register; and its direction, if it says one.
pub(super) fn access(word: &str) -> Option<Option<Op>> {
    let word = word.strip_suffix('s').unwrap_or(word);
    let ends = |ends: &[&str]| ends.iter().any(|end| word.ends_with(end));
    match () {
        () if ends(&["rdmsr", "readmsr", "read_msr", "get_msr", "getmsr", "msr_read"]) => Some(Some(Op::Read)),
        () if ends(&["wrmsr", "writemsr", "write_msr", "set_msr", "setmsr", "msr_write"]) => Some(Some(Op::Write)),
        () if word == "msr" => Some(None),
        () => None,
    }
}

/// The direction: of the access, or of the only verb; `None` where both are there.
fn op(words: &[(usize, &str)]) -> Option<Op> {
    let verb = |word: &str| match word {
        "read" | "reading" | "reads" | "get" | "getting" => Some(Op::Read),
        "write" | "writing" | "writes" | "wrote" | "set" | "setting" => Some(Op::Write),
        _ => access(word).flatten(),
    };
    let mut ops = words.iter().filter_map(|(_, word)| verb(word));
    let first = ops.next()?;
    ops.all(|op| op == first).then_some(first)
}

/// The number behind the word at `from`, and its place.
fn register(line: &str, words: &[(usize, &str)], from: usize) -> Option<(usize, Msr)> {
    for place in from + 1..words.len() {
        let (_, word) = *words.get(place)?;
        let is_near = gap(line, words, place).chars().all(|c| " :([{#=<'\"`".contains(c));
        if !is_near {
            return None;
        }
        if let Some(index) = index(word) {
            return Some((place, Msr(index)));
        }
        if !BETWEEN.contains(&word) && !UNKNOWN.contains(&word) {
            return None;
        }
    }
    None
}

/// What stands between a word and the one before it.
fn gap<'a>(line: &'a str, words: &[(usize, &str)], place: usize) -> &'a str {
    let end = words.get(place).map_or(line.len(), |(start, _)| *start);
    let before = place.checked_sub(1).and_then(|place| words.get(place));
    let begin = before.map_or(0, |(start, word)| start + word.len());
    line.get(begin..end).unwrap_or_default()
}

/// A register's number; without `0x` it is the one of the database, hexadecimal or decimal.
fn index(word: &str) -> Option<u32> {
    if let Some(digits) = word.strip_prefix("0x") {
        return u32::from_str_radix(digits, 16).ok();
    }
    let digits = word.strip_suffix('h').unwrap_or(word);
    // `bad` and `add` are no numbers, and one digit counts something.
    if digits.len() < 2 || !digits.bytes().any(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let hex = u32::from_str_radix(digits, 16).ok();
    let decimal = digits.parse().ok();
    let is_known = |index: &u32| msrgate_msrs::by_msr(Msr(*index)).is_some();
    let known = hex
        .filter(is_known)
        .or_else(|| decimal.filter(is_known).filter(|_| digits.len() < 8));
    known.or(hex).or(decimal)
}

/// What is written, behind the register: `<- 5`, `= 0x5`, `value 0x5`, `data 5`, `<-(0:5)`, or a number of as many digits as 64 bits have.
fn value(line: &str, words: &[(usize, &str)], register: usize) -> Option<u64> {
    let mut place = register + 1;
    let mut is_named = false;
    while let Some((_, word)) = words.get(place) {
        match *word {
            "value" | "val" | "data" | "to" | "with" | "tried" | "write" => is_named = true,
            _ => break,
        }
        place += 1;
    }
    let (_, word) = *words.get(place)?;
    let before = gap(line, words, place);
    is_named |= before.contains("<-") || before.contains('=');
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x").unwrap_or(word), 16).ok();
    if !is_named && word.len() < 16 {
        return None;
    }
    let high = hex(word)?;
    // EDX and EAX.
    if before.ends_with('(') && gap(line, words, place + 1) == ":" {
        let low = hex(words.get(place + 1)?.1)?;
        return Some(high << 32 | low & 0xffff_ffff);
    }
    Some(high)
}
