//! What programs read: JSON, whose keys docs/json.md lists with what stands here of each.

use std::io::{self, Write};

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use crate::stream;

/// What is printed as JSON, and can tell which keys it has.
pub(crate) trait Printed: Serialize + JsonSchema {}

impl<T: Serialize + JsonSchema> Printed for T {}

/// An object of these keys and values. What is said of a key goes into docs/json.md.
///
/// The type has a parameter for each key, which is called as the key is, so that no value's type has to be spelled.
macro_rules! object {
    ($($(#[$about:meta])+ $key:ident: $value:expr),+ $(,)?) => {{
        let object;
        #[allow(non_camel_case_types, reason = "each type is called as its key is")]
        {
            #[derive(serde::Serialize, schemars::JsonSchema)]
            struct Object<$($key),+> {
                $($(#[$about])+ $key: $key),+
            }
            object = Object { $($key: $value),+ };
        }
        object
    }};
}
pub(crate) use object;

/// Whether a key is left out, of which that is said.
pub(crate) fn is_null(value: &impl Serialize) -> bool {
    serde_json::to_value(value).is_ok_and(|value| value.is_null())
}

/// Prints what a command gives to programs.
pub(crate) fn print(printed: &impl Printed) -> io::Result<()> {
    let text = serde_json::to_string_pretty(printed)?;
    writeln!(stream::out(), "{text}")
}

/// Converts an answer to a JSON value, to be put together with others.
pub(crate) fn value(printed: &impl Printed) -> Value {
    serde_json::to_value(printed).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::fs;
    use std::path::Path;

    use schemars::Schema;
    use schemars::generate::SchemaSettings;

    use super::*;
    use crate::surface::{ClassSurface, Surface};
    use crate::{
        check, decompile, diff, doctor, explain, import, learn, migrate, msr, plan, replay, report, review, run,
        scanned, verify, why,
    };

    const END: &str = "<!-- end of keys -->\n";

    /// What a function is given that is not called: only its type is asked for.
    fn nothing<T>() -> T {
        unreachable!()
    }

    fn schema<T: Printed>(_: impl FnOnce() -> T) -> Schema {
        let settings = SchemaSettings::default().with(|settings| settings.inline_subschemas = true);
        settings.into_generator().into_root_schema_for::<T>()
    }

    /// What each command prints, by the names that docs/json.md has for it.
    fn commands() -> Vec<(&'static str, Schema)> {
        vec![
            ("check", schema(|| check::printed(nothing(), nothing()))),
            ("plan", schema(|| plan::printed(nothing(), nothing()))),
            ("plan --state", schema(|| plan::state::printed(nothing(), nothing()))),
            ("explain", schema(|| explain::access(nothing(), nothing(), nothing()))),
            ("explain CODE", schema(|| explain::code_of_finding(nothing()))),
            ("explain POLICY", schema(|| Surface::printed(nothing()))),
            ("explain POLICY @class", schema(|| ClassSurface::printed(nothing()))),
            ("diff", schema(|| diff::printed(nothing(), nothing()))),
            (
                "diff of scans",
                schema(|| diff::scans_printed(nothing(), nothing(), nothing())),
            ),
            (
                "decompile",
                schema(|| decompile::printed(nothing(), nothing(), nothing())),
            ),
            ("import", schema(|| import::printed(nothing(), nothing()))),
            (
                "replay",
                schema(|| replay::print::printed(nothing(), nothing(), nothing())),
            ),
            (
                "learn",
                schema(|| learn::printed(nothing(), nothing(), nothing(), nothing(), nothing())),
            ),
            (
                "review",
                schema(|| review::printed(nothing(), nothing(), nothing(), nothing())),
            ),
            ("verify", schema(|| verify::report::VerifyReport::printed(nothing()))),
            ("scan", schema(|| scanned::printed(nothing()))),
            ("migrate", schema(|| migrate::printed(nothing(), nothing(), nothing()))),
            ("doctor", schema(|| doctor::printed(nothing()))),
            ("report", schema(|| report::print::printed(nothing()))),
            (
                "run",
                schema(|| run::summary::Summary::printed(nothing(), nothing(), nothing(), nothing())),
            ),
            ("reload", schema(|| run::policies::Change::printed(nothing()))),
            ("why", schema(|| why::print::printed(nothing(), nothing()))),
            ("msr", schema(|| msr::printed(nothing(), nothing()))),
        ]
    }

    /// A row for each key of a value, and for those of what is in it.
    fn rows(schema: &Value, at: &str, table: &mut String) {
        let each = ["anyOf", "allOf"]
            .into_iter()
            .filter_map(|any| schema.get(any)?.as_array());
        each.flatten().for_each(|one| rows(one, at, table));
        if let Some(items) = schema.get("items") {
            let at = if at.is_empty() {
                String::new()
            } else {
                format!("{at}[]")
            };
            rows(items, &at, table);
        }
        for (key, value) in schema
            .get("properties")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            let path = if at.is_empty() {
                key.clone()
            } else {
                format!("{at}.{key}")
            };
            let about = value.get("description").and_then(Value::as_str);
            let about = about.unwrap_or_else(|| panic!("`{path}` has no description: {value:#}"));
            let about = about.replace('\n', " ").replace('|', "\\|");
            writeln!(table, "| `{path}` | {} |", about.trim_end_matches('.')).expect("a String takes all");
            rows(value, &path, table);
        }
    }

    #[test]
    fn the_documented_keys_are_those_that_commands_print() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/json.md");
        let document = fs::read_to_string(&path).expect("docs/json.md");
        let mut page = document.clone();
        for (command, schema) in commands() {
            let begin = format!("<!-- keys of {command} -->\n");
            let parts = page
                .split_once(&begin)
                .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
            let (before, after) = parts.unwrap_or_else(|| panic!("docs/json.md has no `{}`", begin.trim()));
            let mut table = String::from("| key | is |\n| --- | --- |\n");
            rows(schema.as_value(), "", &mut table);
            page = format!("{before}{begin}{table}{END}{after}");
        }
        if std::env::var_os("MSRGATE_WRITE_DOCS").is_some() {
            fs::write(&path, page).expect("docs/json.md is written");
        } else {
            assert!(page == document, "docs/json.md is out of date: run `cargo xtask docs`");
        }
    }
}
