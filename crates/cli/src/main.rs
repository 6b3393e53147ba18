//! `msrgate`: an MSR firewall for KVM guests, on the command line.
//!
//! One file a subcommand. This crate is the only one that prints.
#![forbid(unsafe_code)]

mod args;
mod load;
mod machine;
mod check;
mod plan;
mod explain;
mod diff;
mod decompile;
mod import;
mod replay;
mod verify;
mod scan;
mod run;
mod report;
mod learn;
mod msr;
mod manual;
mod render;
mod refusal;
mod exit;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};
use crate::exit::{Exit, Failure};

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match &args.command {
        Command::Check(check) => check::run(check),
        Command::Plan(plan) => plan::run(plan),
        Command::Explain(explain) => explain::run(explain),
        Command::Diff(diff) => diff::run(diff),
        Command::Decompile(decompile) => decompile::run(decompile),
        Command::Import(import) => import::run(import),
        Command::Replay(replay) => replay::run(replay),
        Command::Verify(verify) => verify::run(verify),
        Command::Scan(scan) => scan::run(scan),
        Command::Run(run) => run::run(run),
        Command::Report(report) => report::run(report),
        Command::Learn(learn) => learn::run(learn),
        Command::Msr(msr) => msr::run(msr),
        Command::Schema => manual::schema(),
        Command::Completions(completions) => manual::completions(completions),
        Command::Man(man) => manual::man(man),
    };
    let exit = result.unwrap_or_else(|failure| {
        match failure {
            // Whoever read our output went away, as `head` does: nothing is wrong.
            Failure::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => Exit::Yes,
            failure => {
                // Where even this cannot be printed, the exit code still tells.
                let _ = writeln!(io::stderr(), "msrgate: {failure}");
                failure.exit()
            }
        }
    });
    exit.into()
}
