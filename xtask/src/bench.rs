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
    // What `run_exit` and `boot` run, and the bench, by what it is told of each.
    let programs = ["msrgate", "small_vmm", "msrgate-bench"];
    let built = binary::built(
        &[
            &[
                "build",
                "--release",
                "--package",
                "msrgate-cli",
                "--package",
                "msrgate-bench",
            ][..],
            &["--bin", "msrgate", "--example", "small_vmm", "--bin", "msrgate-bench"],
        ]
        .concat(),
    )?;
    let [msrgate, vmm, bench] = programs.map(|name| {
        let mut found = built.iter().filter(|binary| binary.executable.ends_with(name));
        found.next().ok_or(format!("cargo built no {name}"))
    });
    let mut command = process::bound(&bench?.executable);
    command.env("MSRGATE_BIN", &msrgate?.executable);
    command.env("MSRGATE_SMALL_VMM", &vmm?.executable);
    command.args(words).current_dir(crate::root());
    let status = command.status();
    let status = status.map_err(|error| format!("cannot run {}: {error}", process::shown(&command)))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
