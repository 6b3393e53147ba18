//! The picture of a VMM under `run`: a real QEMU, with a guest that asks for what KVM does not know.

use crate::command::{Folder, Terminal, on_terminal};
use crate::kvm::qemu_runs;
use crate::picture;

/// A guest in a boot sector: it reads what monitors of temperature and power read, writes a power limit, and has the machine reset.
fn boot_sector() -> Vec<u8> {
    let mut code = Vec::new();
    let ecx = |msr: u32| [&[0x66, 0xb9][..], &msr.to_le_bytes()].concat();
    for msr in [0x1a2, 0x19c, 0x1ad, 0x610] {
        code.extend(ecx(msr));
        code.extend([0x0f, 0x32]); // rdmsr
    }
    code.extend(ecx(0x610));
    code.extend([0x66, 0xb8, 0x42, 0, 0, 0, 0x66, 0x31, 0xd2]); // mov eax, 0x42; xor edx, edx
    code.extend([0x0f, 0x30]); // wrmsr
    code.extend(ecx(0xc001_0299));
    code.extend([0x0f, 0x32]); // rdmsr
    code.extend([0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd]); // the keyboard controller resets the machine; hlt
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code
}

#[test]
fn the_picture_of_run_is_what_it_shows_of_qemu() {
    if !qemu_runs() {
        return;
    }
    let folder = Folder::new();
    folder.write("guest.img", boot_sector());
    let line = "run --ignore-unknown --trace - -- qemu-system-x86_64 -accel kvm -cpu host -display none -no-reboot \
                -drive file=guest.img,format=raw";
    let arguments: Vec<&str> = line.split(' ').collect();
    let shown = on_terminal(folder.command(&arguments), 110, Terminal::Both);
    let line = format!(
        "msrgate {}",
        line.replace(" -- ", " -- \\\n    ")
            .replace(" -drive", " \\\n    -drive")
    );
    let picture = include_str!("../../../../docs/pictures/run.svg");
    picture::check("run.svg", picture, &[(&line, shown)]);
}
