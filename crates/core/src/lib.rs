//! What one MSR access of a guest gets.
//!
//! This crate is the pure meaning that every other part of msrgate shares: a [`Filter`] says whether the kernel may
//! answer an access, an [`ActionTable`] says what user space answers where it may not.
//!
//! ```text
//! access ─Filter→ verdict ─┬ allow → the kernel answers ─┬ known → done
//!                          │                              └ unknown, invalid ┐
//!                          └ deny ──────────────────────────────── exit ─────┴─ActionTable→ outcome
//! ```
//!
//! ```
//! use msrgate_core::{Filter, FilterRange, Msr, Op, Ops, Verdict};
//!
//! let microcode = FilterRange::new(0x8b, 1, Ops::READ, vec![0])?;
//! let filter = Filter::new(Verdict::Allow, vec![microcode])?;
//! assert_eq!(filter.verdict(Msr(0x8b), Op::Read), Verdict::Deny);
//! assert_eq!(filter.verdict(Msr(0x8b), Op::Write), Verdict::Allow);
//! # Ok::<(), msrgate_core::FilterError>(())
//! ```
//!
//! Building a filter or a table allocates; asking one never does, and never locks or panics, whatever the guest does.
//! Nothing here parses text, does I/O or knows of an operating system.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

extern crate alloc;

mod msr;
mod access;
mod filter;
mod flat_filter;
mod bitmap;
mod exit;
mod action;
mod fault_cause;
mod table;
mod event;
mod limiter;
pub mod abi;

pub use access::{Access, Op, Ops};
pub use action::{
    Action, ActionForm, Argument, ArgumentKey, ArgumentKind, Arguments, Disposition, Keeps, OnLockedBits, Parameter,
    ReadAction, ReadSource, WriteAction, WriteTarget,
};
pub use bitmap::{PassthroughMsr, SvmPermissionMap, VmxBitmap};
pub use event::{Event, Gap, Log, Nanos};
pub use exit::{Exit, Fault, Outcome, ReadOutcome, Reason, Reasons, Within, WriteOutcome};
pub use fault_cause::FaultCause;
pub use filter::{DecidedBy, Filter, FilterError, FilterRange, Verdict};
pub use flat_filter::FlatFilter;
pub use limiter::LogLimiter;
pub use msr::{Msr, MsrRange};
pub use table::{ActionTable, Answer, EmulatedState, EmulatedStateError, Entry, MsrBackend, TableError, VcpuState};
