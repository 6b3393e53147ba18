//! `msrgate replay`: a recorded guest's accesses, run as a real guest under a policy.
//!
//! The same accesses run three times in step: twice without the policy, since what differs between these two differs
//! by itself (clocks, counters), and once under it.

pub(crate) mod compare;
mod engine;
pub(crate) mod kvm;
mod log;
mod machine;
pub(crate) mod print;
#[cfg(test)]
mod learned;

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;

use msrgate_core::Event;
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;
use msrgate_trace::{Record, TraceError};

use crate::args::{BackendArg, ReplayArgs};
use crate::exit::{Exit, Failure, with_source};
use crate::{cpuid, handler, input, json, load, stream, trace};
use compare::Comparison;
use machine::{Backend, Machine};

/// How many accesses run between two looks at what they got.
const BATCH: usize = 4096;

/// How many vCPUs, of all VMs together, one trace may name.
const MOST_VCPUS: usize = 64;

/// The three runs of one vCPU.
struct VcpuBackends {
    /// Without the policy, twice.
    plain: [Box<dyn Machine>; 2],
    /// Under the policy.
    ruled: Box<dyn Machine>,
}

pub(crate) fn run(args: &ReplayArgs) -> Result<Exit, Failure> {
    let given = cpuid::given(&args.cpuid)?;
    let profile = trace::profile(&args.profile)?;
    let (backend, fallback) = choose(args.backend)?;
    if let Some(why) = &fallback
        && !args.json
    {
        writeln!(stream::err(), "msrgate: running on the engine, since {why}")?;
    }
    let policy = load::unresolved(&args.policy)?;
    let mut comparison: Option<Comparison> = None;
    let mut broken: Option<(String, TraceError)> = None;
    for path in &args.traces {
        let name = input::shown(path);
        let mut lines = match trace::open(path) {
            Ok(lines) => lines,
            Err(trace::Opened::Unreadable(line)) => return Err(Failure::input(line)),
            Err(trace::Opened::Malformed(error)) => {
                broken = Some((name, error));
                break;
            }
        };
        let header = lines.header();
        let cpuid = match (&given, header.parse_cpuid()) {
            (Some(given), _) => Some(given.clone()),
            (None, Some(Ok(cpuid))) => Some(cpuid),
            (None, Some(Err(error))) => {
                broken = Some((name, error));
                break;
            }
            (None, None) => None,
        };
        let is_partial = header.is_partial();
        let loaded = match backend {
            Backend::Kvm => load::planned_for_host(policy.clone(), cpuid.as_ref(), &profile)?,
            Backend::Engine => load::planned_or_report(policy.clone(), cpuid.as_ref(), &profile)?,
        };
        let plan = Arc::new(loaded.plan);
        if comparison.is_none() {
            handler::tell_of_handlers(&plan)?;
        }
        let seen = comparison.get_or_insert_with(|| Comparison::new(backend, loaded.policy.rules.clone()));
        seen.partial += u64::from(is_partial);
        seen.next_trace(plan.map().clone(), plan.presets());
        let maker = Maker {
            backend,
            plan,
            cpuid: cpuid.as_ref(),
        };
        if let Err(error) = replay(&mut lines, &maker, seen, args.json)? {
            broken = Some((name, error));
            break;
        }
    }
    if let Some((name, error)) = &broken {
        let before = if comparison.as_ref().is_some_and(|seen| seen.accesses() > 0) {
            "; what came before is reported"
        } else {
            ""
        };
        writeln!(stream::err(), "msrgate: {name}: {error}{before}")?;
    }
    // A trace without a single event is reported like any other; one whose header is broken has nothing to report on.
    if let Some(seen) = &comparison {
        match args.json {
            true => json::print(&print::printed(
                seen,
                fallback.as_deref(),
                broken.as_ref().map(|(_, error)| error),
            ))?,
            false => print::text(&mut stream::page(), seen, &args.list)?,
        }
    }
    Ok(match (&broken, &comparison) {
        (Some(_), _) => Exit::Input,
        (None, Some(seen)) if seen.accesses() == 0 => {
            writeln!(
                stream::err(),
                "msrgate: no access is in the traces, so nothing was replayed"
            )?;
            Exit::Input
        }
        (None, Some(seen)) if seen.changed() > 0 => Exit::No,
        _ => Exit::Yes,
    })
}

