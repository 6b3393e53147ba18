//! Where the texts of policies come from: the file system, and the policies that come with msrgate.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// What a path begins with that names a policy of [`BUILT_IN`].
const PREFIX: &str = "msrgate:";

/// The policies that come with msrgate, by name.
const BUILT_IN: [(&str, &str); 21] = [
    ("base/kvm-guest", include_str!("../policies/base/kvm-guest.toml")),
    ("base/linux-amd", include_str!("../policies/base/linux-amd.toml")),
    ("base/linux-intel", include_str!("../policies/base/linux-intel.toml")),
    ("base/pmu", include_str!("../policies/base/pmu.toml")),
    ("base/x86-64", include_str!("../policies/base/x86-64.toml")),
    ("bhyve-amd", include_str!("../policies/bhyve-amd.toml")),
    ("bhyve-intel", include_str!("../policies/bhyve-intel.toml")),
    ("crosvm-itmt", include_str!("../policies/crosvm-itmt.toml")),
    ("deny-all", include_str!("../policies/deny-all.toml")),
    ("fixed-microcode", include_str!("../policies/fixed-microcode.toml")),
    ("hvmi-guard", include_str!("../policies/hvmi-guard.toml")),
    ("ignore-unknown", include_str!("../policies/ignore-unknown.toml")),
    ("linux-microvm", include_str!("../policies/linux-microvm.toml")),
    ("linux-pc", include_str!("../policies/linux-pc.toml")),
    ("macos", include_str!("../policies/macos.toml")),
    ("monitoring", include_str!("../policies/monitoring.toml")),
    ("msr-safe", include_str!("../policies/msr-safe.toml")),
    ("openvmm-stubs", include_str!("../policies/openvmm-stubs.toml")),
    ("qemu", include_str!("../policies/qemu.toml")),
    ("qemu-rapl", include_str!("../policies/qemu-rapl.toml")),
    ("windows", include_str!("../policies/windows.toml")),
];

/// Gives the texts that a policy and those it extends are made of.
///
/// A path that begins with `msrgate:` names a policy that comes with msrgate ([`built_in`]), whoever implements this.
pub trait Files {
    /// The text of the file, and a path that is the same for every way of naming the file. The error is for people.
    fn read(&self, path: &Path) -> Result<(PathBuf, String), String>;

    /// The path of the file that the file `by` names in `extends`: relative to the directory of `by`.
    fn extended(&self, by: &Path, name: &str) -> PathBuf {
        by.parent().unwrap_or(Path::new("")).join(name)
    }
}

/// A policy without files around it: one text under a name.
impl Files for (&str, &str) {
    fn read(&self, path: &Path) -> Result<(PathBuf, String), String> {
        if path == Path::new(self.0) {
            Ok((path.to_path_buf(), self.1.to_owned()))
        } else {
            Err("no such file".to_owned())
        }
    }
}

/// The file system: regular files of at most [`Disk::MOST`] bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Disk;

impl Disk {
    /// The most bytes of a file that is read.
    pub const MOST: u64 = 16 << 20;
}

impl Files for Disk {
    fn read(&self, path: &Path) -> Result<(PathBuf, String), String> {
        let said = |error: std::io::Error| error.to_string();
        // The path may be another's word: a device or a FIFO could give bytes without end, or none for ever.
        let metadata = fs::metadata(path).map_err(said)?;
        if !metadata.is_file() && !metadata.is_dir() {
            return Err("it is not a regular file".to_owned());
        }
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(said)?;
        file.take(Disk::MOST + 1).read_to_end(&mut bytes).map_err(said)?;
        let canonical = fs::canonicalize(path).map_err(said)?;
        Ok((canonical, text_of(bytes)?))
    }
}

/// The text of a file, or in words why it is not a policy's.
pub fn text_of(bytes: Vec<u8>) -> Result<String, String> {
    if bytes.len() as u64 > Disk::MOST {
        return Err(format!("it has more than {} MiB", Disk::MOST >> 20));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        format!("it is not UTF-8 text: byte {at} does not belong to any character")
    })
}

