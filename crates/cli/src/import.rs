//! `msrgate import`: what another tool says of MSRs, as a policy.

use std::io::Write;

use msrgate_policy::Policy;
use msrgate_policy::foreign::{Format, Imported, import};

use crate::args::{ImportArgs, Tool};
use crate::exit::{Exit, Failure};
use crate::json::{self, Printed, object};
use crate::{input, stream};

pub(crate) fn run(args: &ImportArgs) -> Result<Exit, Failure> {
    let shown = input::shown(&args.file);
    let format = match args.from {
        Tool::Crosvm => Format::Crosvm,
        Tool::Firecracker => Format::Firecracker,
        Tool::MsrSafe => Format::MsrSafe,
    };
    let bytes = input::bytes(&args.file)?;
    let text = msrgate_policy::text_of(bytes).map_err(|error| Failure::input(format!("{shown}: {error}")))?;
    let imported = import(format, &text).map_err(|error| Failure::input(format!("{shown}: {error}")))?;
    let policy = imported.to_string();
    // What is printed is parsed, so that nothing is printed that is not a policy.
    Policy::parse("imported.toml", &policy).map_err(|rejected| {
        let what = rejected.diagnostics.first().map(|found| found.message.clone());
        Failure::input(format!("{shown}: no policy says that: {}", what.unwrap_or_default()))
    })?;
    let mut out = stream::out();
    match args.json {
        true => json::print(&printed(&imported, &policy))?,
        false => write!(out, "{policy}")?,
    }
    let mut stderr = stream::err();
    for remark in &imported.remarks {
        writeln!(stderr, "msrgate: {shown}: {remark}")?;
    }
    Ok(match imported.remarks.is_empty() {
        true => Exit::Yes,
        false => Exit::No,
    })
}

pub(crate) fn printed(imported: &Imported, policy: &str) -> impl Printed {
    object! {
        /// The policy's text.
        policy: policy,
        /// What its reader should know, in sentences.
        comments: &imported.comments,
        /// Where the policy is not just what was said, in sentences.
        remarks: &imported.remarks,
    }
}
