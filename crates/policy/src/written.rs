//! How an action is written in a policy: `"host"`, `{ value = … }`, `{ mask = { keep = …, set = … } }`.

use std::fmt;
use std::sync::LazyLock;

use msrgate_core::{ActionForm, ArgumentKind, Disposition, Parameter, ReadAction, WriteAction};

/// An action of one direction, and how it is written.
pub(crate) struct Written {
    pub(crate) did: Disposition,
    /// What the guest gets.
    #[cfg_attr(not(feature = "schema"), expect(dead_code, reason = "editors show it"))]
    pub(crate) meaning: &'static str,
    /// What stands with the word.
    pub(crate) with: With,
}

/// What stands with an action's word.
pub(crate) enum With {
    /// Nothing: it is a text.
    Nothing,
    /// `true`.
    True,
    /// An argument.
    One(Parameter),
    /// A table of arguments.
    Several(Vec<Parameter>),
}

/// The actions that a read may get.
pub(crate) static READS: LazyLock<Vec<Written>> = LazyLock::new(|| all(ReadAction::forms()));

/// The actions that a write may get.
pub(crate) static WRITES: LazyLock<Vec<Written>> = LazyLock::new(|| all(WriteAction::forms()));

fn all(forms: Vec<ActionForm>) -> Vec<Written> {
    forms.into_iter().map(Written::of).collect()
}

impl Written {
    fn of(form: ActionForm) -> Written {
        let with = match form.parameters.as_slice() {
            [] if is_flag(form.did) => With::True,
            [] => With::Nothing,
            [one] => With::One(*one),
            _ => With::Several(form.parameters),
        };
        Written {
            did: form.did,
            meaning: form.meaning,
            with,
        }
    }

    /// Whether it is a text.
    pub(crate) fn is_text(&self) -> bool {
        matches!(self.with, With::Nothing)
    }
}

/// Whether an action that is given nothing is written as a key all the same.
pub(crate) fn is_flag(did: Disposition) -> bool {
    did == Disposition::Once
}

/// As a policy has it, with `…` for what the author chooses.
impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.did;
        match &self.with {
            With::Nothing => write!(f, "`{word}`"),
            With::True => write!(f, "{{ {word} = true }}"),
            With::One(one) => write!(f, "{{ {word} = {} }}", some(one)),
            With::Several(several) => write!(f, "{{ {word} = {} }}", table(several)),
        }
    }
}

/// What one of these actions is to be, in words: texts first.
pub(crate) fn choices(direction: &str, actions: &[Written]) -> String {
    let (texts, others): (Vec<_>, Vec<_>) = actions.iter().partition(|action| action.is_text());
    let mut each: Vec<String> = texts.into_iter().chain(others).map(Written::to_string).collect();
    let last = each.pop().unwrap_or_default();
    format!("a {direction} gets {} or {last}", each.join(", "))
}

/// A table of arguments, likewise.
pub(crate) fn table(several: &[Parameter]) -> String {
    let entries = several.iter().map(|each| format!("{} = {}", each.key.name, some(each)));
    format!("{{ {} }}", entries.collect::<Vec<_>>().join(", "))
}

fn some(parameter: &Parameter) -> &'static str {
    match parameter.kind {
        ArgumentKind::Number => "…",
        ArgumentKind::Numbers => "[ … ]",
        ArgumentKind::Name => "\"…\"",
        ArgumentKind::OnLockedBits => "\"deny\"",
    }
}
