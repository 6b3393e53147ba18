//! The nested lane's machine: QEMU's emulator of an AMD CPU with SVM and nested paging.

use std::process::Command;

use crate::job::{Job, Root};
use crate::kernel::Kernel;
use crate::lane::KERNEL_ARGUMENTS;
use crate::package::Need;
use crate::process;

/// QEMU is also the VMM of the tests that boot Linux in the lane, and keeps snapshots on a disk there.
pub(crate) const NEEDS: &[Need] = &[("qemu-system-x86_64", "qemu-system-x86"), ("qemu-img", "qemu-utils")];

/// Words for a kernel's command line on this machine: each processor gets a tick after the other.
///
/// QEMU 7.2 forgets an interrupt now and then. `do_vmexit` (`target/i386/tcg/sysemu/svm_helper.c`) clears a bit of
/// `interrupt_request` without the lock that others set bits under, and a bit that is set meanwhile is lost. The interrupt stays
/// in the local APIC until another one is delivered. A timer that is armed anew by its own interrupt sends no other: that
/// processor has no clock any more, and in the end the machine stands still.
pub(crate) const PERIODIC_TICKS: &str = "nohz=off highres=off";

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
    command.args(["-initrd", "initrd", "-append"]);
    command.arg(format!("{KERNEL_ARGUMENTS} {PERIODIC_TICKS}"));
    if job.root == Root::Host {
        command.args([
            "-fsdev",
            "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
        ]);
        command.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    }
    command
}
