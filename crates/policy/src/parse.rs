//! Text to policy: files, what they extend, and everything that is wrong with them.

mod accept;
mod providers;
mod reader;
mod rule;

#[cfg(all(test, feature = "schema"))]
pub(crate) use rule::{KEYS as RULE_KEYS, WHEN_KEYS};

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use msrgate_core::{ReadAction, Verdict, WriteAction};
use toml::de::{DeTable, DeValue};

use crate::files;
use crate::{Acceptance, Code, Diagnostic, Disk, Files, Place, Policy, Provider, Rule, Source, Spill, Validity};
use reader::{HELPED, Reader, Text};

/// A policy that cannot be used, and all that is wrong with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PolicyErrors {
    /// The files that were read.
    pub sources: Vec<Source>,
    /// What is wrong, in the order of files and places.
    pub diagnostics: Vec<Diagnostic>,
}

/// The most ranges of MSRs that the rules may name, each as often as it is named: `*` comes to some hundred.
const MOST_RANGES: usize = 1 << 19;

/// The keys of a policy.
pub(crate) const KEYS: [&str; 11] = [
    "version", "name", "default", "unknown", "invalid", "valid", "spill", "accept", "handlers", "extends", "rule",
];

/// One file, without those that it extends.
#[derive(Default)]
struct File {
    name: Option<String>,
    default: Option<Verdict>,
    /// Whether there is a default, be it wrong.
    says_default: bool,
    unknown: Option<(ReadAction, WriteAction)>,
    invalid: Option<(ReadAction, WriteAction)>,
    valid: Option<Validity>,
    spill: Option<Spill>,
    accept: Vec<Acceptance>,
    providers: BTreeMap<String, Provider>,
    rules: Vec<Rule>,
    extends: Vec<(String, Place)>,
}

impl File {
    /// Takes from an extended policy what this one does not say, and its rules behind these. What that one accepts of
    /// itself as a whole it does not accept of this one.
    fn extend(&mut self, base: File) {
        self.default = self.default.or(base.default);
        self.says_default |= base.says_default;
        self.unknown = self.unknown.take().or(base.unknown);
        self.invalid = self.invalid.take().or(base.invalid);
        self.valid = self.valid.or(base.valid);
        self.spill = self.spill.or(base.spill);
        for (name, provider) in base.providers {
            self.providers.entry(name).or_insert(provider);
        }
        self.rules.extend(base.rules);
    }

    /// Leaves out rules that earlier ones for the same MSRs replace, so that what is printed reads back.
    fn without_replaced(mut self) -> File {
        let replaced: HashSet<usize> = rule::repeated(&self.rules)
            .into_iter()
            .map(|(again, _)| again)
            .collect();
        let mut position = 0..;
        self.rules.retain(|_| {
            position
                .next()
                .is_none_or(|position: usize| !replaced.contains(&position))
        });
        self
    }
}

impl Policy {
    /// Reads a policy and those it extends from the file system, or says all that is wrong with them. A path that begins with
    /// `msrgate:` names a policy that comes with msrgate.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Policy, PolicyErrors> {
        load(path.as_ref(), &Disk)
    }

    /// Reads a policy and those it extends, or says all that is wrong with them.
    pub fn load(path: &Path, files: &dyn Files) -> Result<Policy, PolicyErrors> {
        load(path, files)
    }

    /// Reads a policy that extends no other from a text; `name` stands for the file in what is reported.
    pub fn parse(name: &str, text: &str) -> Result<Policy, PolicyErrors> {
        load(Path::new(name), &(name, text))
    }
}

fn load(path: &Path, files: &dyn Files) -> Result<Policy, PolicyErrors> {
    let mut loading = Loading {
        files,
        sources: Vec::new(),
        diagnostics: Vec::new(),
        open: Vec::new(),
        read: HashSet::new(),
        ranges_left: MOST_RANGES,
    };
    let file = loading.file(path, None).map(File::without_replaced);
    let Loading {
        sources,
        mut diagnostics,
        ..
    } = loading;
    if let Some(file) = file {
        if let Some(default) = file.default
            && diagnostics.is_empty()
        {
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            let bare = Policy::new(&file.name.or(stem).unwrap_or_default(), default);
            return Ok(Policy {
                unknown: file.unknown.unwrap_or(bare.unknown),
                invalid: file.invalid.unwrap_or(bare.invalid),
                valid: file.valid.unwrap_or(bare.valid),
                spill: file.spill.unwrap_or(bare.spill),
                accept: file.accept,
                providers: file.providers,
                rules: file.rules,
                sources,
                ..bare
            });
        }
        // Where the file itself is broken, a key may be missing only because it could not be read.
        let whole = !diagnostics
            .iter()
            .any(|found| matches!(found.code, Code::Syntax | Code::Unreadable));
        if whole && !file.says_default {
            diagnostics.push(
                Diagnostic::at(
                    Code::MissingKey,
                    Place { source: 0, span: 0..0 },
                    "`default` is missing",
                )
                .help("say what MSRs without a rule get: `default = \"deny\"` or `default = \"allow\"`"),
            );
        }
    }
    diagnostics.sort_by_key(|found| found.place.as_ref().map(|place| (place.source, place.span.start)));
    Err(PolicyErrors { sources, diagnostics })
}

