//! The policies that are in force one after the other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use msrgate_core::Verdict;
use msrgate_plan::{By, DecisionMap, Preset};
use msrgate_policy::{Policy, Provider};
use msrgate_supervise::{Control, Reload};
use serde_json::Value;

use crate::args::{CpuidArgs, ProfileArgs, RunArgs};
use crate::exit::Failure;
use crate::json::{self, Printed, object};
use crate::run::handlers;
use crate::run::resolve::Resolved;
use crate::run::writer::{Lines, Output};
use crate::words::{self, counted};
use crate::{cpuid, load, trace};

/// What another policy is read and compiled with, as the first one was.
pub(crate) struct Policies {
    /// The file that was named, to be read again.
    file: Option<PathBuf>,
    cpuid: CpuidArgs,
    profile: ProfileArgs,
    ignore_unknown: bool,
    /// The programs that were started.
    providers: BTreeMap<String, Provider>,
    /// The fixed answers that the kernel holds.
    presets: Vec<Preset>,
    control: Control,
    lines: Lines,
    /// One after the other.
    change: Mutex<()>,
}

impl Policies {
    pub(crate) fn new(
        args: &RunArgs,
        providers: BTreeMap<String, Provider>,
        presets: Vec<Preset>,
        control: Control,
        lines: Lines,
    ) -> Policies {
        // The VMM may go into the background, where the current directory is another one.
        let again = |path: &PathBuf| {
            let is_none =
                path == Path::new("-") || path == Path::new("host") || msrgate_policy::built_in(path).is_some();
            match is_none {
                true => path.clone(),
                false => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
            }
        };
        Policies {
            file: args.policy.as_ref().filter(|path| *path != Path::new("-")).map(again),
            cpuid: CpuidArgs {
                cpuid: args.cpuid.cpuid.as_ref().map(again),
            },
            profile: ProfileArgs {
                profile: args.profile.profile.as_ref().map(again),
            },
            ignore_unknown: args.ignore_unknown,
            providers,
            presets,
            control,
            lines,
            change: Mutex::new(()),
        }
    }

    /// Whether there is a file that can be read again.
    pub(crate) fn can_read_again(&self) -> bool {
        self.file.is_some()
    }

    /// Puts in force what the file says now.
    pub(crate) fn read_again(&self) {
        let Some(file) = &self.file else { return };
        let policy = load::unresolved(file).map_err(|failure| failure.to_string());
        if let Err(line) = policy.and_then(|policy| self.put(policy, &file.display().to_string(), self.ignore_unknown))
        {
            self.lines.say(format!("the policy that was in force stays: {line}"));
        }
    }

    /// Puts a policy in force.
    pub(crate) fn take(&self, text: &str) -> Result<Value, String> {
        let policy = parsed(text)?;
        let name = policy.name.clone();
        self.put(policy, &name, self.ignore_unknown)
    }

    /// Puts a policy in force that leaves all to the kernel and the VMM.
    pub(crate) fn release(&self) -> Result<Value, String> {
        self.put(Policy::new("no policy", Verdict::Allow), "no policy", false)
    }

    fn put(&self, policy: Policy, name: &str, ignore_unknown: bool) -> Result<Value, String> {
        let _one_at_a_time = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let line = |failure: Failure| failure.to_string();
        let cpuid = cpuid::given(&self.cpuid).map_err(line)?;
        let profile = trace::profile(&self.profile).map_err(line)?;
        let mut resolved = Resolved::of(policy, cpuid, profile, ignore_unknown).map_err(line)?;
        handlers::are_started(&resolved.providers, &self.providers)?;
        resolved.options = resolved.options.with_presets(self.presets.clone());
        let plan = resolved.plan().map_err(line)?;
        let reload = Reload {
            plan,
            options: resolved.options,
            resolve: resolved.resolve,
        };
        let reloaded = self.control.reload(reload)?;
        let change = Change {
            name,
            before: &reloaded.before,
            after: &reloaded.after,
            vms: reloaded.vms,
            longest: reloaded.longest,
        };
        Ok(change.told(&self.lines, resolved.rules, resolved.logs))
    }
}

/// A policy that somebody sends.
pub(crate) fn parsed(text: &str) -> Result<Policy, String> {
    Policy::parse("msrgate reload", text).map_err(|rejected| {
        let first = rejected.diagnostics.first().map(|found| found.message.clone());
        first.unwrap_or_else(|| "the policy is refused".to_owned())
    })
}

/// A policy that took the place of another.
pub(crate) struct Change<'a> {
    pub(crate) name: &'a str,
    pub(crate) before: &'a DecisionMap,
    pub(crate) after: &'a DecisionMap,
    pub(crate) vms: usize,
    /// How long a thread of the VMM stood still at most.
    pub(crate) longest: Duration,
}

impl Change<'_> {
    /// Tells of it; what comes back is for who asked for it.
    pub(crate) fn told(&self, lines: &Lines, rules: usize, logs: bool) -> Value {
        let (_, accesses) = self.differences();
        lines.tell(Output::Policy {
            hash: words::hex(&self.after.hash()),
            rules,
            logs,
        });
        lines.say(format!(
            "{} is in force from here on, on {}; {accesses} of 2^33 accesses differ, and {}",
            self.name,
            counted(self.vms as u64, "VM", "VMs"),
            words::stood_still(self.longest_ns())
        ));
        json::value(&self.printed())
    }

    /// In how many ranges the two policies differ, and in how many accesses.
    fn differences(&self) -> (usize, u64) {
        let differ = self.before.differences(self.after, By::Actions);
        let reads = differ.reads.iter().map(|(range, ..)| range.len());
        let lengths = reads.chain(differ.writes.iter().map(|(range, ..)| range.len()));
        lengths.fold((0, 0), |(ranges, accesses), length| (ranges + 1, accesses + length))
    }

    fn longest_ns(&self) -> u64 {
        u64::try_from(self.longest.as_nanos()).unwrap_or(u64::MAX)
    }

    pub(crate) fn printed(&self) -> impl Printed {
        let (ranges, accesses) = self.differences();
        object! {
            /// On how many VMs the policy was put in force.
            vms: self.vms,
            /// The hash of the policy that was in force; of one that depends on the CPUID, what it is for the first VM.
            before: words::hex(&self.before.hash()),
            /// The hash of the policy that is in force: likewise.
            policy: words::hex(&self.after.hash()),
            /// Whether both mean the same.
            equal: self.before.differences(self.after, By::Actions).is_empty(),
            /// In how many ranges accesses differ, as of `diff`.
            ranges: ranges,
            /// How many accesses differ.
            accesses: accesses,
            /// How long the thread of the VMM stood still that stood still longest, in nanoseconds.
            longest_stop_ns: self.longest_ns(),
        }
    }
}
