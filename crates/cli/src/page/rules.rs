//! The rules of a policy.

use maud::{Markup, html};

use super::{number, short};
use crate::load::Loaded;
use crate::words::plain;

/// What a link to a rule names.
pub(crate) fn id(number: impl std::fmt::Display) -> String {
    format!("rule-{number}")
}

/// The rules by their numbers, and how many accesses each decides where that is known.
pub(crate) fn section(loaded: &Loaded, decided: Option<&[u64]>) -> Markup {
    let policy = &loaded.policy;
    html! {
        section aria-labelledby="rules" {
            h2 #rules { "Rules of the policy" }
            p.muted { "The first rule that names an MSR decides. What no rule names gets the default, " b { (policy.default.name()) } "." }
            @if !policy.rules.is_empty() {
                div.scroll role="region" aria-labelledby="rules" tabindex="0" {
                    table aria-labelledby="rules" {
                        thead {
                            tr {
                                th.n scope="col" { "No." }
                                th scope="col" { "Rule" }
                                th scope="col" { "Why" }
                                @if decided.is_some() { th.n scope="col" { "Accesses" } }
                            }
                        }
                        tbody {
                            @for (number, rule) in policy.rules.iter().enumerate() {
                                tr id=(id(number)) {
                                    th.n scope="row" { (number) }
                                    td.rule { pre { (plain_lines(&rule.to_string())) } }
                                    td.wrap {
                                        (rule.why.as_deref().map(plain).unwrap_or_default())
                                        @if let Some(source) = policy.sources.get(rule.place.source) {
                                            div.muted {
                                                (short(&source.path().display().to_string())) ":"
                                                (source.line_column(rule.place.span.start).0)
                                            }
                                        }
                                    }
                                    @if let Some(decided) = decided {
                                        td.n { (number::number(decided.get(number).copied().unwrap_or(0))) }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The lines of a rule without its heading and its reason, which stand apart.
fn plain_lines(rule: &str) -> String {
    let lines = rule
        .trim()
        .lines()
        .filter(|line| *line != "[[rule]]" && !line.starts_with("why "));
    let lines: Vec<String> = lines.map(plain).collect();
    lines.join("\n")
}
