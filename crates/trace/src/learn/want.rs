//! What a policy must give each access so that the guests are served as they were.

use std::collections::BTreeMap;
use std::sync::Arc;

use msrgate_core::{ArgumentKey, Arguments, Disposition, Msr, MsrRange, OnLockedBits, Op, ReadAction, WriteAction};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_msrs::{Access, Class};
use msrgate_policy::print;

use super::summary::{Summary, Usage};

/// How far a learned policy may go beyond what was seen.
#[derive(Clone, Default, Debug)]
pub struct Generalize {
    /// To a class in a direction, where at least half of its MSRs were used in that direction.
    pub classes: bool,
    /// To a range of MSRs of one class in a direction, where at least half of it was used in that direction.
    pub ranges: bool,
    /// The guests' CPUID: MSRs that it rules out do not count to a class.
    pub cpuid: Option<Cpuid>,
}

/// What a trace does not tell of an access, so that the policy may serve the guest otherwise than it was served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Remark {
    /// The register.
    pub msr: Msr,
    /// The direction.
    pub op: Op,
    /// What is not known, and what the policy does.
    pub message: String,
}

/// What the accesses of one MSR are to get; `None` leaves them to the default.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub(super) struct Want {
    pub(super) read: Option<ReadAction>,
    pub(super) write: Option<WriteAction>,
}

impl Want {
    /// Whether it leaves the direction to the kernel.
    pub(super) fn allows(&self, op: Op) -> bool {
        match op {
            Op::Read => self.read == Some(ReadAction::Allow),
            Op::Write => self.write == Some(WriteAction::Allow),
        }
    }

    /// Whether it is about the direction.
    pub(super) fn decides(&self, op: Op) -> bool {
        match op {
            Op::Read => self.read.is_some(),
            Op::Write => self.write.is_some(),
        }
    }

    /// Leaves the direction to the kernel, unless it gets something else.
    fn allow(&mut self, op: Op) {
        match op {
            Op::Read => _ = self.read.get_or_insert(ReadAction::Allow),
            Op::Write => _ = self.write.get_or_insert(WriteAction::Allow),
        }
    }
}

pub(super) type Wants = BTreeMap<Msr, Want>;

/// What was served, as it was served.
pub(super) fn wants(summary: &Summary) -> (Wants, Vec<Remark>) {
    let mut wants = Wants::new();
    let mut remarks = Vec::new();
    for ((msr, op), seen) in &summary.seen {
        if MsrRange::X2APIC.contains(*msr) {
            continue;
        }
        let other = match op {
            Op::Read => Op::Write,
            Op::Write => Op::Read,
        };
        let shadowed = summary
            .seen
            .get(&(*msr, other))
            .is_some_and(|other| did(other) == Disposition::Shadow);
        let want = wants.entry(*msr).or_default();
        let told = match op {
            Op::Read => read(seen, shadowed).map(|action| want.read = Some(action)),
            Op::Write => write(seen, shadowed).map(|action| want.write = Some(action)),
        };
        if let Err(message) = told {
            want.allow(*op);
            remarks.push(Remark {
                msr: *msr,
                op: *op,
                message,
            });
        }
    }
    (wants, remarks)
}

/// What was always done; [`Disposition::Fault`], which was never, where that changed.
fn did(seen: &Usage) -> Disposition {
    let mut dids = seen.did.keys().map(|did| did.action());
    let first = dids.next().unwrap_or(Disposition::Fault);
    if dids.all(|did| did == first) {
        first
    } else {
        Disposition::Fault
    }
}

fn read(seen: &Usage, written_to_shadow: bool) -> Result<ReadAction, String> {
    let did = match (did(seen), seen.values.iter().next()) {
        // Where nothing was read before a write, any initial value serves.
        (Disposition::Shadow, None) if written_to_shadow => return Ok(ReadAction::Shadow(0)),
        (Disposition::Shadow, Some(_)) if !written_to_shadow => Disposition::Value,
        (did, _) => did,
    };
    let action = ReadAction::of(did, &mut Served(seen, did))?;
    action.ok_or_else(|| untold(seen, did))
}

fn write(seen: &Usage, read_from_shadow: bool) -> Result<WriteAction, String> {
    let did = match did(seen) {
        // Nobody saw what became of it.
        Disposition::Shadow if !read_from_shadow => Disposition::Ignore,
        did => did,
    };
    let action = WriteAction::of(did, &mut Served(seen, did))?;
    action.ok_or_else(|| untold(seen, did))
}

/// What a trace tells of the arguments of an action: the values that were seen, where they are noted.
struct Served<'a>(&'a Usage, Disposition);

impl Served<'_> {
    fn untold<T>(&self) -> Result<T, String> {
        Err(untold(self.0, self.1))
    }
}

