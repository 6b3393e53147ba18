//! `handlers`: programs that answer where the VMM has no code of a handler's name.

use std::collections::BTreeMap;
use std::path::PathBuf;

use toml::Spanned;
use toml::de::DeValue;

use super::reader::Reader;
use crate::{Code, Diagnostic, Provider};

const KEYS: [&str; 2] = ["command", "socket"];

impl Reader {
    /// Who answers for which handler; what is wrong has been reported.
    pub(super) fn providers(&mut self, value: &Spanned<DeValue<'_>>) -> BTreeMap<String, Provider> {
        let wanted = "a table such as { NAME = { command = [\"PROGRAM\"] } }";
        let DeValue::Table(table) = value.get_ref() else {
            self.wrong_type::<()>(value, wanted);
            return BTreeMap::new();
        };
        let mut providers = BTreeMap::new();
        for (key, value) in table.iter() {
            let place = self.place(key);
            let (name, provider) = (self.handler_name(key.get_ref(), place), self.provider(value));
            providers.extend(name.zip(provider));
        }
        providers
    }

    fn provider(&mut self, value: &Spanned<DeValue<'_>>) -> Option<Provider> {
        let DeValue::Table(table) = value.get_ref() else {
            return self.wrong_type(value, "`{ command = [\"PROGRAM\"] }` or `{ socket = \"PATH\" }`");
        };
        self.known_keys(table, &KEYS, "a handler");
        match (table.get("command"), table.get("socket")) {
            (Some(command), None) => {
                let words = self.texts(command, "a program, and its arguments");
                let words: Vec<String> = words.into_iter().map(|word| word.text).collect();
                let named = words.first().is_some_and(|program| !program.is_empty());
                let whole = !words.iter().any(|word| word.contains('\0'));
                if named && whole && words.len() == self.items(command).len() {
                    return Some(Provider::Command(words));
                }
                self.no_provider(command, "a command begins with a program's name")
            }
            (None, Some(socket)) => match self.text(socket, "a socket's path")? {
                path if path.is_empty() || path.contains('\0') => self.no_provider(socket, "this names no socket"),
                path => Some(Provider::Socket(PathBuf::from(path))),
            },
            _ => self.no_provider(value, "a handler is either a command or a socket"),
        }
    }

    fn no_provider(&mut self, value: &Spanned<DeValue<'_>>, message: &str) -> Option<Provider> {
        let place = self.place(value);
        self.found(
            Diagnostic::at(Code::WrongType, place, message)
                .help("write `{ command = [\"PROGRAM\", \"ARGUMENT\"] }` or `{ socket = \"PATH\" }`"),
        );
        None
    }
}
