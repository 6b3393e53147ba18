//! The JSON Schema of a policy file, for editors that complete and check TOML.
//!
//! The parser does not go through these types, since it must report all mistakes at once and with their places; a test
//! holds their keys against the parser's.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, schema_for};
use serde::Deserialize;

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
    /// It is passed on to the kernel from user space.
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
#[derive(JsonSchema, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(dead_code, reason = "only the schema is made of it")]
enum Read {
    /// The kernel's own answer.
    Allow,
    /// #GP(0).
    Deny,
    /// 0.
    Zero,
    /// The physical CPU's value.
    Host,
    /// This value.
    Value(Number),
    /// What the vCPU last wrote, and this before it has.
    Shadow(Number),
    /// The kernel's value: its bits of `keep`, with those of `set` added.
    Mask(ReadMask),
    /// What the handler of this name answers.
    Handler(String),
}

#[derive(JsonSchema, Deserialize)]
#[schemars(deny_unknown_fields)]
#[expect(dead_code, reason = "only the schema is made of it")]
struct ReadMask {
    /// Bits that show through; all where it is left out.
    keep: Option<Number>,
    /// Bits that are always one; none where it is left out.
    set: Option<Number>,
}

/// What a write gets.
#[derive(JsonSchema, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(dead_code, reason = "only the schema is made of it")]
enum Write {
    /// The kernel carries it out.
    Allow,
    /// #GP(0).
    Deny,
    /// Nothing happens, and the guest goes on.
    Ignore,
    /// Kept for this vCPU's reads.
    Shadow,
    /// Only these bits reach the kernel's register.
    Mask(WriteMask),
    /// These values reach the kernel's register; another faults.
    Only(OneOrMore<Number>),
    /// The first write of each vCPU counts; later ones fault.
    Once(bool),
    /// What the handler of this name does.
    Handler(String),
}

#[derive(JsonSchema, Deserialize)]
#[schemars(deny_unknown_fields)]
#[expect(dead_code, reason = "only the schema is made of it")]
struct WriteMask {
    /// Bits that the guest may change.
    may_change: Number,
    /// What a write gets that would change another bit; `deny` where it is left out.
    otherwise: Option<OnLockedBits>,
}

#[derive(JsonSchema, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OnLockedBits {
    Deny,
    Drop,
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
    /// Not `allow` or `mask`, which ask the kernel.
    read: Option<Read>,
    /// Not `allow`, `mask`, `only` or `once`, which ask the kernel.
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
