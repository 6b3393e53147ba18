//! Proof that the crates which claim it need no standard library.
//!
//! `#![no_std]` in a crate says nothing of the crates that it depends on. The proof is a static
//! library with a panic handler of its own: std brings one too, and rustc refuses a program with
//! two. So where it builds, nothing in the whole graph links std. That shows nothing of targets
//! that lack an instruction or an atomic which this one has; where a target without an operating
//! system is installed, the library is built for that one instead.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::process;
use crate::toolchain;

/// The crates, and the features that they have on.
const CRATES: [(&str, &[&str]); 4] = [("core", &[]), ("engine", &[]), ("plan", &["hash"]), ("msrs", &[])];

const BARE_TARGET: &str = "x86_64-unknown-none";

const PANIC_HANDLER: &str = "\
#![no_std]

use core::alloc::{GlobalAlloc, Layout};

struct NoMemory;

// SAFETY: it never gives memory out, which the trait allows: a null pointer says so.
unsafe impl GlobalAlloc for NoMemory {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        core::ptr::null_mut()
    }
    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static MEMORY: NoMemory = NoMemory;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

";

/// Builds the static library. The answer is what was built, and whether it could be.
///
/// # Errors
/// What could not be written or run.
pub(crate) fn build() -> Result<(bool, String), String> {
    let root = crate::root();
    let folder = root.join("target/no-std");
    write(&root, &folder).map_err(|error| format!("cannot write {}: {error}", folder.display()))?;

    let sysroot = process::output(Command::new("rustc").args(["--print", "sysroot"]).current_dir(&root))?;
    let bare = Path::new(sysroot.trim()).join("lib/rustlib").join(BARE_TARGET).is_dir();
    let mut command = process::bound("cargo");
    command
        .arg("build")
        .current_dir(&folder)
        // What builds the database's table is built already.
        .env("CARGO_TARGET_DIR", toolchain::target(""));
    if bare {
        command.args(["--target", BARE_TARGET]);
    }
    let (status, _) = process::watch(&mut command).map_err(|error| format!("cannot run cargo: {error}"))?;
    let place = if bare {
        BARE_TARGET
    } else {
        "this machine's target, with a panic handler that std would collide with"
    };
    let names = CRATES.map(|(name, _)| name).join(", ");
    Ok((status.success(), format!("{names} for {place}")))
}

fn write(root: &Path, folder: &Path) -> std::io::Result<()> {
    let mut manifest = String::from(
        "[package]\nname = \"no-std\"\nedition = \"2024\"\n\n[lib]\npath = \"lib.rs\"\ncrate-type = [\"staticlib\"]\n\n\
         [profile.dev]\npanic = \"abort\"\n\n[workspace]\n\n[dependencies]\n",
    );
    let mut source = String::from(PANIC_HANDLER);
    for (name, features) in CRATES {
        let path = root.join("crates").join(name);
        manifest.push_str(&format!(
            "msrgate-{name} = {{ path = {path:?}, default-features = false, features = {features:?} }}\n"
        ));
        source.push_str(&format!("use msrgate_{name} as _;\n"));
    }
    fs::create_dir_all(folder)?;
    fs::write(folder.join("Cargo.toml"), manifest)?;
    fs::write(folder.join("lib.rs"), source)?;
    // The same versions of dependencies as everywhere; cargo drops the packages that are not used.
    fs::copy(root.join("Cargo.lock"), folder.join("Cargo.lock"))?;
    Ok(())
}
