//! What a guest can reach under a policy: by class of MSRs, who needs it, and what of it tells of the host.

use std::collections::BTreeSet;
use std::io::{self, Write};

use msrgate_core::{Action, Msr, MsrRange, Op, ReadAction, ReadSource, WriteAction};
use msrgate_msrs::{Class, Entry, Host, System, spell};
use msrgate_trace::report::Kind;

use crate::json::{Printed, object};
use crate::load::Loaded;
use crate::render::Table;
use crate::stream::{Stream, Tone};
use crate::words;

/// How many MSRs a line for people names.
const FEW: usize = 4;

/// Accesses of one direction by what they get.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    allowed: u64,
    answered: u64,
    denied: u64,
}

impl Counts {
    fn add(&mut self, kind: Kind, count: u64) {
        *match kind {
            Kind::Allowed => &mut self.allowed,
            Kind::Emulated => &mut self.answered,
            Kind::Faulted => &mut self.denied,
        } += count;
    }

    fn reached(self) -> u64 {
        self.allowed + self.answered
    }

    fn printed(self) -> impl Printed {
        object! {
            /// What the kernel answers.
            allowed: self.allowed,
            /// What gets something in the kernel's place that is no fault.
            answered: self.answered,
            /// What gets #GP.
            denied: self.denied,
        }
    }

    /// In a cell: how many get through, of how many.
    fn cell(self) -> String {
        let of = self.reached() + self.denied;
        match self.answered {
            0 => format!("{} of {of}", self.reached()),
            answered => format!("{} of {of}, {answered} answered", self.reached()),
        }
    }
}

/// One MSR of the database under the policy.
pub(crate) struct Register<'a> {
    entry: &'static Entry,
    read: &'a ReadAction,
    write: &'a WriteAction,
}

impl Register<'_> {
    /// What an access gets, whatever the policy says of what no filter stops.
    fn kind(&self, op: Op) -> Kind {
        if MsrRange::X2APIC.contains(self.entry.msr) {
            return Kind::Allowed;
        }
        Kind::of(match op {
            Op::Read => self.read.did(),
            Op::Write => self.write.did(),
        })
    }

    fn action(&self, op: Op) -> String {
        let action = match op {
            _ if MsrRange::X2APIC.contains(self.entry.msr) => return "allow".to_owned(),
            Op::Read => Action::Read(self.read.clone()),
            Op::Write => Action::Write(self.write.clone()),
        };
        action.to_string()
    }

    fn is_reached(&self) -> bool {
        Op::ALL.into_iter().any(|op| self.kind(op) != Kind::Faulted)
    }

    /// What the register tells of the host where the policy lets the kernel or the physical CPU answer reads.
    fn tells(&self) -> Option<Host> {
        let asked = matches!(self.read.source(), ReadSource::Host | ReadSource::Register);
        Some(self.entry.host).filter(|host| asked && *host != Host::Nothing)
    }
}

/// The MSRs of one class.
pub(crate) struct Row<'a> {
    class: Class,
    registers: Vec<Register<'a>>,
}

impl Row<'_> {
    fn counts(&self, op: Op) -> Counts {
        let mut counts = Counts::default();
        self.registers
            .iter()
            .for_each(|register| counts.add(register.kind(op), 1));
        counts
    }

    fn is_reached(&self) -> bool {
        self.registers.iter().any(Register::is_reached)
    }

    /// The systems of which an access that they make unguarded is served, or is denied.
    fn systems(&self, served: bool) -> BTreeSet<System> {
        let needs = self.registers.iter().flat_map(|register| {
            let needs = register.entry.needs();
            needs.filter(move |need| (register.kind(need.op) != Kind::Faulted) == served)
        });
        needs.map(|need| need.system).collect()
    }

    fn telling(&self) -> impl Iterator<Item = (&Register<'_>, Host)> {
        self.registers
            .iter()
            .filter_map(|register| Some((register, register.tells()?)))
    }
}

/// What a guest can reach.
pub(crate) struct Surface<'a> {
    loaded: &'a Loaded,
    /// Each MSR of the database once, in the first of its classes.
    rows: Vec<Row<'a>>,
}

