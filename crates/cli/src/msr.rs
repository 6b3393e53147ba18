//! `msrgate msr`: the database.

use std::io::{self, Write};

use msrgate_core::Msr;
use msrgate_msrs::number;
use msrgate_msrs::{Class, Entry};
use serde_json::{Value, json};

use crate::args::MsrArgs;
use crate::exit::{Exit, Failure};
use crate::render::Table;
use crate::stream::{self, Stream, Tone};

pub(crate) fn run(args: &MsrArgs) -> Result<Exit, Failure> {
    let what = match args.what.as_slice() {
        [] => "*".to_owned(),
        words => words.join(" "),
    };
    let found = search(&what)?;
    let mut out = stream::out();
    if args.json {
        let array: Value = found.iter().map(|entry| json(entry)).collect();
        writeln!(out, "{array:#}")?;
    } else if let [entry] = found.as_slice() {
        one(&mut stream::page(), entry)?;
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
    if found.is_empty() {
        writeln!(stream::err(), "msrgate: no MSR is known as `{what}`{}", instead(&what))?;
        return Ok(Exit::No);
    }
    Ok(Exit::Yes)
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

fn join<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

fn json(entry: &Entry) -> Value {
    json!({
        "msr": entry.msr.to_string(),
        "name": entry.name(),
        "aliases": entry.aliases().collect::<Vec<_>>(),
        "classes": entry.classes().iter().map(|class| class.to_string()).collect::<Vec<_>>(),
        "vendors": entry.vendors().iter().map(|vendor| vendor.to_string()).collect::<Vec<_>>(),
        "feature": entry.exists().to_string(),
        "access": entry.access.to_string(),
        "filterable": entry.is_filterable(),
        "passes": entry.unfiltered(),
        "state": entry.state.name(),
        "host": entry.host.name(),
        "secret": entry.is_secret(),
        "needs": entry.needs().map(|need| json!({
            "system": need.system.to_string(),
            "op": need.op.name(),
            "why": need.why,
            "source": need.source,
        })).collect::<Value>(),
        "source": entry.source(),
    })
}

fn one(out: &mut Stream<impl Write>, entry: &Entry) -> io::Result<()> {
    out.say(Tone::Title, &format!("{} {}", entry.msr, entry.name()))?;
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
