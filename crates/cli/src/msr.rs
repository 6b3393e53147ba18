//! `msrgate msr`: the database.

use std::io::{self, Write};

use msrgate_core::Msr;
use msrgate_msrs::number;
use msrgate_msrs::{Class, Entry, Field, Host};

use crate::args::MsrArgs;
use crate::exit::{Exit, Failure};
use crate::json::{self, Printed, object};
use crate::render::Table;
use crate::stream::{self, Stream, Tone};
use crate::words;

pub(crate) fn run(args: &MsrArgs) -> Result<Exit, Failure> {
    let (what, value) = match args.what.as_slice() {
        [] => ("*".to_owned(), None),
        [register, value] if let Some(value) = value_of(register, value) => (register.clone(), Some(value)),
        words => (words.join(" "), None),
    };
    let mut found = search(&what)?;
    if args.leaks {
        found.retain(|entry| entry.host != Host::Nothing);
        // What says most stands first.
        let order = [Host::Identity, Host::Activity, Host::Trace, Host::Setup];
        found.sort_by_key(|entry| order.iter().position(|host| *host == entry.host));
    }
    if args.json {
        json::print(&found.iter().map(|entry| printed(entry, value)).collect::<Vec<_>>())?;
    } else if args.leaks && !found.is_empty() {
        leaks(&mut stream::page(), &found)?;
    } else if let [entry] = found.as_slice() {
        one(&mut stream::page(), entry, value)?;
    } else if !found.is_empty() {
        let mut table = Table::new(&["MSR", "name", "classes", "vendors", "also"]);
        for entry in &found {
            table.add_row([
                entry.msr.to_string(),
                entry.name().to_owned(),
                join(entry.classes().iter()),
                join(entry.vendors().iter()),
                join(entry.aliases()),
            ]);
        }
        table.print(&mut stream::page())?;
    }
    if found.is_empty() && args.leaks {
        writeln!(
            stream::err(),
            "msrgate: nothing of `{what}` is known to tell of the host"
        )?;
        return Ok(Exit::No);
    }
    if found.is_empty() {
        writeln!(stream::err(), "msrgate: no MSR is known as `{what}`{}", instead(&what))?;
        return Ok(Exit::No);
    }
    Ok(Exit::Yes)
}

/// The value of a register that is named before it, where the words are these two.
fn value_of(register: &str, value: &str) -> Option<u64> {
    let named = msrgate_msrs::by_name(register).is_some() || number::parse(register).is_ok();
    number::parse(value).ok().filter(|_| named)
}

/// What tells of the host: what it tells, and where a guest could get it.
fn leaks(out: &mut Stream<impl Write>, found: &[&Entry]) -> io::Result<()> {
    let mut table = Table::new(&["MSR", "name", "tells of the host", "through KVM", "source"]);
    for entry in found {
        table.add_row([
            entry.msr.to_string(),
            entry.name().to_owned(),
            entry.host.to_string(),
            match entry.hardware_reaches_guest() {
                true => "where the VMM turns exits off".to_owned(),
                false => "by `host` alone".to_owned(),
            },
            entry.source().to_owned(),
        ]);
    }
    table.print(out)
}

/// What may be meant by a text that means nothing.
fn instead(what: &str) -> String {
    if let Ok(index) = number::parse(what)
        && let Ok(index) = u32::try_from(index)
    {
        let (before, after) = msrgate_msrs::around(Msr(index));
        let neighbours = before.into_iter().chain(after);
        let neighbours: Vec<String> = neighbours
            .map(|entry| format!("{} {}", entry.msr, entry.name()))
            .collect();
        return format!("; near it are {}", neighbours.join(", "));
    }
    match msrgate_msrs::near(what).split_last() {
        None => String::new(),
        Some((one, [])) => format!("; did you mean `{one}`?"),
        Some((last, others)) => format!("; did you mean `{}` or `{last}`?", others.join("`, `")),
    }
}

fn search(what: &str) -> Result<Vec<&'static Entry>, Failure> {
    if let Some(name) = what.strip_prefix('@') {
        return match msrgate_msrs::class(name) {
            Some(entries) => Ok(entries.collect()),
            None => {
                let classes = Class::ALL
                    .iter()
                    .map(|class| format!("\n  @{:<13}{}", class.name(), class.about()));
                let near = msrgate_msrs::nearest_of(name, msrgate_msrs::classes());
                let near = near
                    .map(|near| format!("; did you mean `@{near}`?"))
                    .unwrap_or_default();
                Err(Failure::input(format!(
                    "there is no class `@{name}`{near}; the classes are{}",
                    classes.collect::<String>()
                )))
            }
        };
    }
    match number::parse(what) {
        Ok(index) if u32::try_from(index).is_err() => Err(Failure::input(format!(
            "`{what}` is too large for an MSR index, which has 32 bits"
        ))),
        _ => Ok(msrgate_msrs::search(what)),
    }
}

/// The fields of a register: `0 SCE, 8 LME`.
fn fields(entry: &Entry) -> String {
    let text = |field: Field| match (field.first, field.last) {
        (first, last) if first == last => format!("{first} {}", field.name),
        (first, last) => format!("{first}-{last} {}", field.name),
    };
    join(entry.fields().map(text))
}

