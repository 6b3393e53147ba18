//! `wrap` and `doctor`: wrappers that a shell runs with the command lines of VM managers.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::command::{Folder, Ran, list, text};

/// A program that prints its words, one a line.
const SAYS: &str = "#!/bin/sh\nprintf '%s\\n' \"$0\" \"$@\"\n";

fn program(folder: &Folder, name: &str) -> String {
    folder.write(name, SAYS);
    let path = folder.path().join(name);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("permissions");
    path.display().to_string()
}

/// A wrapper of which msrgate and the VMM are programs that print their words.
struct Wrapper {
    folder: Folder,
    vmm: String,
    msrgate: String,
}

impl Wrapper {
    fn new(manager: &str, more: &[&str]) -> Wrapper {
        let folder = Folder::new();
        let (vmm, msrgate) = (program(&folder, "a vmm"), program(&folder, "it's msrgate"));
        fs::create_dir(folder.path().join("policies")).expect("a folder");
        let args = [
            "wrap",
            manager,
            "-o",
            "wrapper",
            "--vmm",
            &vmm,
            "--policies",
            "policies",
        ];
        let ran = folder.run(&[&args[..], more].concat()).code(0);
        assert!(
            ran.out.is_empty() && ran.err.starts_with("1. "),
            "{} {}",
            ran.out,
            ran.err
        );
        let path = folder.path().join("wrapper");
        let script = fs::read_to_string(&path).expect("a script");
        let own = script
            .lines()
            .find(|line| line.starts_with("msrgate="))
            .expect("a line");
        let fake = format!("msrgate='{}'", msrgate.replace('\'', "'\\''"));
        let script = script.replace(own, &fake);
        fs::write(&path, script).expect("a script");
        assert_eq!(fs::metadata(&path).expect("a file").permissions().mode() & 0o777, 0o755);
        Wrapper { folder, vmm, msrgate }
    }

    fn policy(&self, name: &str) {
        self.folder
            .write(&format!("policies/{name}.toml"), "version = 1\ndefault = \"allow\"\n");
    }

    fn run(&self, words: &[&str]) -> Ran {
        Ran::of(Command::new("./wrapper").args(words).current_dir(self.folder.path()))
    }

    /// The policy that msrgate gets, or `None` where the VMM is started as it is; in either case with all words.
    #[track_caller]
    fn policy_of(&self, words: &[&str]) -> Option<String> {
        let ran = self.run(words);
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        let said: Vec<&str> = ran.out.lines().collect();
        if said.first() == Some(&self.vmm.as_str()) {
            assert_eq!(&said[1..], words);
            return None;
        }
        assert_eq!(said[..3], [self.msrgate.as_str(), "run", "-p"]);
        let rest = &said[4..];
        let vmm = rest.iter().position(|word| *word == "--").expect("`--`");
        assert_eq!(rest[vmm + 1], self.vmm);
        assert_eq!(&rest[vmm + 2..], words);
        Some(
            said[3]
                .trim_start_matches("policies/")
                .trim_end_matches(".toml")
                .to_owned(),
        )
    }
}

const UUID: &str = "c7a5fdbd-cdaf-9455-926a-d65c16db1809";

/// What libvirt gives QEMU to start a domain.
fn start(name: &str) -> Vec<String> {
    let name = format!("guest={name},debug-threads=on");
    let words = [
        "-name",
        &name,
        "-S",
        "-object",
        r#"{"qom-type":"secret","id":"masterKey0"}"#,
        "-machine",
        "pc-q35-7.2,usb=off,dump-guest-core=off",
        "-accel",
        "kvm",
        "-cpu",
        "host,migratable=on",
        "-m",
        "1024",
        "-uuid",
        UUID,
        "-no-user-config",
        "-nodefaults",
        "-msg",
        "timestamp=on",
    ];
    words.map(str::to_owned).to_vec()
}

const PROBES: [&[&str]; 4] = [
    &[
        "-S",
        "-no-user-config",
        "-nodefaults",
        "-nographic",
        "-machine",
        "none,accel=kvm:tcg",
        "-qmp",
        "unix:/x,server=on,wait=off",
        "-daemonize",
    ],
    &["-help"],
    &["--version"],
    &[],
];

