//! The policy language of msrgate: what a guest's MSR accesses get, in a file.
//!
//! ```
//! use msrgate_policy::Policy;
//! use msrgate_plan::Plan;
//!
//! let text = r#"
//! version = 1
//! default = "allow"
//!
//! [[rule]]
//! msr   = "IA32_BIOS_SIGN_ID"
//! read  = { value = "0x0100000000000000" }
//! write = "ignore"
//! "#;
//! let policy = Policy::parse("microcode.toml", text).expect("a policy");
//! let plan = Plan::compile_for(&policy.decision_map(None).expect("no CPUID needed"), &policy.options())?;
//! assert_eq!(plan.filter().ranges().len(), 1);
//! # Ok::<(), msrgate_plan::PlanError>(())
//! ```
//!
//! Parsing reports all that is wrong at once, each with its place and what to write instead ([`Diagnostic`]); there is
//! no partial policy. Texts come from the file system ([`Policy::from_file`]) or from who uses the crate ([`Files`]), and the policies
//! that come with msrgate are inside (`extends = "msrgate:linux-microvm"`).
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

mod files;
mod diagnostic;
mod pattern;
mod provider;
mod policy;
mod written;
mod parse;
mod errors;
#[cfg(feature = "schema")]
mod schema;
mod oracle;
pub mod print;
mod check;
mod fit;
mod note;
mod explain;
pub mod state;
pub mod raw;
mod decompile;
pub mod foreign;

pub use check::check;
pub use decompile::{Decompiled, DecompiledRule, decompile};
pub use diagnostic::{Acceptance, Code, Diagnostic, Edit, Fix, Place, Severity, Source};
pub use explain::{Cause, Explanation, Sees, explain};
pub use files::{Disk, Files, built_in, text_of};
pub use fit::{FitAdvice, Without};
pub use note::notes;
pub use parse::PolicyErrors;
pub use pattern::{Pattern, PatternError};
pub use policy::{CpuidNeeded, Policy, Rule, Spill, Validity, When};
pub use provider::Provider;
#[cfg(feature = "schema")]
pub use schema::schema;
