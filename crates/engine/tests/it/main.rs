//! The engine as a hypervisor sees it. `loom.rs` is a program of its own: it is built with other flags.
#![cfg(not(loom))]

mod machine;
mod process;

mod decision;
mod ioctl;
mod outcome;
mod replacement;
mod set_msr_filter;
mod sharing;
