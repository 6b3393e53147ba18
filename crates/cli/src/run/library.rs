//! Where the library is that goes into the VMM.

use std::path::{Path, PathBuf};

use crate::exit::{Exit, Failure};

const NAME: &str = "libmsrgate_preload.so";
const VARIABLE: &str = "MSRGATE_PRELOAD";

pub(crate) fn find() -> Result<PathBuf, Failure> {
    let machine = |line: String| Failure::Line(Exit::Machine, line);
    let found = match std::env::var_os(VARIABLE) {
        Some(path) => {
            let path = PathBuf::from(path);
            let found = path.canonicalize();
            found.map_err(|error| machine(format!("{VARIABLE} names `{}`: {error}", path.display())))?
        }
        None => {
            let this = std::env::current_exe();
            let this = this.map_err(|error| machine(format!("this program does not find itself: {error}")))?;
            let folder = this.parent().unwrap_or(Path::new("/"));
            let places = [folder.to_path_buf(), folder.join("deps"), folder.join("../lib/msrgate")];
            let files = places.iter().map(|place| place.join(NAME));
            let found = files.filter_map(|file| file.canonicalize().ok()).next();
            found.ok_or_else(|| {
                machine(format!(
                    "{NAME} is neither in {0} nor in {0}/deps nor in {0}/../lib/msrgate: `cargo build` leaves it in \
                     target/*/deps; copy it there, or name it by {VARIABLE}",
                    folder.display()
                ))
            })?
        }
    };
    // The dynamic linker's list has no way to quote them.
    let text = found.as_os_str().as_encoded_bytes();
    if text.iter().any(|byte| matches!(byte, b' ' | b':')) {
        return Err(machine(format!(
            "the dynamic linker takes no path with a blank or a colon: move `{}`, and name it by {VARIABLE}",
            found.display()
        )));
    }
    Ok(found)
}
