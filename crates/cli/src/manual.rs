//! `msrgate completions`, `msrgate man` and `msrgate schema`: what editors, shells and people read about msrgate.

use std::io::{self, Write};

use clap::{Command, CommandFactory};

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
    let mut command = Args::command().disable_help_subcommand(true);
    command.build();
    let titled = |sub: &Command| sub.clone().name(format!("msrgate-{}", sub.get_name()));
    if let Some(directory) = &args.into {
        let pages = command.get_subcommands().map(titled).chain([command.clone()]);
        for page in pages {
            clap_mangen::Man::new(page)
                .generate_to(directory)
                .map_err(|error| Failure::input(format!("cannot write into {}: {error}", directory.display())))?;
        }
        return Ok(Exit::Yes);
    }
    let page =
        match &args.subcommand {
            None => command,
            Some(name) => titled(command.find_subcommand(name).ok_or_else(|| {
                Failure::input(format!("there is no subcommand `{name}`; `msrgate --help` lists them"))
            })?),
        };
    clap_mangen::Man::new(page).render(&mut io::stdout().lock())?;
    Ok(Exit::Yes)
}

pub(crate) fn schema() -> Result<Exit, Failure> {
    let schema = serde_json::Value::from(msrgate_policy::schema());
    writeln!(io::stdout(), "{schema:#}")?;
    Ok(Exit::Yes)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::fs;
    use std::path::Path;

    use clap::Arg;

    use super::*;

    const END: &str = "<!-- end of options -->\n";

    fn options(command: &Command) -> impl Iterator<Item = &Arg> {
        let options = command.get_arguments().filter(|option| !option.is_positional());
        options.filter(|option| !option.is_hide_set() && !option.is_global_set() && option.get_id() != "help")
    }

    /// The table of a command's options, as its help describes them.
    fn table(command: &Command) -> String {
        let mut table = String::from("| option | is |\n| --- | --- |\n");
        for option in options(command) {
            let help = option
                .get_long_help()
                .or(option.get_help())
                .expect("each option has help");
            let help = help.to_string().replace("\n\n", " ").replace('\n', " ");
            writeln!(table, "| {} | {} |", spelled(option), escaped(&help)).expect("a String takes all");
        }
        table
    }

    /// How an option is written: `-p`, `--policy POLICY`.
    fn spelled(option: &Arg) -> String {
        let mut words = format!("--{}", option.get_long().expect("each option has a long name"));
        if option.get_action().takes_values() {
            let name = option.get_value_names().unwrap_or_default().join(" ");
            let possible = option.get_possible_values();
            let values: Vec<_> = possible.iter().map(|value| value.get_name()).collect();
            words.push_str(
                &match option.get_num_args().is_some_and(|number| number.min_values() == 0) {
                    true => format!("[=<{name}>]"),
                    false if values.is_empty() => format!(" {name}"),
                    false => format!(" {}", values.join("|")),
                },
            );
        }
        let short = option.get_short().map(|short| format!("`-{short}`, "));
        format!("{}`{}`", short.unwrap_or_default(), escaped(&words))
    }

    /// A bar would end the cell.
    fn escaped(text: &str) -> String {
        text.replace('|', "\\|")
    }

    /// The document with the tables that the command line has now.
    fn page(document: &str) -> String {
        let mut command = Args::command();
        command.build();
        command.get_subcommands().fold(document.to_owned(), |page, command| {
            let begin = format!("<!-- options of {} -->\n", command.get_name());
            let parts = page
                .split_once(&begin)
                .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
            let has_options = options(command).next().is_some();
            assert_eq!(
                parts.is_some(),
                has_options,
                "docs/cli.md: `{}` and `{}`",
                begin.trim(),
                END.trim()
            );
            match parts {
                Some((before, after)) => format!("{before}{begin}{}{END}{after}", table(command)),
                None => page,
            }
        })
    }

    #[test]
    fn the_documented_options_are_those_of_the_command_line() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
        let document = fs::read_to_string(&path).expect("docs/cli.md");
        let page = page(&document);
        if std::env::var_os("MSRGATE_WRITE_DOCS").is_some() {
            fs::write(&path, page).expect("docs/cli.md is written");
        } else {
            assert!(page == document, "docs/cli.md is out of date: run `cargo xtask docs`");
        }
    }
}
