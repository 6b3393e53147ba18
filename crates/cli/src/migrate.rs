//! `msrgate migrate`: whether a guest can go from one scanned host to others.

use std::fs;
use std::io::{self, BufReader, Write};
use std::path::Path;

use msrgate_core::Msr;
use msrgate_guest::scan::{GuestUse, Kind, Obstacle, Scan, Shared, common, migrate};
use msrgate_policy::Policy;
use msrgate_trace::{Lines, Record, is_trace};

use crate::args::MigrateArgs;
use crate::exit::{Exit, Failure};
use crate::json::{self, Printed, object};
use crate::scanned::{self, Facts};
use crate::stream::{Stream, Tone};
use crate::{cpuid, input, stream, words};

pub(crate) fn run(args: &MigrateArgs) -> Result<Exit, Failure> {
    let mut hosts = Vec::new();
    for path in &args.scans {
        let (facts, scan) = scanned::read(path)?;
        hosts.push(Host {
            name: input::shown(path),
            facts,
            scan,
        });
    }
    let guest = args.guest.as_deref().map(guest_use).transpose()?.unwrap_or_default();
    let ways = ways(&hosts, &guest);
    let scans: Vec<&Scan> = hosts.iter().map(|host| &host.scan).collect();
    let policy = policy(&hosts, &common(&scans, &guest))?;
    if let Some(path) = &args.policy {
        if path == Path::new("-") {
            write!(stream::out(), "{policy}")?;
            return Ok(exit(&ways));
        }
        input::refuse_overwrite(path, args.scans.iter().map(|path| path.as_path()))?;
        fs::write(path, &policy)
            .map_err(|error| Failure::input(format!("cannot write `{}`: {error}", path.display())))?;
    }
    match args.json {
        true => json::print(&printed(&hosts, &ways, &policy))?,
        false => print(&mut stream::page(), args, &hosts, &ways)?,
    }
    Ok(exit(&ways))
}

/// A host, as its scan has it.
pub(crate) struct Host {
    name: String,
    facts: Facts,
    scan: Scan,
}

/// From one host to another.
pub(crate) struct Way {
    from: usize,
    to: usize,
    found: Vec<Obstacle>,
}

impl Way {
    fn obstacles(&self) -> impl Iterator<Item = &Obstacle> {
        self.found.iter().filter(|found| found.kind.is_obstacle())
    }

    fn is_open(&self) -> bool {
        self.obstacles().next().is_none()
    }

    /// What QEMU's `-cpu` takes so that a guest has nothing that the other host refuses or that is untrue there.
    fn qemu(&self) -> Vec<&'static str> {
        let mut switches: Vec<&str> = self.obstacles().flat_map(properties).collect();
        switches.sort_unstable();
        switches.dedup();
        switches
    }
}

/// From the first host to the second, or among more from each to each.
fn ways(hosts: &[Host], guest: &GuestUse) -> Vec<Way> {
    let count = hosts.len();
    let pairs = (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
    let pairs = pairs.filter(|(from, to)| from != to && (count > 2 || from < to));
    let found = pairs.filter_map(|(from, to)| {
        let found = migrate(&hosts.get(from)?.scan, &hosts.get(to)?.scan, guest);
        Some(Way { from, to, found })
    });
    found.collect()
}

fn exit(ways: &[Way]) -> Exit {
    match ways.iter().all(Way::is_open) {
        true => Exit::Yes,
        false => Exit::No,
    }
}

/// What a trace or a CPUID says of the guest.
fn guest_use(path: &Path) -> Result<GuestUse, Failure> {
    let name = input::shown(path);
    let peeked = input::peek(path)?;
    if !is_trace(&peeked.head) {
        return Ok(GuestUse {
            cpuid: Some(cpuid::of_text(&name, peeked.all())?),
            accesses: None,
        });
    }
    let malformed = |error| Failure::input(format!("{name}: {error}"));
    let lines = Lines::new(BufReader::new(peeked.all())).map_err(malformed)?;
    let mut guest = GuestUse {
        cpuid: lines.header().parse_cpuid().transpose().map_err(malformed)?,
        accesses: Some(Default::default()),
    };
    for record in lines {
        if let Record::Event(event) = record.map_err(malformed)? {
            guest.note(event.msr, event.op, Some(event.value));
        }
    }
    Ok(guest)
}

/// QEMU's properties for the bits of an obstacle.
fn properties(found: &Obstacle) -> Vec<&'static str> {
    let Some(restore) = msrgate_msrs::restore(found.msr) else {
        return Vec::new();
    };
    let bits = (0..64).filter(|bit| found.kind.bits() >> bit & 1 == 1);
    let mut properties: Vec<&str> = bits.filter_map(|bit| restore.property(bit)).collect();
    properties.sort_unstable();
    properties.dedup();
    properties
}

