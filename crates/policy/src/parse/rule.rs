//! One `[[rule]]`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use msrgate_core::{Log, MsrRange};
use msrgate_msrs::cpuid::{self, CpuVendor};
use msrgate_msrs::nearest_of;
use msrgate_msrs::number;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::reader::Reader;
use crate::pattern::PatternError;
use crate::policy::When;
use crate::{Code, Diagnostic, Fix, Pattern, Place, Rule};

/// The keys of a rule.
pub(crate) const KEYS: [&str; 7] = ["msr", "read", "write", "when", "log", "why", "accept"];

/// The keys of `when`.
pub(crate) const WHEN_KEYS: [&str; 4] = ["vendor", "family", "model", "features"];

impl Reader {
    /// A rule; `None` where it is not one, which has been reported.
    pub(super) fn rule(&mut self, value: &Spanned<DeValue<'_>>) -> Option<Rule> {
        let place = self.place(value);
        let DeValue::Table(table) = value.get_ref() else {
            return self.wrong_type(value, "a table");
        };
        self.known_keys(table, &KEYS, "a rule");
        let msrs = match table.get("msr") {
            Some(msr) => self.patterns(msr),
            None => {
                let missing = Diagnostic::at(Code::MissingKey, place.clone(), "the rule does not say `msr`");
                self.found(missing.help("name the MSRs it is about: `msr = \"IA32_TSC\"`"));
                None
            }
        };
        let read = table.get("read").map(|read| self.read_action(read));
        let write = table.get("write").map(|write| self.write_action(write));
        if read.is_none() && write.is_none() {
            let nothing = Diagnostic::at(
                Code::DecidesNothing,
                place.clone(),
                "the rule says neither `read` nor `write`",
            );
            self.found(nothing.help("say what reads or writes get: `read = \"allow\"`, `write = \"deny\"`"));
        }
        let when = table.get("when").map_or(Some(When::default()), |when| self.when(when));
        let log = table.get("log").map_or(Some(Log::None), |log| self.log(log));
        let why = table.get("why").map(|why| self.text(why, "a text"));
        let accept = table.get("accept").map(|accept| self.accept(accept));
        Some(Rule {
            msrs: msrs?,
            read: read.map_or(Some(None), |read| read.map(Some))?,
            write: write.map_or(Some(None), |write| write.map(Some))?,
            when: when?,
            log: log?,
            why: why.map_or(Some(None), |why| why.map(Some))?,
            accept: accept.unwrap_or_default(),
            place,
        })
    }

    fn patterns(&mut self, value: &Spanned<DeValue<'_>>) -> Option<Vec<Pattern>> {
        let items = self.items(value);
        if items.is_empty() {
            let place = self.place(value);
            self.found(Diagnostic::at(Code::MissingKey, place, "`msr` lists no MSR"));
            return None;
        }
        let mut patterns: Vec<Pattern> = Vec::new();
        let mut listed: HashMap<Vec<MsrRange>, Place> = HashMap::new();
        let mut fine = true;
        for item in items {
            let text = match item.get_ref() {
                DeValue::String(text) => text.to_string(),
                DeValue::Integer(integer) => integer.to_string(),
                _ => {
                    fine = false;
                    self.wrong_type::<()>(item, "a name, a class, a number or a range");
                    continue;
                }
            };
            let place = self.place(item);
            match self.pattern(&text) {
                Ok(pattern) => {
                    match listed.entry(pattern.ranges()) {
                        Entry::Occupied(first) => {
                            fine = false;
                            let twice = Diagnostic::at(Code::Duplicate, place, format!("`{text}` is listed twice"))
                                .second(first.get().clone(), "first here")
                                .help("leave one of them out");
                            self.found(twice);
                        }
                        Entry::Vacant(place_of) => _ = place_of.insert(place),
                    }
                    patterns.push(pattern);
                }
                Err(error) => {
                    fine = false;
                    let mut diagnostic = Diagnostic::at(code(&error), place, error.to_string());
                    diagnostic.help = self.helps().then(|| error.help()).flatten();
                    diagnostic.fix = self.helps().then(|| error.meant()).flatten().map(Fix::Word);
                    self.found(diagnostic);
                }
            }
        }
        fine.then_some(patterns)
    }

