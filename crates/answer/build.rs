//! Builds the answerer: code of its own, which no other code of the crate calls and nothing links.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=src/blob");
    println!("cargo::rerun-if-changed=src/layout.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let (elf, image) = (out.join("answer.elf"), out.join("answer.bin"));
    fs::write(out.join("abi.rs"), msrgate_core::abi::NUMBERS).expect("OUT_DIR is writable");
    let rustc = env::var_os("RUSTC").expect("cargo sets it");
    let target = env::var("TARGET").expect("cargo sets it");
    let mut command = Command::new(rustc);
    command.args(["--edition", "2024", "--crate-type", "bin", "--crate-name", "answer"]);
    command.args(["--target", &target, "-C", "opt-level=3", "-C", "panic=abort"]);
    // The image is to fit a page: registers are copied one by one.
    command.args(["-C", "llvm-args=-unroll-count=1"]);
    command.args(["-C", "relocation-model=pic", "-C", "codegen-units=1"]);
    // The linker alone: a C compiler would add what starts a program.
    command.args([
        "-C",
        "linker=ld",
        "-C",
        "linker-flavor=ld",
        "-C",
        "link-arg=-static",
        "-C",
        "link-arg=-no-pie",
    ]);
    command.args(["-C", "link-arg=-Tsrc/blob/link.ld", "-C", "link-arg=--gc-sections"]);
    command.arg("-o").arg(&elf).arg("src/blob/main.rs");
    let status = command.status().expect("rustc starts");
    assert!(
        status.success(),
        "the answerer does not build; it takes `ld`, of GNU binutils"
    );
    fs::write(image, section(&fs::read(&elf).expect("the linker wrote it"), &elf)).expect("OUT_DIR is writable");
}

/// The one section that has contents in memory ("Sections" in the System V ABI): code and its constants, at address 0.
fn section(elf: &[u8], path: &Path) -> Vec<u8> {
    let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("eight bytes")) as usize;
    let half = |at: usize| usize::from(u16::from_le_bytes([elf[at], elf[at + 1]]));
    let (table, size, count) = (word(0x28), half(0x3a), half(0x3c));
    const SHF_ALLOC: usize = 2;
    let headers = (0..count).map(|number| table + number * size);
    let loaded: Vec<usize> = headers.filter(|at| word(at + 8) & SHF_ALLOC != 0).collect();
    let [at] = loaded[..] else {
        panic!(
            "{}: the answerer has data that can be written or relocated",
            path.display()
        );
    };
    assert_eq!(word(at + 0x10), 0, "the address of the section");
    elf[word(at + 0x18)..][..word(at + 0x20)].to_vec()
}
