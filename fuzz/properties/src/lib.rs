//! What must hold for every input, whoever makes the inputs up: libFuzzer through `fuzz/fuzz_targets/`, or the tests of
//! this crate, which need no more than a stable compiler.
//!
//! A [`Target`] takes bytes and panics where its property does not hold. Inputs that once broke one, and the seeds from
//! which others are made, lie in `testdata/fuzz/`, in a folder for each target.
#![forbid(unsafe_code)]

mod filter;
mod policy;
mod trace;
mod log;
mod map;
mod plan;
mod raw;

mod kernel;
mod memory;

mod agreement;

mod input;
mod random;

pub use random::Random;

/// One property.
#[derive(Clone, Copy)]
pub struct Target {
    /// The name of its folder and of its fuzz target.
    pub name: &'static str,
    /// Panics where the property does not hold for these bytes.
    pub check: fn(&[u8]),
}

/// Raw filters and capabilities: the engine against a second, naive reading of what the kernel does.
pub const FILTER: Target = Target {
    name: "filter",
    check: filter::check,
};

/// The text of policies: read or refused, never a panic; what is read means the same in every form.
pub const POLICY: Target = Target {
    name: "policy",
    check: policy::check,
};

/// The text of traces, and of their summaries: events or an error, never a panic; what is read can be written and read
/// again, and what is learned from it is a policy.
pub const TRACE: Target = Target {
    name: "trace",
    check: trace::check,
};

/// The lines of logs: an access, a gap, an error or nothing, never a panic; what stands around a line does not matter, and a log
/// has as many accesses as a trace as it has by itself.
pub const LOG: Target = Target {
    name: "log",
    check: log::check,
};

/// Filters in other forms and other tools' words: read or refused, never a panic, and refused with the kernel's error
/// number as the engine gives it.
pub const RAW: Target = Target {
    name: "raw",
    check: raw::check,
};

/// The bytes of decision maps: a whole map or an error, never a panic; a map's plan is what the map says.
pub const MAP: Target = Target {
    name: "map",
    check: map::check,
};

/// The bytes of plans: a plan that is written as these bytes and is what its map says, or an error, never a panic.
pub const PLAN: Target = Target {
    name: "plan",
    check: plan::check,
};
