//! `msrgate completions`, `msrgate man` and `msrgate schema`: what editors, shells and people read about msrgate.

use std::io::{self, Write};

use clap::CommandFactory;

use crate::args::{Args, CompletionsArgs, ManArgs};
use crate::exit::{Exit, Failure};

pub(crate) fn completions(args: &CompletionsArgs) -> Result<Exit, Failure> {
    // `generate` panics where it cannot write, so it writes to memory first.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "msrgate", &mut text);
    io::stdout().write_all(&text)?;
    Ok(Exit::Yes)
}

pub(crate) fn man(args: &ManArgs) -> Result<Exit, Failure> {
    let mut out = io::stdout().lock();
    let mut command = Args::command();
    command.build();
    let page = match &args.subcommand {
        None => command,
        Some(name) => match command.find_subcommand(name) {
            Some(sub) => sub.clone().name(format!("msrgate-{name}")),
            None => {
                return Err(Failure::input(format!(
                    "there is no subcommand `{name}`; `msrgate --help` lists them"
                )));
            }
        },
    };
    clap_mangen::Man::new(page).render(&mut out)?;
    Ok(Exit::Yes)
}

pub(crate) fn schema() -> Result<Exit, Failure> {
    let schema = serde_json::Value::from(msrgate_policy::schema());
    writeln!(io::stdout(), "{schema:#}")?;
    Ok(Exit::Yes)
}
