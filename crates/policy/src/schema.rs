//! The JSON Schema of a policy file, for editors that complete and check TOML.
//!
//! The parser does not go through these types, since it must report all mistakes at once and with their places; a test
//! holds their keys against the parser's.

use std::borrow::Cow;
use std::collections::BTreeMap;

use msrgate_core::{ArgumentKind, OnLockedBits, Parameter};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema, schema_for};
use serde::Deserialize;
use serde_json::Map;

use crate::written::{READS, WRITES, With, Written};

/// The schema of a policy file.
pub fn schema() -> Schema {
    schema_for!(PolicyFile)
}

/// A policy of msrgate: what a KVM guest's MSR accesses get.
#[derive(JsonSchema, Deserialize)]
#[schemars(deny_unknown_fields)]
#[expect(dead_code, reason = "only the schema is made of it")]
struct PolicyFile {
    /// The version of the language: 1.
    #[schemars(range(min = 1, max = 1))]
    version: u32,
    /// What the policy calls itself; the file's name where it is left out.
    name: Option<String>,
    /// What an access gets that no rule decides. May be left out where an extended policy says it.
    default: Option<Default>,
    /// What an access gets that the filter allows and the kernel does not know.
    unknown: Option<Fallback>,
    /// What an access gets that the filter allows and the kernel refuses.
    invalid: Option<Fallback>,
    /// Whether MSRs are denied that the guest's CPUID says do not exist.
    valid: Option<Validity>,
    /// Warnings that may stand wherever in the policy they are, by code, each with the reason.
    accept: Option<Accept>,
    /// Programs that answer for handlers under `msrgate run`, by the handlers' names.
    handlers: Option<Handlers>,
    /// What becomes of what does not fit into the 16 ranges of a filter.
    spill: Option<Spill>,
    /// Policies whose rules come after these; paths are relative to this file.
    extends: Option<OneOrMore<String>>,
    /// The rules; the first that names an MSR decides.
    rule: Option<Vec<Rule>>,
}

/// Codes of warnings and why each may stand.
#[derive(JsonSchema, Deserialize)]
#[schemars(extend("propertyNames" = { "pattern": "^W[0-9]{3}$" }))]
#[expect(dead_code, reason = "only the schema is made of it")]
struct Accept(BTreeMap<String, String>);

/// Programs by the names of the handlers that they answer for.
#[derive(JsonSchema, Deserialize)]
#[schemars(extend("propertyNames" = { "pattern": "^[A-Za-z0-9_.-]+$" }))]
#[expect(dead_code, reason = "only the schema is made of it")]
struct Handlers(BTreeMap<String, Provider>);

#[derive(JsonSchema, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(dead_code, reason = "only the schema is made of it")]
enum Provider {
    /// A program and its arguments, which is asked on its standard input and answers on its standard output.
    Command(OneOrMore<String>),
    /// The path of a Unix stream socket.
    Socket(String),
}

#[derive(JsonSchema, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Default {
    Allow,
    Deny,
}

#[derive(JsonSchema, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Spill {
    /// The policy is refused.
    Refuse,
    /// What does not fit is passed on to the kernel from user space.
    UserSpace,
}

#[derive(JsonSchema, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Validity {
    Any,
    CpuModel,
}

#[derive(JsonSchema, Deserialize)]
#[serde(untagged)]
#[expect(dead_code, reason = "only the schema is made of it")]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