impl<'a> Surface<'a> {
    pub(crate) fn of(loaded: &'a Loaded) -> Surface<'a> {
        let rows = Class::ALL.iter().map(|class| Row {
            class: *class,
            registers: registers(loaded, |entry| entry.classes().first() == Some(class)),
        });
        Surface {
            loaded,
            rows: rows.filter(|row| !row.registers.is_empty()).collect(),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Register<'a>> {
        self.rows.iter().flat_map(|row| &row.registers)
    }

    fn known(&self, op: Op) -> Counts {
        let mut counts = Counts::default();
        self.all().for_each(|register| counts.add(register.kind(op), 1));
        counts
    }

    /// The MSRs that the database does not know, without those that no filter stops.
    fn unnamed(&self, op: Op) -> Counts {
        let map = self.loaded.plan.map();
        let mut counts = Counts::default();
        let mut add = |range: MsrRange, kind: Kind| {
            let unfiltered = range.intersection(MsrRange::X2APIC).map_or(0, MsrRange::len);
            let known = msrgate_msrs::within(range).iter();
            let known = known.filter(|entry| !MsrRange::X2APIC.contains(entry.msr)).count() as u64;
            counts.add(kind, range.len().saturating_sub(unfiltered + known));
        };
        match op {
            Op::Read => map
                .reads()
                .iter()
                .for_each(|(range, decision)| add(range, Kind::of(decision.action.did()))),
            Op::Write => map
                .writes()
                .iter()
                .for_each(|(range, decision)| add(range, Kind::of(decision.action.did()))),
        }
        counts
    }

    /// For each system how many of the accesses that it makes unguarded are served, and how many there are.
    fn systems(&self) -> Vec<(System, usize, usize)> {
        let served = |system: System| {
            let needs = self.all().flat_map(|register| {
                let needs = register.entry.needs().filter(move |need| need.system == system);
                needs.map(|need| register.kind(need.op) != Kind::Faulted)
            });
            let needs: Vec<bool> = needs.collect();
            (system, needs.iter().filter(|served| **served).count(), needs.len())
        };
        System::ALL.into_iter().map(served).collect()
    }

    /// The few lines that say what matters, each with its key.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let known = self.all().count();
        let [reads, writes] = Op::ALL.map(|op| self.known(op));
        let mut reaches = format!(
            "reads of {} and writes of {} of {known} known MSRs",
            reads.reached(),
            writes.reached()
        );
        if reads.answered + writes.answered > 0 {
            let reads = words::counted(reads.answered, "read", "reads");
            let writes = words::counted(writes.answered, "write", "writes");
            reaches.push_str(&format!(
                ", of which {reads} and {writes} get no answer of the kernel's"
            ));
        }
        let [reads, writes] = Op::ALL.map(|op| self.unnamed(op).reached());
        if reads + writes > 0 {
            reaches.push_str(&format!("; reads of {reads} and writes of {writes} that have no name"));
        }
        let mut lines = vec![("reaches", reaches)];
        let systems = self.systems().into_iter();
        let systems = systems.map(|(system, served, of)| format!("{system} {served} of {of}"));
        let systems = systems.collect::<Vec<_>>().join(", ");
        lines.push((
            "serves",
            format!("of the accesses that systems make unguarded: {systems}"),
        ));
        let mut told = Vec::new();
        for host in [Host::Identity, Host::Activity, Host::Trace, Host::Setup] {
            let telling = self.rows.iter().flat_map(Row::telling);
            let telling = telling.filter(|(_, tells)| *tells == host);
            let names: Vec<&str> = telling.map(|(register, _)| register.entry.name()).collect();
            if !names.is_empty() {
                told.push(format!("{host} ({})", few(&names)));
            }
        }
        let told = match told.is_empty() {
            true => "nothing of the host".to_owned(),
            false => format!(
                "of the host, where the hardware's value gets through: {}",
                told.join("; ")
            ),
        };
        lines.push(("tells", told));
        lines
    }

    /// A table of the classes, those of which nothing is reached in a line of their own.
    pub(crate) fn table(&self, out: &mut Stream<impl Write>, all: bool) -> io::Result<()> {
        let mut table = Table::new(&["class", "reads", "writes", "needed by", "tells of the host"]);
        let mut folded = Vec::new();
        for row in &self.rows {
            if !all && !row.is_reached() {
                folded.push(format!("{} ({})", row.class, row.registers.len()));
                continue;
            }
            let names: Vec<&str> = row.telling().map(|(register, _)| register.entry.name()).collect();
            table.add_row([
                format!("@{}", row.class),
                row.counts(Op::Read).cell(),
                row.counts(Op::Write).cell(),
                systems(row),
                few(&names),
            ]);
        }
        table.print(out)?;
        if !folded.is_empty() {
            writeln!(out, "nothing of: {}", folded.join(", "))?;
        }
        Ok(())
    }

    /// For people.
    pub(crate) fn print(&self, out: &mut Stream<impl Write>, all: bool) -> io::Result<()> {
        let policy = &self.loaded.policy;
        out.say(
            Tone::Title,
            &format!("{}, default {}", words::plain(&policy.name), policy.default.name()),
        )?;
        for (key, line) in self.lines() {
            writeln!(out, "  {key:<9}{line}")?;
        }
        writeln!(out)?;
        self.table(out, all)
    }

    /// For programs.
    pub(crate) fn printed(&self) -> impl Printed {
        let (policy, plan) = (&self.loaded.policy, &self.loaded.plan);
        let classes = self.rows.iter().map(|row| {
            let telling = row.telling().map(|(register, host)| {
                object! {
                    /// The MSR.
                    msr: register.entry.msr.to_string(),
                    /// The MSR's name.
                    name: register.entry.name(),
                    /// What the hardware's value tells, as of `msr`.
                    host: host.name(),
                }
            });
            object! {
                /// The class's name without `@`.
                class: row.class.name(),
                /// What its MSRs are for.
                about: row.class.about(),
                /// How many MSRs.
                msrs: row.registers.len(),
                /// Of these, by what a read gets.
                reads: row.counts(Op::Read).printed(),
                /// And by what a write gets.
                writes: row.counts(Op::Write).printed(),
                /// The systems of which an access that they make unguarded is served.
                needed_by: names(row.systems(true)),
                /// The systems of which such an access is denied.
                denied_to: names(row.systems(false)),
                /// The MSRs that tell of the host, of which the kernel or the physical CPU answers reads.
                tells: telling.collect::<Vec<_>>(),
            }
        });
        object! {
            /// Which policy.
            policy: object! {
                /// The policy's name.
                name: &policy.name,
                /// The hash, as of `check`.
                hash: words::hex(&plan.map().hash()),
            },
            /// The policy's default: `"allow"` or `"deny"`.
            default: policy.default.name(),
            /// How many MSRs of the database, by what a read of them gets.
            reads: self.known(Op::Read).printed(),
            /// How many MSRs of the database, by what a write of them gets.
            writes: self.known(Op::Write).printed(),
            /// How many MSRs that the database does not have.
            unnamed: object! {
                /// By what a read gets.
                reads: self.unnamed(Op::Read).printed(),
                /// By what a write gets.
                writes: self.unnamed(Op::Write).printed(),
            },
            /// For each operating system, the accesses that it makes unguarded.
            systems: self.systems().into_iter().map(|(system, served, of)| object! {
                /// The operating system's name.
                system: system.to_string(),
                /// How many of them are not denied.
                served: served,
                /// How many there are.
                needs: of,
            }).collect::<Vec<_>>(),
            /// Each class.
            classes: classes.collect::<Vec<_>>(),
        }
    }
}

/// The MSRs of a class, whichever of its classes it is, under a policy.
pub(crate) struct ClassSurface<'a> {
    loaded: &'a Loaded,
    row: Row<'a>,
}

