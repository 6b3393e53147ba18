//! `msrgate scan`: what a guest can see on this host.

use std::path::PathBuf;
use std::sync::Arc;

use kvm_ioctls::Kvm;
use msrgate_core::MsrRange;
use msrgate_guest::scan::{ScanError, Scanner, WINDOWS, Writes};
use msrgate_kvm::{Handlers, ProbeError};
use msrgate_policy::Pattern;

use crate::args::{ScanArgs, WriteArg};
use crate::cpuid::{self, to_kvm};
use crate::exit::{Exit, Failure, with_source};
use crate::handler::tell_of_handlers;
use crate::scanned::{self, Facts, Found, ScanPolicy};
use crate::{input, load, page, progress, stream, words};

pub(crate) fn run(args: &ScanArgs) -> Result<Exit, Failure> {
    let ranges = ranges(args)?;
    let inputs = || [&args.policy, &args.against, &args.cpuid.cpuid].into_iter().flatten();
    if let Some(html) = page::file(args.html.html.as_deref()) {
        // Before the guest has run for seconds.
        input::refuse_overwrite(html, inputs().map(PathBuf::as_path))?;
    }
    let cpuid = cpuid::given(&args.cpuid)?;
    let before = args.against.as_deref().map(scanned::read).transpose()?;
    let machine = |error: &dyn std::error::Error| Failure::Line(Exit::Machine, with_source(error));
    let device = msrgate_kvm::open().map_err(|error| machine(&error))?;
    // Without a policy a kernel without filters does too.
    let ruled = args
        .policy
        .as_ref()
        .map(|path| Ok((path, msrgate_kvm::probe(&device)?)));
    let ruled = ruled.transpose().map_err(|error: ProbeError| machine(&error))?;
    let kvm = Kvm::new().map_err(|error| machine(&error))?;

    let mut scanner = Scanner::new(&kvm).writes(match args.write {
        WriteArg::None => Writes::None,
        WriteArg::Safe => Writes::Safe,
        WriteArg::All => Writes::All,
    });
    let mut facts = Facts::of_this_machine();
    if args.x2apic {
        scanner = scanner.x2apic();
        facts.x2apic = true;
    }
    if let Some(cpuid) = &cpuid {
        scanner = scanner.cpuid(to_kvm(cpuid)?);
        facts.cpuid = args.cpuid.cpuid.as_ref().map(|path| path.display().to_string());
    }
    if let Some((path, probed)) = &ruled {
        let loaded = load::policy_for_host(path, cpuid.as_ref(), &[])?;
        facts.policy = Some(ScanPolicy {
            name: loaded.policy.name.clone(),
            hash: words::hex(&loaded.plan.map().hash()),
        });
        tell_of_handlers(&loaded.plan)?;
        let handlers = Handlers::faulting(loaded.plan.table().handlers());
        scanner = scanner.under(probed, Arc::new(loaded.plan), handlers);
    }
    let bar = progress::steps();
    let scan = scanner.scan(&ranges, &mut |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let scan = scan.map_err(|error| {
        let exit = match error {
            ScanError::TooMany { .. } => Exit::Input,
            ScanError::Install(_) => Exit::Machine,
            _ => Exit::Guest,
        };
        Failure::Line(exit, with_source(&error))
    })?;

    let against = before.map(|(facts, before)| (facts, scan.since(&before)));
    let found = Found { scan, facts, against };
    match &args.html.html {
        Some(html) => page::write(html, inputs().map(PathBuf::as_path), scanned::page(&found))?,
        None if args.json => scanned::write(&mut stream::out(), &found)?,
        None => scanned::print(&mut stream::page(), &found, args.leaks)?,
    }
    let differs = found.against.is_some_and(|(_, differences)| !differences.is_empty());
    Ok(if differs { Exit::No } else { Exit::Yes })
}

/// What is to be scanned.
fn ranges(args: &ScanArgs) -> Result<Vec<MsrRange>, Failure> {
    let mut ranges = if args.only { Vec::new() } else { WINDOWS.to_vec() };
    if args.all_known {
        ranges.extend(msrgate_msrs::all().iter().map(|known| MsrRange::single(known.msr)));
    }
    for text in &args.range {
        let pattern = Pattern::parse(text).map_err(|error| {
            let help = error.help().map(|help| format!(": {help}")).unwrap_or_default();
            Failure::input(format!("--range {text}: {error}{help}"))
        })?;
        ranges.extend(pattern.ranges());
    }
    Ok(ranges)
}
