//! `msrgate review`: what a policy is to give each access that guests made and it does not decide, one at a time.

mod answer;
mod question;
mod draft;

use std::fs;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use msrgate_core::Op;
use msrgate_msrs::cpuid::Cpuid;
use msrgate_trace::learn::Summary;

use crate::args::{AcceptArg, ReviewArgs};
use crate::exit::{Exit, Failure};
use crate::json::{self, Printed, object};
use crate::output::{self, Existing};
use crate::stream::Tone;
use crate::{cpuid, input, load, stream, trace, words};
use answer::Answer;
use draft::Draft;
use question::{Question, free, questions};

pub(crate) fn run(args: &ReviewArgs) -> Result<Exit, Failure> {
    let target = target(args)?;
    let mut asker = asker(args)?;
    let cpuid = cpuid::given(&args.cpuid)?;
    let base = input::bytes(&args.policy)?;
    let base = msrgate_policy::text_of(base)
        .map_err(|error| Failure::input(format!("cannot read `{}`: {error}", input::shown(&args.policy))))?;
    let summary = summary(&args.traces)?;
    let mut draft = Draft::new(&args.policy, base, cpuid.as_ref(), &summary)?;
    let (questions, denied) = questions(draft.loaded(), &summary, args.denied);
    let answered = match &mut asker {
        Asker::All(what) => accept(&mut draft, &questions, *what)?,
        Asker::Lines(lines) => ask(&mut draft, &questions, lines)?,
    };
    finish(
        args,
        target.as_deref(),
        &draft,
        &Asked {
            questions: &questions,
            answered,
            denied,
        },
        cpuid.as_ref(),
    )
}

/// Where the policy is to be written; `None` where it is printed.
fn target(args: &ReviewArgs) -> Result<Option<PathBuf>, Failure> {
    if args.dry_run {
        return Ok(None);
    }
    if let Some(output) = &args.output {
        let inputs = args.traces.iter().chain(&args.answers).chain(&args.cpuid.cpuid);
        input::refuse_overwrite(output, inputs.map(PathBuf::as_path))?;
        return Ok(Some(output.clone()));
    }
    let shown = input::shown(&args.policy);
    if args.policy == Path::new("-") || msrgate_policy::built_in(&args.policy).is_some() {
        return Err(Failure::input(format!(
            "`{shown}` is no file that can be written: name one with -o, or print the policy with --dry-run"
        )));
    }
    // A link stays one.
    let path = fs::canonicalize(&args.policy);
    path.map(Some)
        .map_err(|error| Failure::input(format!("cannot read `{shown}`: {error}")))
}

/// Who answers.
enum Asker {
    All(AcceptArg),
    Lines(Lines),
}

/// Answers, one a line.
struct Lines {
    from: Box<dyn BufRead>,
    name: String,
    number: u64,
    /// A person is asked again; a script is not.
    terminal: bool,
}

fn asker(args: &ReviewArgs) -> Result<Asker, Failure> {
    if let Some(what) = args.accept {
        return Ok(Asker::All(what));
    }
    let lines = |from: Box<dyn BufRead>, name: String, terminal| {
        Asker::Lines(Lines {
            from,
            name,
            number: 0,
            terminal,
        })
    };
    if let Some(path) = &args.answers {
        let name = input::shown(path);
        let file = input::open(path).map_err(|error| Failure::input(format!("cannot read `{name}`: {error}")))?;
        return Ok(lines(Box::new(io::BufReader::new(file)), name, false));
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::input(
            "standard input is not a terminal, so nobody can be asked: name answers with `--answers FILE`, or what is allowed \
             with `--accept needed`",
        ));
    }
    Ok(lines(Box::new(io::stdin().lock()), input::STDIN.to_owned(), true))
}

/// What the guests did in all traces.
fn summary(paths: &[PathBuf]) -> Result<Summary, Failure> {
    let mut summary = Summary::default();
    for path in paths {
        let shown = input::shown(path);
        let from = trace::reader(path).map_err(|error| Failure::input(format!("cannot read `{shown}`: {error}")))?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let next = Summary::read(&name.unwrap_or_else(|| shown.clone()), from);
        let next = next.map_err(|error| Failure::input(format!("{shown}: {error}")))?;
        let merged = summary.merge(&next);
        merged.map_err(|error| Failure::input(format!("{shown}: {error}")))?;
    }
    if !summary.is_complete() {
        stream::tell("msrgate: the traces do not have all that the guests did, so what is missing is not asked\n");
    }
    Ok(summary)
}

/// What became of a question.
struct Answered {
    answer: Answer,
    /// Why the answer was taken back.
    refused: Option<String>,
}

