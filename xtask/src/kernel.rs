//! Debian's kernels, unpacked beside the build and never installed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::package;
use crate::process;

/// What a lane wants of a kernel.
pub(crate) struct Wanted {
    /// The folder's name in the cache.
    pub(crate) name: String,
    /// `6.1` or `6.12`.
    pub(crate) series: &'static str,
    /// `amd64`, or `cloud-amd64`, which is smaller and has no 9p.
    pub(crate) flavour: &'static str,
    /// Lists of modules: a list's name, and the modules that it loads with all that they need.
    pub(crate) lists: &'static [(&'static str, &'static [&'static str])],
}

/// A kernel on disk: `vmlinuz`, `vmlinux`, `version`, and `modules/` with each module stripped and
/// not compressed, and one file `NAME.order` for each list.
pub(crate) struct Kernel {
    pub(crate) folder: PathBuf,
    /// What `uname -r` says in it.
    pub(crate) version: String,
}

/// The programs that fetching and unpacking takes.
pub(crate) const NEEDS: &[package::Need] = &[
    ("apt-get", "apt"),
    ("dpkg", "dpkg"),
    ("setpriv", "util-linux"),
    ("modprobe", "kmod"),
    ("objcopy", "binutils"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("lz4", "lz4"),
];

/// The kernel from the cache, fetched on first use.
///
/// # Errors
/// Why it cannot be had.
pub(crate) fn fetch(wanted: &Wanted, cache: &Path) -> Result<Kernel, String> {
    let failed = |error| format!("cannot write {}: {error}", cache.display());
    fs::create_dir_all(cache).map_err(failed)?;
    let folder = cache.join(&wanted.name);
    let lock = File::create(cache.join(format!("{}.lock", wanted.name))).map_err(failed)?;
    lock.lock().map_err(failed)?;
    if !folder.join("version").is_file() {
        let fresh = cache.join(format!("{}.new", wanted.name));
        let _ = fs::remove_dir_all(&fresh);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&fresh).map_err(failed)?;
        let unpacked = unpack(wanted, &fresh);
        if unpacked.is_ok() {
            fs::rename(&fresh, &folder).map_err(failed)?;
        }
        let _ = fs::remove_dir_all(&fresh);
        unpacked?;
    }
    let version = fs::read_to_string(folder.join("version")).map_err(failed)?;
    Ok(Kernel {
        folder,
        version: version.trim().to_string(),
    })
}

fn unpack(wanted: &Wanted, fresh: &Path) -> Result<(), String> {
    let tree = fresh.join("tree");
    let package = package::fetch("linux-image", wanted.series, wanted.flavour, &tree)?;
    let failed = |error| format!("cannot unpack {package}: {error}");
    let version = package.trim_start_matches("linux-image-");
    let depmod = package::find("depmod").unwrap_or("depmod".into());
    process::output(process::bound(depmod).arg("-b").arg(&tree).arg(version))?;

    let modules = fresh.join("modules");
    fs::create_dir(&modules).map_err(failed)?;
    for (list, names) in wanted.lists {
        let order = load_order(&tree, version, names)?;
        let mut files = String::new();
        for module in order {
            let name = file_name(&module);
            let plain = name.trim_end_matches(".xz").trim_end_matches(".zst");
            plain_module(&module, &modules.join(plain))?;
            files.push_str(plain);
            files.push('\n');
        }
        fs::write(modules.join(format!("{list}.order")), files).map_err(failed)?;
    }

    let image = fresh.join("vmlinuz");
    fs::rename(tree.join(format!("boot/vmlinuz-{version}")), &image).map_err(failed)?;
    extract_vmlinux(&image, &fresh.join("vmlinux"))?;
    fs::remove_dir_all(&tree).map_err(failed)?;
    // Last: this file says that all the others are there.
    fs::write(fresh.join("version"), version).map_err(failed)
}

