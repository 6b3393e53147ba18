//! One page for a browser, whatever it is about: it asks nothing of any network, and can be read without its script. The verdict
//! comes first, then what it is about, with links to the rows.

pub(crate) mod map;
pub(crate) mod number;
pub(crate) mod rules;
pub(crate) mod sign;

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use msrgate_core::Msr;
use sha2::{Digest, Sha256};

use crate::exit::Failure;
use crate::input;
use crate::stream::Tone;
use crate::words::{self, plain};

const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");

/// The longest text of others that is shown, in characters.
const LONGEST: usize = 200;

/// How many rows a table has: a browser sorts and filters these at once.
pub(crate) const MOST_ROWS: usize = 4096;

/// How many things a verdict names.
const NAMED: usize = 6;

/// What is on a page.
pub(crate) struct Page {
    /// The subcommand that makes it.
    pub(crate) subcommand: &'static str,
    /// What it is about, such as the names of files.
    pub(crate) subject: String,
    pub(crate) verdict: Verdict,
    /// What else there is to say of the subject.
    pub(crate) lead: Option<String>,
    pub(crate) notes: Vec<String>,
    /// The sections.
    pub(crate) body: Markup,
    pub(crate) footer: &'static str,
}

/// The answer, and what it is about.
pub(crate) struct Verdict {
    pub(crate) tone: Tone,
    pub(crate) text: String,
    /// What it is about: where on the page that stands, and what it is called.
    pub(crate) about: Vec<(String, String)>,
}

/// The file that a page goes to; `None` where it is printed.
pub(crate) fn file(html: Option<&Path>) -> Option<&Path> {
    html.filter(|path| *path != Path::new("-"))
}

/// Writes a page into a file that is none of the inputs; `-` is standard output.
pub(crate) fn write<'a>(html: &Path, inputs: impl IntoIterator<Item = &'a Path>, page: Page) -> Result<(), Failure> {
    let text = page.text();
    let Some(path) = file(Some(html)) else {
        return Ok(io::stdout().write_all(text.as_bytes())?);
    };
    input::refuse_overwrite(path, inputs)?;
    fs::write(path, text).map_err(|error| Failure::input(format!("cannot write `{}`: {error}", path.display())))
}

impl Page {
    fn text(self) -> String {
        // Only this style and this script are carried out, whatever a trace or a policy has smuggled in.
        let security = format!(
            "default-src 'none'; style-src '{}'; script-src '{}'; base-uri 'none'; form-action 'none'",
            source(STYLE),
            source(SCRIPT)
        );
        let subject = short(&self.subject);
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta http-equiv="Content-Security-Policy" content=(security);
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    meta name="generator" content={ "msrgate " (env!("CARGO_PKG_VERSION")) };
                    title { "msrgate " (self.subcommand) ": " (subject) }
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    (sign::patterns())
                    header {
                        p.eyebrow { "msrgate " (self.subcommand) " " span { (subject) } }
                        (self.verdict.markup())
                        @if let Some(lead) = &self.lead {
                            p.lead { (lead) }
                        }
                    }
                    main {
                        @if !self.notes.is_empty() {
                            ul.notes aria-label="Notes" {
                                @for (number, note) in self.notes.iter().enumerate() {
                                    li id={ "note-" (number) } { (short(note)) }
                                }
                            }
                        }
                        (self.body)
                    }
                    footer {
                        p { "Made by msrgate " (env!("CARGO_PKG_VERSION")) ". " (self.footer) }
                    }
                    script { (PreEscaped(SCRIPT)) }
                }
            }
        };
        page.into_string()
    }
}

impl Verdict {
    fn markup(&self) -> Markup {
        let tone = match self.tone {
            Tone::Good => "good",
            Tone::Odd => "odd",
            Tone::Bad => "bad",
            Tone::Plain | Tone::Title => "even",
        };
        let (named, rest) = self.about.split_at(self.about.len().min(NAMED));
        html! {
            h1.verdict.(tone) { (plain(&self.text)) }
            @if !named.is_empty() {
                ul.about aria-label="What the verdict is about" {
                    @for (id, text) in named {
                        li { a href={ "#" (id) } { (plain(text)) } }
                    }
                    @if !rest.is_empty() {
                        li.muted { "and " (number::number(rest.len() as u64)) " more, in the table below" }
                    }
                }
            }
        }
    }
}

/// What a security policy calls an inline text.
fn source(text: &str) -> String {
    format!("sha256-{}", BASE64_STANDARD.encode(Sha256::digest(text)))
}

/// A text of a trace or a policy, with an end.
pub(crate) fn short(text: &str) -> String {
    let mut shown: String = text.chars().take(LONGEST).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    plain(&shown)
}

/// The name of an MSR, which may be broken behind an underscore.
pub(crate) fn name(msr: Msr) -> Markup {
    let name = words::name(msr).unwrap_or("unknown");
    html! {
        @for part in name.split_inclusive('_') {
            (part) wbr;
        }
    }
}

/// What finds rows in the page's main table. Hidden, since without the script it does nothing.
pub(crate) fn tools(more: Markup) -> Markup {
    html! {
        div.tools hidden {
            label.search {
                span { "Filter" }
                input #find type="search" autocomplete="off" spellcheck="false" placeholder="name, index, value, …";
            }
            (more)
            p #shown role="status" {}
        }
    }
}

/// The page's main table, in a box of its own, under a heading with this id: the script sorts and filters it.
pub(crate) fn table(id: &str, heading: &str, head: Markup, rows: Markup) -> Markup {
    html! {
        div.scroll.tall role="region" aria-labelledby=(heading) tabindex="0" {
            table.rows id=(id) aria-labelledby=(heading) {
                thead { tr { (head) } }
                tbody { (rows) }
            }
        }
        p.none hidden { "No row is left." }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_has_an_end_and_a_short_one_is_whole() {
        assert_eq!(short(&"ä".repeat(LONGEST)), "ä".repeat(LONGEST));
        assert_eq!(short(&"ä".repeat(LONGEST + 1)).chars().count(), LONGEST + 1);
        assert_eq!(short("a\u{202e}b\u{0}"), "a\\u202eb\\u0000");
    }
}
