//! `msrgate report`: what traces tell, for people, for programs and for the browser.

mod page;
mod print;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use msrgate_core::{Did, Msr, Op, Verdict};
use msrgate_policy::{Explanation, Source, explain};
use msrgate_trace::report::{Kind, Lost, MOST_ROWS, MOST_VCPUS, Report, Row};
use msrgate_trace::{Record, TraceError};

use crate::args::ReportArgs;
use crate::exit::{Exit, Failure};
use crate::load::{self, Loaded};
use crate::render;
use crate::replay::{Opened, open};
use crate::stream;

/// How many vCPUs a note on gaps names.
const FEW_LOST: usize = 3;

/// The traces added up, and the policy that they are held against.
struct Told {
    report: Report,
    /// For each trace its name, and what ended it early.
    files: Vec<(String, Option<TraceError>)>,
    policy: Option<Loaded>,
}

pub(crate) fn run(args: &ReportArgs) -> Result<Exit, Failure> {
    // `-` is standard output.
    let html = args.html.as_deref().filter(|path| *path != Path::new("-"));
    if let Some(html) = html {
        let inputs = args.traces.iter().chain(&args.policy).chain(&args.cpuid.cpuid);
        load::refuse_overwrite(html, inputs.map(PathBuf::as_path))?;
    }
    let given = load::cpuid(&args.cpuid)?;
    let mut told = Told {
        report: Report::default(),
        files: Vec::new(),
        policy: None,
    };
    let mut readable = false;
    for path in &args.traces {
        let name = load::shown(path);
        let mut lines = match open(path) {
            Ok(lines) => lines,
            Err(Opened::Unreadable(line)) => return Err(Failure::input(line)),
            Err(Opened::Malformed(error)) => {
                told.report.begin(Default::default());
                told.files.push((name, Some(error)));
                continue;
            }
        };
        if !readable && let Some(policy) = &args.policy {
            let recorded = match (&given, lines.header().parse_cpuid()) {
                (None, Some(cpuid)) => Some(cpuid.map_err(|error| Failure::input(format!("{name}: {error}")))?),
                _ => None,
            };
            told.policy = Some(load::policy_or_report(
                policy,
                given.as_ref().or(recorded.as_ref()),
                &[],
            )?);
        }
        readable = true;
        told.report.begin(lines.header().clone());
        let error = loop {
            match lines.next() {
                Some(Ok(Record::Event(event))) => told.report.add(&event),
                Some(Ok(Record::Gap(gap))) => told.report.add_gap(&gap),
                Some(Err(error)) => break Some(error),
                None => break None,
            }
        };
        told.files.push((name, error));
    }
    let mut broken = false;
    for (name, error) in &told.files {
        if let Some(error) = error {
            broken = true;
            writeln!(stream::err(), "msrgate: {}", render::plain(&format!("{name}: {error}")))?;
        }
    }
    // Where not even a header could be read there is nothing to report on.
    if readable {
        let mut out = stream::out();
        match html {
            Some(path) => {
                let sources = told.policy.iter().flat_map(|loaded| &loaded.policy.sources);
                load::refuse_overwrite(path, sources.map(Source::path))?;
                fs::write(path, page::page(&told))
                    .map_err(|error| Failure::input(format!("cannot write `{}`: {error}", path.display())))?;
            }
            None if args.html.is_some() => io::stdout().write_all(page::page(&told).as_bytes())?,
            None if args.json => writeln!(out, "{:#}", print::json(&told))?,
            None => print::text(&mut out, &told)?,
        }
    }
    Ok(if broken { Exit::Input } else { Exit::Yes })
}

