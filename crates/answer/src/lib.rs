//! The code that answers MSR exits inside a VMM, as an image, and where it finds what it works by.
//!
//! The image is position-independent machine code for x86-64, made by `build.rs` from `src/blob`. `msrgate-supervise`
//! maps it into a VMM's process and leads the VMM's KVM_RUN calls to its start.
#![no_std]

pub mod layout;

/// The image. Its parameters ([`layout::image`]) are zeros.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/answer.bin"));
