//! The intel lane's machine: Bochs, whose CPU models emulate VMX and EPT. It boots a CD, since it
//! can load no kernel by itself.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::job::Job;
use crate::kernel::Kernel;
use crate::lane::KERNEL_ARGUMENTS;
use crate::package::Need;
use crate::process;

pub(crate) const NEEDS: &[Need] = &[
    ("bochs-bin", "bochs"),
    ("/usr/share/bochs/BIOS-bochs-latest", "bochsbios"),
    ("/usr/share/bochs/VGABIOS-lgpl-latest", "vgabios"),
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

/// Writes the CD and the configuration to `folder` and returns Bochs's command.
///
/// # Errors
/// What could not be written or made.
pub(crate) fn emulator(job: &Job, kernel: &Kernel, folder: &Path) -> Result<Command, String> {
    let failed = |error| format!("cannot write to {}: {error}", folder.display());
    let boot = folder.join("cd/boot");
    fs::create_dir_all(boot.join("grub")).map_err(failed)?;
    fs::copy(folder.join("initrd"), boot.join("initrd")).map_err(failed)?;
    fs::copy(kernel.folder.join("vmlinuz"), boot.join("vmlinuz")).map_err(failed)?;
    // Linux 6.12 stops in its machine check setup, and Bochs takes no microcode.
    let menu = format!("linux /boot/vmlinuz {KERNEL_ARGUMENTS} mce=off dis_ucode_ldr\ninitrd /boot/initrd\nboot\n");
    fs::write(boot.join("grub/grub.cfg"), menu).map_err(failed)?;
    let mut rescue = process::bound("grub-mkrescue");
    rescue.args([
        "-d",
        "/usr/lib/grub/i386-pc",
        "--install-modules=linux normal iso9660 biosdisk",
    ]);
    rescue.args(["--fonts=", "--locales=", "--themes=", "-o", "cd.iso", "cd"]);
    process::output(rescue.current_dir(folder))?;
    fs::remove_dir_all(folder.join("cd")).map_err(failed)?;

    // A build of one's own is three times as fast as Debian's, which is a debugger.
    let bochs = env::var_os("BOCHS").unwrap_or(OsString::from("bochs-bin"));
    let help = Command::new(&bochs).arg("--help").output();
    let help = help.map_err(|error| format!("cannot run {}: {error}", bochs.display()))?;
    let debugger = [help.stdout, help.stderr]
        .concat()
        .windows(3)
        .any(|window| window == b"-rc");
    let display = if debugger {
        "rfb, options=\"timeout=0\""
    } else {
        "nogui"
    };
    fs::write(folder.join("msrs"), MSRS).map_err(failed)?;
    fs::write(folder.join("bochsrc"), configuration(job, display)).map_err(failed)?;
    let mut command = process::bound(bochs);
    command.args(["-q", "-f", "bochsrc"]);
    if debugger {
        fs::write(folder.join("continue"), "c\n").map_err(failed)?;
        command.args(["-rc", "continue"]);
    }
    Ok(command)
}

/// Without a sound card, the thread that Debian's build makes to mix sound aborts it.
///
/// `ips` is the rate of the TSC: above 429 MHz, KVM leaves the preemption timer off and with it
/// the fast path of TSC_DEADLINE.
fn configuration(job: &Job, display: &str) -> String {
    let mebibytes = job.mebibytes;
    format!(
        "\
config_interface: textconfig
display_library: {display}
cpu: model=corei7_haswell_4770, count=1, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=0, msrs=msrs
memory: guest={mebibytes}, host={mebibytes}
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
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
speaker: enabled=0
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
"
    )
}
