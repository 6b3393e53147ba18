//! `cargo xtask dist`: a Debian package and a tarball of what users run and link; and a trial of both.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use crate::binary::{self, Count, SCOPE};
use crate::capi;
use crate::package;
use crate::process;
use crate::test::{self, Ending};
use crate::toolchain;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Who brings what makes the Debian package.
const TOOLS: [package::Need; 2] = [("dpkg-deb", "dpkg"), ("dpkg-shlibdeps", "dpkg-dev")];

#[derive(Args)]
pub(crate) struct Arguments {
    /// Where the package and the tarball are put; `dist` in cargo's target directory where it is left out
    #[arg(long, value_name = "DIR")]
    into: Option<PathBuf>,
}

/// Where things lie.
struct Layout {
    /// What `msrgate.pc` takes for the prefix.
    prefix: &'static str,
    libraries: &'static str,
    zsh: &'static str,
}

const DEBIAN: Layout = Layout {
    prefix: "/usr",
    libraries: "lib/x86_64-linux-gnu",
    zsh: "share/zsh/vendor-completions",
};

/// Unpacked anywhere, so that nothing names a place.
const TARBALL: Layout = Layout {
    prefix: "${pcfiledir}/../..",
    libraries: "lib",
    zsh: "share/zsh/site-functions",
};

/// Makes both.
///
/// # Errors
/// What could not be built or written.
pub(crate) fn run(arguments: &Arguments) -> Result<Ending, String> {
    let into = arguments.into.clone().unwrap_or_else(|| toolchain::target("dist"));
    let made = make(&into, true)?;
    let debian = made.debian.map_or_else(
        |why| format!("no Debian package: {why}"),
        |path| path.display().to_string(),
    );
    Ok(test::one(true, format!("{}, {debian}", made.tarball.display())))
}

struct Made {
    tarball: PathBuf,
    /// The package, or what is missing for one.
    debian: Result<PathBuf, String>,
}

/// Makes both, with the released command and the C library as it is asked for.
fn make(into: &Path, released: bool) -> Result<Made, String> {
    let command = binary::released()?;
    let name = format!("msrgate-{VERSION}-x86_64-linux");
    let tree = into.join(&name);
    fill(&tree, &TARBALL, &command, released)?;
    let tarball = into.join(format!("{name}.tar.gz"));
    let mut tar = process::bound("tar");
    tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .arg(format!("--mtime=@{}", epoch()));
    process::output(tar.args(["-czf"]).arg(&tarball).arg("-C").arg(into).arg(&name))?;
    let debian = match package::require(&TOOLS) {
        Err(why) => Err(why),
        Ok(()) => Ok(debian(into, &command, released)?),
    };
    Ok(Made { tarball, debian })
}

/// The time of the last change, which archives give their files: the same source makes the same archives.
fn epoch() -> String {
    let given = std::env::var("SOURCE_DATE_EPOCH").ok();
    let mut git = process::bound("git");
    git.args(["log", "-1", "--format=%ct"]).current_dir(crate::root());
    let last = || process::output(&mut git).ok().map(|time| time.trim().to_owned());
    given.or_else(last).unwrap_or_else(|| "0".to_owned())
}

/// Puts all that is shipped under a prefix.
fn fill(prefix: &Path, layout: &Layout, command: &Path, released: bool) -> Result<(), String> {
    let root = crate::root();
    let _ = fs::remove_dir_all(prefix);
    let [bin, man, share, documents] = ["bin", "share/man/man1", "share/msrgate", "share/doc/msrgate"]
        .map(|directory| directory_in(prefix, directory));
    let (bin, man, share, documents) = (bin?, man?, share?, documents?);
    let program = bin.join("msrgate");
    process::output(process::bound("strip").arg("-o").arg(&program).arg(command))?;
    process::output(process::bound(&program).args(["man", "--into"]).arg(&man))?;
    for (shell, directory, name) in [
        ("bash", "share/bash-completion/completions", "msrgate"),
        ("zsh", layout.zsh, "_msrgate"),
        ("fish", "share/fish/vendor_completions.d", "msrgate.fish"),
    ] {
        let text = process::output(process::bound(&program).args(["completions", shell]))?;
        write(&directory_in(prefix, directory)?.join(name), &text)?;
    }
    capi::install(layout.prefix, layout.libraries, prefix, released)?;
    let libraries = prefix.join(layout.libraries);
    let archive = libraries.join("libmsrgate.a");
    process::output(process::bound("strip").arg("--strip-debug").arg(archive))?;
    let shared = libraries.join(format!("libmsrgate.so.{VERSION}"));
    process::output(process::bound("strip").arg("--strip-unneeded").arg(shared))?;
    let copied = [
        (["policies", "traces"].as_slice(), &share),
        (&["README.md", "CHANGELOG.md", "SECURITY.md", "docs"], &documents),
        (&["examples/c"], &directory_in(&documents, "examples")?),
    ];
    for (names, to) in copied {
        let from = names.iter().map(|name| root.join(name));
        process::output(process::bound("cp").arg("-R").args(from).arg(to))?;
    }
    write(&documents.join("copyright"), &copyright()?)?;
    write(&documents.join("third-party"), &others()?)?;
    process::output(process::bound("chmod").args(["-R", "u=rwX,go=rX"]).arg(prefix)).map(drop)
}

