//! The stage that holds the database of MSRs against the headers of Debian's kernel.

use std::fs;
use std::path::{Path, PathBuf};

use crate::binary::SCOPE;
use crate::package::{self, Need};
use crate::test::{Ending, cargo, checked, watched};

const NEEDS: &[Need] = &[
    ("apt-get", "apt"),
    ("apt-cache", "apt"),
    ("dpkg", "dpkg"),
    ("setpriv", "util-linux"),
];

/// The series whose headers are taken: the newest that the lanes run.
const SERIES: &str = "6.12";

/// Fetches the headers and runs the test that reads them.
pub(crate) fn compare() -> Result<Ending, String> {
    let folder = match fetch() {
        Ok(folder) => folder,
        Err(why) => return Ok(Ending::Skipped(why)),
    };
    // In the scope of the other tests, so that nothing is built anew.
    let mut command = cargo(&[&["test"], &SCOPE[..], &["--test", "headers"]].concat());
    command.args(["--", "--ignored", "--show-output"]);
    let (passed, text) = watched(command.env("MSRGATE_HEADERS", &folder))?;
    let name = folder.file_name().unwrap_or_default();
    Ok(Ending::Ran {
        count: checked(&text, passed),
        note: name.to_string_lossy().into_owned(),
    })
}

/// The headers from the cache, fetched on first use.
fn fetch() -> Result<PathBuf, String> {
    let cache = crate::root().join("target/headers");
    let failed = |error| format!("cannot write {}: {error}", cache.display());
    if let Some(folder) = headers(&cache) {
        return Ok(folder);
    }
    package::require(NEEDS)?;
    let fresh = cache.with_extension("new");
    let _ = fs::remove_dir_all(&fresh);
    let _ = fs::remove_dir_all(&cache);
    package::fetch("linux-headers", SERIES, "common", &fresh)?;
    fs::rename(&fresh, &cache).map_err(failed)?;
    headers(&cache).ok_or_else(|| "the package has no headers in usr/src".to_owned())
}

/// The folder in which the package keeps them.
fn headers(cache: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(cache.join("usr/src")).ok()?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.is_dir())
}
