//! Policies, plans and filters as inputs.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use msrgate_core::{Msr, MsrRange, Op};
use msrgate_guest::{NoPreset, no_presets};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::{AccessCount, By, CompileOptions, DecisionMap, Plan, PlanError, Preset};
use msrgate_policy::raw::{self, RawFormat, RawInput};
use msrgate_policy::{
    Diagnostic, Disk, Explanation, Files, FitAdvice, Policy, PolicyErrors, Source, decompile, explain,
};

use crate::exit::{Exit, Failure, with_source};
use crate::refusal::TooMany;
use crate::{cpuid, input, render, scanned, stream};

/// The file system, with the policy that the command line names, which is read already.
struct Given<'a> {
    path: &'a Path,
    given: Result<Vec<u8>, String>,
}

impl Files for Given<'_> {
    fn read(&self, path: &Path) -> Result<(PathBuf, String), String> {
        if path == self.path {
            // A pipe has no canonical path, and no file that it extends can be the pipe.
            let canonical = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
            return Ok((canonical, msrgate_policy::text_of(self.given.clone()?)?));
        }
        Disk.read(path)
    }

    fn extended(&self, by: &Path, name: &str) -> PathBuf {
        // A file that is not there yet is to be written.
        let beside = by != self.path || fs::metadata(by).map_or(true, |metadata| metadata.is_file());
        // Nothing lies beside a pipe.
        let directory = by.parent().filter(|_| beside).unwrap_or(Path::new(""));
        directory.join(name)
    }
}

/// A policy that compiles, and all that was made of it.
pub(crate) struct Loaded {
    pub(crate) policy: Policy,
    pub(crate) options: CompileOptions,
    pub(crate) plan: Plan,
    /// What it was resolved for.
    pub(crate) cpuid: Option<Cpuid>,
    /// Fixed answers that are no presets on this machine; empty where it was not asked.
    pub(crate) no_presets: Vec<(MsrRange, NoPreset)>,
}

impl Loaded {
    /// Why an access gets what it gets.
    pub(crate) fn explain(&self, msr: Msr, op: Op) -> Explanation<'_> {
        explain(&self.policy, self.cpuid.as_ref(), &self.options, &self.plan, (msr, op))
    }
}

/// Why there is no plan: what to report, and how to end.
pub(crate) struct Refused {
    pub(crate) sources: Vec<Source>,
    pub(crate) diagnostics: Vec<Diagnostic>,
    pub(crate) exit: Exit,
    /// Where 16 ranges do not suffice: the numbers, and what would fit.
    pub(crate) too_many: Option<Box<TooMany>>,
}

/// Reads, resolves and compiles a policy.
pub(crate) fn policy(path: &Path, cpuid: Option<&Cpuid>, profile: &[AccessCount]) -> Result<Loaded, Box<Refused>> {
    planned(parsed(path, input::read(path))?, cpuid, profile)
}

/// The same of a text in place of what is in the file.
pub(crate) fn policy_in(
    path: &Path,
    text: &str,
    cpuid: Option<&Cpuid>,
    profile: &[AccessCount],
) -> Result<Loaded, Box<Refused>> {
    planned(parsed(path, Ok(text.as_bytes().to_vec()))?, cpuid, profile)
}

/// Resolves and compiles a policy that is read already.
pub(crate) fn planned(policy: Policy, cpuid: Option<&Cpuid>, profile: &[AccessCount]) -> Result<Loaded, Box<Refused>> {
    let map = resolved(&policy, cpuid)?;
    let options = policy.options().with_profile(profile.to_vec());
    let plan = compiled(&policy, &map, &options, cpuid)?;
    Ok(Loaded {
        policy,
        options,
        plan,
        cpuid: cpuid.cloned(),
        no_presets: Vec::new(),
    })
}

/// The same for subcommands that only go on with a plan: what is wrong is printed.
pub(crate) fn policy_or_report(path: &Path, cpuid: Option<&Cpuid>, profile: &[AccessCount]) -> Result<Loaded, Failure> {
    policy(path, cpuid, profile).map_err(|refused| refused.report())
}

/// What a policy that is read already means; what is wrong is printed.
pub(crate) fn map(policy: &Policy, cpuid: Option<&Cpuid>) -> Result<DecisionMap, Failure> {
    resolved(policy, cpuid).map_err(|refused| refused.report())
}

