//! What the command offers on what its libraries find: its own options.

use msrgate_policy::{Code, Diagnostic};
use msrgate_supervise::Remark;

/// What the command offers on a kind of finding.
fn on(code: Code) -> Option<&'static str> {
    Some(match code {
        Code::CpuidNeeded => {
            "give `--cpuid host`, or `--cpuid FILE` with what `cpuid -r -1` printed in such a guest, or with a trace of one"
        }
        Code::LogsNothing => "`msrgate run --learn` shows what a guest touches",
        Code::StateKept => "`msrgate plan --state` says what to save",
        Code::HandlerNeeded => "for `msrgate run` a program can answer: say which in `[handlers]`",
        Code::DeniesAll => "`msrgate learn` makes a policy of what a guest did",
        Code::InterfaceDenied => "with `--cpuid` it is looked at",
        _ => return None,
    })
}

/// The help of a finding, and what the command offers.
pub(crate) fn help(found: &Diagnostic) -> Option<String> {
    joined(found.help.as_deref(), on(found.code))
}

/// What a finding says in one line where its help has no room: only what the command offers is added.
pub(crate) fn line(found: &Diagnostic) -> String {
    joined(Some(&found.message), on(found.code)).unwrap_or_default()
}

/// What the supervisor says, and what the command offers.
pub(crate) fn remark(remark: &Remark) -> String {
    match remark {
        Remark::NoCpuid => format!("{remark}: if this VMM never does, give `msrgate run` the option --cpuid"),
        _ => remark.to_string(),
    }
}

fn joined(said: Option<&str>, offered: Option<&str>) -> Option<String> {
    match (said, offered) {
        (Some(said), Some(offered)) => Some(format!("{said}; {offered}")),
        (one, other) => one.or(other).map(str::to_owned),
    }
}
