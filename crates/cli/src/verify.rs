//! `msrgate verify`: does this machine's kernel do what the engine does?
//!
//! The same calls and accesses go to a live VM and to the engine, whose own MSRs are those of a second live VM without a
//! filter. What a policy, a random filter or a raw argument comes to is compared access by access.

mod call;
mod engine;
mod host;
mod interception;
mod live;
mod pair;
mod policy;
mod random;
mod report;
mod rng;
mod shrink;
mod swap;
mod twin;
mod wild;

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressStyle};
use msrgate_guest::{GuestError, Mode};

use crate::args::{ModeArg, VerifyArgs};
use crate::exit::{Exit, Failure};
use crate::load;
use crate::replay::with_source;
use crate::stream;
use host::Host;
use live::Machine;
use report::Report;

pub(crate) fn run(args: &VerifyArgs) -> Result<Exit, Failure> {
    let cpuid = load::cpuid(&args.cpuid)?;
    let mode = match args.mode {
        ModeArg::Real => Mode::Real,
        ModeArg::Long => Mode::Long,
    };
    let machine = Machine::open(mode, cpuid.as_ref())?;
    let host = Host::look(args.profile);
    let mut report = Report::new(&host, args.mode);
    if let Some(candidates) = args.random {
        let seed = args.seed.unwrap_or_else(seed_of_now);
        report.seed = Some(seed);
        if args.seed.is_none() {
            // Before anything can go wrong that it is needed for.
            writeln!(stream::err(), "msrgate: seed {seed}")?;
        }
        random::run(&machine, &host, &mut report, seed, candidates, args.accesses)?;
    } else if let Some(seconds) = args.swap {
        swap::run(&machine, &mut report, Duration::from_secs(seconds))?;
    } else if args.interception {
        interception::run(&machine, &host, &mut report)?;
    } else {
        let reach = if args.full {
            policy::Reach::Full
        } else {
            policy::Reach::Boundaries
        };
        for path in &args.policies {
            let loaded = load::policy_or_report(path, cpuid.as_ref(), &[])?;
            policy::run(&machine, &host, &mut report, path, loaded, reach)?;
        }
    }
    report.print(args.json)
}

/// A seed that is not the last one's.
fn seed_of_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u64 & 0xffff_ffff
}

/// A bar on a terminal.
pub(crate) fn progress(length: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar
}

/// The guest or KVM failed in a way that is no difference between kernel and engine.
fn guest_failed(error: &GuestError) -> Failure {
    Failure::Line(Exit::Guest, with_source(error))
}