/// The plan of a map that a policy became; what is wrong is printed.
pub(crate) fn plan(
    policy: &Policy,
    map: &DecisionMap,
    options: &CompileOptions,
    cpuid: Option<&Cpuid>,
) -> Result<Plan, Failure> {
    compiled(policy, map, options, cpuid).map_err(|refused| refused.report())
}

/// The same of a policy that is read already.
pub(crate) fn planned_or_report(
    policy: Policy,
    cpuid: Option<&Cpuid>,
    profile: &[AccessCount],
) -> Result<Loaded, Failure> {
    planned(policy, cpuid, profile).map_err(|refused| refused.report())
}

/// The same for this machine's kernel: what it holds by itself becomes presets.
pub(crate) fn policy_for_host(path: &Path, cpuid: Option<&Cpuid>, profile: &[AccessCount]) -> Result<Loaded, Failure> {
    planned_for_host(unresolved(path)?, cpuid, profile)
}

/// The same of a policy that is read already.
pub(crate) fn planned_for_host(
    policy: Policy,
    cpuid: Option<&Cpuid>,
    profile: &[AccessCount],
) -> Result<Loaded, Failure> {
    let map = map(&policy, cpuid)?;
    let options = policy.options().with_profile(profile.to_vec());
    let options = options.with_presets(held(&map, cpuid)?);
    let plan = plan(&policy, &map, &options, cpuid)?;
    Ok(Loaded {
        no_presets: no_presets(&map, options.held(), &plan),
        policy,
        options,
        plan,
        cpuid: cpuid.cloned(),
    })
}

/// What this machine's kernel holds of the map's fixed answers.
pub(crate) fn held(map: &DecisionMap, cpuid: Option<&Cpuid>) -> Result<Vec<Preset>, Failure> {
    let machine = |error: &dyn std::error::Error| Failure::Line(Exit::Machine, with_source(error));
    let device = msrgate_kvm::open().map_err(|error| machine(&error))?;
    msrgate_kvm::probe(&device).map_err(|error| machine(&error))?;
    let kvm = kvm_ioctls::Kvm::new().map_err(|error| machine(&error))?;
    let cpuid = cpuid.map(cpuid::to_kvm).transpose()?;
    msrgate_guest::held(&kvm, map, cpuid.as_ref()).map_err(|error| machine(&error))
}

/// What a policy, a plan or a raw filter says.
pub(crate) struct PolicyOrFilter {
    pub(crate) map: DecisionMap,
    /// The presets of a plan.
    pub(crate) presets: Vec<Preset>,
    /// How much it says: whether an access is left to the kernel, or also what it gets if not.
    pub(crate) by: By,
}

/// What the bytes of an input say, whichever of these they are.
pub(crate) fn policy_or_filter(path: &Path, bytes: Vec<u8>, cpuid: Option<&Cpuid>) -> Result<PolicyOrFilter, Failure> {
    if RawFormat::of(&bytes) == RawFormat::Policy {
        let policy = unresolved_in(path, bytes)?;
        let map = map(&policy, cpuid)?;
        return Ok(PolicyOrFilter {
            map,
            presets: Vec::new(),
            by: By::Actions,
        });
    }
    let RawInput {
        filter, plan, presets, ..
    } = filter(path, &bytes)?;
    let (map, by) = match plan {
        Some(map) => (map, By::Actions),
        None => (DecisionMap::of_filter(&filter), By::Verdicts),
    };
    Ok(PolicyOrFilter { map, presets, by })
}

/// A plan or a raw filter. What the kernel takes for something else than it looks like is told on standard error.
pub(crate) fn filter(path: &Path, bytes: &[u8]) -> Result<RawInput, Failure> {
    let shown = input::shown(path);
    let given = raw::read(bytes).map_err(|error| {
        Failure::input(match input::recorded(bytes) {
            Some((what, readers)) => format!("{shown}: it is {what} and no filter: {readers}"),
            None => format!("{shown}: {error}"),
        })
    })?;
    let mut stderr = stream::err();
    for remark in &given.remarks {
        // Where even this cannot be printed, there is nobody to tell.
        let _ = writeln!(stderr, "msrgate: {shown}: {remark}");
    }
    Ok(given)
}