impl Answered {
    fn kept(answer: Answer) -> Answered {
        Answered { answer, refused: None }
    }
}

/// All questions, and what became of those that were put.
pub(crate) struct Asked<'a> {
    questions: &'a [Question<'a>],
    answered: Vec<Answered>,
    /// How many were not put, since a rule denies them.
    denied: usize,
}

/// Allows what is to be allowed of what is denied now.
fn accept(draft: &mut Draft<'_>, questions: &[Question<'_>], what: AcceptArg) -> Result<Vec<Answered>, Failure> {
    let wanted = |question: &Question<'_>| {
        let denied = draft
            .loaded()
            .explain(question.msr, question.op)
            .action
            .did()
            .is_fault();
        let needed = question.needs().next().is_some();
        let served = question.served() > 0
            && match question.op {
                Op::Read => what >= AcceptArg::Reads,
                Op::Write => what >= AcceptArg::Served,
            };
        denied && !question.is_leak() && (needed || served)
    };
    let wanted: Vec<bool> = questions.iter().map(wanted).collect();
    let allowed = questions.iter().zip(&wanted).filter(|(_, wanted)| **wanted);
    let allowed: Vec<(&Question<'_>, Answer)> = allowed.map(|(question, _)| (question, Answer::Allow)).collect();
    let together = allowed.is_empty() || draft.answer(&allowed).is_ok();
    let mut answered = Vec::new();
    for (question, wanted) in questions.iter().zip(wanted) {
        answered.push(match (wanted, together) {
            (false, _) => Answered::kept(Answer::Skip),
            (true, true) => Answered::kept(Answer::Allow),
            // They do not all fit.
            (true, false) => match draft.answer(&[(question, Answer::Allow)]) {
                Ok(_) => Answered::kept(Answer::Allow),
                Err(why) => Answered {
                    answer: Answer::Allow,
                    refused: Some(why),
                },
            },
        });
    }
    Ok(answered)
}

/// Asks one at a time, until there is no answer more.
fn ask(draft: &mut Draft<'_>, questions: &[Question<'_>], lines: &mut Lines) -> Result<Vec<Answered>, Failure> {
    let mut answered = Vec::new();
    let mut err = stream::err();
    let mut quit = false;
    for (number, question) in questions.iter().enumerate() {
        // A shadow answers both directions.
        if quit || draft.decides(question.msr, question.op) {
            answered.push(Answered::kept(Answer::Skip));
            continue;
        }
        err.say(
            Tone::Title,
            &format!("{} of {}  {}", number + 1, questions.len(), question.named()),
        )?;
        for (key, line) in question.lines(draft.loaded()) {
            writeln!(err, "  {key:<6}{line}")?;
        }
        answered.push(loop {
            write!(err, "{} [skip]: ", answer::choices(question.op).join(", "))?;
            err.flush()?;
            let Some(line) = lines.next()? else {
                quit = true;
                writeln!(err)?;
                break Answered::kept(Answer::Skip);
            };
            if !lines.terminal {
                writeln!(err, "{}", words::plain(&line))?;
            }
            let answer = match answer::parse(&line, question.op) {
                Ok(answer) => answer,
                Err(why) if lines.terminal => {
                    err.say(Tone::Bad, &format!("  {why}"))?;
                    continue;
                }
                Err(why) => {
                    return Err(Failure::input(format!("{}, line {}: {why}", lines.name, lines.number)));
                }
            };
            match answer {
                Answer::Skip => break Answered::kept(answer),
                Answer::Quit => {
                    quit = true;
                    break Answered::kept(answer);
                }
                _ => {}
            }
            match draft.answer(&[(question, answer)]) {
                Ok(told) => {
                    for line in told {
                        err.say(Tone::Odd, &format!("  accepted in the rule, {line}"))?;
                    }
                    let free = free(draft.loaded());
                    err.say(Tone::Good, &format!("  {answer}; {free} of 16 ranges free"))?;
                    break Answered::kept(answer);
                }
                Err(why) => {
                    err.say(Tone::Bad, &format!("  taken back: {why}"))?;
                    if !lines.terminal {
                        break Answered {
                            answer,
                            refused: Some(why),
                        };
                    }
                }
            }
        });
        writeln!(err)?;
    }
    Ok(answered)
}

