//! Typed values out of TOML, with a finding for each that is not what it should be.

use std::collections::HashMap;

use msrgate_core::{OnLockedBits, ReadAction, WriteAction};
use msrgate_msrs::nearest_of;
use msrgate_msrs::number::{self, NumberError};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::{Code, Diagnostic, Pattern, Place};

type Value<'a> = Spanned<DeValue<'a>>;

pub(super) struct Reader {
    pub(super) source: usize,
    pub(super) diagnostics: Vec<Diagnostic>,
    /// Patterns that name many MSRs, by how they are written, since rules repeat them.
    pub(super) wide: HashMap<String, Pattern>,
    /// How many ranges of MSRs may still be named.
    pub(super) ranges_left: usize,
}

/// With more findings than these no word that may be meant is looked for.
const HELPED: usize = 100;

/// A text and where it stands.
pub(super) struct Text {
    pub(super) text: String,
    pub(super) place: Place,
}

const READS: &str = "a read gets `allow`, `deny`, `zero`, `host`, { value = … }, { shadow = … }, { mask = { keep = …, set = … } } or { handler = \"…\" }";
const WRITES: &str = "a write gets `allow`, `deny`, `ignore`, `shadow`, { mask = { may_change = …, otherwise = \"deny\" } }, { only = [ … ] }, { once = true } or { handler = \"…\" }";

impl Reader {
    pub(super) fn new(source: usize, ranges_left: usize) -> Reader {
        Reader {
            source,
            diagnostics: Vec::new(),
            wide: HashMap::new(),
            ranges_left,
        }
    }

    /// Whether there are so few findings that each is worth a search for the word that is meant.
    pub(super) fn helps(&self) -> bool {
        self.diagnostics.len() < HELPED
    }

    pub(super) fn found(&mut self, diagnostic: Diagnostic) {
        self.diagnostics.push(diagnostic);
    }

    pub(super) fn place<T>(&self, value: &Spanned<T>) -> Place {
        Place {
            source: self.source,
            span: value.span(),
        }
    }

    pub(super) fn wrong_type<T>(&mut self, value: &Value<'_>, wanted: &str) -> Option<T> {
        let message = format!("this is {}, and {wanted} is wanted", kind(value.get_ref()));
        let place = self.place(value);
        self.found(Diagnostic::at(Code::WrongType, place, message));
        None
    }

    /// Reports each key that is not one of `known`.
    pub(super) fn known_keys(&mut self, table: &DeTable<'_>, known: &[&str], what: &str) {
        for key in table.keys() {
            let name: &str = key.get_ref();
            if !known.contains(&name) {
                let near = self.helps().then(|| nearest_of(name, known.iter().copied())).flatten();
                let help = match near {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("the keys of {what} are {}", known.join(", ")),
                };
                let place = self.place(key);
                self.found(Diagnostic::at(Code::UnknownKey, place, format!("{what} has no key `{name}`")).help(help));
            }
        }
    }

    pub(super) fn text(&mut self, value: &Value<'_>, wanted: &str) -> Option<String> {
        match value.get_ref() {
            DeValue::String(text) => Some(text.to_string()),
            _ => self.wrong_type(value, wanted),
        }
    }

    /// One text, or a list of them.
    pub(super) fn texts(&mut self, value: &Value<'_>, wanted: &str) -> Vec<Text> {
        self.items(value)
            .into_iter()
            .filter_map(|item| {
                let place = self.place(item);
                Some(Text {
                    text: self.text(item, wanted)?,
                    place,
                })
            })
            .collect()
    }