fn directory_in(parent: &Path, name: &str) -> Result<PathBuf, String> {
    let directory = parent.join(name);
    fs::create_dir_all(&directory).map_err(|error| format!("cannot make {}: {error}", directory.display()))?;
    Ok(directory)
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

/// Debian's machine-readable file of licences.
fn copyright() -> Result<String, String> {
    let mut text = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
        Upstream-Name: msrgate\nSource: https://github.com/msrgate/msrgate\n\
        Comment: The programs hold crates of others; the file third-party has their licences.\n\n\
        Files: *\nCopyright: The msrgate authors\nLicense: Apache-2.0 or MIT\n"
        .to_owned();
    for (name, file) in [("Apache-2.0", "LICENSE-APACHE"), ("MIT", "LICENSE-MIT")] {
        text.push_str(&format!("\nLicense: {name}\n"));
        for line in read(&crate::root().join(file))?.lines() {
            let line = if line.is_empty() { "." } else { line };
            text.push_str(&format!(" {line}\n"));
        }
    }
    Ok(text)
}

/// The licences of the crates of others that the command was built of, which are those of the C library too: each text once, after the
/// crates that have it.
fn others() -> Result<String, String> {
    let messages = binary::messages(&binary::RELEASE)?;
    let manifests = messages.iter().filter_map(|message| message["manifest_path"].as_str());
    let manifests: BTreeSet<PathBuf> = manifests.map(PathBuf::from).collect();
    let mut by_text: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in manifests.iter().filter_map(|manifest| manifest.parent()) {
        if package.starts_with(crate::root()) {
            continue;
        }
        let manifest = read(&package.join("Cargo.toml"))?;
        let licence = manifest.lines().find_map(|line| line.strip_prefix("license = "));
        // The registry's directories are called by name and version.
        let name = package.file_name().unwrap_or_default().to_string_lossy();
        let title = format!("{name}: {}", licence.unwrap_or("as follows").trim_matches('"'));
        let files = fs::read_dir(package).map_err(|error| format!("cannot read {}: {error}", package.display()))?;
        let files = files.filter_map(Result::ok).map(|file| file.path());
        let texts = files.filter(|file| {
            let name = file.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
            let licence = ["LICEN", "COPYING", "NOTICE", "UNLICEN"];
            file.is_file() && licence.iter().any(|start| name.starts_with(start))
        });
        let mut texts = texts.map(|file| read(&file)).collect::<Result<Vec<_>, _>>()?;
        if texts.is_empty() {
            texts.push("Its package holds no text of the licence.".to_owned());
        }
        for text in texts {
            by_text.entry(text).or_default().insert(title.clone());
        }
    }
    let texts = by_text.iter().map(|(text, titles)| {
        let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
        format!("{}\n\n{}\n", titles.join("\n"), text.trim_matches('\n'))
    });
    Ok(texts.collect::<Vec<_>>().join("\n----\n\n"))
}

/// Makes the Debian package.
fn debian(into: &Path, command: &Path, released: bool) -> Result<PathBuf, String> {
    let place = into.join("debian");
    let tree = place.join("tree");
    let _ = fs::remove_dir_all(&place);
    fill(&tree.join("usr"), &DEBIAN, command, released)?;
    // What the programs need of libraries is asked in a directory that looks like a source package's.
    write(
        &directory_in(&place, "debian")?.join("control"),
        "Source: msrgate\n\nPackage: msrgate\nArchitecture: amd64\n",
    )?;
    let mut needs = process::bound("dpkg-shlibdeps");
    needs.current_dir(&place).args(["-O", "tree/usr/bin/msrgate"]);
    needs.arg(format!("tree/usr/{}/libmsrgate.so.{VERSION}", DEBIAN.libraries));
    let needs = process::output(&mut needs)?;
    let needs = needs
        .trim()
        .strip_prefix("shlibs:Depends=")
        .ok_or("dpkg-shlibdeps names no libraries")?;
    let size = process::output(process::bound("du").args(["-sk"]).arg(&tree))?;
    let size = size.split_whitespace().next().unwrap_or("0");
    let control = format!(
        "Package: msrgate\nVersion: {VERSION}\nArchitecture: amd64\nSection: admin\nPriority: optional\n\
         Maintainer: The msrgate authors <https://github.com/msrgate/msrgate/issues>\n\
         Homepage: https://github.com/msrgate/msrgate\nInstalled-Size: {size}\nDepends: {needs}\n\
         Description: MSR firewall for KVM guests\n \
         A policy says what a guest gets for its reads and writes of model-specific\n \
         registers. msrgate compiles it to the filter that KVM holds, proves the\n \
         result, and puts it on a VMM. With libmsrgate, the library for VMMs in C.\n"
    );
    let about = directory_in(&tree, "DEBIAN")?;
    write(&about.join("control"), &control)?;
    write(&about.join("triggers"), "activate-noawait ldconfig\n")?;
    process::output(process::bound("chmod").arg("0755").arg(&tree).arg(&about))?;
    let package = into.join(format!("msrgate_{VERSION}_amd64.deb"));
    let mut build = process::bound("dpkg-deb");
    build
        .env("SOURCE_DATE_EPOCH", epoch())
        .args(["--root-owner-group", "--build"]);
    process::output(build.arg(&tree).arg(&package))?;
    Ok(package)
}

/// Installs both in clean directories and does there what users do. The C library in them is as tests build it: its release
/// takes a minute, and what is tried is where it lies.
pub(crate) fn check() -> Result<Ending, String> {
    let into = toolchain::target("dist-check");
    let made = make(&into, false)?;
    let vmm = binary::built(&[&["build"], &SCOPE[..], &["--example", "small_vmm"]].concat())?;
    let vmm = vmm.into_iter().next().ok_or("cargo built no small_vmm")?.executable;
    let mut trial = Trial {
        vmm,
        count: Count::default(),
    };
    let root = into.join("root");
    let _ = fs::remove_dir_all(&root);
    let note = match &made.debian {
        Ok(package) => {
            trial.note("dpkg installs the package", install(package, &root))?;
            trial.job(&root.join("usr"), &DEBIAN, &root)?;
            if package::root() {
                trial.note("dpkg removes all of the package", remove(&root))?;
            }
            "the Debian package and the tarball, with a C library that is not optimised".to_owned()
        }
        Err(why) => {
            trial.count.skipped += 1;
            format!("the tarball; no Debian package: {why}")
        }
    };
    let _ = fs::remove_dir_all(into.join("unpacked"));
    let unpacked = directory_in(&into, "unpacked")?;
    let mut tar = process::bound("tar");
    tar.arg("-xzf")
        .arg(&made.tarball)
        .args(["--strip-components=1", "-C"])
        .arg(&unpacked);
    trial.note("tar unpacks the tarball", process::output(&mut tar).map(drop))?;
    trial.job(&unpacked, &TARBALL, Path::new(""))?;
    Ok(Ending::Ran {
        count: trial.count,
        note,
    })
}

/// Installs a package where nothing else is; who is not root only unpacks it.
fn install(package: &Path, root: &Path) -> Result<(), String> {
    if !package::root() {
        return process::output(process::bound("dpkg-deb").arg("-x").arg(package).arg(root)).map(drop);
    }
    for directory in ["info", "updates"] {
        directory_in(&root.join("var/lib/dpkg"), directory)?;
    }
    write(&root.join("var/lib/dpkg/status"), "")?;
    // What it needs is this machine's, not that directory's.
    process::output(dpkg(root).args(["--force-depends", "--install"]).arg(package)).map(drop)
}

fn remove(root: &Path) -> Result<(), String> {
    process::output(dpkg(root).args(["--purge", "msrgate"]))?;
    match root.join("usr").exists() {
        true => Err("there still is something in /usr".to_owned()),
        false => Ok(()),
    }
}

fn dpkg(root: &Path) -> Command {
    let mut command = process::bound("dpkg");
    command.arg(format!("--root={}", root.display()));
    command
}

struct Trial {
    /// A VMM that knows nothing of msrgate.
    vmm: PathBuf,
    count: Count,
}

impl Trial {
    /// Does with what is installed under a prefix what users do with it.
    fn job(&mut self, prefix: &Path, layout: &Layout, root: &Path) -> Result<(), String> {
        let program = prefix.join("bin/msrgate");
        let share = prefix.join("share/msrgate");
        let [policy, microcode] =
            ["linux-microvm", "fixed-microcode"].map(|name| share.join("policies").join(name).with_extension("toml"));
        let trace = share.join("traces/linux-6.1-microvm.jsonl");
        let command = || {
            let mut command = process::bound(&program);
            // Nothing of the source's directory helps.
            command.env_clear().current_dir("/");
            command
        };
        self.shows("msrgate check", command().arg("check").arg(&policy), "")?;
        self.shows(
            "msrgate plan",
            command().args(["plan", "--json"]).arg(&policy),
            "\"ranges\"",
        )?;
        let mut replay = command();
        replay
            .args(["replay", "--backend", "engine", "-p"])
            .arg(&policy)
            .arg(&trace);
        self.shows(
            "msrgate replay",
            &mut replay,
            "the policy changed nothing for the guest",
        )?;
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        if kvm {
            let mut run = command();
            run.args(["run", "-p"])
                .arg(&microcode)
                .arg("--")
                .arg(&self.vmm)
                .arg("r:0x8b");
            self.shows("msrgate run", &mut run, "rdmsr 0x8b 0x100000000000000")?;
        } else {
            self.count.skipped += 1;
        }

        let libraries = prefix.join(layout.libraries);
        let mut flags = process::bound("pkg-config");
        flags.env("PKG_CONFIG_LIBDIR", libraries.join("pkgconfig"));
        flags
            .env("PKG_CONFIG_SYSROOT_DIR", root)
            .args(["--cflags", "--libs", "msrgate"]);
        flags
            .env("PKG_CONFIG_ALLOW_SYSTEM_CFLAGS", "1")
            .env("PKG_CONFIG_ALLOW_SYSTEM_LIBS", "1");
        let flags = process::output(&mut flags)?;
        let example = prefix.join("vmm");
        let mut compiler = process::bound("cc");
        let source = prefix.join("share/doc/msrgate").join(capi::EXAMPLE);
        compiler
            .arg(&source)
            .arg("-o")
            .arg(&example)
            .args(flags.split_whitespace());
        self.shows("the VMM in C compiles", &mut compiler, "")?;
        if kvm {
            let mut vmm = process::bound(&example);
            vmm.env("LD_LIBRARY_PATH", &libraries)
                .arg(source.with_file_name("policy.toml"));
            self.shows("the VMM in C", &mut vmm, "the guest has read 0x4")?;
        } else {
            self.count.skipped += 1;
        }
        let _ = fs::remove_file(example);

        for page in ["man1/msrgate.1", "man1/msrgate-run.1", "man3/msrgate.3"] {
            let page = prefix.join("share/man").join(page);
            self.note(&format!("there is {}", page.display()), read(&page).map(drop))?;
        }
        let completions = prefix.join("share/bash-completion/completions/msrgate");
        self.shows(
            "bash reads the completions",
            process::bound("bash").arg("-n").arg(completions),
            "",
        )
    }

    /// Whether a command ends well and writes this.
    fn shows(&mut self, what: &str, command: &mut Command, text: &str) -> Result<(), String> {
        let result = process::output(command).and_then(|out| match out.contains(text) {
            true => Ok(()),
            false => Err(format!("it does not say `{text}` but: {out}")),
        });
        self.note(what, result)
    }

    fn note(&mut self, what: &str, result: Result<(), String>) -> Result<(), String> {
        let line = match result {
            Ok(()) => {
                self.count.passed += 1;
                format!("test {what} ... ok\n")
            }
            Err(why) => {
                self.count.failed += 1;
                format!("test {what} ... FAILED: {why}\n")
            }
        };
        process::print(&line).map_err(|error| error.to_string())
    }
}