/// The policy under which a guest sees the same on all hosts.
fn policy(hosts: &[Host], shared: &[Shared]) -> Result<String, Failure> {
    let mut text = String::from("# Under this policy a guest sees the same on each of these hosts:\n");
    for host in hosts {
        text.push_str(&format!("#   {}\n", described(host).replace(char::is_control, " ")));
    }
    text.push_str("version = 1\nname = \"same-on-all-hosts\"\ndefault = \"allow\"\n");
    let key = |msr: Msr| match words::name(msr) {
        Some(name) => format!("\"{name}\""),
        None => msr.to_string(),
    };
    for shared in shared {
        let Some(value) = shared.value else { continue };
        let write = if shared.writable { "ignore" } else { "deny" };
        text.push_str(&format!(
            "\n[[rule]]\nmsr = {}\nread = {{ value = \"{value:#x}\" }}\nwrite = \"{write}\"\nwhy = \"what all hosts can give\"\n",
            key(shared.msr),
        ));
    }
    let denied = shared.iter().filter(|shared| shared.value.is_none());
    let denied: Vec<String> = denied.map(|shared| key(shared.msr)).collect();
    if !denied.is_empty() {
        text.push_str(&format!(
            "\n[[rule]]\nmsr = [{}]\nread = \"deny\"\nwrite = \"deny\"\nwhy = \"not every host has it\"\n",
            denied.join(", ")
        ));
    }
    // What is written is parsed, so that nothing is written that is not a policy.
    let parsed = Policy::parse("hosts.toml", &text).map_err(|errors| {
        let what = errors.diagnostics.first().map(|found| found.message.clone());
        Failure::input(format!("no policy says that: {}", what.unwrap_or_default()))
    });
    parsed.map(|_| text)
}

fn described(host: &Host) -> String {
    let facts = [&host.facts.host, &host.facts.microcode, &host.facts.kernel];
    let facts: Vec<&str> = facts.into_iter().flatten().map(String::as_str).collect();
    format!("{}: {}", host.name, facts.join(", "))
}

fn value(value: Option<u64>) -> String {
    value.map_or("none".to_owned(), |value| format!("{value:#x}"))
}

/// What an obstacle is, in a clause.
fn says(found: &Obstacle) -> String {
    let bits = match words::bits(found.msr, found.kind.bits()) {
        names if names.is_empty() => words::bit_numbers(found.kind.bits()),
        names => format!("{} ({names})", words::bit_numbers(found.kind.bits())),
    };
    match found.kind {
        Kind::Refused { .. } => format!("KVM_SET_MSRS refuses the value because of {bits}"),
        Kind::Absent => "the other host's KVM does not have the register".to_owned(),
        Kind::Untrue { .. } => {
            format!("KVM_SET_MSRS takes the value, and {bits} would tell the guest something untrue about that host")
        }
        Kind::Changes => {
            "no KVM_SET_MSRS restores the value, and a guest that reads the register again sees another".to_owned()
        }
        Kind::ToBeSet => "KVM_SET_MSRS takes the value, which the VMM has to set".to_owned(),
        Kind::MayBeRefused { .. } => format!("KVM_SET_MSRS refuses the value of a guest that has changed {bits}"),
    }
}

