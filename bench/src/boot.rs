//! `boot`: a Linux boot under `msrgate run`, beside one without, by an unmodified QEMU in the nested lane.
//!
//! `cargo xtask nested` runs this program again inside the lane, which boots the guests in turns and tells the times.

use std::env;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::figure::{Aim, Figure};
use crate::rounds::{Costs, rounds};
use crate::run_exit::program;
use crate::{Effort, Measured, Missing};

/// Says that the guest is up, and powers it off.
const INIT: &str = "#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs none /dev\n\
                    echo @ready > /dev/ttyS0\n/bin/busybox poweroff -f\n";
const READY: &str = "@ready";
/// Stands before the line that has the times.
const TIMES: &str = "@times ";

pub(crate) fn measure(effort: Effort) -> Measured {
    let msrgate = program("MSRGATE_BIN")?;
    let this = env::current_exe().map_err(|error| error.to_string())?;
    let boots = effort.of(10, 1);
    let inside = format!(
        "MSRGATE_BIN='{}' '{}' --boots {boots}",
        msrgate.display(),
        this.display()
    );
    let mut lane = Command::new("cargo");
    lane.args(["xtask", "nested", "--mem", "1536", "--timeout", "3600", "--", &inside]);
    let done = lane
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    let said = String::from_utf8_lossy(&done.stdout);
    match done.status.code() {
        Some(0) => {}
        Some(125) => return Err(Missing::Skipped("the nested lane cannot run here".to_owned())),
        _ => return Err(format!("the lane: {}\n{said}", done.status).into()),
    }
    let line = said.lines().find_map(|line| line.strip_prefix(TIMES));
    let times: [Vec<f64>; 2] = line
        .and_then(|line| serde_json::from_str(line).ok())
        .ok_or_else(|| format!("the lane tells no times:\n{said}"))?;
    let [under, bare] = times.map(Costs);
    let figure = |what, ours, theirs| Figure::new(what, "s", ours).beside("without", theirs);
    Ok(vec![
        figure(
            format!("a Linux boot under a policy of 20 rules, the median of {boots}"),
            under.median(),
            bare.median(),
        )
        .aim(Aim::Ratio(1.01)),
        figure("the fastest of them".to_owned(), under.least(), bare.least()),
    ])
}

/// Boots guests in the lane, with a policy and without in turns, and prints the seconds that each took.
pub(crate) fn inside(boots: usize) -> Result<(), String> {
    let kernel = env::var_os("MSRGATE_LANE_BOOT")
        .map(PathBuf::from)
        .ok_or("not in the nested lane")?;
    let msrgate = env::var_os("MSRGATE_BIN").ok_or("MSRGATE_BIN names no program")?;
    let folder = env::temp_dir().join("msrgate-bench");
    furnish(&folder).map_err(|error| format!("cannot write to `{}`: {error}", folder.display()))?;
    let under = |_: &mut ()| {
        let mut command = Command::new(&msrgate);
        command.args(["run", "-p", "policy.toml", "--", "qemu-system-x86_64"]);
        boot(&mut command, &folder, &kernel)
    };
    let bare = |_: &mut ()| boot(&mut Command::new("qemu-system-x86_64"), &folder, &kernel);
    let times = rounds(boots, &mut (), [&under, &bare])?;
    let times = serde_json::to_string(&times.map(|costs| costs.0)).map_err(|error| error.to_string())?;
    println!("{TIMES}{times}");
    Ok(())
}

fn furnish(folder: &Path) -> std::io::Result<()> {
    let root = folder.join("root");
    for name in ["bin", "dev"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::write(folder.join("policy.toml"), policy())?;
    fs::write(root.join("init"), INIT)?;
    fs::set_permissions(root.join("init"), Permissions::from_mode(0o755))?;
    let script = "cp $(command -v busybox) root/bin/ && cd root && find . | busybox cpio -o -H newc > ../initrd";
    let packed = Command::new("sh")
        .args(["-ec", script])
        .current_dir(folder)
        .stderr(Stdio::null())
        .status()?;
    if packed.success() {
        Ok(())
    } else {
        Err(std::io::Error::other("the initramfs cannot be packed"))
    }
}

/// 20 rules, some of them for what Linux touches while it boots.
fn policy() -> String {
    let mut text = String::from("version = 1\nname = \"boot\"\ndefault = \"allow\"\n");
    let fixed: [u32; 10] = [
        0x8b,
        0x17,
        0xfe,
        0x277,
        0x2ff,
        0x3a,
        0x4b56_4d04,
        0xc001_001f,
        0xc001_0015,
        0xc001_1029,
    ];
    for msr in fixed {
        let says = match msr {
            0x8b => "read = { value = \"0x0100000000000000\" }\nwrite = \"ignore\"",
            0x17 | 0x3a => "read = \"zero\"\nwrite = \"deny\"",
            _ => "read = \"allow\"\nwrite = \"allow\"\nwhy = \"Linux asks for it\"",
        };
        text.push_str(&format!("[[rule]]\nmsr = \"{msr:#x}\"\n{says}\n"));
    }
    for msr in 0x600..0x60a {
        text.push_str(&format!(
            "[[rule]]\nmsr = \"{msr:#x}\"\nread = \"deny\"\nwrite = \"deny\"\n"
        ));
    }
    text
}

/// Seconds from the start of `command`, to which QEMU's arguments are added, until the guest says that it is up.
fn boot(command: &mut Command, folder: &Path, kernel: &Path) -> Result<f64, String> {
    let fixed = "-M microvm,rtc=on -accel kvm -cpu host -m 256 -nodefaults -display none -serial stdio -no-reboot \
                 -initrd initrd";
    let append = "console=ttyS0 panic=-1 quiet mitigations=off nokaslr no_timer_check random.trust_cpu=on audit=0 \
                  cryptomgr.notests";
    command
        .args(fixed.split_whitespace())
        .arg("-kernel")
        .arg(kernel.join("vmlinux"));
    command
        .args(["-append", append])
        .current_dir(folder)
        .stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command
        .spawn()
        .map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let mut up = None;
    if let Some(serial) = child.stdout.take() {
        for line in BufReader::new(serial).split(b'\n').map_while(Result::ok) {
            if String::from_utf8_lossy(&line).trim() == READY {
                up = up.or(Some(start.elapsed().as_secs_f64()));
            }
        }
    }
    let done = child.wait_with_output().map_err(|error| error.to_string())?;
    let told = String::from_utf8_lossy(&done.stderr);
    up.ok_or_else(|| format!("the guest does not come up: {}\n{told}", done.status))
}
