//! Typed values out of TOML, with a finding for each that is not what it should be.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use msrgate_core::{
    ArgumentKey, Arguments, Disposition, OnLockedBits, ReadAction, ReadSource, WriteAction, WriteTarget,
};
use msrgate_msrs::nearest_of;
use msrgate_msrs::number::{self, NumberError};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::written::{READS, WRITES, With, Written, choices, table};
use crate::{Code, Diagnostic, Fix, Pattern, Place};

type Value<'a> = Spanned<DeValue<'a>>;

pub(super) struct Reader {
    pub(super) source: usize,
    pub(super) diagnostics: Vec<Diagnostic>,
    /// Patterns that name many MSRs, by how they are written, since rules repeat them.
    pub(super) wide: HashMap<String, Pattern>,
    /// How many ranges of MSRs may still be named.
    pub(super) ranges_left: usize,
}

/// With more findings than these it is not looked for what may be meant.
pub(super) const HELPED: usize = 100;

/// A text and where it stands.
pub(super) struct Text {
    pub(super) text: String,
    pub(super) place: Place,
}

/// Words of one direction that are taken for another's: the direction, the word, and what is said.
const MISTAKEN: [(&str, &str, &str); 2] = [
    ("read", "ignore", "a read that the kernel is not asked for gets `zero`"),
    ("write", "zero", "a write that goes nowhere gets `ignore`"),
];

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
                let mut found =
                    Diagnostic::at(Code::UnknownKey, place, format!("{what} has no key `{name}`")).help(help);
                found.fix = near.map(|near| Fix::Word(near.to_owned()));
                self.found(found);
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
                        .help("write `0x8b` or `139`; a value beyond 63 bits as a string: `\"0xffffffffffffffff\"`"),
                );
                None
            }
        }
    }

    pub(super) fn read_action(&mut self, value: &Value<'_>) -> Option<ReadAction> {
        self.action(value, "read", &READS, |did, given| ReadAction::of(did, given))
    }

    pub(super) fn write_action(&mut self, value: &Value<'_>) -> Option<WriteAction> {
        self.action(value, "write", &WRITES, |did, given| WriteAction::of(did, given))
    }

    /// One of `actions`, which `of` makes of what stands with its word.
    fn action<A>(
        &mut self,
        value: &Value<'_>,
        direction: &'static str,
        actions: &'static [Written],
        of: impl Fn(Disposition, &mut Given<'_, '_, '_>) -> Result<Option<A>, Infallible>,
    ) -> Option<A> {
        let (word, place, argument) = match value.get_ref() {
            DeValue::String(word) => (word.to_string(), self.place(value), None),
            DeValue::Table(table) => {
                let mut entries = table.iter();
                let (Some((key, argument)), None) = (entries.next(), entries.next()) else {
                    let message = "an action with arguments is a table of exactly one key";
                    let place = self.place(value);
                    let found = Diagnostic::at(Code::UnknownAction, place, message);
                    self.found(found.help(choices(direction, actions)));
                    return None;
                };
                (key.get_ref().to_string(), self.place(key), Some(argument))
            }
            other => {
                let message = format!("expected an action, found {}", kind(other));
                let found = Diagnostic::at(Code::WrongType, self.place(value), message);
                self.found(found.help(choices(direction, actions)));
                return None;
            }
        };
        let action = actions.iter().find(|action| action.did.name() == word);
        let Some(action) = action.filter(|action| action.is_text() == argument.is_none()) else {
            let mistaken = MISTAKEN
                .iter()
                .find(|(of, other, _)| (*of, *other) == (direction, &*word));
            let (message, help) = match (action, mistaken) {
                (Some(action), _) => (
                    format!("a {direction}'s `{word}` is not written like this"),
                    format!("write {action}"),
                ),
                (None, mistaken) => (
                    format!("a {direction} has no action `{word}`"),
                    mistaken.map_or_else(|| choices(direction, actions), |(.., help)| (*help).to_owned()),
                ),
            };
            self.found(Diagnostic::at(Code::UnknownAction, place, message).help(help));
            return None;
        };
        let mut given = Given {
            place: argument.map_or(place, |argument| self.place(argument)),
            reader: self,
            direction,
            word: action.did.name(),
            argument,
            table: None,
            broken: false,
        };
        given.check(&action.with)?;
        let Ok(made) = of(action.did, &mut given);
        made.filter(|_| !given.broken)
    }

    fn handler(&mut self, value: &Value<'_>) -> Option<String> {
        let wanted = "a handler's name; a program that answers for it stands in `[handlers]`";
        let name = self.text(value, wanted)?;
        let place = self.place(value);
        self.handler_name(&name, place)
    }

    /// A name that handlers can have, which stands at this place.
    pub(super) fn handler_name(&mut self, name: &str, place: Place) -> Option<String> {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || !name.chars().all(fine) {
            self.found(
                Diagnostic::at(Code::WrongType, place, format!("`{name}` cannot name a handler"))
                    .help("a handler's name is made of letters, digits, `_`, `-` and `.`"),
            );
            return None;
        }
        Some(name.to_owned())
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
        if let Some((value, Some(action))) = &read
            && action.source() == ReadSource::Register
        {
            refused(value, action.name());
            return None;
        }
        if let Some((value, Some(action))) = &write
            && action.target() == WriteTarget::Register
        {
            refused(value, action.name());
            return None;
        }
        let read = read.map_or(Some(ReadAction::Deny), |(_, action)| action);
        let write = write.map_or(Some(WriteAction::Deny), |(_, action)| action);
        Some((read?, write?))
    }
}