/// What to do about an obstacle.
fn help(found: &Obstacle) -> Option<String> {
    let properties = properties(found);
    let bits = found.kind.bits();
    Some(match found.kind {
        Kind::Refused { .. } | Kind::Untrue { .. } if !properties.is_empty() => {
            let restore = msrgate_msrs::restore(found.msr)?;
            let nameless = (0..64).filter(|bit| bits >> bit & 1 == 1 && restore.property(*bit).is_none());
            let nameless = nameless.fold(0, |all, bit: u32| all | 1 << bit);
            let rest = match nameless {
                0 => String::new(),
                rest => format!("; {} has no property of QEMU's", words::bit_numbers(rest)),
            };
            format!("QEMU: -cpu MODEL,{}{rest}", words::switches(&properties))
        }
        Kind::Refused { .. } if is_vmx(found.msr) => {
            "QEMU: a CPU model that both hosts have, or -cpu MODEL,-vmx if the guest runs no guests".to_owned()
        }
        Kind::Absent if is_vmx(found.msr) => {
            "on an Intel processor load kvm_intel there with nested=1; or -cpu MODEL,-vmx if the guest runs no guests"
                .to_owned()
        }
        Kind::ToBeSet => {
            let property = msrgate_msrs::restore(found.msr)?.qemu_property?;
            format!("QEMU: -cpu MODEL,{property}={:#x}", found.from)
        }
        Kind::Absent | Kind::Changes | Kind::Untrue { .. } => {
            "a policy can answer for the register: --policy FILE writes one".to_owned()
        }
        _ => return None,
    })
}

fn is_vmx(msr: Msr) -> bool {
    let entry = msrgate_msrs::by_msr(msr);
    entry.is_some_and(|entry| entry.classes().contains(&msrgate_msrs::Class::Vmx))
}

fn print(out: &mut Stream<impl Write>, args: &MigrateArgs, hosts: &[Host], ways: &[Way]) -> io::Result<()> {
    for way in ways {
        let (Some(from), Some(to)) = (hosts.get(way.from), hosts.get(way.to)) else {
            continue;
        };
        let count = way.obstacles().count() as u64;
        let (from_name, to_name) = (&from.name, &to.name);
        match count {
            0 => out.say(Tone::Good, &format!("yes: a guest of {from_name} can go to {to_name}"))?,
            count => {
                let registers = words::counted(count, "register stands", "registers stand");
                out.say(
                    Tone::Bad,
                    &format!("no: {registers} in the way from {from_name} to {to_name}"),
                )?;
            }
        }
        if hosts.len() == 2 {
            writeln!(out, "  from  {}", described(from))?;
            writeln!(out, "  to    {}", described(to))?;
        }
        for found in way.found.iter().filter(|found| found.kind.is_obstacle()) {
            writeln!(out)?;
            one(out, found)?;
        }
        let remarks: Vec<&Obstacle> = way.found.iter().filter(|found| !found.kind.is_obstacle()).collect();
        if hosts.len() == 2 && !remarks.is_empty() {
            writeln!(out, "\nno obstacle, but to be considered:")?;
            for found in remarks {
                one(out, found)?;
            }
        }
        let properties = way.qemu();
        if !properties.is_empty() {
            writeln!(out, "\nall of these: -cpu MODEL,{}", words::switches(&properties))?;
        }
        for host in [from, to].into_iter().filter(|host| host.scan.lists.is_none()) {
            let name = &host.name;
            writeln!(
                out,
                "{name} does not say what KVM tells a VMM: `msrgate scan --json` there does"
            )?;
        }
        if hosts.len() > 2 {
            writeln!(out)?;
        }
    }
    match (&args.policy, ways.iter().all(Way::is_open)) {
        (Some(path), _) => writeln!(
            out,
            "{}: a guest sees the same on all hosts under this policy, which changes nothing of what a VMM sets",
            path.display()
        ),
        (None, false) => writeln!(
            out,
            "--policy FILE writes the policy under which a guest sees the same on all hosts"
        ),
        (None, true) => Ok(()),
    }
}

