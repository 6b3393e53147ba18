//! VMMs in C and Go, compiled when they are first wanted.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::command::find;
use crate::kvm::kvm_opens;

/// Compiled in, since some lanes have no files but the test itself.
macro_rules! sources {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("../../vmm/", $name)))),+]
    };
}

const SOURCES: &[(&str, &str)] = sources![
    "guest.h",
    "sandbox.h",
    "accesses.c",
    "accesses.go",
    "asking.c",
    "descriptors.c",
    "filters.c",
    "fuzz.c",
    "guest.c",
    "handed.c",
    "helper.c",
    "kicks.c",
    "lives.c",
    "many.c",
    "past.c",
    "running.c",
    "pauses.c",
    "reloads.c",
    "sandbox.c",
    "sequence.c",
    "smm.c",
    "threads.c",
    "wrapper.c",
];

/// Those that take an emulated processor seconds, for what many hosts' kernels do not have.
const QUICK: &[&str] = &["smm"];

/// How a VMM is built.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Way {
    /// With glibc as a library.
    Dynamic,
    /// With glibc in it.
    Static,
    /// Likewise, at an address that changes.
    StaticPie,
    /// Its system calls are instructions of its own.
    Inline,
    /// Its ioctls are made in a function as Rust's musl has it, without room beside it.
    Packed,
    /// With musl in it.
    Musl,
    /// In Go: `accesses` alone.
    Go,
    /// A library, and no VMM.
    Library,
}

impl Way {
    pub(crate) const IN_C: [Way; 6] = [
        Way::Dynamic,
        Way::Static,
        Way::StaticPie,
        Way::Inline,
        Way::Packed,
        Way::Musl,
    ];
    pub(crate) const ALL: [Way; 7] = [
        Way::Dynamic,
        Way::Static,
        Way::StaticPie,
        Way::Inline,
        Way::Packed,
        Way::Musl,
        Way::Go,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Dynamic => "dynamic",
            Way::Static => "static",
            Way::StaticPie => "static-pie",
            Way::Inline => "inline",
            Way::Packed => "packed",
            Way::Musl => "musl",
            Way::Go => "go",
            Way::Library => "library",
        }
    }

    /// The compiler, and what it is told.
    fn compiler(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Way::Dynamic => ("cc", &[]),
            Way::Static => ("cc", &["-static"]),
            Way::StaticPie => ("cc", &["-static-pie"]),
            Way::Inline => ("cc", &["-DINLINE"]),
            Way::Packed => ("cc", &["-static", "-DPACKED"]),
            Way::Go => ("go", &[]),
            Way::Library => ("cc", &["-shared", "-fPIC"]),
            // The kernel's headers are no part of musl.
            Way::Musl => (
                "musl-gcc",
                &[
                    "-static",
                    "-idirafter",
                    "/usr/include",
                    "-idirafter",
                    "/usr/include/x86_64-linux-gnu",
                ],
            ),
        }
    }
}

/// Programs by name, where they could be built.
type Built = HashMap<(String, Way), Option<PathBuf>>;

/// A VMM's program; `None`, and a line that says why, where the test is to be skipped.
pub(crate) fn vmm(name: &str, way: Way) -> Option<PathBuf> {
    if std::env::var("MSRGATE_LANE").is_ok_and(|lane| lane != "host") && !QUICK.contains(&name) && kvm_opens() {
        println!("skipped: an emulated processor takes minutes for it; live/run.rs has what depends on the vendor");
        return None;
    }
    vmm_anywhere(name, way)
}

/// Likewise, on an emulated processor too: for what depends on the kernel.
pub(crate) fn vmm_anywhere(name: &str, way: Way) -> Option<PathBuf> {
    static BUILT: Mutex<Option<Built>> = Mutex::new(None);
    if !kvm_opens() {
        return None;
    }
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built.get_or_insert_default();
    let program = built.entry((name.to_owned(), way)).or_insert_with(|| build(name, way));
    if program.is_none() {
        println!("skipped: `{name}` cannot be built: there is no `{}`", way.compiler().0);
    }
    program.clone()
}

fn build(name: &str, way: Way) -> Option<PathBuf> {
    let program = format!("{name}-{}", way.name());
    if let Some(directory) = std::env::var_os("MSRGATE_VMMS") {
        return Some(Path::new(&directory).join(program)).filter(|program| program.exists());
    }
    let (compiler, options) = way.compiler();
    find(compiler)?;
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("vmm-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    for (name, text) in SOURCES {
        fs::write(directory.join(name), text).unwrap();
    }
    let cc = |options: &[&str], source: &str, program: &str| {
        let mut command = Command::new(if way == Way::Go { "cc" } else { compiler });
        command.args(["-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", program]);
        command.args(options).arg(source);
        finished(command.current_dir(&directory))
    };
    match way {
        Way::Go => {
            cc(&[], "guest.c", "guest");
            let guest = finished(&mut Command::new(directory.join("guest")));
            fs::write(directory.join("guest.bin"), guest).unwrap();
            let mut go = Command::new(compiler);
            go.args(["build", "-o", &program, &format!("{name}.go")]);
            // What it keeps for the next time lies here too.
            go.env("GOCACHE", directory.join("go"));
            finished(go.current_dir(&directory));
        }
        _ => _ = cc(options, &format!("{name}.c"), &program),
    }
    Some(directory.join(program))
}

/// What a command prints, which has to succeed.
fn finished(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    output.stdout
}
