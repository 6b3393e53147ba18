//! What is wrong with a policy, and where.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// How much a finding weighs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// Worth knowing; nothing to change.
    Note,
    /// The policy works, and most likely not as its author meant.
    Warning,
    /// The policy cannot be used.
    Error,
}

impl Severity {
    /// The word that JSON uses.
    pub const fn name(self) -> &'static str {
        match self {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

/// A stable name for a kind of finding. `docs/findings.md` has a paragraph on each.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each code's text stands in `Code::title`")]
pub enum Code {
    Syntax,
    Version,
    UnknownKey,
    WrongType,
    UnknownName,
    UnknownClass,
    NoMatch,
    BadNumber,
    ReversedRange,
    UnknownAction,
    MissingKey,
    Duplicate,
    Cycle,
    Unreadable,
    DecidesNothing,
    UnknownCondition,
    ActionNotHere,
    CpuidNeeded,
    TooManyRanges,
    TooMuchState,
    PlannerBug,
    CannotSpill,
    TooManyMsrs,
    Unreachable,
    Unenforceable,
    LogsNothing,
    WithoutEffect,
    PartlyHidden,
    Repeated,
    Useless,
    BreaksGuest,
    TellsOfHost,
    AcceptsNothing,
    AllowsAbsent,
    DeniesShown,
    TakenForDone,
    Nowhere,
    ReadsOtherwise,
    DeniesAll,
    LeavesSecret,
    NeverFiltered,
    PassesUnseen,
    LastMsr,
    NoSevEs,
    NotIntercepted,
    ReachedByInstructions,
    HostView,
    PresetsHeld,
    PassedOn,
    RangeCut,
    HandlerNeeded,
    NoGuestStarts,
    StateUnlisted,
    StateKept,
    InterfaceDenied,
    KernelGap,
    Confidential,
}

impl Code {
    const ALL: [(Code, &'static str, &'static str); 57] = [
        (Code::Syntax, "E001", "the policy is not valid TOML"),
        (Code::Version, "E002", "the version is missing or not known"),
        (Code::UnknownKey, "E003", "a key is not part of the language"),
        (Code::WrongType, "E004", "a value has the wrong type"),
        (Code::UnknownName, "E005", "no MSR has this name"),
        (Code::UnknownClass, "E006", "there is no such class"),
        (Code::NoMatch, "E007", "a glob matches no name"),
        (Code::BadNumber, "E008", "a number is malformed or too large"),
        (Code::ReversedRange, "E009", "a range ends before it begins"),
        (Code::UnknownAction, "E010", "there is no such action"),
        (Code::MissingKey, "E011", "a key is missing"),
        (Code::Duplicate, "E012", "something is given twice"),
        (Code::Cycle, "E013", "policies extend each other in a cycle"),
        (Code::Unreadable, "E014", "a file cannot be read"),
        (Code::DecidesNothing, "E015", "a rule decides neither reads nor writes"),
        (
            Code::UnknownCondition,
            "E016",
            "no CPU vendor or CPUID feature has this name",
        ),
        (Code::ActionNotHere, "E017", "an action cannot be used here"),
        (
            Code::CpuidNeeded,
            "E018",
            "the policy depends on the guest's CPUID, and none was given",
        ),
        (
            Code::TooManyRanges,
            "E020",
            "the policy needs more than 16 filter ranges",
        ),
        (Code::TooMuchState, "E021", "too many MSRs would keep a state"),
        (Code::PlannerBug, "E022", "the planner has a bug"),
        (
            Code::CannotSpill,
            "E023",
            "what does not fit cannot be passed through from user space",
        ),
        (Code::TooManyMsrs, "E024", "the rules name too many ranges of MSRs"),
        (
            Code::Unreachable,
            "W001",
            "a rule decides nothing, since rules before it decide all its accesses",
        ),
        (Code::Unenforceable, "W002", "no filter can stop what a rule forbids"),
        (Code::LogsNothing, "W003", "a rule logs what never leaves the kernel"),
        (
            Code::WithoutEffect,
            "W004",
            "a shadow register is written and never read, or the reverse",
        ),
        (
            Code::PartlyHidden,
            "W005",
            "a wider rule before this one decides part of what it names",
        ),
        (Code::Repeated, "W006", "a rule repeats what rules before it say"),
        (Code::Useless, "W007", "without the rule, everything would be the same"),
        (
            Code::BreaksGuest,
            "W008",
            "a rule denies what an operating system does unguarded",
        ),
        (
            Code::TellsOfHost,
            "W009",
            "a guest reads what tells of the host and its other guests",
        ),
        (Code::AcceptsNothing, "W010", "an acceptance accepts nothing"),
        (
            Code::AllowsAbsent,
            "W011",
            "a rule allows an MSR that the guest's CPUID does not show",
        ),
        (
            Code::DeniesShown,
            "W012",
            "the policy denies MSRs that the guest's CPUID shows",
        ),
        (
            Code::TakenForDone,
            "W013",
            "a rule answers in place of a register that the processor works by",
        ),
        (
            Code::Nowhere,
            "W014",
            "no processor or hypervisor is known to have an MSR where a rule names one",
        ),
        (
            Code::ReadsOtherwise,
            "W015",
            "a rule answers reads of a register that the guest writes",
        ),
        (Code::DeniesAll, "W016", "the policy denies everything"),
        (
            Code::LeavesSecret,
            "W017",
            "a rule leaves to the kernel what tells of the host and its other guests",
        ),
        (Code::NeverFiltered, "N001", "the x2APIC is never filtered"),
        (
            Code::PassesUnseen,
            "N002",
            "writes of IA32_TSC_DEADLINE may pass unseen",
        ),
        (Code::LastMsr, "N003", "no range covers MSR 0xffffffff"),
        (Code::NoSevEs, "N004", "an SEV-ES guest needs its GHCB MSR"),
        (
            Code::NotIntercepted,
            "N005",
            "AMD's processors do not intercept SEV_STATUS",
        ),
        (
            Code::ReachedByInstructions,
            "N006",
            "instructions reach registers past the filter",
        ),
        (
            Code::HostView,
            "N007",
            "some actions go through the host's view of a register",
        ),
        (
            Code::PresetsHeld,
            "N008",
            "presets hold as long as nobody else sets the registers",
        ),
        (Code::PassedOn, "N009", "accesses are passed through from user space"),
        (
            Code::RangeCut,
            "N010",
            "MSRs in a row take several ranges of the filter",
        ),
        (
            Code::HandlerNeeded,
            "N011",
            "a handler is in a VMM that links the library",
        ),
        (
            Code::NoGuestStarts,
            "N020",
            "no rule allows what an operating system does unguarded",
        ),
        (
            Code::StateUnlisted,
            "N021",
            "a snapshot must save MSRs that KVM does not list",
        ),
        (Code::StateKept, "N022", "the policy keeps state that KVM does not have"),
        (
            Code::InterfaceDenied,
            "N023",
            "a rule denies an interface that the guest's CPUID may show",
        ),
        (Code::KernelGap, "N024", "some kernels let a guest pass the filter"),
        (
            Code::Confidential,
            "N025",
            "a confidential guest gets something else than the policy says",
        ),
    ];

    fn entry(self) -> &'static (Code, &'static str, &'static str) {
        match Code::ALL.iter().find(|(code, ..)| *code == self) {
            Some(entry) => entry,
            None => &Code::ALL[0],
        }
    }

    /// The code itself: `E005`.
    pub fn code(self) -> &'static str {
        self.entry().1
    }

