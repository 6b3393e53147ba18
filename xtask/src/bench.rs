//! `cargo xtask bench`: builds what is measured as it is released, and has it measured.

use std::process::ExitCode;

use clap::Args;

use crate::{binary, process};

#[derive(Args)]
pub(crate) struct Arguments {
    /// The bench's own; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// Exits as the bench does.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    match run(&arguments.words) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("xtask: {why}");
            ExitCode::from(2)
        }
    }
}

fn run(words: &[String]) -> Result<ExitCode, String> {
    let programs = binary::built(&["build", "--release", "--package", "msrgate-bench"])?;
    let bench = programs.first().ok_or("cargo built no bench")?;
    let mut command = process::bound(&bench.executable);
    command.args(words).current_dir(crate::root());
    let status = command.status();
    let status = status.map_err(|error| format!("cannot run {}: {error}", process::shown(&command)))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