    /// The items of a list, or the value itself.
    pub(super) fn items<'v, 'a>(&self, value: &'v Value<'a>) -> Vec<&'v Value<'a>> {
        match value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            _ => vec![value],
        }
    }

    /// One of some words.
    pub(super) fn word<T: Copy>(&mut self, value: &Value<'_>, words: &[(&str, T)], what: &str) -> Option<T> {
        let choices = || {
            words
                .iter()
                .map(|(word, _)| format!("`{word}`"))
                .collect::<Vec<_>>()
                .join(" or ")
        };
        let DeValue::String(text) = value.get_ref() else {
            return self.wrong_type(value, &choices());
        };
        let found = words
            .iter()
            .find(|(word, _)| *word == text.as_ref())
            .map(|(_, meaning)| *meaning);
        if found.is_none() {
            let place = self.place(value);
            self.found(
                Diagnostic::at(Code::UnknownAction, place, format!("{what} cannot be `{text}`"))
                    .help(format!("write {}", choices())),
            );
        }
        found
    }

    /// A 64-bit number: an integer, or a text that holds one.
    pub(super) fn integer(&mut self, value: &Value<'_>) -> Option<u64> {
        let (written, parsed) = match value.get_ref() {
            DeValue::Integer(integer) => (
                integer.to_string(),
                number::parse_digits(integer.as_str(), integer.radix()),
            ),
            DeValue::String(text) => (text.to_string(), number::parse(text)),
            _ => return self.wrong_type(value, "a number"),
        };
        let place = self.place(value);
        match parsed {
            Ok(number) => Some(number),
            Err(NumberError::TooLarge) => {
                let message = format!("`{written}` has more than 64 bits");
                self.found(
                    Diagnostic::at(Code::BadNumber, place, message)
                        .help("an MSR holds 64 bits: at most `\"0xffffffffffffffff\"`"),
                );
                None
            }
            Err(NumberError::Malformed) => {
                let message = format!("`{written}` is not a number");
                self.found(
                    Diagnostic::at(Code::BadNumber, place, message)
                        .help("write `0x8b` or `139`; a value beyond 63 bits as a text: `\"0xffffffffffffffff\"`"),
                );
                None
            }
        }
    }

    /// The only key of a table that names an action, and what it is given.
    fn only_key<'v, 'a>(&mut self, value: &'v Value<'a>, actions: &str) -> Option<(String, Place, &'v Value<'a>)> {
        let DeValue::Table(table) = value.get_ref() else {
            let message = format!("this is {}, and an action is wanted", kind(value.get_ref()));
            let place = self.place(value);
            self.found(Diagnostic::at(Code::WrongType, place, message).help(actions));
            return None;
        };
        let mut entries = table.iter();
        match (entries.next(), entries.next()) {
            (Some((key, argument)), None) => Some((key.get_ref().to_string(), self.place(key), argument)),
            _ => {
                let place = self.place(value);
                let message = "an action with arguments is a table of exactly one key";
                self.found(Diagnostic::at(Code::UnknownAction, place, message).help(actions));
                None
            }
        }
    }

    fn no_action<T>(&mut self, place: Place, name: &str, direction: &str, help: &str) -> Option<T> {
        let message = format!("a {direction} has no action `{name}`");
        self.found(Diagnostic::at(Code::UnknownAction, place, message).help(help));
        None
    }

    pub(super) fn read_action(&mut self, value: &Value<'_>) -> Option<ReadAction> {
        if let DeValue::String(word) = value.get_ref() {
            let place = self.place(value);
            return match word.as_ref() {
                "allow" => Some(ReadAction::Allow),
                "deny" => Some(ReadAction::Deny),
                "zero" => Some(ReadAction::Value(0)),
                "host" => Some(ReadAction::Host),
                "ignore" => self.no_action(
                    place,
                    "ignore",
                    "read",
                    "a read that the kernel is not asked for gets `zero`",
                ),
                "shadow" => self.no_action(place, "shadow", "read", "say what it reads at first: { shadow = 0 }"),
                other => self.no_action(place, other, "read", READS),
            };
        }
        let (key, place, argument) = self.only_key(value, READS)?;
        match key.as_str() {
            "value" => self.integer(argument).map(ReadAction::Value),
            "shadow" => self.integer(argument).map(ReadAction::Shadow),
            "handler" => self.handler(argument).map(|name| ReadAction::Handler(name.into())),
            "mask" => {
                let DeValue::Table(table) = argument.get_ref() else {
                    return self.wrong_type(argument, "{ keep = …, set = … }");
                };
                self.known_keys(table, &["keep", "set"], "a read's mask");
                let keep = table.get("keep").map(|keep| self.integer(keep));
                let set = table.get("set").map(|set| self.integer(set));
                if keep.is_none() && set.is_none() {
                    let place = self.place(argument);
                    self.found(
                        Diagnostic::at(Code::MissingKey, place, "a read's mask says neither `keep` nor `set`")
                            .help("`keep` are the bits that show through, `set` those that are always one"),
                    );
                    return None;
                }
                Some(ReadAction::Mask {
                    keep: keep.unwrap_or(Some(u64::MAX))?,
                    set: set.unwrap_or(Some(0))?,
                })
            }
            other => self.no_action(place, other, "read", READS),
        }
    }

    pub(super) fn write_action(&mut self, value: &Value<'_>) -> Option<WriteAction> {
        if let DeValue::String(word) = value.get_ref() {
            let place = self.place(value);
            return match word.as_ref() {
                "allow" => Some(WriteAction::Allow),
                "deny" => Some(WriteAction::Deny),
                "ignore" => Some(WriteAction::Ignore),
                "shadow" => Some(WriteAction::Shadow),
                "zero" => self.no_action(place, "zero", "write", "a write that goes nowhere gets `ignore`"),
                "once" => self.no_action(place, "once", "write", "write { once = true }"),
                other => self.no_action(place, other, "write", WRITES),
            };
        }
        let (key, place, argument) = self.only_key(value, WRITES)?;
        match key.as_str() {
            "only" => {
                let items = self.items(argument);
                let values: Vec<Option<u64>> = items.iter().map(|item| self.integer(item)).collect();
                let values: Vec<u64> = values.into_iter().collect::<Option<_>>()?;
                if values.is_empty() {
                    let place = self.place(argument);
                    self.found(
                        Diagnostic::at(Code::MissingKey, place, "`only` lists no value")
                            .help("to allow none, write `write = \"deny\"`"),
                    );
                    return None;
                }
                Some(WriteAction::Only(values.into()))
            }
            "once" => match argument.get_ref() {
                DeValue::Boolean(true) => Some(WriteAction::Once),
                _ => {
                    let place = self.place(argument);
                    self.found(
                        Diagnostic::at(Code::WrongType, place, "`once` can only be true")
                            .help("write { once = true }, or leave it out"),
                    );
                    None
                }
            },
            "handler" => self.handler(argument).map(|name| WriteAction::Handler(name.into())),
            "mask" => {
                let DeValue::Table(table) = argument.get_ref() else {
                    return self.wrong_type(argument, "{ may_change = …, otherwise = \"deny\" }");
                };
                self.known_keys(table, &["may_change", "otherwise"], "a write's mask");
                let Some(may_change) = table.get("may_change") else {
                    let place = self.place(argument);
                    self.found(
                        Diagnostic::at(Code::MissingKey, place, "a write's mask does not say `may_change`")
                            .help("`may_change` are the bits that the guest may change"),
                    );
                    return None;
                };
                let may_change = self.integer(may_change);
                let otherwise = match table.get("otherwise") {
                    Some(otherwise) => {
                        let words = [("deny", OnLockedBits::Deny), ("drop", OnLockedBits::Drop)];
                        self.word(otherwise, &words, "`otherwise`")
                    }
                    None => Some(OnLockedBits::Deny),
                };
                Some(WriteAction::Mask {
                    may_change: may_change?,
                    otherwise: otherwise?,
                })
            }
            other => self.no_action(place, other, "write", WRITES),
        }
    }

    fn handler(&mut self, value: &Value<'_>) -> Option<String> {
        let name = self.text(value, "a handler's name")?;
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || !name.chars().all(fine) {
            let place = self.place(value);
            self.found(
                Diagnostic::at(Code::WrongType, place, format!("`{name}` cannot name a handler"))
                    .help("a handler's name is made of letters, digits, `_`, `-` and `.`"),
            );
            return None;
        }
        Some(name)
    }

    /// What `unknown` or `invalid` says: a word for both directions, or an action for each.
    pub(super) fn fallback(&mut self, value: &Value<'_>, key: &str) -> Option<(ReadAction, WriteAction)> {
        let DeValue::Table(table) = value.get_ref() else {
            let words = [("deny", false), ("ignore", true)];
            return self
                .word(value, &words, &format!("`{key}`"))
                .map(|ignore| match ignore {
                    true => (ReadAction::Value(0), WriteAction::Ignore),
                    false => (ReadAction::Deny, WriteAction::Deny),
                });
        };
        self.known_keys(table, &["read", "write"], &format!("`{key}`"));
        let read = table.get("read").map(|read| (read, self.read_action(read)));
        let write = table.get("write").map(|write| (write, self.write_action(write)));
        let mut refused = |value: &Value<'_>, action: &str| {
            let place = self.place(value);
            let message = format!("`{action}` asks the kernel, and `{key}` is for what the kernel does not answer");
            let help = "`deny`, `zero` or `ignore`, a value, a shadow or a handler can stand here";
            self.found(Diagnostic::at(Code::ActionNotHere, place, message).help(help));
        };
        if let Some((value, Some(action @ (ReadAction::Allow | ReadAction::Mask { .. })))) = &read {
            refused(value, action.name());
            return None;
        }
        if let Some((
            value,
            Some(action @ (WriteAction::Allow | WriteAction::Mask { .. } | WriteAction::Only(_) | WriteAction::Once)),
        )) = &write
        {
            refused(value, action.name());
            return None;
        }
        let read = read.map_or(Some(ReadAction::Deny), |(_, action)| action);
        let write = write.map_or(Some(WriteAction::Deny), |(_, action)| action);
        Some((read?, write?))
    }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
