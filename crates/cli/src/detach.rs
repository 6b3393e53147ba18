//! `msrgate detach`: leaves a VMM to itself.

use std::io::Write;
use std::time::Duration;

use crate::args::DetachArgs;
use crate::control::{Request, Running};
use crate::exit::{Exit, Failure};
use crate::stream;

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn run(args: &DetachArgs) -> Result<Exit, Failure> {
    let running = Running::find(args.process)?;
    let done = running.ask(&Request::Detach, PATIENCE)?;
    match args.json {
        true => writeln!(stream::out(), "{done:#}")?,
        false => stream::page().say(stream::Tone::Good, "the VMM is left to itself")?,
    }
    Ok(Exit::Yes)
}