/// What stands with an action's word.
struct Given<'r, 'v, 'a> {
    reader: &'r mut Reader,
    direction: &'static str,
    word: &'static str,
    place: Place,
    argument: Option<&'v Value<'a>>,
    /// The argument, where it is a table of several.
    table: Option<&'v DeTable<'a>>,
    /// Whether an argument is missing or wrong, which has been reported.
    broken: bool,
}

impl Given<'_, '_, '_> {
    /// Whether it is of the kind that belongs with the word; `None` where it is not, which has been reported.
    fn check(&mut self, with: &With) -> Option<()> {
        let Some(argument) = self.argument else { return Some(()) };
        match (with, argument.get_ref()) {
            (With::Nothing | With::One(_), _) | (With::True, DeValue::Boolean(true)) => {}
            (With::True, _) => {
                let message = format!("`{}` can only be true", self.word);
                let help = format!("write {{ {} = true }}, or leave it out", self.word);
                self.missing(Code::WrongType, message, help);
                return None;
            }
            (With::Several(several), DeValue::Table(table)) => {
                let names: Vec<&str> = several.iter().map(|each| each.key.name).collect();
                let what = format!("a {}'s {}", self.direction, self.word);
                self.reader.known_keys(table, &names, &what);
                if !several
                    .iter()
                    .any(|each| each.required || table.contains_key(each.key.name))
                {
                    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
                    let message = format!("{what} says neither {}", names.join(" nor "));
                    let meanings = several.iter().map(|each| each.key).map(meaning);
                    let help = meanings.collect::<Vec<_>>().join("; ");
                    self.missing(Code::MissingKey, message, help);
                    return None;
                }
                self.table = Some(table);
            }
            (With::Several(several), _) => return self.reader.wrong_type(argument, &table(several)),
        }
        Some(())
    }

    fn missing(&mut self, code: Code, message: String, help: String) {
        self.broken = true;
        self.reader
            .found(Diagnostic::at(code, self.place.clone(), message).help(help));
    }

    /// What `read` makes of an argument; `default` where it is not there, which is reported if it is `required`.
    fn argument<T>(
        &mut self,
        key: ArgumentKey,
        required: bool,
        default: T,
        read: impl FnOnce(&mut Reader, &Value<'_>) -> Option<T>,
    ) -> Result<T, Infallible> {
        let value = match self.table {
            Some(table) => table.get(key.name),
            None => self.argument,
        };
        let read = value.map(|value| read(self.reader, value));
        if read.is_none() && required {
            let message = format!("a {}'s {} does not say `{}`", self.direction, self.word, key.name);
            self.missing(Code::MissingKey, message, meaning(key));
        }
        self.broken |= matches!(read, Some(None));
        Ok(read.flatten().unwrap_or(default))
    }
}

impl Arguments for Given<'_, '_, '_> {
    type Error = Infallible;

    fn number(&mut self, key: ArgumentKey) -> Result<u64, Infallible> {
        self.argument(key, true, 0, Reader::integer)
    }

    fn number_or(&mut self, key: ArgumentKey, default: u64) -> Result<u64, Infallible> {
        self.argument(key, false, default, Reader::integer)
    }

    fn numbers(&mut self, key: ArgumentKey) -> Result<Arc<[u64]>, Infallible> {
        let (word, direction) = (self.word, self.direction);
        self.argument(key, true, Arc::default(), |reader, value| {
            let items = reader.items(value);
            let numbers: Vec<Option<u64>> = items.iter().map(|item| reader.integer(item)).collect();
            if numbers.is_empty() {
                let place = reader.place(value);
                let nothing = Diagnostic::at(Code::MissingKey, place, format!("`{word}` lists no value"));
                reader.found(nothing.help(format!("to allow none, write `{direction} = \"deny\"`")));
                return None;
            }
            numbers.into_iter().collect()
        })
    }

    fn name(&mut self, key: ArgumentKey) -> Result<Arc<str>, Infallible> {
        self.argument(key, true, Arc::from(""), |reader, value| {
            reader.handler(value).map(Arc::from)
        })
    }

    fn otherwise(&mut self, key: ArgumentKey) -> Result<OnLockedBits, Infallible> {
        let words = OnLockedBits::ALL.map(|each| (each.name(), each));
        self.argument(key, false, OnLockedBits::Deny, |reader, value| {
            reader.word(value, &words, &format!("`{}`", key.name))
        })
    }
}

/// What an argument is, as help.
fn meaning(key: ArgumentKey) -> String {
    format!("`{}`: {}", key.name, key.meaning)
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
