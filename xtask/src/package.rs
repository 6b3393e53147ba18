//! Debian packages that the lanes stand on.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::process;

/// A program's name, or an absolute path, and the package that brings it.
pub(crate) type Need = (&'static str, &'static str);

/// The keys by which packages of Debian's are known, and the package that brings them.
pub(crate) const KEYS: Need = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "debian-archive-keyring",
);

/// Makes sure that every need is there, installing the packages of those that are not.
///
/// # Errors
/// A sentence that names the packages, where they are missing and cannot be installed.
pub(crate) fn require(needs: &[Need]) -> Result<(), String> {
    let missing = |needs: &[Need]| -> Vec<&'static str> {
        let absent = needs.iter().filter(|(thing, _)| find(thing).is_none());
        absent.map(|&(_, package)| package).collect()
    };
    if missing(needs).is_empty() {
        return Ok(());
    }
    let _one = alone();
    let mut packages = missing(needs);
    if packages.is_empty() {
        return Ok(());
    }
    let wanted = packages.join(" ");
    if find("apt-get").is_none() {
        return Err(format!("needs the programs of Debian's packages {wanted}"));
    }
    if !root() {
        return Err(format!("needs packages: apt-get install {wanted}"));
    }
    // Installing one package may remove another of an older or newer version, which the next round brings back.
    for _ in 0..2 {
        eprintln!("xtask: installing {}", packages.join(" "));
        if install(&packages).is_err() {
            update()?;
            install(&packages)?;
        }
        packages = missing(needs);
        if packages.is_empty() {
            return Ok(());
        }
    }
    Err(format!("installed, and still lack what {} bring", packages.join(" ")))
}

/// Of stages that run at once, one at a time has apt-get change what this machine has.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fetches the package lists.
///
/// # Errors
/// apt-get's last words, or that only root may.
fn update() -> Result<(), String> {
    if !root() {
        return Err("the package lists are too old, and only root can fetch them: apt-get update".into());
    }
    process::output(process::bound("apt-get").args(["update", "-q"])).map(drop)
}

/// Where a program is on the search path or in the folders of system programs, or a file itself.
pub(crate) fn find(thing: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    // Joining an absolute path to a folder gives that path.
    folders.map(|folder| folder.join(thing)).find(|file| file.is_file())
}

fn install(packages: &[&str]) -> Result<(), String> {
    let mut command = process::bound("apt-get");
    command
        .args(["install", "-y", "-q", "--no-install-recommends"])
        .args(packages);
    process::output(command.env("DEBIAN_FRONTEND", "noninteractive")).map(drop)
}

/// Whether this process may install.
pub(crate) fn root() -> bool {
    Path::new("/proc/self")
        .metadata()
        .is_ok_and(|process| process.uid() == 0)
}

/// Downloads the newest `KIND-SERIES.…-FLAVOUR` into a folder that is made, and unpacks it there. Returns its name.
///
/// # Errors
/// Why it cannot be had.
pub(crate) fn fetch(kind: &str, series: &str, flavour: &str, into: &Path) -> Result<String, String> {
    let failed = |error| format!("cannot write {}: {error}", into.display());
    let _one = alone();
    fs::create_dir_all(into).map_err(failed)?;
    let once = || -> Result<String, String> {
        let package = newest(kind, series, flavour)?;
        eprintln!("xtask: fetching {package}");
        let mut command = process::bound("apt-get");
        // As root, apt-get otherwise downloads as a user who may not write here.
        command.args(["download", "-q", "-o", "APT::Sandbox::User=root", &package]);
        process::output(command.current_dir(into))?;
        Ok(package)
    };
    let package = once().or_else(|why| {
        update().map_err(|error| format!("{why}; {error}"))?;
        once()
    })?;
    let archive = fs::read_dir(into)
        .map_err(failed)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| format!("apt-get brought no file for {package}"))?;
    process::output(process::bound("dpkg").arg("-x").arg(&archive).arg(into))?;
    fs::remove_file(&archive).map_err(failed)?;
    Ok(package)
}

/// Downloads a package's source of this release of Debian, from where this machine has its packages from, and unpacks it into a folder
/// that is made. What Debian adds is left out.
///
/// # Errors
/// Why it cannot be had.
pub(crate) fn source(package: &str, release: &str, into: &Path) -> Result<(), String> {
    let failed = |error| format!("cannot write {}: {error}", into.display());
    let folder = into.join("apt");
    fs::create_dir_all(folder.join("lists/partial")).map_err(failed)?;
    let mut places = Command::new("apt-get");
    places.args([
        "indextargets",
        "--format",
        "$(SITE) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
    ]);
    let places = process::output(&mut places)?;
    let place = places
        .lines()
        .find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            // Updates and security have archives of their own.
            [site, release, "main"] if !release.contains('-') => Some(site),
            _ => None,
        });
    let place = place.ok_or("this machine has its packages from no archive of Debian's")?;
    let list = folder.join("sources.list");
    let line = format!("deb-src [signed-by={}] {place} {release} main\n", KEYS.0);
    fs::write(&list, line).map_err(failed)?;
    let apt = || {
        let mut command = process::bound("apt-get");
        command.args(["-q", "-o", "APT::Sandbox::User=root", "-o", "Dir::Etc::sourceparts=-"]);
        for (setting, value) in [
            ("Dir::Etc::sourcelist", &list),
            ("Dir::State::lists", &folder.join("lists")),
        ] {
            command.arg("-o").arg(format!("{setting}={}", value.display()));
        }
        // Those of this machine's other lists stay as they are.
        command.args(["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="]);
        command.current_dir(into);
        command
    };
    process::output(apt().arg("update"))?;
    process::output(apt().args(["source", "--download-only", "--tar-only", package]))?;
    fs::remove_dir_all(&folder).map_err(failed)?;
    let archive = fs::read_dir(into)
        .map_err(failed)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.is_file())
        .ok_or_else(|| format!("apt-get brought no source of {package}"))?;
    let mut tar = process::bound("tar");
    tar.arg("-xf")
        .arg(&archive)
        .args(["--strip-components=1", "-C"])
        .arg(into);
    process::output(&mut tar).map(drop)
}

/// The newest package whose name is `KIND-SERIES.…-FLAVOUR`.
///
/// # Errors
/// That there is none.
fn newest(kind: &str, series: &str, flavour: &str) -> Result<String, String> {
    let pattern = format!(r"^{kind}-{}\..*-{flavour}$", series.replace('.', r"\."));
    let list = process::output(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    // The pattern's `.*` also matches the other flavours, whose names are longer.
    let plain = names.filter(|name| {
        name.strip_suffix(&format!("-{flavour}"))
            .is_some_and(|rest| !rest.ends_with("-cloud") && !rest.ends_with("-rt"))
    });
    plain
        .max_by_key(|name| numbers(name))
        .map(str::to_string)
        .ok_or_else(|| format!("no package {kind}-{series}.*-{flavour} is known here"))
}

/// The numbers in a version, in order, by which versions of one series compare.
fn numbers(version: &str) -> Vec<u64> {
    let digits = version.split(|character: char| !character.is_ascii_digit());
    digits.filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number_and_not_by_letter() {
        assert!(numbers("linux-image-6.12.117+deb12-amd64") > numbers("linux-image-6.12.99+deb12-amd64"));
        assert!(numbers("linux-image-6.1.0-56-amd64") > numbers("linux-image-6.1.0-9-amd64"));
    }
}
