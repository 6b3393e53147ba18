//! Policies and CPUIDs from files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use msrgate_core::{Msr, MsrRange, Op};
use msrgate_guest::{NoPreset, no_presets};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::{By, CompileOptions, DecisionMap, Plan, PlanError, Preset, Touched};
use msrgate_policy::raw::{self, Form, Given};
use msrgate_policy::{Diagnostic, Files, Fit, Policy, Rejected, Source};
use msrgate_trace::{Lines, Record};

use crate::args::{CpuidArgs, ProfileArgs};
use crate::exit::{Exit, Failure};
use crate::render;
use crate::replay::kvm::to_kvm;
use crate::replay::{Opened, with_source};
use crate::stream;

/// The most bytes that are read of an input that is held in memory as a whole. Traces are read line by line.
const MOST: u64 = 16 << 20;

/// What standard input is called.
const STDIN: &str = "standard input";

/// An input as it is named in messages.
pub(crate) fn shown(path: &Path) -> String {
    match path == Path::new("-") {
        true => STDIN.to_owned(),
        false => path.display().to_string(),
    }
}

/// Opens an input; `-` is standard input, which can be read once.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    static STDIN_OPENED: AtomicBool = AtomicBool::new(false);
    if path != Path::new("-") {
        return File::open(path);
    }
    match STDIN_OPENED.swap(true, Ordering::Relaxed) {
        true => Err(io::Error::other("it is named twice, and it can be read once")),
        false => stdin(),
    }
}

fn stdin() -> io::Result<File> {
    Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?))
}

/// All of an input, or in words why not.
fn read(path: &Path) -> Result<Vec<u8>, String> {
    whole(open(path).map_err(|error| error.to_string())?)
}

/// All of an input that is open, or in words why not.
pub(crate) fn whole(from: impl Read) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    from.take(MOST + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    match bytes.len() as u64 > MOST {
        true => Err(format!(
            "it has more than {} MiB, and only a trace or a scan may: name the file that is meant",
            MOST >> 20
        )),
        false => Ok(bytes),
    }
}

/// The text of an input, or in words why it is none.
pub(crate) fn text(bytes: Vec<u8>) -> Result<String, String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        format!("it is not UTF-8 text: byte {at} does not belong to any character")
    })
}

/// Refuses an output that would overwrite an input, under whatever name.
pub(crate) fn refuse_overwrite<'a>(output: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> Result<(), Failure> {
    let same = |a: &fs::Metadata, b: &fs::Metadata| a.is_file() && (a.dev(), a.ino()) == (b.dev(), b.ino());
    let Ok(written) = fs::metadata(output) else {
        return Ok(());
    };
    for input in inputs {
        let read = match input == Path::new("-") {
            true => stdin().and_then(|stdin| stdin.metadata()),
            false => fs::metadata(input),
        };
        if read.is_ok_and(|read| same(&written, &read)) {
            return Err(Failure::input(format!(
                "`{}` is the file of the input `{}`, and would be overwritten: name another output",
                output.display(),
                shown(input)
            )));
        }
    }
    Ok(())
}

/// The file system, with the policy that the command line names, which is read already.
struct Disk<'a> {
    path: &'a Path,
    given: Result<Vec<u8>, String>,
}

impl Files for Disk<'_> {
    fn read(&self, path: &Path) -> Result<(PathBuf, String), String> {
        if path == self.path {
            // A pipe has no canonical path, and no file that it extends can be the pipe.
            let canonical = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
            return Ok((canonical, text(self.given.clone()?)?));
        }
        // The path is another's word: a device or a FIFO could give bytes without end, or none for ever.
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() || metadata.is_dir() => {}
            Ok(_) => return Err("it is not a regular file".to_owned()),
            Err(error) => return Err(error.to_string()),
        }
        let bytes = read(path)?;
        let canonical = fs::canonicalize(path).map_err(|error| error.to_string())?;
        Ok((canonical, text(bytes)?))
    }

    fn extended(&self, by: &Path, name: &str) -> PathBuf {
        let beside = by != self.path || fs::metadata(by).is_ok_and(|metadata| metadata.is_file());
        // Nothing lies beside a pipe.
        let directory = by.parent().filter(|_| beside).unwrap_or(Path::new(""));
        directory.join(name)
    }
}

/// A policy that compiles, and all that was made of it.
pub(crate) struct Loaded {
    pub(crate) policy: Policy,
    pub(crate) map: DecisionMap,
    pub(crate) options: CompileOptions,
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
    planned(parsed(path, read(path))?, cpuid, profile)
}

/// Resolves and compiles a policy that is read already.
pub(crate) fn planned(policy: Policy, cpuid: Option<&Cpuid>, profile: &[Touched]) -> Result<Loaded, Box<Refused>> {
    let (policy, map) = resolved(policy, cpuid)?;
    let options = policy.options().with_profile(profile.to_vec());
    compiled(policy, map, options, cpuid)
}

/// The same for subcommands that only go on with a plan: what is wrong is printed.
pub(crate) fn policy_or_report(path: &Path, cpuid: Option<&Cpuid>, profile: &[Touched]) -> Result<Loaded, Failure> {
    policy(path, cpuid, profile).map_err(|refused| refused.report())
}

/// The same of a policy that is read already.
pub(crate) fn planned_or_report(policy: Policy, cpuid: Option<&Cpuid>, profile: &[Touched]) -> Result<Loaded, Failure> {
    planned(policy, cpuid, profile).map_err(|refused| refused.report())
}

