//! Findings as SARIF 2.1.0 ("Static Analysis Results Interchange Format", OASIS), which code hosts and editors read.

use std::path::Path;

use msrgate_policy::{Code, Diagnostic, Severity};
use serde_json::{Value, json};

use super::found::{Checked, Location};
use crate::{hint, words};

/// One log of one run over all policies.
pub(super) fn log(checked: &[(String, Checked)]) -> Value {
    let mut codes: Vec<Code> = checked
        .iter()
        .flat_map(|(_, one)| one.all())
        .map(|found| found.code)
        .collect();
    codes.sort_unstable();
    codes.dedup();
    let rules = codes.iter().map(|code| {
        json!({
            "id": code.code(),
            "shortDescription": { "text": code.title() },
            "help": { "text": words::finding(*code).unwrap_or(code.title()) },
            "defaultConfiguration": { "level": level(code.severity()) },
        })
    });
    let results = checked
        .iter()
        .flat_map(|(path, one)| one.all().map(|found| result(path, one, found, &codes)));
    json!({
        "$schema": "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "msrgate",
                "version": env!("CARGO_PKG_VERSION"),
                "rules": rules.collect::<Value>(),
            } },
            "columnKind": "unicodeCodePoints",
            "results": results.collect::<Value>(),
        }],
    })
}

fn result(path: &str, checked: &Checked, found: &Diagnostic, codes: &[Code]) -> Value {
    let help = hint::help(found).map(|help| format!("\n{help}")).unwrap_or_default();
    let location = match checked.place(found) {
        Some(place) => json!({ "physicalLocation": physical(&place) }),
        None => json!({ "physicalLocation": { "artifactLocation": { "uri": uri(path) } } }),
    };
    let mut result = json!({
        "ruleId": found.code.code(),
        "ruleIndex": codes.iter().position(|code| *code == found.code),
        "level": level(found.severity()),
        "message": { "text": format!("{}{help}", found.message) },
        "locations": [location],
    });
    if let Some((second, label)) = &found.second
        && let Some(place) = checked.where_is(second)
    {
        result["relatedLocations"] = json!([{ "physicalLocation": physical(&place), "message": { "text": label } }]);
    }
    if let Some(reason) = &found.accepted {
        result["suppressions"] = json!([{ "kind": "inSource", "justification": reason }]);
    }
    result
}

fn physical(Location { file, begin, end }: &Location) -> Value {
    json!({
        "artifactLocation": { "uri": uri(file) },
        "region": { "startLine": begin.0, "startColumn": begin.1, "endLine": end.0, "endColumn": end.1 },
    })
}

fn level(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Note => "note",
    }
}

/// A path as a reference of RFC 3986: absolute ones as URIs, the others as they are.
fn uri(path: &str) -> String {
    let mut uri = if Path::new(path).is_absolute() {
        "file://".to_owned()
    } else {
        String::new()
    };
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => uri.push(char::from(byte)),
            byte => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    uri
}
