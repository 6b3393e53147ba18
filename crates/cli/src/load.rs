//! Policies and CPUIDs from files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use msrgate_core::{Msr, MsrRange, Op};
use msrgate_guest::{NoPreset, no_presets};
use msrgate_plan::{By, DecisionMap, Plan, PlanError, Touched};
use msrgate_policy::cpuid::Cpuid;
use msrgate_policy::raw::{self, Form, Given};
use msrgate_policy::trace::{Lines, Record};
use msrgate_policy::{Diagnostic, Files, Fit, Policy, Rejected, Source};

use crate::args::{CpuidArgs, ProfileArgs};
use crate::exit::{Exit, Failure};
use crate::render;
use crate::replay::kvm::to_kvm;
use crate::replay::{Opened, with_source};

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
    /// Fixed answers that are no presets on this machine; empty where it was not asked.
    pub(crate) no_presets: Vec<(MsrRange, NoPreset)>,
}

/// Why there is no plan: what to report, and how to end.
pub(crate) struct Refused {
    pub(crate) sources: Vec<Source>,
    pub(crate) diagnostics: Vec<Diagnostic>,
    pub(crate) exit: Exit,
    /// Where 16 ranges do not suffice: the numbers, and what would fit.
    pub(crate) too_many: Option<Box<TooMany>>,
}

/// A policy that needs too many ranges.
#[derive(Debug)]
pub(crate) struct TooMany {
    pub(crate) policy: Policy,
    pub(crate) error: PlanError,
    pub(crate) fit: Fit,
}

/// Reads, resolves and compiles a policy.
pub(crate) fn policy(path: &Path, cpuid: Option<&Cpuid>, profile: &[Touched]) -> Result<Loaded, Box<Refused>> {
    let (policy, map) = resolved(path, cpuid)?;
    compiled(policy, map.with_profile(profile.to_vec()), cpuid)
}

/// The same for subcommands that only go on with a plan: what is wrong is printed.
pub(crate) fn policy_or_report(path: &Path, cpuid: Option<&Cpuid>, profile: &[Touched]) -> Result<Loaded, Failure> {
    policy(path, cpuid, profile).map_err(|refused| refused.report())
}

