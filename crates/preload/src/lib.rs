//! `libmsrgate_preload.so`: libc's functions, each of which forwards to a [`msrgate_hook::Hook`].
//!
//! `msrgate run` has the dynamic linker load it ahead of libc. Not for linking: see the manifest.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod interpose;
mod libc_calls;
mod live;