    fn pattern(&mut self, text: &str) -> Result<Pattern, PatternError> {
        if let Some(pattern) = self.wide.get(text) {
            return Ok(pattern.clone());
        }
        let pattern = Pattern::parse(text)?;
        if matches!(pattern, Pattern::Glob(..) | Pattern::Class(..)) {
            self.wide.insert(text.to_owned(), pattern.clone());
        }
        Ok(pattern)
    }

    fn when(&mut self, value: &Spanned<DeValue<'_>>) -> Option<When> {
        let DeValue::Table(table) = value.get_ref() else {
            return self.wrong_type(value, "a table such as { vendor = \"intel\" }");
        };
        self.known_keys(table, &WHEN_KEYS, "`when`");
        let before = self.diagnostics.len();
        let mut when = When::default();
        for vendor in table
            .get("vendor")
            .map(|vendor| self.texts(vendor, "a vendor"))
            .unwrap_or_default()
        {
            let vendors = [
                ("intel", CpuVendor::Intel),
                ("amd", CpuVendor::Amd),
                ("hygon", CpuVendor::Hygon),
            ];
            match vendors.iter().find(|(name, _)| name.eq_ignore_ascii_case(&vendor.text)) {
                Some((_, vendor)) => when.vendor.push(*vendor),
                None => {
                    let message = format!("`{}` is not a known CPU vendor", vendor.text);
                    self.found(
                        Diagnostic::at(Code::UnknownCondition, vendor.place, message)
                            .help("write `intel`, `amd` or `hygon`"),
                    );
                }
            }
        }
        when.family = self.numbers(table, "family");
        when.model = self.numbers(table, "model");
        for feature in table
            .get("features")
            .map(|features| self.texts(features, "a feature"))
            .unwrap_or_default()
        {
            let known = cpuid::features().iter().map(|feature| feature.name);
            if cpuid::is_feature(&feature.text) {
                when.features.push(feature.text);
                continue;
            }
            let message = format!("`{}` is not a known CPUID feature", feature.text);
            let near = self.helps().then(|| nearest_of(&feature.text, known)).flatten();
            let help = match near {
                Some(near) => format!("did you mean `{near}`? the names are those of `/proc/cpuinfo`"),
                None => "the names are those of `/proc/cpuinfo`".to_owned(),
            };
            let mut found = Diagnostic::at(Code::UnknownCondition, feature.place, message).help(help);
            found.fix = near.map(|near| Fix::Word(near.to_owned()));
            self.found(found);
        }
        if self.diagnostics.len() > before {
            return None;
        }
        if when.is_always() {
            let place = self.place(value);
            let empty = Diagnostic::at(Code::MissingKey, place, "`when` has no condition");
            self.found(
                empty.help("say for which guests: { vendor = \"intel\", features = [\"mtrr\"] }, or leave it out"),
            );
            return None;
        }
        Some(when)
    }