/// A 64-bit number: an integer, or a text such as `"0xffffffffffffffff"`.
#[derive(JsonSchema, Deserialize)]
#[serde(untagged)]
#[expect(dead_code, reason = "only the schema is made of it")]
enum Number {
    Integer(u64),
    Text(#[schemars(regex(pattern = r"^(0[xX][0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*)$"))] String),
}

/// Which MSRs, and what their accesses get.
#[derive(JsonSchema, Deserialize)]
#[schemars(deny_unknown_fields)]
#[expect(dead_code, reason = "only the schema is made of it")]
struct Rule {
    /// A name, an alias, a glob over names, a class (`@pmu`), a number, an inclusive range (`0x10..=0x1f`), or a list of
    /// these.
    msr: OneOrMore<Pattern>,
    /// What reads get; where it is left out, later rules decide reads.
    read: Option<Read>,
    /// What writes get; where it is left out, later rules decide writes.
    write: Option<Write>,
    /// For which guests the rule holds.
    when: Option<When>,
    /// How much of what user space answers is logged.
    log: Option<Log>,
    /// Why the rule is there.
    why: Option<String>,
    /// Warnings about the rule that may stand, by code, each with the reason.
    accept: Option<Accept>,
}

#[derive(JsonSchema, Deserialize)]
#[serde(untagged)]
#[expect(dead_code, reason = "only the schema is made of it")]
enum Pattern {
    Index(u32),
    Text(String),
}

/// What a read gets.
#[derive(Deserialize)]
#[expect(dead_code, reason = "only the schema is made of it")]
struct Read(toml::Value);

impl JsonSchema for Read {
    fn schema_name() -> Cow<'static, str> {
        "Read".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        actions("What a read gets.", &READS, generator)
    }
}

/// What a write gets.
#[derive(Deserialize)]
#[expect(dead_code, reason = "only the schema is made of it")]
struct Write(toml::Value);

impl JsonSchema for Write {
    fn schema_name() -> Cow<'static, str> {
        "Write".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        actions("What a write gets.", &WRITES, generator)
    }
}

/// One of these actions.
fn actions(description: &str, actions: &[Written], generator: &mut SchemaGenerator) -> Schema {
    let mut each = Vec::new();
    for action in actions {
        let word = action.did.name();
        let with = match &action.with {
            With::Nothing => {
                each.push(json_schema!({ "description": action.meaning, "type": "string", "const": word }));
                continue;
            }
            With::True => json_schema!({ "type": "boolean" }),
            With::One(one) => argument(one, generator),
            With::Several(several) => {
                let required = several.iter().filter(|each| each.required).map(|each| each.key.name);
                let required: Vec<&str> = required.collect();
                let mut properties = Map::new();
                for each in several {
                    let mut schema = argument(each, generator);
                    schema.insert("description".to_owned(), each.key.meaning.into());
                    properties.insert(each.key.name.to_owned(), schema.into());
                }
                json_schema!({
                    "type": "object",
                    "properties": properties,
                    "additionalProperties": false,
                    "required": required,
                })
            }
        };
        each.push(json_schema!({
            "description": action.meaning,
            "type": "object",
            "properties": { word: with },
            "additionalProperties": false,
            "required": [word],
        }));
    }
    json_schema!({ "description": description, "oneOf": each })
}

fn argument(parameter: &Parameter, generator: &mut SchemaGenerator) -> Schema {
    match parameter.kind {
        ArgumentKind::Number => generator.subschema_for::<Number>(),
        ArgumentKind::Numbers => generator.subschema_for::<OneOrMore<Number>>(),
        ArgumentKind::Name => generator.subschema_for::<String>(),
        ArgumentKind::OnLockedBits => {
            json_schema!({ "type": "string", "enum": OnLockedBits::ALL.map(OnLockedBits::name) })
        }
    }
}

/// A word for both directions, or an action for each.
#[derive(JsonSchema, Deserialize)]
#[serde(untagged)]
#[expect(dead_code, reason = "only the schema is made of it")]
enum Fallback {
    Word(FallbackWord),
    Actions(FallbackActions),
}

#[derive(JsonSchema, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FallbackWord {
    /// The kernel's own #GP.
    Deny,
    /// Reads get 0, writes go nowhere.
    Ignore,
}

#[derive(JsonSchema, Deserialize)]
#[schemars(deny_unknown_fields)]
#[expect(dead_code, reason = "only the schema is made of it")]
struct FallbackActions {
    /// An action that does not ask the kernel: none of `allow`, `mask` and their like.
    read: Option<Read>,
    /// An action that does not ask the kernel: none of `allow`, `mask`, `only`, `once` and their like.
    write: Option<Write>,
}