struct Loading<'a> {
    files: &'a dyn Files,
    sources: Vec<Source>,
    diagnostics: Vec<Diagnostic>,
    /// The files that are being read, each extended by the one before it.
    open: Vec<PathBuf>,
    /// The files that have been read.
    read: HashSet<PathBuf>,
    /// How many ranges of MSRs the rules may still name.
    ranges_left: usize,
}

impl Loading<'_> {
    /// Reads a file and all that it extends. `None` where it adds nothing: it cannot be read, or has been.
    fn file(&mut self, path: &Path, asked: Option<Place>) -> Option<File> {
        let (canonical, text) = match files::read(self.files, path) {
            Ok(read) => read,
            Err(error) => {
                let message = format!("cannot read `{}`: {error}", path.display());
                let built_in = format!("msrgate:{}", path.file_stem().unwrap_or_default().display());
                let help = matches!(crate::built_in(Path::new(&built_in)), Some(Ok(_)))
                    .then(|| format!("`{built_in}` comes with msrgate"));
                let found = match asked {
                    Some(place) => Diagnostic::at(Code::Unreadable, place, message)
                        .help("a path in `extends` is relative to the file that it stands in"),
                    None => Diagnostic::whole(Code::Unreadable, message),
                };
                self.diagnostics.push(match help {
                    Some(help) => found.help(help),
                    None => found,
                });
                return None;
            }
        };
        if let Some(start) = self.open.iter().position(|open| *open == canonical) {
            let circle = self.open.iter().skip(start).chain([&canonical]);
            let names: Vec<String> = circle.map(|path| path.display().to_string()).collect();
            let message = format!("policies extend each other in a cycle: {}", names.join(" → "));
            let place = asked.unwrap_or(Place { source: 0, span: 0..0 });
            self.diagnostics.push(
                Diagnostic::at(Code::Cycle, place, message)
                    .help("move what both need into a third file that extends neither"),
            );
            return None;
        }
        if !self.read.insert(canonical.clone()) {
            // Extended by two policies: its rules stand behind the first already, where they decide.
            return None;
        }
        let source = self.sources.len();
        self.sources.push(Source::new(path.to_path_buf(), text.clone()));
        let mut file = self.parse(source, &text);
        self.open.push(canonical);
        for (name, place) in std::mem::take(&mut file.extends) {
            if let Some(base) = self.file(&files::extended(self.files, path, &name), Some(place)) {
                file.extend(base);
            }
        }
        self.open.pop();
        Some(file)
    }

    fn parse(&mut self, source: usize, text: &str) -> File {
        let (document, errors) = DeTable::parse_recoverable(text);
        let broken = !errors.is_empty();
        let mut syntax: Vec<Diagnostic> = Vec::new();
        for (number, error) in errors.into_iter().enumerate() {
            let span = error.span().unwrap_or(0..0);
            let (code, help) = match number < HELPED && is_repeated_key(text, &span) {
                true => (Code::Duplicate, "a key may stand once: leave one of them out"),
                false => (
                    Code::Syntax,
                    "a line is `key = value`, a string stands in quotes, and `[[rule]]` begins a rule",
                ),
            };
            syntax.push(Diagnostic::at(code, Place { source, span }, error.message().to_owned()).help(help));
        }
        let mut reader = Reader::new(source, self.ranges_left);
        let file = read_file(document.get_ref(), &mut reader);
        self.ranges_left = reader.ranges_left;
        // What recovery made of a broken line is not the author's mistake.
        let line = |place: &Place| {
            let source = self.sources.get(place.source);
            source.map_or(0, |source| source.line_column(place.span.start).0)
        };
        let broken_lines: HashSet<usize> = syntax
            .iter()
            .filter_map(|found| found.place.as_ref())
            .map(line)
            .collect();
        let meant = reader.diagnostics.into_iter().filter(|found| {
            let on_broken = found
                .place
                .as_ref()
                .is_some_and(|place| broken_lines.contains(&line(place)));
            let made_up = found.place.as_ref().is_some_and(|place| place.span.is_empty());
            let missing = matches!(found.code, Code::MissingKey | Code::Version | Code::DecidesNothing);
            !(broken && (on_broken || made_up || missing))
        });
        let meant: Vec<Diagnostic> = meant.collect();
        self.diagnostics.extend(syntax);
        self.diagnostics.extend(meant);
        file
    }
}

