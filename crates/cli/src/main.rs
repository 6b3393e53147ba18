//! `msrgate`: an MSR firewall for KVM guests, on the command line.
//!
//! One file a subcommand. This crate is the only one that prints.
#![forbid(unsafe_code)]

mod args;
mod json;
mod input;
mod output;
mod trace;
mod cpuid;
mod load;
mod page;
mod machine;
mod handler;
mod cause;
mod surface;
mod check;
mod plan;
mod explain;
mod diff;
mod decompile;
mod import;
mod replay;
mod verify;
mod scan;
mod migrate;
mod doctor;
mod wrap;
mod control;
mod metrics;
mod journal;
mod run;
mod reload;
mod top;
mod detach;
mod report;
mod learn;
mod why;
mod review;
mod msr;
mod manual;
mod scanned;
mod refusal;
mod hint;
mod render;
mod words;
mod progress;
mod stream;
mod exit;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{ColorChoice, Parser, ValueEnum};

use crate::args::{Args, Command};
use crate::exit::{Exit, Failure};

fn main() -> ExitCode {
    let result = Args::try_parse().map_or_else(
        |error| usage(&error),
        |args| {
            let _ = stream::COLOUR.set(args.color);
            run(&args.command)
        },
    );
    // What is still to be written may not fit either.
    let result = result.and_then(|exit| Ok(io::stdout().flush().map(|()| exit)?));
    let exit = result.unwrap_or_else(|failure| {
        match failure {
            // Whoever read our output went away, as `head` does: nothing is wrong.
            Failure::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => Exit::Yes,
            failure => {
                // Where even this cannot be printed, the exit code still tells.
                let _ = stream::err().say(stream::Tone::Bad, &format!("msrgate: {failure}"));
                failure.exit()
            }
        }
    });
    exit.into()
}

fn run(command: &Command) -> Result<Exit, Failure> {
    match command {
        Command::Check(check) => check::run(check),
        Command::Plan(plan) => plan::run(plan),
        Command::Explain(explain) => explain::run(explain),
        Command::Diff(diff) => diff::run(diff),
        Command::Decompile(decompile) => decompile::run(decompile),
        Command::Import(import) => import::run(import),
        Command::Replay(replay) => replay::run(replay),
        Command::Verify(verify) => verify::run(verify),
        Command::Scan(scan) => scan::run(scan),
        Command::Migrate(migrate) => migrate::run(migrate),
        Command::Doctor(doctor) => doctor::run(doctor),
        Command::Wrap(wrap) => wrap::run(wrap),
        Command::Run(run) => run::run(run),
        Command::Attach(attach) => run::attach(attach),
        Command::Capture(capture) => run::capture(capture),
        Command::Reload(reload) => reload::run(reload),
        Command::Top(top) => top::run(top),
        Command::Detach(detach) => detach::run(detach),
        Command::Report(report) => report::run(report),
        Command::Learn(learn) => learn::run(learn),
        Command::Why(why) => why::run(why),
        Command::Review(review) => review::run(review),
        Command::Msr(msr) => msr::run(msr),
        Command::Schema => manual::schema(),
        Command::Completions(completions) => manual::completions(completions),
        Command::Man(man) => manual::man(man),
    }
}

/// What a command line that is wrong, or asks for help, says of colour.
fn colour() -> Option<ColorChoice> {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let mut words = words.take_while(|word| word != "--");
    let word = words.find(|word| word.starts_with("--color"))?;
    let value = word
        .strip_prefix("--color=")
        .map(str::to_owned)
        .or_else(|| words.next())?;
    ColorChoice::from_str(&value, true).ok()
}

/// Prints the help that was asked for, or what is wrong with the command line.
fn usage(error: &clap::Error) -> Result<Exit, Failure> {
    if let Some(choice) = colour() {
        let _ = stream::COLOUR.set(choice);
    }
    let text = error.render();
    let plain = text.to_string();
    // What is wrong quotes arguments, so it has colour only where they do nothing to a terminal.
    let harmless = stream::shown(&plain, "\n\t") == plain;
    let coloured = |colour: bool| match colour && harmless {
        true => text.ansi().to_string(),
        false => stream::shown(&plain, "\n\t").into_owned(),
    };
    if error.use_stderr() {
        // Where even this cannot be printed, the exit code still tells.
        let _ = stream::err().coloured(&coloured(stream::colour(&io::stderr())));
        return Ok(Exit::Input);
    }
    stream::out().coloured(&coloured(stream::colour(&io::stdout())))?;
    Ok(Exit::Yes)
}