impl Arguments for Served<'_> {
    type Error = String;

    fn number(&mut self, _: ArgumentKey) -> Result<u64, String> {
        self.0.values.only().map_or_else(|| self.untold(), |value| Ok(*value))
    }

    fn number_or(&mut self, _: ArgumentKey, _: u64) -> Result<u64, String> {
        self.untold()
    }

    fn numbers(&mut self, _: ArgumentKey) -> Result<Arc<[u64]>, String> {
        match self.0.values.more() {
            false => Ok(self.0.values.iter().copied().collect()),
            true => self.untold(),
        }
    }

    fn name(&mut self, _: ArgumentKey) -> Result<Arc<str>, String> {
        self.untold()
    }

    fn otherwise(&mut self, _: ArgumentKey) -> Result<OnLockedBits, String> {
        self.untold()
    }
}

fn untold(seen: &Usage, always: Disposition) -> String {
    match always {
        Disposition::Fault => {
            let words: Vec<String> = seen
                .did
                .iter()
                .map(|(did, count)| format!("`{did}` {}", print::counted(*count, "time", "times")))
                .collect();
            format!(
                "served in several ways, {}; it is left to the kernel",
                words.join(" and ")
            )
        }
        Disposition::Value | Disposition::Only | Disposition::Shadow => several(seen),
        did => format!("served by `{did}`, of which a trace does not tell all; it is left to the kernel"),
    }
}

fn several(seen: &Usage) -> String {
    let values: Vec<String> = seen.values.iter().take(4).map(|value| format!("{value:#x}")).collect();
    let more = if seen.values.more() || seen.values.iter().count() > values.len() {
        ", …"
    } else {
        ""
    };
    format!(
        "served with several values, {}{more}; it is left to the kernel",
        values.join(", ")
    )
}

/// Adds what is not far from what was seen, and gives the classes that this made whole.
pub(super) fn widen(wants: &mut Wants, widen: &Generalize) -> Vec<(Class, Op)> {
    let mut whole = Vec::new();
    for op in Op::ALL {
        // Ranges first: they are to lie between what was seen.
        if widen.ranges {
            ranges(wants, op);
        }
        if widen.classes {
            classes(wants, op, widen.cpuid.as_ref(), &mut whole);
        }
    }
    whole
}

fn allows(wants: &Wants, msr: Msr, op: Op) -> bool {
    wants.get(&msr).is_some_and(|want| want.allows(op))
}

/// A class whose MSRs were used to the half, of those that are there and can be used in this direction.
fn classes(wants: &mut Wants, op: Op, cpuid: Option<&Cpuid>, whole: &mut Vec<(Class, Op)>) {
    let impossible = match op {
        Op::Read => Access::WriteOnly,
        Op::Write => Access::ReadOnly,
    };
    // Judged by what was seen, not by what another class adds.
    let seen = wants.clone();
    for class in Class::ALL.iter().filter(|class| **class != Class::X2apic) {
        let members = || {
            msrgate_msrs::all()
                .iter()
                .filter(|entry| entry.classes().contains(class))
        };
        let (mut there, mut used) = (0, 0);
        for entry in members() {
            let is_used = allows(&seen, entry.msr, op);
            let exists = cpuid.is_none_or(|cpuid| entry.exists_on(cpuid) != Some(false));
            used += usize::from(is_used);
            there += usize::from(is_used || exists && entry.access != impossible);
        }
        if used >= 2 && used * 2 >= there {
            for entry in members() {
                wants.entry(entry.msr).or_default().allow(op);
            }
            if members().any(|entry| !allows(&seen, entry.msr, op)) {
                whole.push((*class, op));
            }
        }
    }
}

/// Neighbours of one class joined while at least half of the MSRs from the first to the last were used, and all of them
/// are of that class: what the database does not know is nothing that was nearly seen.
fn ranges(wants: &mut Wants, op: Op) {
    /// `used` MSRs of a class from `first` to `last`.
    struct Run {
        class: Option<Class>,
        first: u32,
        last: u32,
        used: u64,
    }
    let mut runs: Vec<Run> = Vec::new();
    for (msr, _) in wants.iter().filter(|(_, want)| want.allows(op)) {
        let mut run = Run {
            class: class(*msr),
            first: msr.0,
            last: msr.0,
            used: 1,
        };
        while let Some(before) = runs.pop_if(|before| {
            let length = u64::from(run.last - before.first) + 1;
            before.class.is_some()
                && (before.used + run.used) * 2 >= length
                && (before.last..=run.first).all(|msr| class(Msr(msr)) == before.class)
        }) {
            run = Run {
                class: run.class,
                first: before.first,
                last: run.last,
                used: before.used + run.used,
            };
        }
        runs.push(run);
    }
    for run in runs {
        for msr in run.first..=run.last {
            wants.entry(Msr(msr)).or_default().allow(op);
        }
    }
}

/// The first of its classes, under which a learned policy lists it.
pub(super) fn class(msr: Msr) -> Option<Class> {
    msrgate_msrs::by_msr(msr).and_then(|entry| entry.classes().first().copied())
}
