//! The project's own chores, run as `cargo xtask NAME`.
//!
//! - `test` is what continuous integration runs: formatting, lints, tests, documentation, the build
//!   without std, licences, and the tests that need a live KVM, in every lane that this machine has.
//! - `bench` measures what msrgate costs, each figure beside its baseline.
//! - `docs` writes the tables of options in `docs/cli.md` and of keys in `docs/json.md`, `pictures` the pictures of a terminal in `docs/pictures`.
//! - `fuzz`, `check-memory` and `check-orders` are stages of it that can run by themselves, and longer.
//! - `capi` builds and installs the library for VMMs in C, and a stage of `test` tries it.
//! - `dist` makes the Debian package and the tarball; a stage of `test` installs both and uses them.
//! - `api` lists the public API of the crates; a stage of `test` compares the listing.
//! - `bare` boots Linux on the hypervisor of `examples/bare`; a stage of `test` compares what both see.
//! - `nested` and `intel` run any command on a Debian kernel with a real `kvm_amd` or `kvm_intel`,
//!   on a machine that needs no virtualization of its own.
#![forbid(unsafe_code)]

mod test;
mod bench;

mod binary;
mod no_std;
mod checker;
mod fuzz;
mod headers;
mod capi;
mod dist;
mod published;
mod api;
mod house;
mod modules;
mod toolchain;

mod job;
mod lane;

mod intel;
mod nested;
mod bare;

mod bochs;
mod initramfs;
mod kernel;
mod package;
mod process;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own chores")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Run every check and test; the last line counts them
    #[command(after_help = test::HELP)]
    Test(test::Arguments),
    /// Measure what msrgate costs, each figure beside its baseline of the same run
    #[command(disable_help_flag = true)]
    Bench(bench::Arguments),
    /// Write the tables of docs/cli.md and docs/json.md from what the command takes and prints
    Docs,
    /// Make the pictures of a terminal in docs/pictures from what the command shows; that of a VMM needs QEMU and /dev/kvm
    Pictures,
    /// Look for inputs that break filters, policies, traces or maps
    #[command(after_help = fuzz::HELP)]
    Fuzz(fuzz::Arguments),
    /// Run the tests of the crates with unsafe code under AddressSanitizer, or else valgrind
    CheckMemory,
    /// Compare the crates' public API with its listing, or write that anew
    Api(api::Arguments),
    /// Replace a filter in every order of steps, under loom
    CheckOrders,
    /// Build and install libmsrgate, the library for VMMs in C
    Capi(capi::Arguments),
    /// Make a Debian package and a tarball of the command, libmsrgate, policies and documents
    Dist(dist::Arguments),
    /// Boot Linux on the hypervisor of examples/bare, and show what the guest sees beside what the hypervisor counts
    Bare(bare::Arguments),
    /// Run a command on a Debian kernel with kvm_amd, inside QEMU's emulator
    #[command(after_help = job::HELP)]
    Nested(job::NestedArguments),
    /// Run a command on a Debian kernel with kvm_intel, inside Bochs
    #[command(after_help = job::HELP)]
    Intel(job::IntelArguments),
}

fn main() -> ExitCode {
    match Arguments::parse().chore {
        Chore::Test(arguments) => test::main(&arguments),
        Chore::Bench(arguments) => bench::main(&arguments),
        Chore::Docs => test::tell(test::docs()),
        Chore::Pictures => test::tell(test::pictures()),
        Chore::Fuzz(arguments) => test::tell(fuzz::run(&arguments)),
        Chore::CheckMemory => test::tell(checker::memory()),
        Chore::Capi(arguments) => test::tell(capi::run(&arguments)),
        Chore::Dist(arguments) => test::tell(dist::run(&arguments)),
        Chore::Api(arguments) => api::main(&arguments),
        Chore::Bare(arguments) => bare::main(&arguments),
        Chore::CheckOrders => test::tell(checker::orders()),
        Chore::Nested(arguments) => lane::main(lane::Lane::Nested, &arguments.into()),
        Chore::Intel(arguments) => lane::main(lane::Lane::Intel, &arguments.into()),
    }
}

/// Where the lanes keep kernels and Bochs, and run.
fn lanes() -> PathBuf {
    root().join("target/lanes")
}

/// The workspace's root.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}
