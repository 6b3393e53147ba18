//! Compiles both policies, and says how an ELF without an operating system is linked.

use std::error::Error;
use std::path::Path;
use std::{env, fs};

use msrgate_plan::Plan;
use msrgate_policy::Policy;

const LINK: [&str; 6] = [
    "-nostartfiles",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
];

fn main() {
    let here = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    for file in ["policy.toml", "second.toml", "link.ld", "src/boot.s"] {
        println!("cargo::rerun-if-changed={file}");
    }
    for argument in LINK {
        println!("cargo::rustc-link-arg-bin=bare={argument}");
    }
    println!("cargo::rustc-link-arg-bin=bare=-T{here}/link.ld");
    for name in ["policy", "second"] {
        if let Err(error) = compile(name) {
            println!("cargo::error={}", error.to_string().replace('\n', "\ncargo::error="));
        }
    }
}

fn compile(name: &str) -> Result<(), Box<dyn Error>> {
    let policy = Policy::from_file(format!("{name}.toml"))?;
    let plan = Plan::compile_for(&policy.decision_map(None)?, &policy.options())?;
    let out = env::var_os("OUT_DIR").ok_or("cargo runs this")?;
    Ok(fs::write(Path::new(&out).join(name), plan.to_bytes())?)
}
