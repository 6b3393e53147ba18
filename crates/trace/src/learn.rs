//! From what guests did to the smallest policy that serves them.
//!
//! ```
//! use msrgate_policy::Policy;
//! use msrgate_trace::learn::{Learned, Summary, Generalize};
//!
//! let trace = "{\"msrgate_trace\":1}\n\
//!              {\"op\":\"rdmsr\",\"msr\":\"0xc0000080\",\"value\":\"0x0\",\"did\":\"allow\"}\n\
//!              {\"op\":\"wrmsr\",\"msr\":\"0xc0000080\",\"value\":\"0x100\",\"did\":\"allow\"}\n\
//!              {\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"did\":\"fault\"}\n";
//! let summary = Summary::read("boot.jsonl", trace.as_bytes())?;
//! let learned = Learned::from(&summary, &Generalize::default());
//! let policy = Policy::parse("learned.toml", &learned.to_string()).expect("a policy");
//! // IA32_EFER in both directions; what faulted stays denied.
//! assert_eq!(policy.rules.len(), 1);
//! # Ok::<(), msrgate_trace::learn::LearnError>(())
//! ```
//!
//! [`Learned::since`] says what a later policy does otherwise than an older one.
//!
//! A [`Summary`] is what learning keeps of traces. Its size does not grow with their length, and summaries merge in any
//! order and grouping to the same bytes.

mod summary;
mod observe;
mod want;
mod rule;
mod text;
mod since;

pub use rule::{Facts, Learned, LearnedRule};
pub use since::{Baseline, Change, Kind};
pub use summary::{LearnError, Summary, Usage};
pub use want::{Generalize, Remark};