/// For which guests a rule holds: all that is said must be true.
#[derive(JsonSchema, Deserialize)]
#[schemars(deny_unknown_fields)]
#[expect(dead_code, reason = "only the schema is made of it")]
struct When {
    /// One of these CPU vendors.
    vendor: Option<OneOrMore<VendorName>>,
    /// A CPU family: numbers and inclusive ranges.
    family: Option<OneOrMore<Pattern>>,
    /// A CPU model: numbers and inclusive ranges.
    model: Option<OneOrMore<Pattern>>,
    /// CPUID features, all of them, by their names in `/proc/cpuinfo`.
    features: Option<OneOrMore<String>>,
}

#[derive(JsonSchema, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum VendorName {
    Intel,
    Amd,
    Hygon,
}

/// How much is logged.
#[derive(JsonSchema, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only the schema is made of it")]
enum Log {
    /// Nothing.
    None,
    /// Each access.
    All,
    /// The first of each MSR and direction.
    First,
    /// At most so many a second.
    PerSecond(#[schemars(range(min = 1))] u32),
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::parse;

    fn keys(schema: &Value) -> Vec<String> {
        let properties = schema["properties"].as_object().unwrap();
        let mut keys: Vec<String> = properties.keys().cloned().collect();
        keys.sort();
        keys
    }

    fn sorted(keys: &[&str]) -> Vec<String> {
        let mut keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        keys.sort();
        keys
    }

    #[test]
    fn the_schema_has_the_keys_that_the_parser_knows() {
        let schema: Value = schema().into();
        assert_eq!(keys(&schema), sorted(&parse::KEYS));
        assert_eq!(keys(&schema["$defs"]["Rule"]), sorted(&parse::RULE_KEYS));
        assert_eq!(keys(&schema["$defs"]["When"]), sorted(&parse::WHEN_KEYS));
        assert_eq!(schema["$defs"]["Accept"]["propertyNames"]["pattern"], "^W[0-9]{3}$");
    }

    /// What the schema describes of one action, read by the parser: each word, with a value of each kind.
    #[test]
    fn the_schema_has_the_actions_that_the_parser_reads() {
        let schema: Value = schema().into();
        let some = |kind: &Value| match kind["type"].as_str() {
            Some("string") => format!("{:?}", kind["enum"][0].as_str().unwrap_or("x")),
            Some("boolean") => "true".to_owned(),
            _ => "1".to_owned(),
        };
        for (direction, def) in [("read", "Read"), ("write", "Write")] {
            let actions = schema["$defs"][def]["oneOf"].as_array().unwrap();
            assert_eq!(actions.len(), 8);
            for action in actions {
                let written = match action["const"].as_str() {
                    Some(word) => format!("{word:?}"),
                    None => {
                        let (word, with) = action["properties"].as_object().unwrap().iter().next().unwrap();
                        let with = match with["properties"].as_object() {
                            Some(several) => {
                                let each = several.iter().map(|(key, kind)| format!("{key} = {}", some(kind)));
                                format!("{{ {} }}", each.collect::<Vec<_>>().join(", "))
                            }
                            None => some(with),
                        };
                        format!("{{ {word} = {with} }}")
                    }
                };
                let text = format!("version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = 1\n{direction} = {written}\n");
                let read = crate::Policy::parse("p.toml", &text);
                assert!(read.is_ok(), "{text}: {:?}", read.err());
            }
        }
    }

    #[test]
    fn what_the_schema_takes_the_types_read() {
        let text = r#"
            version = 1
            default = "deny"
            unknown = { read = "zero", write = "ignore" }
            invalid = "deny"
            accept = { W007 = "kept for who reads it" }
            extends = "base.toml"
            [[rule]]
            msr = ["IA32_TSC", 0x10]
            read = { mask = { keep = "0xff" } }
            write = { only = [1, "0x2"] }
            when = { vendor = "intel", model = "0x55..=0x6a" }
            log = { per_second = 1 }
            accept = { W004 = "the reads are another's" }
            [[rule]]
            msr = 0x8b
            read = "host"
            write = { once = true }
            log = "first"
        "#;
        let read: Result<PolicyFile, _> = toml::from_str(text);
        assert!(read.is_ok(), "{:?}", read.err());
    }
}