/// The same for this machine's kernel: what it holds by itself becomes presets.
pub(crate) fn policy_for_host(path: &Path, cpuid: Option<&Cpuid>, profile: &[Touched]) -> Result<Loaded, Failure> {
    planned_for_host(unresolved(path)?, cpuid, profile)
}

/// The same of a policy that is read already.
pub(crate) fn planned_for_host(policy: Policy, cpuid: Option<&Cpuid>, profile: &[Touched]) -> Result<Loaded, Failure> {
    let (policy, map) = resolved(policy, cpuid).map_err(|refused| refused.report())?;
    let options = policy.options().with_profile(profile.to_vec());
    let options = options.holding(held(&map, cpuid)?);
    let loaded = compiled(policy, map, options, cpuid).map_err(|refused| refused.report())?;
    Ok(Loaded {
        no_presets: no_presets(&loaded.map, loaded.options.held(), &loaded.plan),
        ..loaded
    })
}

/// What this machine's kernel holds of the map's fixed answers.
pub(crate) fn held(map: &DecisionMap, cpuid: Option<&Cpuid>) -> Result<Vec<Preset>, Failure> {
    let machine = |error: &dyn std::error::Error| Failure::Line(Exit::Machine, with_source(error));
    let device = msrgate_kvm::open().map_err(|error| machine(&error))?;
    msrgate_kvm::probe(&device).map_err(|error| machine(&error))?;
    let kvm = kvm_ioctls::Kvm::new().map_err(|error| machine(&error))?;
    let cpuid = cpuid.map(to_kvm).transpose()?;
    msrgate_guest::held(&kvm, map, cpuid.as_ref()).map_err(|error| machine(&error))
}

/// What a policy, a plan or a raw filter says.
pub(crate) struct Said {
    pub(crate) map: DecisionMap,
    /// The presets of a plan.
    pub(crate) presets: Vec<Preset>,
    /// How much it says: whether an access is left to the kernel, or also what it gets if not.
    pub(crate) by: By,
}

/// What the bytes of an input say, whichever of these they are.
pub(crate) fn said(path: &Path, bytes: Vec<u8>, cpuid: Option<&Cpuid>) -> Result<Said, Failure> {
    if Form::of(&bytes) == Form::Policy {
        let policy = unresolved_in(path, bytes)?;
        let (_, map) = resolved(policy, cpuid).map_err(|refused| refused.report())?;
        return Ok(Said {
            map,
            presets: Vec::new(),
            by: By::Actions,
        });
    }
    let Given {
        filter, plan, presets, ..
    } = filter(path, &bytes)?;
    let (map, by) = match plan {
        Some(map) => (map, By::Actions),
        None => (DecisionMap::of_filter(&filter), By::Verdicts),
    };
    Ok(Said { map, presets, by })
}

/// A plan or a raw filter. What the kernel takes for something else than it looks like is told on standard error.
pub(crate) fn filter(path: &Path, bytes: &[u8]) -> Result<Given, Failure> {
    let shown = shown(path);
    let given = raw::read(bytes).map_err(|error| Failure::input(format!("{shown}: {error}")))?;
    let mut stderr = stream::err();
    for remark in &given.remarks {
        // Where even this cannot be printed, there is nobody to tell.
        let _ = writeln!(stderr, "msrgate: {shown}: {remark}");
    }
    Ok(given)
}

/// All of an input.
pub(crate) fn bytes(path: &Path) -> Result<Vec<u8>, Failure> {
    read(path).map_err(|error| Failure::input(format!("cannot read `{}`: {error}", shown(path))))
}

/// Reads a policy and nothing more; what is wrong is printed.
pub(crate) fn unresolved(path: &Path) -> Result<Policy, Failure> {
    parsed(path, read(path)).map_err(|refused| refused.report())
}

/// Reads the policy in the bytes of an input; what is wrong is printed.
pub(crate) fn unresolved_in(path: &Path, bytes: Vec<u8>) -> Result<Policy, Failure> {
    parsed(path, Ok(bytes)).map_err(|refused| refused.report())
}

/// The policy of an input, with what it extends.
fn parsed(path: &Path, given: Result<Vec<u8>, String>) -> Result<Policy, Box<Refused>> {
    let path = match path == Path::new("-") {
        true => Path::new(STDIN),
        false => path,
    };
    accepted(Policy::load(path, &Disk { path, given }))
}

fn resolved(policy: Policy, cpuid: Option<&Cpuid>) -> Result<(Policy, DecisionMap), Box<Refused>> {
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

fn compiled(
    policy: Policy,
    map: DecisionMap,
    options: CompileOptions,
    cpuid: Option<&Cpuid>,
) -> Result<Loaded, Box<Refused>> {
    let error = match Plan::compile_for(&map, &options) {
        Ok(plan) => {
            return Ok(Loaded {
                policy,
                map,
                options,
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
        // Where even this cannot be printed, the exit code still tells.
        let _ = render::findings(&self.diagnostics.iter().collect::<Vec<_>>(), &self.sources);
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
    let name = shown(path);
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
    let name = shown(path);
    let unreadable = |error: io::Error| Failure::input(format!("cannot read `{name}`: {error}"));
    let malformed = |error: &dyn std::fmt::Display| Failure::input(format!("{name}: {error}"));
    let mut file = BufReader::new(open(path).map_err(unreadable)?);
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
    let text = whole(file).and_then(text).map_err(|error| malformed(&error))?;
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
