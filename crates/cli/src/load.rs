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
use crate::replay::kvm::to_kvm;
use crate::replay::with_source;

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
    let (policy, map) = resolved(path, cpuid)?;
    compiled(policy, map)
}

/// The same for subcommands that only go on with a plan: what is wrong is printed.
pub(crate) fn policy_or_report(path: &Path, cpuid: Option<&Cpuid>) -> Result<Loaded, Failure> {
    policy(path, cpuid).map_err(|refused| refused.report())
}

/// The same for this machine's kernel: what it holds by itself becomes presets.
pub(crate) fn policy_for_host(path: &Path, cpuid: Option<&Cpuid>) -> Result<Loaded, Failure> {
    let (policy, map) = resolved(path, cpuid).map_err(|refused| refused.report())?;
    let map = held(map, cpuid)?;
    compiled(policy, map).map_err(|refused| refused.report())
}

/// The map with what this machine's kernel holds of its fixed answers.
pub(crate) fn held(map: DecisionMap, cpuid: Option<&Cpuid>) -> Result<DecisionMap, Failure> {
    let machine = |error: &dyn std::error::Error| Failure::Line(Exit::Machine, with_source(error));
    let device = msrgate_kvm::open().map_err(|error| machine(&error))?;
    msrgate_kvm::probe(&device).map_err(|error| machine(&error))?;
    let kvm = kvm_ioctls::Kvm::new().map_err(|error| machine(&error))?;
    let cpuid = cpuid.map(to_kvm).transpose()?;
    let held = msrgate_guest::held(&kvm, &map, cpuid.as_ref()).map_err(|error| machine(&error))?;
    Ok(map.holding(held))
}

fn resolved(path: &Path, cpuid: Option<&Cpuid>) -> Result<(Policy, DecisionMap), Box<Refused>> {
    let policy = Policy::load(path, &Disk).map_err(|rejected| {
        Box::new(Refused {
            sources: rejected.sources,
            diagnostics: rejected.diagnostics,
            exit: Exit::Input,
        })
    })?;
    match policy.decision_map(cpuid) {
        Ok(map) => Ok((policy, map)),
        Err(needed) => Err(refused(&policy, needed.diagnostic(), Exit::Input)),
    }
}

fn compiled(policy: Policy, map: DecisionMap) -> Result<Loaded, Box<Refused>> {
    match Plan::compile(&map) {
        Ok(plan) => Ok(Loaded { policy, map, plan }),
        // The policy is fine; it does not fit what the kernel can hold.
        Err(error) => Err(refused(&policy, policy.explain_error(&error), Exit::No)),
    }
}

fn refused(policy: &Policy, diagnostic: Diagnostic, exit: Exit) -> Box<Refused> {
    Box::new(Refused {
        sources: policy.sources.clone(),
        diagnostics: vec![diagnostic],
        exit,
    })
}

impl Refused {
    fn report(&self) -> Failure {
        let mut stderr = std::io::stderr().lock();
        for found in &self.diagnostics {
            let _ = writeln!(stderr, "{}\n", render::diagnostic(found, &self.sources));
        }
        Failure::Reported(self.exit)
    }
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
