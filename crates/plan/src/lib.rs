//! From a decision map to what a KVM guest's MSR filter can hold.
//!
//! A [`DecisionMap`] says what each of the 2^32 MSRs gets, for reads and writes apart. [`Plan::compile`] turns it into
//! the fewest filter ranges that realise it, the reasons for which the kernel must hand accesses to user space, and the
//! table of what user space answers then; or refuses, with the numbers. What it returns has been proven equal to the
//! map, over intervals that leave no MSR out.
//!
//! ```
//! use msrgate_core::{MsrRange, Msr, Op, ReadAction, Verdict, WriteAction};
//! use msrgate_plan::{Decision, DecisionMap, Intervals, Plan};
//!
//! let by_default = Decision::of(ReadAction::Allow);
//! let microcode = Decision::of(ReadAction::Value(1 << 32)).by(0);
//! let map = DecisionMap::new(
//!     Intervals::first_match(by_default, [(MsrRange::single(Msr(0x8b)), microcode)]),
//!     Intervals::uniform(Decision::of(WriteAction::Allow)),
//! );
//! let plan = Plan::compile(&map)?;
//! assert_eq!(plan.filter().ranges().len(), 1);
//! assert_eq!(plan.filter().verdict(Msr(0x8b), Op::Read), Verdict::Deny);
//! # Ok::<(), msrgate_plan::PlanError>(())
//! ```
//!
//! Knows nothing of text, nor of single MSRs. What no filter can stop of a map is named in [`Plan::notes`].
//!
//! # Features
//! `hash` (off): `DecisionMap::hash`, a name for what a map means, which every plan then has. A state of `shadow` and `once`
//! is saved under that name. A program that reads plans which were compiled before ([`Plan::from_bytes`]) finds it there and
//! does without the feature.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

extern crate alloc;

mod intervals;
mod map;
mod options;
mod segment;
mod pack;
mod share;
mod cover;
mod error;
mod shortfall;
mod preset;
mod spill;
mod order;
mod note;
mod proof;
mod plan;
mod change;
mod compose;
mod differ;
mod form;

pub use change::{Change, ChangedPart};
pub use differ::{By, Differences, Fallback};
pub use error::{Group, PlanError, SpillError};
pub use form::{DecodeError, LoadError};
pub use intervals::Intervals;
pub use map::{Decision, DecisionMap};
pub use note::Note;
pub use options::{AccessCount, CompileOptions, Preset, Spillable};
pub use plan::{Minimum, Plan};
pub use segment::Direction;