/// Where the fields stand, if that is not where the register does.
fn fields_source(entry: &Entry) -> String {
    match entry.fields_source() {
        source if source != entry.source() && entry.fields().next().is_some() => format!("by {source}"),
        _ => String::new(),
    }
}

fn join<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

pub(crate) fn printed(entry: &'static Entry, value: Option<u64>) -> impl Printed {
    object! {
        /// The index.
        msr: entry.msr.to_string(),
        /// The name.
        name: entry.name(),
        /// Other names.
        aliases: entry.aliases().collect::<Vec<_>>(),
        /// The classes, without `@`.
        classes: entry.classes().iter().map(|class| class.to_string()).collect::<Vec<_>>(),
        /// `"intel"`, `"amd"`, ….
        vendors: entry.vendors().iter().map(|vendor| vendor.to_string()).collect::<Vec<_>>(),
        /// What CPUID must have for it to exist; `"-"` if nothing is said.
        feature: entry.exists().to_string(),
        /// Whether it can be read and written.
        access: entry.access.to_string(),
        /// Whether a filter can stop every access to it.
        filterable: entry.is_filterable(),
        /// What passes a filter nevertheless, in words; null if nothing is known to.
        passes: entry.unfiltered(),
        /// How the guest's value is saved: `"listed"` by `KVM_GET_MSRS` (`KVM_GET_MSR_INDEX_LIST` names it), `"unlisted"` by
        /// `KVM_GET_MSRS` (and it does not), `"sregs"` by `KVM_GET_SREGS`, `"lapic"` by `KVM_GET_LAPIC`; null if there is
        /// nothing to save.
        state: entry.state.name(),
        /// What the hardware's value tells of the host: `"setup"`, `"identity"`, `"activity"`, `"trace"` (addresses that
        /// others used); null if nothing.
        host: entry.host.name(),
        /// Whether that is what a tenant must not see: all of these but `"setup"`.
        secret: entry.is_secret(),
        /// The accesses of it that operating systems make unguarded.
        needs: entry.needs().map(|need| object! {
            /// The operating system.
            system: need.system.to_string(),
            /// The direction.
            op: need.op.name(),
            /// What it is for, and what becomes of the system without.
            why: need.why,
            /// Where that can be read.
            source: need.source,
        }).collect::<Vec<_>>(),
        /// Where it is documented.
        source: entry.source(),
        /// The fields of its value that are known, from the lowest bit up.
        fields: entry.fields().map(|field| object! {
            /// The lowest bit.
            first: field.first,
            /// The highest bit.
            last: field.last,
            /// The manual's name. Of VMX's capabilities `must:NAME` is a control that must be 1, and `NAME` one that may be.
            name: field.name,
            /// The values that have a word.
            words: field.words().map(|(value, word)| object! {
                /// A value.
                value: format!("{value:#x}"),
                /// The manual's word for the value.
                word: word,
            }).collect::<Vec<_>>(),
        }).collect::<Vec<_>>(),
        /// Where the fields are documented; null where none are known.
        fields_source: entry.fields().next().map(|_| entry.fields_source()),
        /// Only with a value on the command line: that value.
        #[serde(skip_serializing_if = "json::is_null")]
        value: value.map(|value| format!("{value:#x}")),
        /// Likewise: what its bits mean, from the lowest up: fields that are not zero, or whose zero has a word, and bits that
        /// are not known.
        #[serde(skip_serializing_if = "json::is_null")]
        bits: value.map(|value| words::bits_printed(entry.msr, value)),
    }
}

fn one(out: &mut Stream<impl Write>, entry: &Entry, value: Option<u64>) -> io::Result<()> {
    out.say(Tone::Title, &format!("{} {}", entry.msr, entry.name()))?;
    if let Some(value) = value {
        let bits = words::bits(entry.msr, value);
        let known = entry.fields().next().is_some();
        let bits = match (known, bits.as_str()) {
            (false, _) => "the database does not know its bits",
            (true, "") => "no bit is set",
            (true, bits) => bits,
        };
        writeln!(out, "  {:<12}{value:#x}: {bits}", "value")?;
    }
    let filterable = match (entry.is_filterable(), entry.unfiltered()) {
        (true, None) => "yes".to_owned(),
        (true, Some(but)) => format!("yes, but {but}"),
        (false, why) => format!("no: {}", why.unwrap_or_else(|| "no KVM filter can stop it".to_owned())),
    };
    let said = |text: String| if text == "-" { String::new() } else { text };
    for (key, value) in [
        ("also", join(entry.aliases())),
        ("classes", join(entry.classes().iter())),
        ("vendors", join(entry.vendors().iter())),
        ("feature", entry.exists().to_string()),
        ("access", entry.access.to_string()),
        ("filterable", filterable),
        ("saved by", said(entry.state.to_string())),
        ("of the host", said(entry.host.to_string())),
        ("source", entry.source().to_owned()),
        ("fields", fields(entry)),
        ("", fields_source(entry)),
    ] {
        if !value.is_empty() {
            writeln!(out, "  {key:<12}{value}")?;
        }
    }
    for need in entry.needs() {
        let msrgate_msrs::Need {
            system,
            op,
            why,
            source,
            ..
        } = need;
        writeln!(out, "  {:<12}{system}, {op}: {why} ({source})", "needed by")?;
    }
    Ok(())
}