fn one(out: &mut Stream<impl Write>, found: &Obstacle) -> io::Result<()> {
    let name = words::name(found.msr)
        .map(|name| format!(" {name}"))
        .unwrap_or_default();
    let (own, other) = (value(Some(found.from)), value(found.to));
    writeln!(
        out,
        "{}{name}: a guest has {own}, the other host {other}: {}",
        found.msr,
        says(found)
    )?;
    if let (Kind::Refused { .. }, true) = (found.kind, msrgate_msrs::restore(found.msr).is_some()) {
        writeln!(out, "  QEMU ends with `failed to set MSR {} to {own}`", found.msr)?;
    }
    match help(found) {
        Some(help) => writeln!(out, "  {help}"),
        None => Ok(()),
    }
}

pub(crate) fn printed(hosts: &[Host], ways: &[Way], policy: &str) -> impl Printed {
    let way = |way: &Way| {
        let name = |place: usize| hosts.get(place).map(|host| host.name.clone());
        object! {
            /// From which host: the file.
            from: name(way.from),
            /// To which.
            to: name(way.to),
            /// Whether nothing stands in the way.
            can: way.is_open(),
            /// What stands in the way, by MSR.
            obstacles: way.obstacles().map(obstacle).collect::<Vec<_>>(),
            /// What does not stand in the way and is to be known: likewise.
            remarks: way.found.iter().filter(|found| !found.kind.is_obstacle()).map(obstacle).collect::<Vec<_>>(),
            /// All properties that `-cpu` is to turn off.
            qemu: way.qemu(),
        }
    };
    object! {
        /// Whether nothing stands in the way, on any way.
        can: ways.iter().all(Way::is_open),
        /// The scans in the order of the command line.
        hosts: hosts.iter().map(|host| object! {
            /// Where and under what it was made.
            #[serde(flatten)]
            facts: &host.facts,
            /// The scan's path as it was given.
            file: &host.name,
            /// Whether it says what KVM tells a VMM.
            lists: host.scan.lists.is_some(),
        }).collect::<Vec<_>>(),
        /// From the first host to the second; of more hosts, from each to each.
        ways: ways.iter().map(way).collect::<Vec<_>>(),
        /// The policy under which a guest sees the same on all hosts, in TOML.
        policy: policy,
    }
}

fn obstacle(found: &Obstacle) -> impl Printed + use<> {
    let bits = (0..64).filter(|bit| found.kind.bits() >> bit & 1 == 1);
    object! {
        /// The MSR.
        msr: found.msr.to_string(),
        /// The MSR's name; null if it is not known.
        name: words::name(found.msr),
        /// An obstacle is `"refused"`: KVM_SET_MSRS refuses the guest's value; `"absent"`: the other host's KVM does not
        /// have the register; `"untrue"`: KVM takes the value, which tells the guest what is not so there; `"changes"`: the
        /// guest reads another value. A remark is `"to-be-set"`: KVM takes the value, if the VMM sets it;
        /// `"may-be-refused"`: a guest can have set bits that the other host refuses.
        kind: found.kind.name(),
        /// What a guest has.
        from: value(Some(found.from)),
        /// What the other host offers; null if it offers nothing.
        to: found.to.map(|to| format!("{to:#x}")),
        /// The numbers of the bits that are concerned; empty if it is the whole register.
        bits: bits.collect::<Vec<u32>>(),
        /// Properties of QEMU's CPU models for these bits.
        qemu: properties(found),
        /// What to do; null if there is nothing to say.
        help: help(found),
    }
}
