//! `msrgate why`: from a line of a log to what is behind it, and what to do.

mod logs;
mod case;
pub(crate) mod print;

use std::io::{IsTerminal, Write};
use std::path::Path;

use crate::args::WhyArgs;
use crate::exit::{Exit, Failure};
use crate::{json, stream, words};
use case::Case;
use logs::Logs;

pub(crate) fn run(args: &WhyArgs) -> Result<Exit, Failure> {
    let mut logs = Logs::default();
    match args.logs.as_slice() {
        [] if std::io::stdin().is_terminal() => {
            return Err(Failure::input(
                "name a log, or give a line of one in quotes: `msrgate why 'kvm [1]: ignored rdmsr: 0x641'`",
            ));
        }
        [] => logs.file(Path::new("-"))?,
        given => logs.given(given)?,
    }
    let cases = Case::all(&logs);
    match args.json {
        true => json::print(&print::printed(&logs, &cases))?,
        false if !cases.is_empty() => print::text(&mut stream::page(), &logs, &cases)?,
        false => {}
    }
    if cases.is_empty() {
        let lines = match logs.lines {
            0 => "the log is empty: it says".to_owned(),
            lines => words::counted(lines, "line says", "lines say"),
        };
        let broken = match logs.broken {
            0 => "",
            _ => "; of some the end is missing, which may be in the line behind",
        };
        let nameless = match logs.nameless {
            true => {
                ". The VMM ended since KVM refused a register, and does not say which: the host's kernel may, `journalctl -k | msrgate why`, and `msrgate capture -- VMM…` prints what the VMM sets"
            }
            false => "",
        };
        writeln!(
            stream::err(),
            "msrgate: {lines} nothing of an MSR that is understood here{broken}{nameless}{}",
            logs::register(&args.logs)
        )?;
        return Ok(Exit::No);
    }
    Ok(Exit::Yes)
}