impl Told {
    /// What the policy says of an access, where there is a policy.
    fn explain(&self, msr: Msr, op: Op) -> Option<Explanation<'_>> {
        let Loaded {
            policy,
            map,
            options,
            plan,
            ..
        } = self.policy.as_ref()?;
        Some(explain(policy, map, options, plan, (msr, op)))
    }

    /// What the policy gives the accesses of a row, as far as a filter can; all is allowed where there is no policy.
    fn decides(&self, row: &Row) -> Kind {
        match self.explain(row.msr, row.op) {
            Some(explained) if explained.verdict == Verdict::Deny => {
                Did::from_name(explained.action).map_or(Kind::Faulted, Kind::of)
            }
            _ => Kind::Allowed,
        }
    }

    /// Whether the policy denies what the guest was served with.
    fn breaks(&self, row: &Row) -> bool {
        self.decides(row) == Kind::Faulted && row.served() > 0
    }

    /// How many accesses the policy denies that the guest was served with.
    fn broken(&self) -> u64 {
        let broken = self.report.rows().filter(|row| self.breaks(row));
        broken.map(Row::served).sum()
    }

    /// How many accesses each rule of the policy decides, by its number.
    fn decided(&self) -> Vec<u64> {
        let rules = self.policy.as_ref().map_or(0, |loaded| loaded.policy.rules.len());
        let mut counts = vec![0; rules];
        for row in self.report.rows() {
            let rule = self.explain(row.msr, row.op).and_then(|explained| explained.rule);
            let place = rule.and_then(|(number, _)| usize::try_from(number).ok());
            if let Some(count) = place.and_then(|place| counts.get_mut(place)) {
                *count += row.count;
            }
        }
        counts
    }

    /// How many accesses are missing from each trace that says so, whose, and when they were lost.
    fn gaps(&self) -> Vec<String> {
        let traces = (0..).zip(&self.files).zip(self.report.traces());
        let gaps = traces.filter(|(_, trace)| trace.lost > 0);
        gaps.map(|((number, (name, _)), trace)| self.gap(number, name, trace.lost))
            .collect()
    }

    fn gap(&self, trace: u32, name: &str, all: u64) -> String {
        let lost = self.report.lost_by_vcpu().filter(|lost| lost.trace == trace);
        let mut lost: Vec<Lost> = lost.collect();
        lost.sort_by_key(|lost| std::cmp::Reverse(lost.events));
        lost.truncate(FEW_LOST);
        let named = lost.iter().fold(0, |sum: u64, lost| sum.saturating_add(lost.events));
        let whose = lost.iter().map(|lost| {
            let seconds = |t: u64| format!("{:.6} s", t as f64 / 1e9);
            let (first, last) = (seconds(lost.first), seconds(lost.last));
            let until = if first == last {
                String::new()
            } else {
                format!(" to {last}")
            };
            format!("{} of VM {} vCPU {} at {first}{until}", lost.events, lost.vm, lost.vcpu)
        });
        format!(
            "{} missing from {name}, so this is not all that the guests did: {}{}",
            render::counted(all, "access is", "accesses are"),
            whose.collect::<Vec<_>>().join(", "),
            if named < all { ", and of more vCPUs" } else { "" }
        )
    }

    /// What a reader of the report has to know of it.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let traces = self.report.traces();
        for ((name, error), trace) in self.files.iter().zip(traces) {
            if let Some(error) = error {
                notes.push(format!("{name}: {error}; what came before it is in the report"));
            }
            if let (Some(loaded), Some(hash)) = (&self.policy, &trace.header.policy)
                && *hash != load::hex(&loaded.plan.hash())
            {
                notes.push(format!(
                    "{name} was made under another policy: its numbers of rules are not those of `{}`",
                    loaded.policy.name
                ));
            }
        }
        let cpuids = || traces.iter().filter_map(|trace| trace.header.cpuid.as_deref());
        if self.policy.as_ref().is_some_and(|loaded| loaded.policy.asks_cpuid())
            && cpuids().any(|cpuid| cpuids().next() != Some(cpuid))
        {
            notes.push(
                "the traces' guests have different CPUIDs, and the policy depends on it: what it decides is told for one"
                    .to_owned(),
            );
        }
        if self.report.unlisted() > 0 {
            notes.push(format!(
                "{} accesses are of MSRs that are not listed, since there is room for {MOST_ROWS}",
                self.report.unlisted()
            ));
        }
        if self.report.vcpus().len() == MOST_VCPUS {
            notes.push(format!("no more than {MOST_VCPUS} vCPUs are told apart"));
        }
        if self.report.accesses() > 1 && traces.iter().all(|trace| trace.duration() == 0) {
            notes.push("the traces do not tell when".to_owned());
        }
        notes
    }
}
