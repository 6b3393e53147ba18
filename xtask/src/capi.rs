//! `cargo xtask capi`: libmsrgate, the library for VMMs in C, built, installed and tried.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use crate::binary::{self, Count, Kind, SCOPE};
use crate::process;
use crate::test::Ending;
use crate::toolchain;

/// The name under which programs find the library that they were linked with: its number grows with a change that breaks them.
const SONAME: &str = "libmsrgate.so.0";

/// What the archive needs of the system (`rustc --print native-static-libs`).
const SYSTEM: [&str; 6] = ["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"];

/// The calls of `msrgate.h`.
const CALLS: [&str; 9] = [
    "msrgate_load",
    "msrgate_install",
    "msrgate_replace",
    "msrgate_vcpu_add",
    "msrgate_dispatch",
    "msrgate_save",
    "msrgate_restore",
    "msrgate_stats",
    "msrgate_free",
];

/// What the tests are compiled as: the compiler, and its arguments.
const DIALECTS: [(&str, &[&str]); 6] = [
    ("gcc", &["-std=gnu99"]),
    ("gcc", &["-std=gnu11"]),
    ("g++", &["-std=c++20", "-x", "c++"]),
    ("clang", &["-std=gnu99"]),
    ("clang", &["-std=gnu11"]),
    ("clang++", &["-std=c++20", "-x", "c++"]),
];

/// What the header is compiled as by itself, to the letter of the standard.
const HEADER: [(&str, &str, &str); 6] = [
    ("gcc", "c99", "c"),
    ("gcc", "c11", "c"),
    ("g++", "c++11", "c++"),
    ("clang", "c99", "c"),
    ("clang", "c11", "c"),
    ("clang++", "c++20", "c++"),
];

const TESTS: &str = "crates/capi/tests/calls.c";

/// A whole VMM in C on the library, one on what `plan --emit c` prints, and their policy.
pub(crate) const EXAMPLE: &str = "examples/c/vmm.c";
const HEADER_EXAMPLE: &str = "examples/c/header.c";
pub(crate) const POLICY: &str = "examples/c/policy.toml";

const WARNINGS: [&str; 5] = ["-Wall", "-Wextra", "-Werror", "-Wconversion", "-g"];

#[derive(Args)]
pub(crate) struct Arguments {
    /// Where to install: DIR/lib, DIR/include, DIR/lib/pkgconfig, DIR/share/man
    #[arg(long, value_name = "DIR", required_unless_present = "check")]
    prefix: Option<PathBuf>,
    /// Where the files are put in place of the prefix, for packages
    #[arg(long, value_name = "DIR", requires = "prefix")]
    destdir: Option<PathBuf>,
    /// Compile the tests in C and C++ against an installed copy, and run them
    #[arg(long)]
    check: bool,
}

/// Builds and installs, or tries.
///
/// # Errors
/// What could not be built, written or run.
pub(crate) fn run(arguments: &Arguments) -> Result<Ending, String> {
    if let Some(prefix) = &arguments.prefix {
        let below = prefix.strip_prefix("/").unwrap_or(prefix);
        let into = arguments
            .destdir
            .as_ref()
            .map_or_else(|| prefix.clone(), |dir| dir.join(below));
        install(&prefix.display().to_string(), "lib", &into, true)?;
        println!("installed in {}", into.display());
    }
    match arguments.check {
        true => check(),
        false => Ok(crate::test::one(true, format!("{} calls in {SONAME}", CALLS.len()))),
    }
}

