//! `cargo xtask check-memory` and `cargo xtask check-orders`: what tests alone do not see.

use std::path::Path;

use crate::binary::{self, Binary, Count, Kind, POLICY_UNOPTIMISED};
use crate::test::{Ending, cargo, checked, watched};
use crate::{process, toolchain};

/// The crates that contain unsafe code.
const UNSAFE: [&str; 2] = ["msrgate-kvm", "msrgate-guest"];

/// Runs the tests of the crates with unsafe code, those that need a live KVM too, under AddressSanitizer; without a
/// nightly compiler under valgrind.
pub(crate) fn memory() -> Result<Ending, String> {
    let Err(no_nightly) = toolchain::nightly() else {
        return address_sanitizer();
    };
    match process::output(process::bound("valgrind").arg("--version")) {
        Ok(version) => valgrind(version.trim()),
        Err(no_valgrind) => Ok(Ending::Skipped(format!("{no_nightly}; {no_valgrind}"))),
    }
}

fn address_sanitizer() -> Result<Ending, String> {
    let mut command = toolchain::nightly_cargo(&["test", "--tests", "--no-fail-fast", "--target", toolchain::HOST]);
    command.args(UNSAFE.iter().flat_map(|name| ["--package", name]));
    command.args(POLICY_UNOPTIMISED);
    command.arg("--target-dir").arg(toolchain::target("memory"));
    command.args(["--", "--show-output", "--test-threads=1"]);
    command.env("RUSTFLAGS", "-Zsanitizer=address").envs(live());
    // What is found is told by lines.
    command.env("CARGO_PROFILE_DEV_DEBUG", "line-tables-only");
    let (passed, said) = watched(&mut command)?;
    Ok(Ending::Ran {
        count: checked(&said, passed),
        note: format!("AddressSanitizer over {}", UNSAFE.join(", ")),
    })
}

fn valgrind(version: &str) -> Result<Ending, String> {
    let suppressions = crate::root().join("xtask/valgrind.supp");
    let mut count = Count::default();
    // Those that the other stages run, so that nothing is built again.
    let binaries = binary::tests()?;
    let theirs = binaries.iter().filter(|binary| {
        let package = binary.package.file_name().unwrap_or_default().to_string_lossy();
        binary.kind != Kind::Program && UNSAFE.contains(&&*format!("msrgate-{package}"))
    });
    for Binary {
        executable, package, ..
    } in theirs
    {
        let mut command = process::bound("valgrind");
        command.args(["--quiet", "--error-exitcode=99"]);
        command
            .arg(format!("--suppressions={}", suppressions.display()))
            .arg(executable);
        command.args(["--show-output", "--test-threads=1"]).current_dir(package);
        command.env("CARGO_MANIFEST_DIR", package).envs(live());
        let (passed, said) = watched(&mut command)?;
        count += checked(&said, passed);
    }
    Ok(Ending::Ran {
        count,
        note: format!("{version} over {}", UNSAFE.join(", ")),
    })
}

/// What live tests see: where there is a KVM, they may not skip themselves.
fn live() -> impl Iterator<Item = (&'static str, &'static str)> {
    let required = Path::new("/dev/kvm").exists().then_some(("MSRGATE_LANE_REQUIRE", "1"));
    [("MSRGATE_LANE", "host")].into_iter().chain(required)
}

/// Runs the replacement of a filter through every order of its steps that loom finds.
pub(crate) fn orders() -> Result<Ending, String> {
    let mut command = cargo(&["test", "--release", "--package", "msrgate-engine", "--test", "loom"]);
    command
        .arg("--target-dir")
        .arg(toolchain::target("loom"))
        .env("RUSTFLAGS", "--cfg loom")
        // The tests take seconds, and optimising across crates takes longer.
        .env("CARGO_PROFILE_RELEASE_LTO", "off");
    let (passed, said) = watched(&mut command)?;
    let mut count = checked(&said, passed);
    if count.passed == 0 {
        // Without the flag the file is empty, which passes.
        count.failed = count.failed.max(1);
    }
    Ok(Ending::Ran {
        count,
        note: "loom over the replacement of a filter".into(),
    })
}