    /// What it means, in general.
    pub fn title(self) -> &'static str {
        self.entry().2
    }

    /// The kind of this code; `None` if there is none.
    pub fn from_code(code: &str) -> Option<Code> {
        Code::all().find(|known| known.code() == code)
    }

    /// How much such a finding weighs.
    pub fn severity(self) -> Severity {
        match self.code().as_bytes() {
            [b'E', ..] => Severity::Error,
            [b'W', ..] => Severity::Warning,
            _ => Severity::Note,
        }
    }

    /// All codes, for documentation.
    pub fn all() -> impl Iterator<Item = Code> {
        Code::ALL.iter().map(|(code, ..)| *code)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.code())
    }
}

/// A file that took part in a policy.
#[derive(Clone, Debug)]
pub struct Source {
    path: PathBuf,
    text: String,
    /// Places from which lines and columns are counted, once somebody asks for one: a byte, with its line and column.
    marks: OnceLock<Vec<(usize, usize, usize)>>,
}

impl PartialEq for Source {
    fn eq(&self, other: &Source) -> bool {
        self.path == other.path && self.text == other.text
    }
}

impl Eq for Source {}

impl Source {
    pub(crate) fn new(path: PathBuf, text: String) -> Source {
        Source {
            path,
            text,
            marks: OnceLock::new(),
        }
    }