impl<'a> ClassSurface<'a> {
    pub(crate) fn of(loaded: &'a Loaded, class: Class) -> ClassSurface<'a> {
        ClassSurface {
            loaded,
            row: Row {
                class,
                registers: registers(loaded, |entry| entry.classes().contains(&class)),
            },
        }
    }

    /// What a row says of a register, behind its name.
    fn cells(&self, register: &Register<'_>) -> [String; 5] {
        let needs = register.entry.needs();
        let needs: BTreeSet<String> = needs.map(|need| format!("{} ({})", need.system, need.op)).collect();
        let places = Op::ALL.map(|op| {
            let rule = self.loaded.explain(register.entry.msr, op).cause.rule();
            rule.and_then(|(number, _)| self.loaded.policy.rule_place(number))
        });
        let mut places: Vec<String> = places.into_iter().flatten().collect();
        places.dedup();
        [
            register.action(Op::Read),
            register.action(Op::Write),
            needs.into_iter().collect::<Vec<_>>().join(", "),
            register.tells().map(|host| host.to_string()).unwrap_or_default(),
            places.join(", "),
        ]
    }

    /// For people: what is reached, and the rest in a line.
    pub(crate) fn print(&self, out: &mut Stream<impl Write>, all: bool) -> io::Result<()> {
        let (class, registers) = (self.row.class, &self.row.registers);
        let [reads, writes] = Op::ALL.map(|op| self.row.counts(op).reached());
        let of = words::counted(registers.len() as u64, "MSR", "MSRs");
        out.say(
            Tone::Title,
            &format!("@{class}: a guest reaches reads of {reads} and writes of {writes} of its {of}"),
        )?;
        writeln!(out, "  {}\n", class.about())?;
        let shown = |register: &&Register<'_>| all || register.is_reached();
        let mut table = Table::new(&["MSR", "name", "read", "write", "needed by", "tells of the host", "rule"]);
        let rows = registers
            .iter()
            .filter(shown)
            .map(|register| (register, self.cells(register)));
        let rows: Vec<(&Register<'_>, [String; 5])> = rows.collect();
        // Neighbours that are alike share a row.
        let alike = |(a, before): &(&Register<'_>, [String; 5]), (b, cells): &(&Register<'_>, [String; 5])| {
            !all && before == cells && a.entry.msr.0.checked_add(1) == Some(b.entry.msr.0)
        };
        for run in rows.chunk_by(alike) {
            let (Some((first, cells)), Some((last, _))) = (run.first(), run.last()) else {
                continue;
            };
            let (range, name) = match MsrRange::new(first.entry.msr, last.entry.msr) {
                Some(range) if range.len() > 1 => (range.to_string(), words::names(range)),
                _ => (first.entry.msr.to_string(), first.entry.name().to_owned()),
            };
            table.add_row([range, name].into_iter().chain(cells.iter().cloned()));
        }
        if !table.is_empty() {
            table.print(out)?;
        }
        let rest: Vec<Msr> = registers
            .iter()
            .filter(|register| !shown(register))
            .map(|register| register.entry.msr)
            .collect();
        if !rest.is_empty() {
            let rest = spell::patterns(&rest);
            let names: Vec<&str> = rest.iter().map(String::as_str).collect();
            writeln!(out, "denied: {}; --all shows all", few(&names))?;
        }
        Ok(())
    }

    /// For programs.
    pub(crate) fn printed(&self) -> impl Printed {
        let policy = &self.loaded.policy;
        let registers = self.row.registers.iter().map(|register| {
            let rule = |op| {
                let rule = self.loaded.explain(register.entry.msr, op).cause.rule();
                rule.map(|(number, _)| number)
            };
            object! {
                /// The MSR.
                msr: register.entry.msr.to_string(),
                /// The MSR's name.
                name: register.entry.name(),
                /// What a read gets, in words.
                read: register.action(Op::Read),
                /// The number of the rule that decides reads; null where none does.
                read_rule: rule(Op::Read),
                /// What a write gets.
                write: register.action(Op::Write),
                /// Likewise of writes.
                write_rule: rule(Op::Write),
                /// The accesses of it that operating systems make unguarded.
                needs: register.entry.needs().map(|need| object! {
                    /// The operating system.
                    system: need.system.to_string(),
                    /// The direction.
                    op: need.op.name(),
                    /// What it is for, and what becomes of the system without.
                    why: need.why,
                    /// Where that can be read.
                    source: need.source,
                }).collect::<Vec<_>>(),
                /// What its value tells of the host, where the kernel or the physical CPU answers reads; else null.
                host: register.tells().and_then(Host::name),
            }
        });
        object! {
            /// Which policy.
            policy: object! {
                /// The policy's name.
                name: &policy.name,
                /// The hash, as of `check`.
                hash: words::hex(&self.loaded.plan.map().hash()),
            },
            /// The class.
            class: self.row.class.name(),
            /// What its MSRs are for.
            about: self.row.class.about(),
            /// How many MSRs of the database, by what a read of them gets.
            reads: self.row.counts(Op::Read).printed(),
            /// How many MSRs of the database, by what a write of them gets.
            writes: self.row.counts(Op::Write).printed(),
            /// Each MSR.
            registers: registers.collect::<Vec<_>>(),
        }
    }
}

fn registers(loaded: &Loaded, which: impl Fn(&Entry) -> bool) -> Vec<Register<'_>> {
    let map = loaded.plan.map();
    let entries = msrgate_msrs::all().iter().filter(|entry| which(entry));
    let register = |entry: &'static Entry| Register {
        entry,
        read: &map.reads().get(entry.msr).action,
        write: &map.writes().get(entry.msr).action,
    };
    entries.map(register).collect()
}

/// Who needs a class, and to whom some of what is needed is denied.
fn systems(row: &Row<'_>) -> String {
    let (served, denied) = (row.systems(true), row.systems(false));
    let all: BTreeSet<System> = served.union(&denied).copied().collect();
    let word = |system: System| match (served.contains(&system), denied.contains(&system)) {
        (true, true) => format!("{system} (some denied)"),
        (false, _) => format!("{system} (denied)"),
        (true, false) => system.to_string(),
    };
    all.into_iter().map(word).collect::<Vec<_>>().join(", ")
}

fn names(systems: BTreeSet<System>) -> Vec<String> {
    systems.into_iter().map(|system| system.to_string()).collect()
}

/// The first of several names, and how many more there are.
fn few(names: &[&str]) -> String {
    let mut shown: Vec<String> = names.iter().take(FEW).map(|name| (*name).to_owned()).collect();
    if names.len() > FEW {
        shown.push(format!("{} more", names.len() - FEW));
    }
    shown.join(", ")
}