    /// Numbers and inclusive ranges of them, of a family or a model.
    fn numbers(&mut self, table: &DeTable<'_>, key: &str) -> Vec<(u32, u32)> {
        let Some(value) = table.get(key) else {
            return Vec::new();
        };
        let mut ranges = Vec::new();
        for item in self.items(value) {
            let text = match item.get_ref() {
                DeValue::String(text) => text.to_string(),
                DeValue::Integer(integer) => integer.to_string(),
                _ => {
                    self.wrong_type::<()>(item, "a number or a range of them");
                    continue;
                }
            };
            let number = |text: &str| {
                number::parse(text.trim())
                    .ok()
                    .and_then(|number| u32::try_from(number).ok())
            };
            let (first, last) = match text.split_once("..=") {
                Some((first, last)) => (number(first), number(last)),
                None => (number(&text), number(&text)),
            };
            let place = self.place(item);
            match (first, last) {
                (Some(first), Some(last)) if first <= last => ranges.push((first, last)),
                (Some(first), Some(last)) => {
                    let message = format!("the range `{text}` ends before it begins");
                    let help = format!("write `\"{last:#x}..={first:#x}\"`");
                    self.found(Diagnostic::at(Code::ReversedRange, place, message).help(help));
                }
                _ => {
                    let message = format!("`{text}` is not a {key}");
                    let help = format!("write `{key} = 6`, `{key} = \"0x55..=0x6a\"` or a list of these");
                    self.found(Diagnostic::at(Code::BadNumber, place, message).help(help));
                }
            }
        }
        ranges
    }

    fn log(&mut self, value: &Spanned<DeValue<'_>>) -> Option<Log> {
        let DeValue::Table(table) = value.get_ref() else {
            return self.word(
                value,
                &[("none", Log::None), ("all", Log::All), ("first", Log::First)],
                "`log`",
            );
        };
        self.known_keys(table, &["per_second"], "`log`");
        let Some(number) = table.get("per_second") else {
            let place = self.place(value);
            self.found(Diagnostic::at(
                Code::MissingKey,
                place,
                "`log` does not say `per_second`",
            ));
            return None;
        };
        let place = self.place(number);
        match self.integer(number).map(u32::try_from)? {
            Ok(n) if n > 0 => Some(Log::PerSecond(n)),
            _ => {
                let odd = Diagnostic::at(Code::BadNumber, place, "`per_second` is from 1 to 4294967295");
                self.found(odd.help("to log nothing, write `log = \"none\"`"));
                None
            }
        }
    }
}

fn code(error: &PatternError) -> Code {
    match error {
        PatternError::UnknownName(_) => Code::UnknownName,
        PatternError::UnknownClass(_) => Code::UnknownClass,
        PatternError::NoMatch(_) => Code::NoMatch,
        PatternError::Malformed(_) | PatternError::TooLarge(_) => Code::BadNumber,
        PatternError::Reversed { .. } | PatternError::NotInclusive { .. } => Code::ReversedRange,
    }
}

/// Rules that never count, since earlier ones decide the same MSRs for the same guests in every direction that they say:
/// position, and that of the first such rule.
pub(super) fn repeated(rules: &[Rule]) -> Vec<(usize, usize)> {
    // The first rule of these MSRs and guests that decides reads, and the first that decides writes.
    let mut seen: HashMap<(Vec<MsrRange>, &When), [Option<usize>; 2]> = HashMap::new();
    let mut repeated = Vec::new();
    for (position, rule) in rules.iter().enumerate() {
        let mut ranges = rule.ranges();
        ranges.sort_unstable();
        let [read, write] = seen.entry((ranges, &rule.when)).or_default();
        let says = [(rule.read.is_some(), read), (rule.write.is_some(), write)];
        let mut first = None;
        let mut counts = false;
        for (_, decided) in says.into_iter().filter(|(says, _)| *says) {
            match decided {
                Some(earlier) => first = first.or(Some(*earlier)),
                None => {
                    *decided = Some(position);
                    counts = true;
                }
            }
        }
        if let Some(first) = first
            && !counts
        {
            repeated.push((position, first));
        }
    }
    repeated
}

/// Reports the rules of one file that never count because it says the same before.
pub(super) fn twice(rules: &[Rule], reader: &mut Reader) {
    for (again, first) in repeated(rules) {
        if let (Some(again), Some(first)) = (rules.get(again), rules.get(first)) {
            let message = "a rule before this one decides the same MSRs, so this one never counts";
            reader.found(
                Diagnostic::at(Code::Duplicate, again.place.clone(), message)
                    .second(first.place.clone(), "first decided here")
                    .help("leave one of them out, or join them"),
            );
        }
    }
}