/// Whether the error at this place is about a key that is there before: it is none of a key with another name.
fn is_repeated_key(text: &str, place: &Range<usize>) -> bool {
    let parts = (text.get(..place.start), text.get(place.clone()), text.get(place.end..));
    let (Some(before), Some(key), Some(behind)) = parts else {
        return false;
    };
    let is_key = || DeTable::parse(&format!("{key} = 0")).is_ok_and(|table| table.get_ref().len() == 1);
    let renamed = format!("{before}renamed-by-msrgate{behind}");
    let errors = || DeTable::parse_recoverable(&renamed).1.into_iter();
    !key.is_empty() && is_key() && errors().all(|error| error.span().is_none_or(|span| span.start != place.start))
}

fn read_file(document: &DeTable<'_>, reader: &mut Reader) -> File {
    let mut file = File::default();
    let top = Place {
        source: reader.source,
        span: 0..0,
    };
    reader.known_keys(document, &KEYS, "a policy");
    match document.get("version") {
        Some(version) => {
            if reader.integer(version) != Some(1) {
                let place = reader.place(version);
                let message = "this is not a version of the language that is known here";
                reader.found(Diagnostic::at(Code::Version, place, message).help("write `version = 1`"));
            }
        }
        None => {
            reader.found(Diagnostic::at(Code::Version, top, "`version` is missing").help("write `version = 1` first"))
        }
    }
    if let Some(name) = document.get("name") {
        file.name = reader.text(name, "a name");
    }
    if let Some(default) = document.get("default") {
        file.says_default = true;
        file.default = reader.word(
            default,
            &[("allow", Verdict::Allow), ("deny", Verdict::Deny)],
            "`default`",
        );
    }
    if let Some(spill) = document.get("spill") {
        file.spill = reader.word(
            spill,
            &[("refuse", Spill::Refuse), ("user-space", Spill::UserSpace)],
            "`spill`",
        );
    }
    if let Some(valid) = document.get("valid") {
        file.valid = reader.word(
            valid,
            &[("any", Validity::Any), ("cpu-model", Validity::CpuModel)],
            "`valid`",
        );
    }
    if let Some(accept) = document.get("accept") {
        file.accept = reader.accept(accept);
    }
    if let Some(handlers) = document.get("handlers") {
        file.providers = reader.providers(handlers);
    }
    file.unknown = document
        .get("unknown")
        .and_then(|value| reader.fallback(value, "unknown"));
    file.invalid = document
        .get("invalid")
        .and_then(|value| reader.fallback(value, "invalid"));
    if let Some(extends) = document.get("extends") {
        file.extends = reader
            .texts(extends, "a path")
            .into_iter()
            .map(|Text { text, place }| (text, place))
            .collect();
    }
    if let Some(rules) = document.get("rule") {
        match rules.get_ref() {
            DeValue::Array(tables) => {
                for table in tables.iter() {
                    let Some(rule) = reader.rule(table) else { continue };
                    let ranges = rule.ranges().len();
                    let Some(left) = reader.ranges_left.checked_sub(ranges) else {
                        reader.found(too_many(rule.place));
                        break;
                    };
                    reader.ranges_left = left;
                    file.rules.push(rule);
                }
            }
            _ => {
                let place = reader.place(rules);
                reader.found(
                    Diagnostic::at(Code::WrongType, place, "`rule` is a list of tables")
                        .help("begin each rule with `[[rule]]`, in two pairs of brackets"),
                );
            }
        }
    }
    rule::twice(&file.rules, reader);
    file
}

fn too_many(place: Place) -> Diagnostic {
    let message = format!("the rules up to this one name more than {MOST_RANGES} ranges of MSRs");
    Diagnostic::at(Code::TooManyMsrs, place, message)
        .help("join rules that give the same, and name ranges in place of single MSRs")
}

#[cfg(test)]
mod tests;
