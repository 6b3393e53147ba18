//! A domain of libvirt's under msrgate, by the wrapper that `wrap libvirt` writes. Skipped where `virt-qemu-run` is not there.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::command::{Folder, wait_until};
use crate::kvm::kvm_opens;

/// Whether libvirt can start a domain here, which takes root, QEMU, its driver and the user that its packages make.
fn libvirt() -> bool {
    let needs = [
        "/usr/bin/virt-qemu-run",
        "/usr/bin/qemu-system-x86_64",
        "/etc/libvirt/qemu.conf",
    ];
    let lacks = needs.into_iter().find(|need| !Path::new(need).exists());
    if let Some(lacks) = lacks {
        println!("skipped: {lacks} is not there: Debian's libvirt-daemon-system and qemu-system-x86 bring it");
    }
    let root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    if !root {
        println!("skipped: libvirt's driver without its daemon needs root");
    }
    lacks.is_none() && root
}

/// A domain whose firmware finds no disk and waits.
fn domain(folder: &Folder, name: &str) -> Command {
    let wrapper = folder.path().join("wrapper");
    folder.write(
        &format!("{name}.xml"),
        format!(
            "<domain type='kvm'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><devices><emulator>{}</emulator>\
             <memballoon model='none'/><controller type='usb' model='none'/></devices></domain>",
            wrapper.display()
        ),
    );
    let mut command = Command::new("virt-qemu-run");
    command.args(["-r", &folder.path().join("root").display().to_string()]);
    command.arg(folder.path().join(format!("{name}.xml")));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Ends the domain with the process that started it.
struct Running(Child);

impl Running {
    /// As from a terminal: libvirt ends the domain.
    fn end(&mut self) {
        let id = self.0.id().to_string();
        let _ = Command::new("kill").args(["-INT", &id]).status();
        let _ = self.0.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

#[test]
fn a_domain_of_libvirts_starts_under_its_policy_and_none_starts_without() {
    if !kvm_opens() || !libvirt() {
        return;
    }
    let folder = Folder::new();
    let at = |name: &str| folder.path().join(name).display().to_string();
    for name in ["policies", "traces", "root/etc"] {
        fs::create_dir_all(folder.path().join(name)).expect("a folder");
    }
    // Nothing of the machine is touched but what QEMU needs.
    folder.write("root/etc/qemu.conf", "user = \"root\"\ngroup = \"root\"\nremember_owner = 0\nsecurity_driver = \"none\"\ncgroup_controllers = []\nnamespaces = []\nstdio_handler = \"file\"\n");
    folder.write(
        "policies/web.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"@mtrr\"\nread = \"zero\"\nwrite = \"ignore\"\nlog = \"all\"\n",
    );
    let policies = at("policies");
    let traces = at("traces");
    folder
        .run(&[
            "wrap",
            "libvirt",
            "-o",
            "wrapper",
            "--policies",
            &policies,
            "--traces",
            &traces,
        ])
        .code(0);

    let other = domain(&folder, "other").status().expect("virt-qemu-run starts");
    assert!(!other.success());
    let log =
        |name: &str| fs::read_to_string(folder.path().join(format!("root/log/qemu/{name}.log"))).unwrap_or_default();
    assert!(
        log("other").contains("no policy for the VM 'other'"),
        "{}",
        log("other")
    );
    assert_eq!(
        fs::read_dir(&traces).expect("a folder").count(),
        0,
        "libvirt's questions leave no trace"
    );

    let mut web = Running(domain(&folder, "web").spawn().expect("virt-qemu-run starts"));
    let trace = || {
        let entry = fs::read_dir(&traces).ok()?.next()?.ok()?;
        fs::read_to_string(entry.path()).ok()
    };
    // The firmware asks for MTRRs, which the policy answers.
    wait_until(|| {
        let ended = web.0.try_wait().expect("a child");
        assert!(ended.is_none(), "{ended:?}: {}", log("web"));
        trace().is_some_and(|trace| trace.lines().count() > 1)
    });
    web.end();
    let name = fs::read_dir(&traces)
        .expect("a folder")
        .next()
        .expect("a trace")
        .expect("an entry");
    assert!(name.file_name().to_string_lossy().starts_with("web-"), "{name:?}");
    assert!(
        trace().is_some_and(|trace| trace.contains("\"msr\":\"0xfe\"")),
        "{:?}",
        trace()
    );
    assert!(log("web").contains("msrgate: 1 VM and 1 vCPU"), "{}", log("web"));
}