    /// As the author would recognise it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it holds.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The line and column, both from 1, of a place in the text; columns count characters.
    pub fn line_column(&self, offset: usize) -> (usize, usize) {
        // The beginning of each line, and of each further part of a long one.
        const PART: usize = 1024;
        let marks = self.marks.get_or_init(|| {
            let mut marks = vec![(0, 1, 1)];
            let (mut line, mut column) = (1, 1);
            for (at, c) in self.text.char_indices() {
                (line, column) = if c == '\n' { (line + 1, 1) } else { (line, column + 1) };
                if column % PART == 1 {
                    marks.push((at + c.len_utf8(), line, column));
                }
            }
            marks
        });
        let mark = marks.partition_point(|(start, ..)| *start <= offset).saturating_sub(1);
        let (start, line, column) = marks.get(mark).copied().unwrap_or((0, 1, 1));
        let before = self.text.get(start..offset).or(self.text.get(start..));
        (line, column + before.unwrap_or_default().chars().count())
    }
}

/// A place in a source: which file, and which bytes of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// Index into the sources.
    pub source: usize,
    /// Bytes of its text.
    pub span: Range<usize>,
}

/// One finding.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Diagnostic {
    /// The kind of the finding.
    pub code: Code,
    /// What is wrong: lower case, no full stop, the author's text in backticks.
    pub message: String,
    /// Where; `None` where it is about the whole.
    pub place: Option<Place>,
    /// Another place that belongs to it, and what it is: `first defined here`.
    pub second: Option<(Place, String)>,
    /// What to write instead.
    pub help: Option<String>,
    /// What to change in the text, where `help` says just that.
    pub fix: Option<Fix>,
    /// Why the policy lets it stand, where it does.
    pub accepted: Option<String>,
}

/// A change of a policy's text that does what the help of a finding says.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Fix {
    /// Write this word at the finding's place; quotes stay as they are.
    Word(String),
    /// Leave out the rule at the finding's place.
    Rule,
    /// Leave out this key of the rule at the finding's place.
    Key(&'static str),
}

/// What is to stand in a text in place of some bytes of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Edit {
    /// Index into the sources.
    pub source: usize,
    /// The bytes.
    pub span: Range<usize>,
    /// What is to stand there.
    pub with: String,
}

/// A kind of warning that a policy's author has looked at and lets stand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Acceptance {
    /// The kind.
    pub code: Code,
    /// Why it may stand.
    pub reason: String,
    /// Where it is said.
    pub place: Place,
}

impl Diagnostic {
    /// A finding at a place.
    pub fn at(code: Code, place: Place, message: impl Into<String>) -> Diagnostic {
        Diagnostic {
            code,
            message: message.into(),
            place: Some(place),
            second: None,
            help: None,
            fix: None,
            accepted: None,
        }
    }

    /// A finding about the whole policy.
    pub fn whole(code: Code, message: impl Into<String>) -> Diagnostic {
        Diagnostic {
            code,
            message: message.into(),
            place: None,
            second: None,
            help: None,
            fix: None,
            accepted: None,
        }
    }

    /// With what to write instead.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Diagnostic {
        self.help = Some(help.into());
        self
    }

    /// With what to change in the text.
    #[must_use]
    pub fn fix(mut self, fix: Fix) -> Diagnostic {
        self.fix = Some(fix);
        self
    }

    /// The change of the text that the finding asks for, where there is one.
    pub fn edit(&self, sources: &[Source]) -> Option<Edit> {
        let place = self.place.as_ref()?;
        let text = sources.get(place.source)?.text();
        let part = text.get(place.span.clone())?;
        let (span, with) = match self.fix.as_ref()? {
            Fix::Word(word) => {
                let quote = part.chars().next().filter(|first| matches!(first, '"' | '\''));
                let quote = quote.map(String::from).unwrap_or_default();
                (place.span.clone(), format!("{quote}{word}{quote}"))
            }
            Fix::Rule => {
                let rule = rule_lines(text, place.span.start)?;
                (with_gap(text, rule), String::new())
            }
            Fix::Key(key) => {
                let rule = rule_lines(text, place.span.start)?;
                let mut start = rule.start;
                let lines = text.get(rule)?.split_inclusive('\n').map(|line| {
                    start += line.len();
                    (start - line.len()..start, line)
                });
                let mut lines =
                    lines.filter(|(_, line)| line.split('=').next().is_some_and(|name| name.trim() == *key));
                let (line, _) = lines.next().filter(|_| lines.next().is_none())?;
                (line, String::new())
            }
        };
        Some(Edit {
            source: place.source,
            span,
            with,
        })
    }

    /// With another place.
    #[must_use]
    pub fn second(mut self, place: Place, label: impl Into<String>) -> Diagnostic {
        self.second = Some((place, label.into()));
        self
    }

    /// How much it weighs.
    pub fn severity(&self) -> Severity {
        self.code.severity()
    }

    /// Whether there is something to mend: it is no note, and the policy does not accept it.
    pub fn is_open(&self) -> bool {
        self.severity() != Severity::Note && self.accepted.is_none()
    }
}

