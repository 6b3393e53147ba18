//! Compiles the policy, and refuses to build where something is wrong with it.

use std::error::Error;
use std::path::Path;
use std::{env, fs};

use msrgate::{Plan, Policy};

fn main() {
    println!("cargo::rerun-if-changed=policy.toml");
    if let Err(error) = compile("policy.toml") {
        // The errors have file, line and column, and stand below cargo's own.
        println!("cargo::error={}", error.to_string().replace('\n', "\ncargo::error="));
    }
}

fn compile(path: &str) -> Result<(), Box<dyn Error>> {
    let policy = Policy::from_file(path)?;
    let plan = Plan::compile_for(&policy.decision_map(None)?, &policy.options())?;
    let out = env::var_os("OUT_DIR").ok_or("cargo runs this")?;
    Ok(fs::write(Path::new(&out).join("plan"), plan.to_bytes())?)
}