/// The backend, and why it is not KVM where that would have been taken.
fn choose(asked: BackendArg) -> Result<(Backend, Option<String>), Failure> {
    let usable = || -> Result<(), String> {
        let kvm = msrgate_kvm::open().map_err(|error| with_source(&error))?;
        msrgate_kvm::probe(&kvm).map_err(|error| with_source(&error))?;
        Ok(())
    };
    match asked {
        BackendArg::Engine => Ok((Backend::Engine, None)),
        BackendArg::Kvm => match usable() {
            Ok(()) => Ok((Backend::Kvm, None)),
            Err(why) => Err(Failure::Line(
                Exit::Machine,
                format!("{why}; `--backend engine` works without KVM"),
            )),
        },
        BackendArg::Auto => Ok(match usable() {
            Ok(()) => (Backend::Kvm, None),
            Err(why) => (Backend::Engine, Some(why)),
        }),
    }
}

/// Makes the three runs of a vCPU.
struct Maker<'a> {
    backend: Backend,
    plan: Arc<Plan>,
    cpuid: Option<&'a Cpuid>,
}

impl Maker<'_> {
    fn backends(&self) -> Result<VcpuBackends, Failure> {
        Ok(VcpuBackends {
            plain: [self.machine(None)?, self.machine(None)?],
            ruled: self.machine(Some(&self.plan))?,
        })
    }

    fn machine(&self, plan: Option<&Arc<Plan>>) -> Result<Box<dyn Machine>, Failure> {
        Ok(match self.backend {
            Backend::Kvm => Box::new(kvm::Guest::new(plan, self.cpuid)?),
            Backend::Engine => Box::new(engine::Guest::new(plan)),
        })
    }
}

/// Replays one trace; the inner error is the trace's, and what came before it has been compared.
fn replay(
    lines: &mut trace::Trace,
    maker: &Maker<'_>,
    seen: &mut Comparison,
    quiet: bool,
) -> Result<Result<(), TraceError>, Failure> {
    let mut vcpus: HashMap<(u32, u32), VcpuBackends> = HashMap::new();
    let mut batch: Vec<Event> = Vec::with_capacity(BATCH);
    let mut logged = log::Logged::new(quiet, seen.rules.len());
    loop {
        let next = lines.next().transpose();
        let event = match next {
            Ok(Some(Record::Gap(gap))) => {
                seen.miss(&gap);
                continue;
            }
            Ok(Some(Record::Event(event))) => Some(event),
            Ok(None) => None,
            Err(error) => {
                flush(&mut batch, &mut vcpus, maker, seen, &mut logged)?;
                return Ok(Err(error));
            }
        };
        let vcpu = |event: &Event| (event.vm, event.vcpu);
        let full = batch.len() == BATCH;
        let other = batch.last().map(vcpu) != event.as_ref().map(vcpu);
        if full || other {
            flush(&mut batch, &mut vcpus, maker, seen, &mut logged)?;
        }
        match event {
            Some(event) => batch.push(event),
            None => return Ok(Ok(())),
        }
    }
}

/// Runs a batch of one vCPU's accesses three times and compares.
fn flush(
    batch: &mut Vec<Event>,
    vcpus: &mut HashMap<(u32, u32), VcpuBackends>,
    maker: &Maker<'_>,
    seen: &mut Comparison,
    logged: &mut log::Logged,
) -> Result<(), Failure> {
    let Some(first) = batch.first() else {
        return Ok(());
    };
    let key = (first.vm, first.vcpu);
    if !vcpus.contains_key(&key) {
        if vcpus.len() == MOST_VCPUS {
            return Err(Failure::input(format!("the trace names more than {MOST_VCPUS} vCPUs")));
        }
        vcpus.insert(key, maker.backends()?);
    }
    let Some(backends) = vcpus.get_mut(&key) else {
        return Ok(());
    };
    let mut got = [Vec::new(), Vec::new(), Vec::new()];
    let [once, twice, ruled] = &mut got;
    let [first_plain, second_plain] = &mut backends.plain;
    first_plain.run(batch, once)?;
    second_plain.run(batch, twice)?;
    backends.ruled.run(batch, ruled)?;
    for (((event, once), twice), ruled) in batch.iter().zip(&*once).zip(&*twice).zip(&*ruled) {
        seen.add(event, [once.outcome, twice.outcome], ruled);
        logged.see(event, ruled, seen)?;
    }
    batch.clear();
    Ok(())
}