/// The same for this machine's kernel: what it holds by itself becomes presets.
pub(crate) fn policy_for_host(path: &Path, cpuid: Option<&Cpuid>, profile: &[Touched]) -> Result<Loaded, Failure> {
    let (policy, map) = resolved(path, cpuid).map_err(|refused| refused.report())?;
    let map = held(map, cpuid)?.with_profile(profile.to_vec());
    let loaded = compiled(policy, map, cpuid).map_err(|refused| refused.report())?;
    Ok(Loaded {
        no_presets: no_presets(&loaded.map, &loaded.plan),
        ..loaded
    })
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

/// What a policy, a plan or a raw filter says.
pub(crate) struct Said {
    pub(crate) map: DecisionMap,
    /// How much it says: whether an access is left to the kernel, or also what it gets if not.
    pub(crate) by: By,
}

/// What a file says, whichever of these it holds; `-` is standard input.
pub(crate) fn said(path: &Path, cpuid: Option<&Cpuid>) -> Result<Said, Failure> {
    let bytes = bytes(path)?;
    if Form::of(&bytes) == Form::Policy {
        let (_, map) = resolved_from(path, &bytes, cpuid).map_err(|refused| refused.report())?;
        return Ok(Said { map, by: By::Actions });
    }
    let Given { filter, plan, .. } = filter(path, &bytes)?;
    Ok(match plan {
        Some(map) => Said { map, by: By::Actions },
        None => Said {
            map: DecisionMap::of_filter(&filter),
            by: By::Verdicts,
        },
    })
}

/// A plan or a raw filter. What the kernel takes for something else than it looks like is told on standard error.
pub(crate) fn filter(path: &Path, bytes: &[u8]) -> Result<Given, Failure> {
    let shown = path.display();
    let given = raw::read(bytes).map_err(|error| Failure::input(format!("{shown}: {error}")))?;
    let mut stderr = io::stderr().lock();
    for remark in &given.remarks {
        // Where even this cannot be printed, there is nobody to tell.
        let _ = writeln!(stderr, "msrgate: {shown}: {remark}");
    }
    Ok(given)
}

/// All of a file, or of standard input where it is `-`.
pub(crate) fn bytes(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = match path == Path::new("-") {
        true => io::stdin().read_to_end(&mut bytes).map(|_| bytes),
        false => fs::read(path),
    };
    read.map_err(|error| Failure::input(format!("cannot read `{}`: {error}", path.display())))
}

/// The policy in a file whose bytes are read already, with what it extends.
fn resolved_from(path: &Path, bytes: &[u8], cpuid: Option<&Cpuid>) -> Result<(Policy, DecisionMap), Box<Refused>> {
    match std::str::from_utf8(bytes) {
        Ok(text) if path == Path::new("-") => understood(Policy::parse("standard input", text), cpuid),
        _ => resolved(path, cpuid),
    }
}

/// Reads a policy and nothing more; what is wrong is printed.
pub(crate) fn unresolved(path: &Path) -> Result<Policy, Failure> {
    accepted(Policy::load(path, &Disk)).map_err(|refused| refused.report())
}

fn resolved(path: &Path, cpuid: Option<&Cpuid>) -> Result<(Policy, DecisionMap), Box<Refused>> {
    understood(Policy::load(path, &Disk), cpuid)
}

fn understood(read: Result<Policy, Rejected>, cpuid: Option<&Cpuid>) -> Result<(Policy, DecisionMap), Box<Refused>> {
    let policy = accepted(read)?;
    match policy.decision_map(cpuid) {
        Ok(map) => Ok((policy, map)),
        Err(needed) => Err(refused(&policy, needed.diagnostic(), Exit::Input)),
    }
}

fn accepted(read: Result<Policy, Rejected>) -> Result<Policy, Box<Refused>> {
    read.map_err(|rejected| {
        Box::new(Refused {
            sources: rejected.sources,
            diagnostics: rejected.diagnostics,
            exit: Exit::Input,
            too_many: None,
        })
    })
}

fn compiled(policy: Policy, map: DecisionMap, cpuid: Option<&Cpuid>) -> Result<Loaded, Box<Refused>> {
    let error = match Plan::compile(&map) {
        Ok(plan) => {
            return Ok(Loaded {
                policy,
                map,
                plan,
                no_presets: Vec::new(),
            });
        }
        Err(error) => error,
    };
    // The policy is fine; it does not fit what the kernel can hold.
    if !matches!(error, PlanError::TooManyRanges { .. }) {
        return Err(refused(&policy, policy.explain_error(&error, None), Exit::No));
    }
    let fit = Fit::search(&policy, &map, cpuid);
    let mut refused = refused(&policy, policy.explain_error(&error, Some(&fit)), Exit::No);
    refused.too_many = Some(Box::new(TooMany { policy, error, fit }));
    Err(refused)
}

fn refused(policy: &Policy, diagnostic: Diagnostic, exit: Exit) -> Box<Refused> {
    Box::new(Refused {
        sources: policy.sources.clone(),
        diagnostics: vec![diagnostic],
        exit,
        too_many: None,
    })
}

impl Refused {
    fn report(self) -> Failure {
        let mut stderr = std::io::stderr().lock();
        for found in &self.diagnostics {
            let _ = writeln!(stderr, "{}\n", render::diagnostic(found, &self.sources));
        }
        match self.too_many {
            Some(too_many) => Failure::TooMany(too_many),
            None => Failure::Reported(self.exit),
        }
    }
}

/// How often the trace that the command line names has each MSR and direction; nothing without one.
pub(crate) fn profile(args: &ProfileArgs) -> Result<Vec<Touched>, Failure> {
    let Some(path) = &args.profile else {
        return Ok(Vec::new());
    };
    let name = path.display();
    let lines = match crate::replay::open(path) {
        Ok(lines) => lines,
        Err(Opened::Unreadable(line)) => return Err(Failure::input(line)),
        Err(Opened::Malformed(error)) => return Err(Failure::input(format!("{name}: {error}"))),
    };
    let mut counts: BTreeMap<(Msr, Op), u64> = BTreeMap::new();
    let mut lost = 0u64;
    for record in lines {
        match record.map_err(|error| Failure::input(format!("{name}: {error}")))? {
            Record::Event(event) => *counts.entry((event.msr, event.op)).or_default() += 1,
            Record::Gap(gap) => lost = lost.saturating_add(gap.events),
        }
    }
    if lost > 0 {
        let lost = render::counted(lost, "access is", "accesses are");
        let note = format!("{name}: {lost} missing from it, so the guest does more than the profile counts");
        let _ = writeln!(std::io::stderr(), "msrgate: note: {}", render::plain(&note));
    }
    let touched = counts.into_iter().map(|((msr, op), count)| Touched { msr, op, count });
    Ok(touched.collect())
}

/// The guest's CPUID that the command line names.
pub(crate) fn cpuid(args: &CpuidArgs) -> Result<Option<Cpuid>, Failure> {
    match &args.cpuid {
        None => Ok(None),
        Some(path) if path == Path::new("host") => host_cpuid().map(Some),
        Some(path) => file_cpuid(path).map(Some),
    }
}

/// What `cpuid -r` printed, or what the header of a trace says; the rest of the trace is not read.
fn file_cpuid(path: &Path) -> Result<Cpuid, Failure> {
    let name = path.display();
    let unreadable = |error: io::Error| Failure::input(format!("cannot read `{name}`: {error}"));
    let malformed = |error: &dyn std::fmt::Display| Failure::input(format!("{name}: {error}"));
    let mut file = BufReader::new(File::open(path).map_err(unreadable)?);
    if file
        .fill_buf()
        .map_err(unreadable)?
        .trim_ascii_start()
        .starts_with(b"{")
    {
        let lines = Lines::new(file).map_err(|error| malformed(&error))?;
        let cpuid = lines.header().parse_cpuid();
        let cpuid =
            cpuid.ok_or_else(|| malformed(&"the trace's header has no `cpuid`, so give `cpuid -r -1`'s output"))?;
        return cpuid.map_err(|error| malformed(&error));
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(unreadable)?;
    Cpuid::parse_raw(&text).map_err(|error| malformed(&error))
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
