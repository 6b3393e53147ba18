//! `msrgate verify`: does this machine's kernel do what the engine does?

pub(crate) mod report;

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use msrgate_guest::Mode;
use msrgate_verify::{Kernel, Machine, Reach, Report, VerifyError};

use crate::args::{ModeArg, VerifyArgs};
use crate::cpuid::to_kvm;
use crate::exit::{Exit, Failure, with_source};
use crate::{cpuid, load, progress, stream};

pub(crate) fn run(args: &VerifyArgs) -> Result<Exit, Failure> {
    let cpuid = cpuid::given(&args.cpuid)?;
    let mode = match args.mode {
        ModeArg::Real => Mode::Real,
        ModeArg::Long => Mode::Long,
    };
    let mut kernel = Kernel::running();
    if let Some(name) = &args.profile {
        let unknown = || Failure::input(format!("there is no profile `{name}`"));
        kernel = kernel.with_profile(name).ok_or_else(unknown)?;
    }
    let machine = Machine::open(mode, cpuid.as_ref().map(to_kvm).transpose()?, kernel).map_err(failed)?;
    let bar = progress::steps();
    let progress = |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    };
    let mut seed = None;
    let report = if let Some(candidates) = args.random {
        let given = args.seed.unwrap_or_else(seed_of_now);
        seed = Some(given);
        if args.seed.is_none() {
            // Before anything can go wrong that it is needed for.
            writeln!(stream::err(), "msrgate: seed {given}")?;
        }
        machine.random(given, candidates, args.accesses, &progress)
    } else if let Some(seconds) = args.swap {
        machine.swap(Duration::from_secs(seconds), &progress)
    } else if args.interception {
        machine.interception()
    } else {
        let reach = if args.full { Reach::Full } else { Reach::Boundaries };
        let mut report = Ok(Report::default());
        for path in &args.policies {
            let loaded = load::policy_or_report(path, cpuid.as_ref(), &[])?;
            let name = path.display().to_string();
            let plan = Arc::new(loaded.plan);
            report = report.and_then(|mut report| {
                report.add(machine.policy(&name, plan.map(), Arc::clone(&plan), reach, &progress)?);
                Ok(report)
            });
        }
        report
    };
    bar.finish_and_clear();
    report::print(&report.map_err(failed)?, machine.kernel(), args, seed)
}

/// A seed that is not the last one's.
fn seed_of_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u64 & 0xffff_ffff
}

fn failed(error: VerifyError) -> Failure {
    let exit = match error {
        VerifyError::Guest(_) | VerifyError::Panicked => Exit::Guest,
        _ => Exit::Machine,
    };
    Failure::Line(exit, with_source(&error))
}