/// Reads a policy and nothing more; what is wrong is printed.
pub(crate) fn unresolved(path: &Path) -> Result<Policy, Failure> {
    parsed(path, input::read(path)).map_err(|refused| refused.report())
}

/// The same of a policy, or of what a plan or a raw filter is as one.
pub(crate) fn unresolved_or_filter(path: &Path) -> Result<Policy, Failure> {
    let given = input::read(path);
    let read = match &given {
        Ok(bytes) if raw::read(bytes).is_ok() => {
            let text = decompile(&filter(path, bytes)?).to_string();
            // Where its lines are to be seen.
            let name = format!("msrgate decompile {}", input::shown(path));
            parsed(Path::new(&name), Ok(text.into_bytes()))
        }
        _ => parsed(path, given),
    };
    read.map_err(|refused| refused.report())
}

/// Reads the policy in the bytes of an input; what is wrong is printed.
pub(crate) fn unresolved_in(path: &Path, bytes: Vec<u8>) -> Result<Policy, Failure> {
    parsed(path, Ok(bytes)).map_err(|refused| refused.report())
}

/// The policy of an input, with what it extends.
fn parsed(path: &Path, given: Result<Vec<u8>, String>) -> Result<Policy, Box<Refused>> {
    let path = match path == Path::new("-") {
        true => Path::new(input::STDIN),
        false => path,
    };
    accepted(Policy::load(
        path,
        &Given {
            path,
            given: given.and_then(unless_recognised),
        },
    ))
}

/// The bytes, or in words what was named in place of a policy, where that is clear by its beginning.
fn unless_recognised(bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    let head = bytes.get(..4096).unwrap_or(&bytes);
    if let Some((what, readers)) = input::recorded(head) {
        return Err(format!("it is {what} and no policy: {readers}"));
    }
    let head = head.trim_ascii_start();
    let what = match head {
        _ if scanned::is_scan(head) => "it is a scan and no policy: `msrgate migrate` and `msrgate diff` read scans",
        [b'{' | b'[', ..] if is_json(&bytes) => {
            "it is JSON and no policy: `msrgate decompile` makes a policy of a plan or a filter, `msrgate import` of other tools' files"
        }
        [0x7f, b'E', b'L', b'F', ..] => "it is a program and no policy",
        _ => return Ok(bytes),
    };
    Err(what.to_owned())
}

/// Whether the bytes are JSON, or lines of it.
fn is_json(bytes: &[u8]) -> bool {
    let values = serde_json::Deserializer::from_slice(bytes).into_iter::<serde::de::IgnoredAny>();
    values.into_iter().all(|value| value.is_ok())
}

fn resolved(policy: &Policy, cpuid: Option<&Cpuid>) -> Result<DecisionMap, Box<Refused>> {
    let map = policy.decision_map(cpuid);
    map.map_err(|needed| refused(policy, needed.diagnostic(), Exit::Input))
}

fn accepted(read: Result<Policy, PolicyErrors>) -> Result<Policy, Box<Refused>> {
    read.map_err(|rejected| {
        Box::new(Refused {
            sources: rejected.sources,
            diagnostics: rejected.diagnostics,
            exit: Exit::Input,
            too_many: None,
        })
    })
}

fn compiled(
    policy: &Policy,
    map: &DecisionMap,
    options: &CompileOptions,
    cpuid: Option<&Cpuid>,
) -> Result<Plan, Box<Refused>> {
    Plan::compile_for(map, options).map_err(|error| {
        // The policy is fine; it does not fit what the kernel can hold.
        if !matches!(error, PlanError::TooManyRanges { .. }) {
            return refused(policy, policy.explain_error(&error, None), Exit::No);
        }
        let fit = FitAdvice::search(policy, map, cpuid);
        let mut refused = refused(policy, policy.explain_error(&error, Some(&fit)), Exit::No);
        let policy = policy.clone();
        refused.too_many = Some(Box::new(TooMany { policy, error, fit }));
        refused
    })
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
    pub(crate) fn report(self) -> Failure {
        // Where even this cannot be printed, the exit code still tells.
        let _ = render::findings(&self.diagnostics.iter().collect::<Vec<_>>(), &self.sources);
        match self.too_many {
            Some(too_many) => Failure::TooMany(too_many),
            None => Failure::Reported(self.exit),
        }
    }
}