/// Installs into `into` what later lies in `prefix`, with the libraries in its directory `libraries`.
pub(crate) fn install(prefix: &str, libraries: &str, into: &Path, released: bool) -> Result<(), String> {
    let archive = archive(released)?;
    let (lib, include) = (into.join(libraries), into.join("include"));
    let (pkgconfig, man) = (lib.join("pkgconfig"), into.join("share/man/man3"));
    for directory in [&lib, &include, &pkgconfig, &man] {
        fs::create_dir_all(directory).map_err(|error| format!("cannot make {}: {error}", directory.display()))?;
    }
    let source = crate::root().join("crates/capi");
    let copy = |from: &Path, to: PathBuf| {
        fs::copy(from, &to).map_err(|error| format!("cannot copy {} to {}: {error}", from.display(), to.display()))
    };
    copy(&archive, lib.join("libmsrgate.a"))?;
    copy(&source.join("include/msrgate.h"), include.join("msrgate.h"))?;
    copy(&source.join("msrgate.3"), man.join("msrgate.3"))?;

    let version = env!("CARGO_PKG_VERSION");
    let shared = format!("libmsrgate.so.{version}");
    link(&archive, &lib.join(&shared))?;
    for name in [SONAME, "libmsrgate.so"] {
        let path = lib.join(name);
        let _ = fs::remove_file(&path);
        symlink(&shared, &path).map_err(|error| format!("cannot link {}: {error}", path.display()))?;
    }
    let description = format!(
        "prefix={prefix}\nlibdir=${{prefix}}/{libraries}\nincludedir=${{prefix}}/include\n\nName: msrgate\n\
         Description: An MSR firewall for KVM guests\nVersion: {version}\nLibs: -L${{libdir}} -lmsrgate\n\
         Libs.private: {}\nCflags: -I${{includedir}}\n",
        SYSTEM.join(" "),
    );
    let path = pkgconfig.join("msrgate.pc");
    fs::write(&path, description).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Builds the static library: as it is released, or with the workspace's tests, which build it anyway.
fn archive(released: bool) -> Result<PathBuf, String> {
    let release = ["build", "--release", "--package", "msrgate-capi", "--lib"];
    let tests = [&["test", "--no-run"], &SCOPE[..]].concat();
    let messages = binary::messages(if released { &release } else { &tests })?;
    let library = messages
        .iter()
        .rfind(|message| message["target"]["name"] == "msrgate_capi" && message["profile"]["test"] == false);
    let files = library.and_then(|library| library["filenames"].as_array());
    let mut files = files.into_iter().flatten().filter_map(|file| file.as_str());
    let archive = files.find(|file| file.ends_with(".a"));
    Ok(archive.ok_or("cargo built no libmsrgate_capi.a")?.into())
}

/// Makes the shared library of the static one: rustc's own gives no control over which symbols are seen under which version.
fn link(archive: &Path, shared: &Path) -> Result<(), String> {
    let script = shared.with_extension("map");
    let symbols: String = CALLS.iter().map(|call| format!(" {call};")).collect();
    fs::write(&script, format!("MSRGATE_0 {{ global:{symbols} local: *; }};\n"))
        .map_err(|error| format!("cannot write {}: {error}", script.display()))?;
    let mut command = process::bound("gcc");
    command.args([
        "-shared",
        "-Wl,--gc-sections",
        "-Wl,-z,relro,-z,now",
        "-Wl,--no-undefined",
    ]);
    command
        .arg(format!("-Wl,-soname,{SONAME}"))
        .arg(format!("-Wl,--version-script,{}", script.display()));
    command.args(CALLS.iter().map(|call| format!("-Wl,-u,{call}")));
    command.arg("-o").arg(shared).arg(archive).args(SYSTEM);
    let linked = process::output(&mut command);
    let _ = fs::remove_file(&script);
    linked.map(drop)
}

/// Compiles the tests in each dialect, against the shared library and the static one, runs them, and runs them under
/// memory checkers.
pub(crate) fn check() -> Result<Ending, String> {
    let place = toolchain::target("capi");
    let prefix = place.join("prefix");
    install(&prefix.display().to_string(), "lib", &prefix, false)?;
    fs::write(prefix.join("include/policy.h"), emitted()?)
        .map_err(|error| format!("cannot write policy.h: {error}"))?;
    let mut trial = Trial {
        prefix,
        place,
        count: Count::default(),
        left_out: Vec::new(),
    };
    trial.exports()?;
    for (compiler, standard, language) in HEADER {
        trial.header(compiler, standard, language)?;
    }
    for (compiler, dialect) in DIALECTS {
        let shared = ["-lmsrgate", "-lpthread"];
        trial.attempt(compiler, dialect, &shared, None)?;
    }
    let mut whole = vec!["-l:libmsrgate.a"];
    whole.extend(SYSTEM);
    trial.attempt(
        "gcc",
        &["-std=gnu11"],
        &whole,
        Some(&["valgrind", "--quiet", "--leak-check=full", "--error-exitcode=99"]),
    )?;
    whole.push("-fsanitize=address");
    trial.attempt("gcc", &["-std=gnu11"], &whole, None)?;
    let mut note = "msrgate.h as C99, C11 and C++, and its calls under valgrind and AddressSanitizer".to_owned();
    if !trial.left_out.is_empty() {
        note = format!("{note}; there is no {}", trial.left_out.join(", no "));
    }
    Ok(Ending::Ran {
        count: trial.count,
        note,
    })
}

/// What `plan --emit c` prints of the examples' policy.
fn emitted() -> Result<String, String> {
    let built = binary::tests()?;
    let command = built
        .iter()
        .find(|program| program.name == "cli::msrgate" && program.kind == Kind::Program);
    let command = command.ok_or("cargo built no msrgate")?;
    let mut command = process::bound(&command.executable);
    command.args(["plan", "--emit", "c", POLICY]).current_dir(crate::root());
    process::output(&mut command)
}

struct Trial {
    prefix: PathBuf,
    place: PathBuf,
    count: Count,
    /// Programs that are not there.
    left_out: Vec<String>,
}

impl Trial {
    /// Holds the symbols of the shared library against the calls.
    fn exports(&mut self) -> Result<(), String> {
        let library = self.prefix.join("lib").join(SONAME);
        let mut command = process::bound("nm");
        let symbols = process::output(command.args(["--dynamic", "--defined-only"]).arg(library))?;
        let seen = symbols.lines().filter_map(|line| line.split_whitespace().nth(2));
        let mut seen: Vec<&str> = seen.filter(|symbol| !symbol.starts_with("MSRGATE_0")).collect();
        let mut expected = CALLS.map(|call| format!("{call}@@MSRGATE_0")).to_vec();
        seen.sort_unstable();
        expected.sort_unstable();
        self.add(
            seen == expected,
            &format!("the shared library has these symbols alone: {}", seen.join(" ")),
        )
    }

    /// Whether these programs are there; one that is not is noted.
    fn has<'a>(&mut self, programs: impl IntoIterator<Item = &'a str>) -> bool {
        for program in programs {
            if process::output(process::bound(program).arg("--version")).is_err() {
                if !self.left_out.iter().any(|known| known == program) {
                    self.left_out.push(program.to_owned());
                }
                return false;
            }
        }
        true
    }

    fn header(&mut self, compiler: &str, standard: &str, language: &str) -> Result<(), String> {
        if !self.has([compiler]) {
            return Ok(());
        }
        let mut command = process::bound(compiler);
        command
            .arg(format!("-std={standard}"))
            .args(["-x", language, "-pedantic-errors", "-fsyntax-only"]);
        command.args(WARNINGS).arg(self.prefix.join("include/msrgate.h"));
        let compiled = process::output(&mut command);
        let what = compiled.map_or_else(|why| why, |_| format!("msrgate.h, {compiler} -std={standard}"));
        self.add(!what.contains("failed"), &what)
    }

    /// Compiles the tests and runs them, perhaps by another program.
    fn attempt(
        &mut self,
        compiler: &str,
        dialect: &[&str],
        libraries: &[&str],
        by: Option<&[&str]>,
    ) -> Result<(), String> {
        if !self.has([compiler].into_iter().chain(by.and_then(<[&str]>::first).copied())) {
            return Ok(());
        }
        let what = [&[compiler], dialect, libraries, by.unwrap_or_default()]
            .concat()
            .join(" ");
        for source in [TESTS, HEADER_EXAMPLE, EXAMPLE] {
            if source == EXAMPLE && dialect.contains(&"c++") {
                continue;
            }
            let program = self.place.join(Path::new(source).file_stem().unwrap_or_default());
            let mut command = process::bound(compiler);
            command
                .args(dialect)
                .args(WARNINGS)
                .arg(format!("-I{}/include", self.prefix.display()));
            command.arg(crate::root().join(source)).arg("-o").arg(&program);
            // The language is that of the sources alone.
            command
                .args(["-x", "none"])
                .arg(format!("-L{}/lib", self.prefix.display()))
                .args(libraries);
            if let Err(why) = process::output(&mut command) {
                self.add(false, &why)?;
                continue;
            }
            let mut command = match by {
                Some([checker, arguments @ ..]) => {
                    let mut command = process::bound(checker);
                    command.args(arguments).arg(&program);
                    command
                }
                _ => process::bound(&program),
            };
            command.env("LD_LIBRARY_PATH", self.prefix.join("lib"));
            self.run(source, &what, &mut command)?;
        }
        Ok(())
    }

    fn run(&mut self, source: &str, what: &str, command: &mut Command) -> Result<(), String> {
        if source == EXAMPLE {
            command.arg(crate::root().join(POLICY));
        }
        let (status, said) = process::watch(command).map_err(|error| format!("cannot run {source}: {error}"))?;
        if said.contains("skipped: ") || said.contains("/dev/kvm: ") {
            self.count.skipped += 1;
            return Ok(());
        }
        let read = said.lines().filter_map(|line| line.strip_prefix("the guest has read "));
        let right = source == TESTS || read.eq(["0x11", "0x0", "0x4"]);
        self.add(status.success() && right, &format!("{source}, {what}"))
    }

    fn add(&mut self, passed: bool, what: &str) -> Result<(), String> {
        match passed {
            true => self.count.passed += 1,
            false => self.count.failed += 1,
        }
        let result = if passed { "ok" } else { "FAILED" };
        process::print(&format!("test {what} ... {result}\n")).map_err(|error| error.to_string())
    }
}
