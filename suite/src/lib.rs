//! One set of cases, run on every implementation of what an MSR access gets.
//!
//! A [`Case`] installs a policy or a raw filter, lets the guest make accesses and says what comes of each. An
//! [`Implementation`] runs it and says what it saw, as far as it can: a filter knows verdicts but no outcomes, the
//! oracle knows no errno. [`check()`] compares. The cases are in `testdata/cases`, their format in `testdata/README.md`;
//! they are compiled in, so that a test binary runs where the sources are not.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

mod bare;
mod bitmap;
mod check;
mod compiled;
mod engine;
mod files;
mod read;
mod filter;
mod library;
mod live;
mod machine;
mod map;
mod number;
mod oracle;
mod plan;

pub use bare::{Bare, Interceptions};
pub use bitmap::{Svm, Vmx};
pub use check::{Checked, Implementation, Stop, Subject, Tally, check, check_all, perform, run};
pub use engine::Engine;
pub use files::cases;
pub use filter::{CoreFilter, Flat};
pub use library::Library;
pub use live::{Live, answer};
pub use machine::Machine;
pub use map::Map;
pub use msrgate_engine::Process;
pub use msrgate_verify::case::{
    AccessStep, Call, CallResult, Case, Descriptor, Place, RawFilter, RawRange, Seen, Step, Target,
};
pub use oracle::Oracle;
pub use plan::Planned;
pub use read::parse;