impl Lines {
    /// The next answer; comments of a script are none.
    fn next(&mut self) -> Result<Option<String>, Failure> {
        loop {
            let mut line = String::new();
            let read = self.from.read_line(&mut line);
            let read = read.map_err(|error| Failure::input(format!("cannot read {}: {error}", self.name)))?;
            self.number += 1;
            match read {
                0 => return Ok(None),
                _ if line.trim_start().starts_with('#') => {}
                _ => return Ok(Some(line.trim().to_owned())),
            }
        }
    }
}

/// Writes or prints the policy, and says what was done.
fn finish(
    args: &ReviewArgs,
    target: Option<&Path>,
    draft: &Draft<'_>,
    asked: &Asked<'_>,
    cpuid: Option<&Cpuid>,
) -> Result<Exit, Failure> {
    let found = draft.new_findings();
    let refused = asked
        .answered
        .iter()
        .filter(|answered| answered.refused.is_some())
        .count();
    let written = target.filter(|_| draft.is_changed() || args.output.is_some());
    if let Some(path) = written {
        write(path, draft.text(), cpuid, args.output.is_none())?;
    }
    let mut out = stream::out();
    if args.json {
        json::print(&printed(draft, asked, written, &found))?;
    } else if target.is_none() {
        write!(out, "{}", draft.text())?;
    }
    let mut err = stream::err();
    let count = |which: fn(Answer) -> bool| {
        let kept = asked
            .answered
            .iter()
            .filter(|one| one.refused.is_none() && which(one.answer));
        kept.count() as u64
    };
    let left = count(|answer| matches!(answer, Answer::Skip | Answer::Quit));
    let decided = count(|answer| !matches!(answer, Answer::Skip | Answer::Quit));
    let mut told = format!(
        "{} of {} decided; {left} left as they were",
        decided,
        words::counted(asked.questions.len() as u64, "access", "accesses")
    );
    if asked.denied > 0 {
        let rest = words::counted(asked.denied as u64, "more is", "more are");
        told.push_str(&format!("; {rest} denied by a rule, which --denied asks about"));
    }
    match written {
        Some(path) => told.push_str(&format!("; written to {}", path.display())),
        None if target.is_some() => told.push_str("; nothing is written"),
        None => {}
    }
    writeln!(err, "msrgate: {}", words::plain(&told))?;
    for (question, answered) in asked.questions.iter().zip(&asked.answered) {
        if let Some(why) = &answered.refused {
            let told = format!("{}: `{}` was taken back: {why}", question.named(), answered.answer);
            writeln!(err, "msrgate: {}", words::plain(&told))?;
        }
    }
    for found in &found {
        writeln!(err, "msrgate: {}: {}", found.code, words::plain(&found.message))?;
    }
    Ok(match refused == 0 && found.is_empty() {
        true => Exit::Yes,
        false => Exit::No,
    })
}

pub(crate) fn printed(
    draft: &Draft<'_>,
    asked: &Asked<'_>,
    written: Option<&Path>,
    found: &[msrgate_policy::Diagnostic],
) -> impl Printed {
    let accesses = asked
        .questions
        .iter()
        .zip(&asked.answered)
        .map(|(question, answered)| question.printed(answered.answer.to_string(), answered.refused.as_deref()));
    object! {
        /// What was asked, by MSR.
        accesses: accesses.collect::<Vec<_>>(),
        /// How many accesses were not asked, since a rule denies them.
        denied_by_rules: asked.denied,
        /// The warnings about other rules that the answers brought.
        findings: found.iter().map(|found| object! {
            /// The code, see [findings.md](findings.md).
            code: found.code.code(),
            /// What is wrong.
            message: &found.message,
        }).collect::<Vec<_>>(),
        /// How many of the filter's 16 ranges the policy takes.
        ranges: draft.loaded().plan.filter().ranges().len(),
        /// The file that the policy was written to; null where none was.
        written: written.map(|path| path.display().to_string()),
        /// The policy's text.
        policy: draft.text(),
    }
}

/// Writes the policy's file whole or not at all, and keeps what it was.
fn write(path: &Path, text: &str, cpuid: Option<&Cpuid>, backup: bool) -> Result<(), Failure> {
    // What it extends has to be found from there, too.
    load::policy_in(path, text, cpuid, &[]).map_err(|refused| refused.report())?;
    let put = || {
        if backup {
            let mut name = path.as_os_str().to_owned();
            name.push(".bak");
            // Whatever has that name is replaced, and not written to.
            let _ = fs::remove_file(&name);
            fs::copy(path, name)?;
        }
        let permissions = fs::metadata(path).ok().map(|old| old.permissions());
        output::put(path, text, permissions, Existing::Replaced)
    };
    put().map_err(|error| Failure::input(format!("cannot write `{}`: {error}", words::plain(&input::shown(path)))))
}
