//! `msrgate report`: what traces tell, for people, for programs and for the browser.

mod html;
pub(crate) mod print;
mod contents;

use std::io::Write;
use std::path::PathBuf;

use msrgate_policy::Source;
use msrgate_trace::Record;
use msrgate_trace::report::Report;

use crate::args::ReportArgs;
use crate::exit::{Exit, Failure};
use crate::{cpuid, input, json, load, page, stream, trace, words};
use contents::Contents;

pub(crate) fn run(args: &ReportArgs) -> Result<Exit, Failure> {
    if let Some(html) = page::file(args.html.html.as_deref()) {
        let inputs = args.traces.iter().chain(&args.policy).chain(&args.cpuid.cpuid);
        input::refuse_overwrite(html, inputs.map(PathBuf::as_path))?;
    }
    let given = cpuid::given(&args.cpuid)?;
    let mut contents = Contents {
        report: Report::default(),
        files: Vec::new(),
        policy: None,
    };
    let mut readable = false;
    for path in &args.traces {
        let name = input::shown(path);
        let mut lines = match trace::open(path) {
            Ok(lines) => lines,
            Err(trace::Opened::Unreadable(line)) => return Err(Failure::input(line)),
            Err(trace::Opened::Malformed(error)) => {
                contents.report.begin(Default::default());
                contents.files.push((name, Some(error)));
                continue;
            }
        };
        if !readable && let Some(policy) = &args.policy {
            let recorded = match (&given, lines.header().parse_cpuid()) {
                (None, Some(cpuid)) => Some(cpuid.map_err(|error| Failure::input(format!("{name}: {error}")))?),
                _ => None,
            };
            contents.policy = Some(load::policy_or_report(
                policy,
                given.as_ref().or(recorded.as_ref()),
                &[],
            )?);
        }
        readable = true;
        contents.report.begin(lines.header().clone());
        let error = loop {
            match lines.next() {
                Some(Ok(Record::Event(event))) => contents.report.add(&event),
                Some(Ok(Record::Gap(gap))) => contents.report.add_gap(&gap),
                Some(Err(error)) => break Some(error),
                None => break None,
            }
        };
        contents.report.end(lines.header().clone());
        contents.files.push((name, error));
    }
    let mut broken = false;
    for (name, error) in &contents.files {
        if let Some(error) = error {
            broken = true;
            writeln!(stream::err(), "msrgate: {}", words::plain(&format!("{name}: {error}")))?;
        }
    }
    // Where not even a header could be read there is nothing to report on.
    if readable {
        match &args.html.html {
            Some(html) => {
                let sources = contents.policy.iter().flat_map(|loaded| &loaded.policy.sources);
                page::write(html, sources.map(Source::path), html::page(&contents))?;
            }
            None if args.json => json::print(&print::printed(&contents))?,
            None => print::text(&mut stream::page(), &contents, &args.list)?,
        }
    }
    Ok(if broken { Exit::Input } else { Exit::Yes })
}
