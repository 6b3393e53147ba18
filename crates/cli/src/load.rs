//! Policies and CPUIDs from files.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use msrgate_plan::{DecisionMap, Plan};
use msrgate_policy::cpuid::Cpuid;
use msrgate_policy::{Diagnostic, Files, Policy, Source};

use crate::args::CpuidArgs;
use crate::exit::{Exit, Failure};
use crate::render;

/// The file system.
struct Disk;

impl Files for Disk {
    fn read(&self, path: &Path) -> Result<(PathBuf, String), String> {
        let bytes = fs::read(path).map_err(|error| error.to_string())?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            format!("it is not UTF-8 text: byte {at} does not belong to any character")
        })?;
        let canonical = fs::canonicalize(path).map_err(|error| error.to_string())?;
        Ok((canonical, text))
    }
}

/// A policy that compiles, and all that was made of it.
pub(crate) struct Loaded {
    pub(crate) policy: Policy,
    pub(crate) map: DecisionMap,
    pub(crate) plan: Plan,
}

/// Why there is no plan: what to report, and how to end.
pub(crate) struct Refused {
    pub(crate) sources: Vec<Source>,
    pub(crate) diagnostics: Vec<Diagnostic>,
    pub(crate) exit: Exit,
}

/// Reads, resolves and compiles a policy.
pub(crate) fn policy(path: &Path, cpuid: Option<&Cpuid>) -> Result<Loaded, Box<Refused>> {
    let policy = Policy::load(path, &Disk).map_err(|rejected| {
        Box::new(Refused {
            sources: rejected.sources,
            diagnostics: rejected.diagnostics,
            exit: Exit::Input,
        })
    })?;
    let refused = |diagnostic, exit| {
        Box::new(Refused {
            sources: policy.sources.clone(),
            diagnostics: vec![diagnostic],
            exit,
        })
    };
    let map = policy
        .decision_map(cpuid)
        .map_err(|needed| refused(needed.diagnostic(), Exit::Input))?;
    // The policy is fine; it does not fit what the kernel can hold.
    let plan = Plan::compile(&map).map_err(|error| refused(policy.explain_error(&error), Exit::No))?;
    Ok(Loaded { policy, map, plan })
}

/// The same for subcommands that only go on with a plan: what is wrong is printed.
pub(crate) fn policy_or_report(path: &Path, cpuid: Option<&Cpuid>) -> Result<Loaded, Failure> {
    policy(path, cpuid).map_err(|refused| {
        let mut stderr = std::io::stderr().lock();
        for found in &refused.diagnostics {
            let _ = writeln!(stderr, "{}\n", render::diagnostic(found, &refused.sources));
        }
        Failure::Reported(refused.exit)
    })
}

/// The guest's CPUID that the command line names.
pub(crate) fn cpuid(args: &CpuidArgs) -> Result<Option<Cpuid>, Failure> {
    match &args.cpuid {
        None => Ok(None),
        Some(path) if path == Path::new("host") => host_cpuid().map(Some),
        Some(path) => {
            let name = path.display();
            let text =
                fs::read_to_string(path).map_err(|error| Failure::input(format!("cannot read `{name}`: {error}")))?;
            let cpuid = Cpuid::parse_raw(&text).map_err(|error| Failure::input(format!("{name}: {error}")))?;
            Ok(Some(cpuid))
        }
    }
}

/// What KVM on this machine offers a guest.
fn host_cpuid() -> Result<Cpuid, Failure> {
    let machine = |line: String| Failure::Line(Exit::Machine, line);
    msrgate_kvm::open().map_err(|error| machine(format!("{error}; without KVM give `--cpuid FILE`")))?;
    let kvm = kvm_ioctls::Kvm::new().map_err(|error| machine(format!("/dev/kvm does not open: {error}")))?;
    let supported = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| machine(format!("KVM_GET_SUPPORTED_CPUID failed: {error}")))?;
    let entries = supported.as_slice().iter().map(|entry| {
        let values = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        (entry.function, entry.index, values)
    });
    Ok(Cpuid::from_entries(entries))
}

/// A hash as programs and people get it.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
