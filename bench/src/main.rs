//! What msrgate costs: `cargo xtask bench`.
//!
//! Each figure stands beside a baseline that was measured in the same run, in turns, so that a busy machine disturbs
//! both alike. All figures are costs: less is better, and a ratio below 1 means that ours is the cheaper.
#![forbid(unsafe_code)]

mod figure;
mod rounds;

mod lookup;
mod instructions;
mod live;
mod run_exit;
mod attach;
mod boot;
mod bare;
mod replace;
mod plan;
mod trace;
mod weight;

mod machine;
mod report;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use figure::Figure;

/// Measures what msrgate costs, each figure beside its baseline of the same run
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench", after_help = HELP)]
struct Arguments {
    /// Measure this and nothing else; may be given more than once
    #[arg(long, value_name = "KEY")]
    only: Vec<Key>,
    /// Measure for seconds, not minutes: shows that it works, and no figure to rely on
    #[arg(long)]
    quick: bool,
    /// Print for programs
    #[arg(long)]
    json: bool,
    /// Keep the result in bench/record/, with machine and kernel
    #[arg(long, conflicts_with = "quick")]
    record: bool,
    /// Do one thing for whoever counts its instructions
    #[arg(long, hide = true, value_name = "CASE", requires = "times")]
    count: Option<instructions::Case>,
    /// How often
    #[arg(long, hide = true, value_name = "N")]
    times: Option<usize>,
    /// Boot guests, in the nested lane
    #[arg(long, hide = true, value_name = "N")]
    boots: Option<usize>,
}

const HELP: &str = "\
All figures are costs, so less is better. The ratio is ours by the baseline's. The exit code is 1 where an aim is missed;
what this machine cannot measure is named as skipped.";

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Key {
    /// A verdict, beside the kernel's walk over the ranges
    Lookup,
    /// Instructions of the access path, counted by valgrind
    Instructions,
    /// An access that user space answers, beside the same loop by hand; needs KVM
    ExitDispatch,
    /// A fixed answer that the kernel holds, beside an allowed read and an answer from user space; needs KVM
    ConstantRead,
    /// An access that `msrgate run` answers, beside a VMM that answers it itself; needs KVM
    RunExit,
    /// How long a thread of a VMM stands still for `msrgate attach`, beside a debugger; needs KVM
    Attach,
    /// A Linux boot under `msrgate run`, beside one without, 10 of each in the nested lane; takes long, so only where asked for
    Boot,
    /// A Linux boot on the hypervisor of examples/bare, beside one without, 10 of each; takes long, so only where asked for
    Bare,
    /// Installing a plan, beside the bare calls; needs KVM
    Install,
    /// Replacing a filter under readers, beside arc-swap and a lock
    Replace,
    /// From the text of a policy to its plan, by the number of rules
    Plan,
    /// Reading, writing and learning from a trace, beside serde_json in the obvious way
    Trace,
    /// How much an empty VMM grows by with a plan, the planner, the language; four builds, so only where asked for
    Weight,
}

impl Key {
    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// How much is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// Enough that it is seen to work.
    Quick,
    /// Enough for figures.
    Full,
}

impl Effort {
    /// `full` of something, or the few that show that it works.
    pub(crate) fn of(self, full: usize, quick: usize) -> usize {
        match self {
            Effort::Full => full,
            Effort::Quick => quick,
        }
    }
}

/// The figures of a key.
pub(crate) type Measured = Result<Vec<Figure>, Missing>;

/// Why there are none.
pub(crate) enum Missing {
    /// This machine lacks what they need.
    Skipped(String),
    /// Something is broken.
    Failed(String),
}

impl From<String> for Missing {
    fn from(why: String) -> Missing {
        Missing::Failed(why)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let part = match (arguments.count, arguments.boots) {
        (Some(case), _) => Some(instructions::repeat(case, arguments.times.unwrap_or(0))),
        (None, Some(boots)) => Some(boot::inside(boots)),
        (None, None) => None,
    };
    match part {
        Some(Ok(())) => return ExitCode::SUCCESS,
        Some(Err(why)) => {
            eprintln!("bench: {why}");
            return ExitCode::from(2);
        }
        None => {}
    }
    let effort = if arguments.quick { Effort::Quick } else { Effort::Full };
    let chosen = |key: &&Key| match arguments.only.as_slice() {
        [] => !matches!(key, Key::Boot | Key::Bare | Key::Weight),
        only => only.contains(key),
    };
    let mut failed = false;
    let mut report = report::Report::new(machine::Machine::look(), arguments.quick);
    for key in Key::value_variants().iter().filter(chosen) {
        if io::stderr().is_terminal() {
            eprintln!("measuring {}", key.name());
        }
        let measured = match key {
            Key::Lookup => lookup::measure(effort),
            Key::Instructions => instructions::measure(effort),
            Key::RunExit => run_exit::measure(effort),
            Key::Attach => attach::measure(effort),
            Key::Boot => boot::measure(effort),
            Key::Bare => bare::measure(effort),
            Key::ExitDispatch => live::exit_dispatch(effort),
            Key::ConstantRead => live::constant_read(effort),
            Key::Install => live::install(effort),
            Key::Replace => replace::measure(effort),
            Key::Plan => plan::measure(effort),
            Key::Trace => trace::measure(effort),
            Key::Weight => weight::measure(),
        };
        match measured {
            Ok(figures) => report.add(key.name(), figures),
            Err(Missing::Skipped(why)) => report.skip(key.name(), why),
            Err(Missing::Failed(why)) => {
                eprintln!("bench: {}: {why}", key.name());
                report.skip(key.name(), format!("it failed: {why}"));
                failed = true;
            }
        }
    }
    let told = if arguments.json {
        report.print_json()
    } else {
        report.print();
        Ok(())
    };
    let only: Vec<String> = arguments.only.iter().map(|key| key.name()).collect();
    let kept = if arguments.record { report.record(&only) } else { Ok(()) };
    match told.and(kept) {
        Ok(()) if failed => ExitCode::from(2),
        Ok(()) if report.all_met() || arguments.quick => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("bench: {why}");
            ExitCode::from(2)
        }
    }
}
