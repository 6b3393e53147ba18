//! The intel lane's machine: Bochs, whose CPU models emulate VMX and EPT. It boots a CD, since it
//! can load no kernel by itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bochs;
use crate::job::Job;
use crate::kernel::Kernel;
use crate::lane::KERNEL_ARGUMENTS;
use crate::package::Need;
use crate::process;

pub(crate) const NEEDS: &[Need] = &[
    ("/usr/share/bochs/BIOS-bochs-latest", "bochsbios"),
    ("/usr/share/vgabios/vgabios.bin", "vgabios"),
    ("/usr/lib/grub/i386-pc/linux.mod", "grub-pc-bin"),
    ("grub-mkrescue", "grub-common"),
    ("xorriso", "xorriso"),
    ("mformat", "mtools"),
];

/// The MSRs that the CPU model lacks and Linux must find: address, type, reset value, reserved
/// bits, ignored bits, each value as a high and a low half.
///
/// All others fault as on real hardware, since unknown ones are not ignored. Without 0x1a0 the
/// kernel's first steps triple-fault; with no microcode revision in 0x8b, Linux turns
/// TSC_DEADLINE off for an erratum.
const MSRS: &str = "\
   0x017 0 00000000 00000000 00000000 00000000 00000000 00000000
   0x08b 0 00000028 00000000 00000000 00000000 ffffffff ffffffff
   0x034 0 00000000 00000000 00000000 00000000 00000000 00000000
   0x0ce 0 00000000 00000000 00000000 00000000 00000000 00000000
   0x140 0 00000000 00000000 00000000 00000000 00000000 00000000
   0x1a0 0 00000000 00000001 00000000 00000000 00000000 00000000
";

/// The lane's machine: writes the CD and the configuration to `folder` and returns Bochs's command.
///
/// # Errors
/// What could not be written or made.
pub(crate) fn emulator(job: &Job, kernel: &Kernel, folder: &Path) -> Result<Command, String> {
    let files = [
        (kernel.folder.join("vmlinuz"), "vmlinuz"),
        (folder.join("initrd"), "initrd"),
    ];
    let menu = format!("linux /boot/vmlinuz {KERNEL_ARGUMENTS} {ON_BOCHS}\ninitrd /boot/initrd\nboot\n");
    machine(1, job.mebibytes, &files, &menu, "linux", folder)
}

/// The same with the hypervisor of `examples/bare`, which gets these files as modules.
///
/// # Errors
/// Likewise.
pub(crate) fn bare(
    cpus: u32,
    hypervisor: &Path,
    words: &str,
    modules: &[PathBuf],
    folder: &Path,
) -> Result<Command, String> {
    let names: Vec<String> = (0..modules.len()).map(|number| format!("module{number}")).collect();
    let modules = modules.iter().cloned().zip(names.iter().map(String::as_str));
    let files: Vec<(PathBuf, &str)> = std::iter::once((hypervisor.to_path_buf(), "bare"))
        .chain(modules)
        .collect();
    let loads: String = names.iter().map(|name| format!("module2 /boot/{name}\n")).collect();
    let menu = format!("multiboot2 /boot/bare {words} {ON_BOCHS}\n{loads}boot\n");
    machine(cpus, 512, &files, &menu, "multiboot2", folder)
}

/// Linux 6.12 stops in its machine check setup, and Bochs takes no microcode.
const ON_BOCHS: &str = "mce=off dis_ucode_ldr";

/// Bochs with a CD from which GRUB's module `loader` boots these files by `menu`.
fn machine(
    cpus: u32,
    mebibytes: u32,
    files: &[(PathBuf, &str)],
    menu: &str,
    loader: &str,
    folder: &Path,
) -> Result<Command, String> {
    let failed = |error| format!("cannot write to {}: {error}", folder.display());
    let boot = folder.join("cd/boot");
    fs::create_dir_all(boot.join("grub")).map_err(failed)?;
    for (from, to) in files {
        fs::copy(from, boot.join(to)).map_err(failed)?;
    }
    fs::write(boot.join("grub/grub.cfg"), menu).map_err(failed)?;
    let mut rescue = process::bound("grub-mkrescue");
    rescue.args(["-d", "/usr/lib/grub/i386-pc"]);
    rescue.arg(format!("--install-modules={loader} normal iso9660 biosdisk"));
    rescue.args(["--fonts=", "--locales=", "--themes=", "-o", "cd.iso", "cd"]);
    process::output(rescue.current_dir(folder))?;
    fs::remove_dir_all(folder.join("cd")).map_err(failed)?;

    let bochs = bochs::program()?;
    let help = Command::new(&bochs).arg("--help").output();
    let help = help.map_err(|error| format!("cannot run {}: {error}", bochs.display()))?;
    let debugger = [help.stdout, help.stderr]
        .concat()
        .windows(3)
        .any(|window| window == b"-rc");
    fs::write(folder.join("msrs"), MSRS).map_err(failed)?;
    fs::write(folder.join("bochsrc"), configuration(cpus, mebibytes, debugger)).map_err(failed)?;
    let mut command = process::bound(bochs);
    command.args(["-q", "-f", "bochsrc"]);
    if debugger {
        fs::write(folder.join("continue"), "c\n").map_err(failed)?;
        command.args(["-rc", "continue"]);
    }
    Ok(command)
}

/// `ips` is the rate of the TSC: above 429 MHz, KVM leaves the preemption timer off and with it
/// the fast path of TSC_DEADLINE.
fn configuration(cpus: u32, mebibytes: u32, debugger: bool) -> String {
    let display = match debugger {
        // Without a sound card, the thread that Debian's build makes to mix sound aborts it.
        true => {
            "display_library: rfb, options=\"timeout=0\"\n\
             sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy\nspeaker: enabled=0"
        }
        false => "display_library: nogui",
    };
    format!(
        "\
config_interface: textconfig
{display}
cpu: model=corei7_haswell_4770, count={cpus}, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=0, msrs=msrs
memory: guest={mebibytes}, host={mebibytes}
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=cd.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=console
com2: enabled=1, mode=file, dev=output
com3: enabled=1, mode=file, dev=marks
clock: sync=none, time0=1700000000
log: bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"
    )
}