#[test]
fn a_domain_of_libvirts_gets_its_policy_by_name_by_uuid_or_by_default() {
    let wrapper = Wrapper::new("libvirt", &[]);
    let of = |name: &str| {
        let words = start(name);
        wrapper.policy_of(&words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let none = wrapper.run(&["-name", "guest=web,debug-threads=on", "-uuid", UUID]);
    let none = none
        .code(1)
        .says(&["no policy for the VM 'web'", "policies/default.toml would be it"]);
    assert!(none.out.is_empty());
    wrapper.policy("default");
    assert_eq!(of("web").as_deref(), Some("default"));
    wrapper.policy(UUID);
    assert_eq!(of("web").as_deref(), Some(UUID));
    wrapper.policy("web");
    assert_eq!(of("web").as_deref(), Some("web"));
    wrapper.policy("a b");
    assert_eq!(of("a b").as_deref(), Some("a b"));
    // A name with a comma is known by its id; one with a slash is no file.
    assert_eq!(of("web,,1").as_deref(), Some(UUID));
    assert_eq!(of("../policies/web").as_deref(), Some(UUID));
    assert_eq!(wrapper.policy_of(&["-name", "web,process=x"]).as_deref(), Some("web"));
    assert_eq!(
        wrapper.policy_of(&["-name", "debug-threads=on,guest=web"]).as_deref(),
        Some("web")
    );
}

#[test]
fn what_asks_the_vmm_and_starts_no_vm_is_left_alone_and_no_vm_passes_for_it() {
    for manager in ["libvirt", "proxmox"] {
        let wrapper = Wrapper::new(manager, &[]);
        wrapper.policy("default");
        for probe in PROBES {
            assert_eq!(wrapper.policy_of(probe), None, "{probe:?}");
        }
        for vm in [
            &["-name", "-help", "-m", "1G"][..],
            &["-name", "help"],
            &["-machine", "none", "-machine", "q35"],
            &["-machine", "none", "-name", "guest=web"],
            &["-m", "1G"],
            &["-cpu", "help"],
        ] {
            assert_eq!(wrapper.policy_of(vm).as_deref(), Some("default"), "{vm:?}");
        }
    }
}

#[test]
fn a_vm_of_proxmox_gets_its_policy_by_number_and_a_trace_by_name() {
    let wrapper = Wrapper::new("proxmox", &["--traces", "/var/log/ms r"]);
    wrapper.policy("default");
    let words = [
        "-id",
        "100",
        "-name",
        "web,debug-threads=on",
        "-no-shutdown",
        "-daemonize",
        "-smbios",
        "type=1,uuid=x",
    ];
    assert_eq!(wrapper.policy_of(&words).as_deref(), Some("default"));
    wrapper.policy("web");
    assert_eq!(wrapper.policy_of(&words).as_deref(), Some("web"));
    wrapper.policy("100");
    assert_eq!(wrapper.policy_of(&words).as_deref(), Some("100"));
    wrapper
        .run(&words)
        .code(0)
        .shows(&["--trace\n/var/log/ms r/%n-%p-%t.jsonl\n--\n"]);
}

#[test]
fn a_wrapper_is_plain_posix_shell() {
    let wrapper = Wrapper::new("libvirt", &["--traces", "/var/log/msrgate"]);
    let shells = [("dash", vec!["-n"]), ("shellcheck", vec!["--shell=sh"])];
    for (program, args) in shells {
        let ran = Command::new(program)
            .args(args)
            .arg("wrapper")
            .current_dir(wrapper.folder.path())
            .output();
        match ran {
            Ok(ran) => assert!(
                ran.status.success(),
                "{program}: {}",
                String::from_utf8_lossy(&ran.stdout)
            ),
            Err(error) => println!("skipped: {program} does not start: {error}"),
        }
    }
}

#[test]
fn nothing_is_overwritten_unless_that_is_asked_for() {
    let folder = Folder::new();
    folder.write("taken", "mine");
    let read = || fs::read_to_string(folder.path().join("taken")).expect("a file");
    let refused = folder.run(&["wrap", "libvirt", "-o", "taken"]).code(2);
    refused.says(&["`taken` exists already: --force overwrites it"]);
    assert_eq!(read(), "mine");
    folder.run(&["wrap", "libvirt", "-o", "taken", "--force"]).code(0);
    assert!(read().starts_with("#!/bin/sh\n"));
    let left: Vec<_> = fs::read_dir(folder.path()).expect("a folder").collect();
    assert_eq!(left.len(), 1, "{left:?}");
    let printed = folder.run(&["wrap", "proxmox"]).code(0);
    printed.shows(&["#!/bin/sh", "dpkg-divert"]);
    folder
        .run(&["wrap", "libvirt", "-o", "no/such/folder"])
        .code(2)
        .says(&["cannot write"]);
}

#[test]
fn a_drop_in_has_the_services_own_command_behind_msrgate() {
    let folder = Folder::new();
    let unit = |name: &str, text: &str| folder.write(name, format!("[Unit]\n[Service]\n{text}[Install]\n"));
    unit(
        "vm@.service",
        "ExecStart=/bin/false\nExecStart=\nExecStart=-/usr/bin/vmm --id %i \\\n    --memory 1G\n",
    );
    let args = [
        "wrap",
        "systemd",
        "--service",
        "./vm@.service",
        "--traces",
        "/var/log/m",
    ];
    let ran = folder.run(&args).code(0);
    let line = ran.out.lines().last().expect("a line");
    let (before, after) = line.split_once(" run ").expect("a command");
    assert!(
        before.starts_with("ExecStart=-/") && Path::new(before.trim_start_matches("ExecStart=-")).exists(),
        "{before}"
    );
    assert_eq!(
        after,
        "-p /etc/msrgate/vm@.toml --trace /var/log/m/%%n-%%p-%%t.jsonl -- /usr/bin/vmm --id %i --memory 1G"
    );
    assert!(ran.out.contains("[Service]\nExecStart=\nExecStart="), "{}", ran.out);
    ran.says(&["/etc/systemd/system/vm@.service.d/msrgate.conf"]);
    unit("two.service", "ExecStart=/a\nExecStart=/b\n");
    unit("at.service", "ExecStart=@/a b\n");
    for (service, says) in [
        ("./two.service", "2 lines"),
        ("./at.service", "`@`"),
        ("./none.service", "cannot read"),
        (
            "no-such-service-of-msrgate",
            "no unit `no-such-service-of-msrgate.service`",
        ),
    ] {
        folder
            .run(&["wrap", "systemd", "--service", service])
            .code(2)
            .says(&[says]);
    }
    folder.run(&["wrap", "systemd"]).code(2).says(&["--service NAME"]);
}

#[test]
fn doctor_says_for_each_check_how_it_ended() {
    let folder = Folder::new();
    let ran = folder.run(&["doctor", "--json"]);
    let said = ran.json();
    let checks = list(&said, "checks");
    let failed = checks.iter().any(|check| text(check, "status") == "fail");
    assert_eq!(
        (ran.code, &said["ok"]),
        (Some(i32::from(failed)), &serde_json::json!(!failed))
    );
    let names: Vec<&str> = checks.iter().map(|check| text(check, "check")).collect();
    assert_eq!(names[..4], ["/dev/kvm", "filter", "exits", "features"]);
    for check in checks {
        assert!(
            ["pass", "warn", "fail", "skipped"].contains(&text(check, "status")),
            "{check}"
        );
        assert!(!text(check, "says").is_empty());
        let remedy = matches!(text(check, "status"), "warn" | "fail");
        assert!(!remedy || check["remedy"].is_string(), "{check}");
    }
    let opens = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    assert_eq!(text(&checks[0], "status") == "pass", opens);
    let shown = folder.run(&["doctor"]);
    let verdict = if failed {
        "msrgate does not work on this machine"
    } else {
        "msrgate works on this machine"
    };
    assert!(shown.out.starts_with(verdict), "{}", shown.out);
}
