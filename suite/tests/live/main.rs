//! The cases on live KVM, and what KVM does.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod behaviour;
mod cases;
