//! The nested lane's machine: QEMU's emulator of an AMD CPU with SVM and nested paging.

use std::process::Command;

use crate::job::{Job, Root};
use crate::kernel::Kernel;
use crate::lane::KERNEL_ARGUMENTS;
use crate::package::Need;
use crate::process;

/// QEMU is also the VMM of the tests that boot Linux in the lane, and keeps snapshots on a disk there.
pub(crate) const NEEDS: &[Need] = &[("qemu-system-x86_64", "qemu-system-x86"), ("qemu-img", "qemu-utils")];

/// QEMU's command, with a file for each serial port.
pub(crate) fn machine(cpus: u32, mebibytes: u32, ports: &[&str]) -> Command {
    let mut command = process::bound("qemu-system-x86_64");
    command.args(["-accel", "tcg,thread=multi,tb-size=256"]);
    // microvm boots no faster and has one serial port.
    command.args(["-M", "pc", "-cpu", "EPYC,+svm,+npt"]);
    command.args(["-smp", &cpus.to_string(), "-m", &mebibytes.to_string()]);
    command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
    for port in ports {
        command.args(["-chardev", &format!("file,id={port},path={port}")]);
        command.args(["-serial", &format!("chardev:{port}")]);
    }
    command
}

/// The lane's machine. `vmlinux` is entered by PVH, which leaves out the kernel's own unpacking.
pub(crate) fn emulator(job: &Job, kernel: &Kernel) -> Command {
    let mut command = machine(job.cpus, job.mebibytes, &["console", "output", "marks"]);
    command.arg("-kernel").arg(kernel.folder.join("vmlinux"));
    command.args(["-initrd", "initrd", "-append", KERNEL_ARGUMENTS]);
    if job.root == Root::Host {
        command.args([
            "-fsdev",
            "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
        ]);
        command.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    }
    command
}
