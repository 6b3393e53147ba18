//! `accept`: warnings that a policy lets stand.

use msrgate_msrs::nearest_of;
use toml::Spanned;
use toml::de::DeValue;

use super::reader::Reader;
use crate::{Acceptance, Code, Diagnostic, Severity};

impl Reader {
    /// What a policy or a rule accepts; what is wrong has been reported.
    pub(super) fn accept(&mut self, value: &Spanned<DeValue<'_>>) -> Vec<Acceptance> {
        let DeValue::Table(table) = value.get_ref() else {
            self.wrong_type::<()>(value, "a table such as { W007 = \"why it may stand\" }");
            return Vec::new();
        };
        let mut accept = Vec::new();
        for (key, value) in table.iter() {
            let place = self.place(key);
            let name: &str = key.get_ref();
            let Some(code) = Code::from_code(name).filter(|code| code.severity() == Severity::Warning) else {
                let help = match name.as_bytes() {
                    [b'E', ..] => "an error cannot be accepted: mend it".to_owned(),
                    [b'N', ..] => "a note changes no exit code and needs no acceptance".to_owned(),
                    _ => match nearest_of(name, warnings()) {
                        Some(near) => format!("did you mean `{near}`?"),
                        None => format!("the warnings are {}", warnings().collect::<Vec<_>>().join(", ")),
                    },
                };
                self.found(Diagnostic::at(Code::UnknownKey, place, format!("`{name}` is not a warning")).help(help));
                continue;
            };
            let Some(reason) = self.text(value, "the reason, a text") else {
                continue;
            };
            if reason.trim().is_empty() {
                let place = self.place(value);
                let message = format!("`{name}` is accepted without a reason");
                self.found(Diagnostic::at(Code::MissingKey, place, message).help("say why it may stand"));
                continue;
            }
            accept.push(Acceptance { code, reason, place });
        }
        accept
    }
}

/// The codes that can be accepted.
fn warnings() -> impl Iterator<Item = &'static str> {
    Code::all()
        .filter(|code| code.severity() == Severity::Warning)
        .map(Code::code)
}