/// The lines of the rule whose header begins here, without comments and empty lines behind its last key: they belong to what
/// follows. `None` where the header does not begin a line.
fn rule_lines(text: &str, header: usize) -> Option<Range<usize>> {
    let before = text.get(..header)?;
    let mut lines = text.get(header..)?.split_inclusive('\n');
    let first = lines.next().filter(|line| line.starts_with("[["))?;
    if !(before.is_empty() || before.ends_with('\n')) {
        return None;
    }
    let (mut at, mut end) = (header + first.len(), header + first.len());
    for line in lines {
        let own = line.trim_start();
        if own.starts_with('[') && !own.starts_with("[rule.") {
            break;
        }
        at += line.len();
        if !own.is_empty() && !own.starts_with('#') {
            end = at;
        }
    }
    Some(header..end)
}

/// Lines with the empty ones behind them, where an empty one stands before them too.
fn with_gap(text: &str, lines: Range<usize>) -> Range<usize> {
    let before = text.get(..lines.start).unwrap_or_default();
    let behind = text.get(lines.end..).unwrap_or_default();
    let gap = match before.is_empty() || before.ends_with("\n\n") {
        true => behind.len() - behind.trim_start_matches(['\n', '\r']).len(),
        false => 0,
    };
    lines.start..lines.end + gap
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_left_out_with_its_lines_and_a_key_with_its_own() {
        let text = "a = 1\n\n[[rule]]\nmsr = 1\nlog = \"all\" # why\n\n[[rule]]\nmsr = 2\n";
        let sources = [Source::new("p".into(), text.to_owned())];
        let first = text.find("[[").unwrap()..text.find("\nmsr").unwrap();
        let at = |span: Range<usize>, fix| {
            let place = Place { source: 0, span };
            let edit = Diagnostic::at(Code::Useless, place, "").fix(fix).edit(&sources)?;
            let mut edited = text.to_owned();
            edited.replace_range(edit.span, &edit.with);
            Some(edited)
        };
        let rest = "a = 1\n\n[[rule]]\nmsr = 2\n";
        assert_eq!(at(first.clone(), Fix::Rule).as_deref(), Some(rest));
        let quiet = "a = 1\n\n[[rule]]\nmsr = 1\n\n[[rule]]\nmsr = 2\n";
        assert_eq!(at(first.clone(), Fix::Key("log")).as_deref(), Some(quiet));
        assert_eq!(at(first.clone(), Fix::Key("when")), None);
        assert_eq!(
            at(first.start + 1..first.end, Fix::Rule),
            None,
            "not from the beginning of a line"
        );
        let all = text.find("\"all").unwrap();
        assert!(
            at(all..all + 5, Fix::Word("first".to_owned()))
                .unwrap()
                .contains("log = \"first\" # why")
        );
        assert!(at(0..1, Fix::Word("b".to_owned())).unwrap().starts_with("b = 1"));
    }

    #[test]
    fn codes_are_unique_and_each_variant_has_one() {
        let mut codes: Vec<&str> = Code::all().map(Code::code).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Code::ALL.len());
        assert_eq!(Code::WithoutEffect.code(), "W004");
    }

    #[test]
    fn columns_count_characters_and_lines_start_at_one() {
        let source = Source::new("p".into(), "aé\nü = 1".to_owned());
        assert_eq!(source.line_column(0), (1, 1));
        assert_eq!(source.line_column(3), (1, 3));
        assert_eq!(source.line_column(4), (2, 1));
        assert_eq!(source.line_column(source.text.len()), (2, 6));
        assert_eq!(source.line_column(source.text.len() + 1), (2, 6));
    }
}