/// The modules' files in the order in which they load: any other order lacks symbols.
fn load_order(tree: &Path, version: &str, names: &[&str]) -> Result<Vec<PathBuf>, String> {
    let modprobe = package::find("modprobe").unwrap_or("modprobe".into());
    let mut order = Vec::new();
    for name in names {
        let mut command = Command::new(&modprobe);
        command
            .arg("-d")
            .arg(tree)
            .args(["-S", version, "--show-depends", name]);
        for line in process::output(&mut command)?.lines() {
            let Some(file) = line.strip_prefix("insmod ") else {
                continue;
            };
            let file = PathBuf::from(file.trim());
            if !order.contains(&file) {
                order.push(file);
            }
        }
    }
    Ok(order)
}

/// Writes a module without compression and without what loading does not need. What is stripped has
/// no signature left either, which the kernel would spend seconds to check in an emulator.
fn plain_module(module: &Path, to: &Path) -> Result<(), String> {
    let name = file_name(module);
    if name.ends_with(".xz") {
        decompress(&["xz", "-dcq"], module, to)?;
    } else if name.ends_with(".zst") {
        decompress(&["zstd", "-dcq"], module, to)?;
    } else {
        fs::copy(module, to).map_err(|error| format!("cannot copy {}: {error}", module.display()))?;
    }
    let mut strip = Command::new("objcopy");
    strip.args(["--strip-unneeded", "--remove-section=.BTF"]).arg(to);
    process::output(&mut strip).map(drop)
}

/// Takes the ELF image out of a bzImage ("The Linux/x86 Boot Protocol": `setup_sects`,
/// `payload_offset`, `payload_length`). An emulator takes seconds to unpack it by itself.
fn extract_vmlinux(image: &Path, to: &Path) -> Result<(), String> {
    let bytes = fs::read(image).map_err(|error| format!("cannot read {}: {error}", image.display()))?;
    let payload = payload(&bytes).ok_or_else(|| format!("{} is no bzImage", image.display()))?;
    let program: &[&str] = match payload {
        [0xfd, b'7', b'z', b'X', ..] => &["xz", "-dcq"],
        [0x02, 0x21, 0x4c, 0x18, ..] => &["lz4", "-dcq"],
        [0x28, 0xb5, 0x2f, 0xfd, ..] => &["zstd", "-dcq"],
        _ => return Err(format!("{} is compressed in an unknown way", image.display())),
    };
    // All but gzip lack the size at their end that the kernel's unpacker wants, so its build
    // appends four bytes that the programs would complain of.
    let (stream, size) = payload.split_at(payload.len().saturating_sub(4));
    let packed = to.with_extension("packed");
    fs::write(&packed, stream).map_err(|error| format!("cannot write {}: {error}", packed.display()))?;
    decompress(program, &packed, to)?;
    let _ = fs::remove_file(&packed);
    let got = fs::metadata(to).map_or(0, |about| about.len());
    match <[u8; 4]>::try_from(size) {
        Ok(size) if u64::from(u32::from_le_bytes(size)) == got => Ok(()),
        _ => Err(format!(
            "{} unpacks to {got} bytes, which it does not announce",
            image.display()
        )),
    }
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let sectors = match usize::from(*image.get(0x1f1)?) {
        0 => 4,
        sectors => sectors,
    };
    let start = (sectors + 1) * 512 + word(0x248)?;
    image.get(start..start.checked_add(word(0x24c)?)?)
}

fn decompress(program: &[&str], from: &Path, to: &Path) -> Result<(), String> {
    let failed = |error| format!("cannot unpack {}: {error}", from.display());
    let [name, arguments @ ..] = program else { return Ok(()) };
    let mut command = process::bound(name);
    command.args(arguments);
    command.stdin(File::open(from).map_err(failed)?);
    command
        .stdout(File::create(to).map_err(failed)?)
        .stderr(Stdio::inherit());
    let status = command.status().map_err(failed)?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{name} cannot unpack {}", from.display()))
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_is_found_behind_the_setup_sectors() {
        let mut image = vec![0; 4096];
        image[0x1f1] = 2;
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&3_u32.to_le_bytes());
        image[3 * 512 + 16..3 * 512 + 19].copy_from_slice(b"abc");
        assert_eq!(payload(&image), Some(&b"abc"[..]));
    }

    #[test]
    fn a_payload_past_the_end_is_no_payload() {
        let mut image = vec![0; 1024];
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&image), None);
    }
}
