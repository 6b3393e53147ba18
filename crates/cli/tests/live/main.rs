//! The command's tests that need a live KVM, one program for the lanes. Skipped where /dev/kvm does not open, unless
//! MSRGATE_LANE_REQUIRE is 1.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "../allows/mod.rs"]
mod allows;
#[path = "../command/mod.rs"]
mod command;
#[path = "../filter/mod.rs"]
mod filter;
#[path = "../picture/mod.rs"]
mod picture;
#[path = "../policies/mod.rs"]
mod policies;

mod kvm;

mod attacks;
mod database;
mod learn;
mod libvirt;
mod migrate;
mod pictures;
mod raw;
mod replay;
mod run;
mod scan;
mod tutorial;
mod verify;