/// The text of the policy that comes with msrgate under such a path, as `msrgate:linux-microvm`; in words why there is none,
/// or `None` where the path does not begin with `msrgate:` and is a file's.
pub fn built_in(path: &Path) -> Option<Result<&'static str, String>> {
    let name = name(path)?;
    let found = BUILT_IN.iter().find(|(known, _)| *known == name);
    Some(found.map(|(_, text)| *text).ok_or_else(|| {
        let names: Vec<&str> = BUILT_IN.iter().map(|(known, _)| *known).collect();
        format!(
            "msrgate comes with no policy of this name, but with {}",
            names.join(", ")
        )
    }))
}

fn name(path: &Path) -> Option<&str> {
    let name = path.to_str()?.strip_prefix(PREFIX)?;
    Some(name.strip_suffix(".toml").unwrap_or(name))
}

/// What [`Files::read`] gives, of a built-in policy or of `files`.
pub(crate) fn read(files: &dyn Files, path: &Path) -> Result<(PathBuf, String), String> {
    match built_in(path) {
        Some(text) => text.map(|text| {
            let canonical = format!("{PREFIX}{}", name(path).unwrap_or_default());
            (canonical.into(), text.to_owned())
        }),
        None => files.read(path),
    }
}

/// What [`Files::extended`] gives, with the names of built-in policies.
pub(crate) fn extended(files: &dyn Files, by: &Path, name: &str) -> PathBuf {
    match name.starts_with(PREFIX) {
        true => name.into(),
        // What stands beside a built-in policy is built in too.
        false if self::name(by).is_some() => format!("{PREFIX}{name}").into(),
        false => files.extended(by, name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Policy;

    #[test]
    fn every_policy_of_the_directory_is_built_in_and_means_what_the_file_does() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies");
        let mut names = Vec::new();
        for within in ["", "base"] {
            for entry in fs::read_dir(directory.join(within)).unwrap() {
                let path = entry.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "toml") {
                    names.push(path.strip_prefix(&directory).unwrap().with_extension(""));
                }
            }
        }
        names.sort();
        let built_in: Vec<PathBuf> = BUILT_IN.iter().map(|(name, _)| name.into()).collect();
        assert_eq!(built_in, names);
        for name in BUILT_IN.map(|(name, _)| name) {
            let file = directory.join(name).with_extension("toml");
            let fragment = name.starts_with("base/");
            let loads = |path: &Path| Policy::load(path, &Disk).map_err(|wrong| wrong.diagnostics.len());
            let (from_file, built_in) = (loads(&file), loads(Path::new(&format!("msrgate:{name}"))));
            assert_eq!(from_file, built_in, "{name}");
            assert_eq!(built_in.is_err(), fragment, "{name}");
        }
    }

    #[test]
    fn a_policy_extends_one_that_is_built_in_and_a_name_that_is_none_is_told_with_all_that_are() {
        let text = "version = 1\nextends = \"msrgate:linux-microvm\"\n";
        let extending = Policy::parse("p.toml", text).unwrap();
        let itself = Policy::load(Path::new("msrgate:linux-microvm.toml"), &Disk).unwrap();
        let name = itself.name.clone();
        assert!(Policy { name, ..extending } == itself);
        let error = Policy::parse("p.toml", "version = 1\nextends = \"msrgate:linux\"\n").unwrap_err();
        assert!(error.to_string().contains("linux-microvm, "), "{error}");
        // A file's name may hold the prefix, and a policy that is built in reaches none.
        assert_eq!(built_in(Path::new("./msrgate:qemu")), None);
        assert!(built_in(Path::new("msrgate:../policies/qemu")).is_some_and(|text| text.is_err()));
    }

    #[test]
    fn a_directory_a_device_and_a_missing_file_are_told() {
        for path in ["/", "/dev/null", "/nowhere"] {
            assert!(Policy::load(Path::new(path), &Disk).is_err(), "{path}");
        }
    }
}
