//! What msrgate is asked for by the VMM's process that it attached to.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use super::*;
use crate::attacks::reloads;
use crate::policies::too_much;

/// What msrgate decides anew at each access.
pub(super) const ASKED: &str = r#"default = "allow"
[handlers]
cores = { command = ["sh", "-c", "while read -r line; do case $line in *'\"op\":\"read\"'*) echo '{\"value\": \"0x20004\"}';; *) echo '{\"fault\": true}';; esac; done"] }
[[rule]]
msr = "0x174"
read = { mask = { keep = "0xff", set = "0x100" } }
write = { once = true }
[[rule]]
msr = "0x175"
write = { only = [1, 2] }
[[rule]]
msr = "0x8b"
read = { value = "0x5" }
[[rule]]
msr = "0x35"
read = { handler = "cores" }
write = { handler = "cores" }
"#;

#[test]
fn what_msrgate_decides_anew_reaches_guests_of_a_vmm_that_runs() {
    for way in [Way::Dynamic, Way::Static, Way::StaticPie, Way::Musl] {
        let Some(program) = vmm("running", way) else { continue };
        for options in [&[][..], &["waits"]] {
            let folder = with_policy(ASKED);
            let mut vmm = Asked::start(&program, &[&["1", "2"], options].concat());
            assert_eq!(vmm.ask("0 w:0x174=0x2345"), "wrmsr 0x174 done");
            let own = vmm.ask("0 r:0x35");
            for round in 0..2 {
                let trace = ["--trace", "trace.jsonl", "--rip", "--json"];
                let attach = Attach::start(&folder, &[&NONE[..], &trace].concat(), &vmm.process()).unwrap();
                let before = if round == 0 {
                    "rdmsr 0x174 0x145"
                } else {
                    "rdmsr 0x174 0x107"
                };
                for (access, got) in [
                    ("0 r:0x174", before),
                    ("0 w:0x174=7", "wrmsr 0x174 done"),
                    ("0 w:0x174=8", "wrmsr 0x174 fault"),
                    ("0 r:0x174", "rdmsr 0x174 0x107"),
                    ("1 w:0x174=9", "wrmsr 0x174 done"),
                    ("1 r:0x174", "rdmsr 0x174 0x109"),
                    ("0 w:0x175=2", "wrmsr 0x175 done"),
                    ("0 w:0x175=3", "wrmsr 0x175 fault"),
                    ("1 r:0x8b", "rdmsr 0x8b 0x5"),
                    ("1 r:0x35", "rdmsr 0x35 0x20004"),
                    ("1 w:0x35=1", "wrmsr 0x35 fault"),
                ] {
                    assert_eq!(vmm.ask(access), got, "{way:?} {options:?} {access}");
                }
                let told = summary(&attach.detach().code(0));
                assert_eq!((&told["detached"], &told["ended"]), (&true.into(), &false.into()));
                assert_eq!(whole(&traced(&folder)), (11, 0), "{way:?}");
                assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x7", "{way:?}");
                assert_eq!(vmm.ask("0 r:0x175"), "rdmsr 0x175 0x2", "{way:?}");
                assert_eq!(vmm.ask("0 r:0x35"), own, "{way:?}");
            }
            vmm.end();
        }
    }
}

#[test]
fn a_vmm_in_go_is_answered_and_asks() {
    let Some(program) = vmm("accesses", Way::Go) else {
        return;
    };
    let folder = with_policy(ASKED);
    let mut command = Command::new(&program);
    command
        .args(["1", "w:0x174=7", "r:0x174", "w:0x174=8", "r:0x8b", "r:0x35"])
        .env("WAIT", "1");
    let mut vmm = Asked::of(command);
    let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
    assert_eq!(vmm.ask(""), "wrmsr 0x174 done");
    for got in [
        "rdmsr 0x174 0x107",
        "wrmsr 0x174 fault",
        "rdmsr 0x8b 0x5",
        "rdmsr 0x35 0x20004",
    ] {
        assert_eq!(vmm.line(), got);
    }
    vmm.end();
    attach.rest().code(0);
}

#[test]
fn where_a_sandbox_lets_no_thread_wait_what_takes_an_answer_is_refused() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ASKED);
    let mut vmm = Asked::start(&program, &["1", "1", "sandbox"]);
    refused(
        &folder,
        &NONE,
        &vmm.process(),
        3,
        "lets them wait for no answer (`futex`)",
    );
    let attach = folder.path().join("trace.jsonl");
    refused(
        &folder,
        &[&NONE[..], &["--audit", "--trace", attach.to_str().unwrap()]].concat(),
        &vmm.process(),
        3,
        "lets them wait for no answer (`futex`)",
    );
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
    // What takes none is put in force, and is not replaced.
    folder.write("policy.toml", format!("version = 1\nname = \"test\"\n{ANSWERED}"));
    let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
    assert_eq!(vmm.ask("0 r:0x8b"), "rdmsr 0x8b 0x5");
    let ran = folder.run(&["reload", &vmm.process(), "-p", "policy.toml"]).code(1);
    ran.says(&["lets them wait for no answer", "msrgate detach"]);
    assert_eq!(vmm.ask("0 r:0x8b"), "rdmsr 0x8b 0x5");
    attach.detach().code(0);
    vmm.end();
}

#[test]
fn the_physical_cpus_value_reaches_a_guest_or_is_refused() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy("default = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = \"host\"\n");
    let mut vmm = Asked::start(&program, &["1", "1"]);
    if fs::File::open("/dev/cpu/0/msr").is_err() {
        return refused(&folder, &NONE, &vmm.process(), 3, "/dev/cpu/0/msr does not open");
    }
    let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
    let got = vmm.ask("0 r:0x8b");
    let cpus = fs::read_dir("/dev/cpu").unwrap().flatten();
    let values = cpus.filter_map(|cpu| {
        let file = fs::File::open(cpu.path().join("msr")).ok()?;
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0x8b).ok()?;
        Some(format!("rdmsr 0x8b {:#x}", u64::from_le_bytes(bytes)))
    });
    assert!(values.into_iter().any(|value| value == got), "{got}");
    attach.detach().code(0);
    vmm.end();
}

#[test]
fn what_a_filter_has_no_room_for_is_passed_on() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(&too_much());
    let mut vmm = Asked::start(&program, &["1", "2"]);
    // 2 is no memory type.
    let refused = vmm.ask("0 w:0x277=2");
    let attach = Attach::start(&folder, &[&NONE[..], &["--json"]].concat(), &vmm.process()).unwrap();
    for (access, got) in [
        ("0 w:0x277=1", "wrmsr 0x277 done"),
        ("0 r:0x277", "rdmsr 0x277 0x1"),
        ("0 w:0x277=2", &refused),
        ("1 w:0xc0000081=5", "wrmsr 0xc0000081 done"),
        ("1 r:0xc0000081", "rdmsr 0xc0000081 0x5"),
        ("1 r:0x174", "rdmsr 0x174 fault"),
        ("0 r:0x35", "rdmsr 0x35 fault"),
    ] {
        assert_eq!(vmm.ask(access), got);
    }
    let told = summary(&attach.detach().code(0));
    let passed = |row: &Value| row.to_string().contains("\"pass\"");
    assert!(list(&told, "by_msr").iter().any(passed), "{told:#}");
    vmm.end();
}

/// Accesses and what they give without a policy.
const PLAIN: [(&str, &str); 7] = [
    ("0 w:0x174=5", "wrmsr 0x174 done"),
    ("0 r:0x174", "rdmsr 0x174 0x5"),
    ("1 r:0x174", "rdmsr 0x174 0x0"),
    ("1 r:0x175", "rdmsr 0x175 0x0"),
    ("0 r:0xdeadbeef", "rdmsr 0xdeadbeef fault"),
    ("1 w:0xdeadbeef=1", "wrmsr 0xdeadbeef fault"),
    ("0 r:0x174", "rdmsr 0x174 0x5"),
];

#[test]
fn audits_and_learning_change_nothing_and_tell_of_first_touches() {
    for (way, options) in [
        (Way::Dynamic, &["1", "2"][..]),
        (Way::Dynamic, &["2", "2"]),
        (Way::Static, &["1", "2", "waits"]),
        (Way::Musl, &["1", "2"]),
    ] {
        let Some(program) = vmm("running", way) else { continue };
        let folder = with_policy(ANSWERED);
        let mut vmm = Asked::start(&program, options);
        for (mode, touched) in [
            (&["-p", "policy.toml", "--audit"][..], 3),
            (&["--learn"], 4),
            (&["--learn=all"], 7),
        ] {
            let mut command = folder.command(&["attach", "--vm", "all", "--json", "--trace", "trace.jsonl"]);
            command.args(mode).args(NONE).arg(vmm.process());
            let attach = Attach::of(&mut command).unwrap();
            for (access, got) in PLAIN {
                assert_eq!(vmm.ask(access), got, "{way:?} {options:?} {mode:?}");
            }
            let told = summary(&attach.detach().code(0));
            let events = traced(&folder);
            let of = |op: &str, msr: &str| {
                let is = |event: &&Value| event["op"] == op && event["msr"] == msr;
                events.iter().filter(is).count()
            };
            let seen = ["rdmsr", "wrmsr"].map(|op| of(op, "0x174"));
            let each = if mode == ["--learn=all"] { [3, 1] } else { [1, 1] };
            assert_eq!(seen, each, "{way:?} {mode:?} {events:#?}");
            let known = events.iter().filter(|event| event["msr"] != "0xdeadbeef");
            let known = known.filter(|event| event.get("op").is_some()).count();
            assert_eq!(
                known,
                if mode == ["--learn=all"] { 5 } else { touched - 1 },
                "{mode:?} {events:#?}"
            );
            if mode.contains(&"--audit") {
                assert!(
                    told.to_string().contains("\"would\"") || events.iter().any(|event| event.get("would").is_some())
                );
            }
            for (access, got) in PLAIN {
                assert_eq!(vmm.ask(access), got, "{way:?} {options:?} after {mode:?}");
            }
        }
        vmm.end();
    }
}

#[test]
fn where_msrgate_is_killed_what_it_is_asked_for_faults_and_what_it_looks_on_at_goes_on() {
    let accesses = ["w:0x175=0", "r:0x174", "r:0x8b", "r:0xdeadbeef"];
    let policy = ASKED.replace("read = { value = \"0x5\" }", "read = \"zero\"");
    let own = [
        "wrmsr 0x175 done",
        "rdmsr 0x174 0x0",
        "rdmsr 0x8b 0x100000000",
        "rdmsr 0xdeadbeef fault",
    ];
    let killed = [
        "wrmsr 0x175 fault",
        "rdmsr 0x174 fault",
        "rdmsr 0x8b 0x0",
        "rdmsr 0xdeadbeef fault",
    ];
    let live = [
        "wrmsr 0x175 fault",
        "rdmsr 0x174 0x100",
        "rdmsr 0x8b 0x0",
        "rdmsr 0xdeadbeef fault",
    ];
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let mut vmm = Asked::start(&program, &["1", "1"]);
    let microcode = vmm.ask("0 r:0x8b");
    vmm.end();
    let own = own.map(|line| {
        if line.starts_with("rdmsr 0x8b") {
            microcode.as_str()
        } else {
            line
        }
    });
    killed_at_any_moment(&[&policy], 40, &accesses, [&own, &killed], &live);
    killed_at_any_moment(&[&policy, "--audit"], 40, &accesses, [&own, &own], &own);
}

/// A VMM that ran already, whose guests do the same again and again.
struct Busy {
    folder: Folder,
    child: Child,
}

impl Busy {
    /// Under no policy; `None` where it cannot be built.
    fn start(way: Way, what: &str) -> Option<Busy> {
        let program = vmm("reloads", way)?;
        let folder = reloads::Live::folder();
        let mut command = Command::new(&program);
        command.args(["2", what]).args(reloads::ACCESSES);
        let file = fs::File::create(folder.path().join("out")).unwrap();
        let child = command.current_dir(folder.path()).stdout(file).spawn().unwrap();
        let busy = Busy { folder, child };
        wait_until(|| busy.lines().len() >= 2);
        Some(busy)
    }

    fn process(&self) -> String {
        self.child.id().to_string()
    }

    fn lines(&self) -> Vec<String> {
        let out = fs::read_to_string(self.folder.path().join("out")).unwrap();
        out.lines().map(str::to_owned).collect()
    }

    /// Waits until both vCPUs get this, and gives how many lines there are then.
    fn sees(&self, what: &str) -> usize {
        let mut count = 0;
        wait_until(|| {
            let lines = self.lines();
            count = lines.len();
            let last = |vcpu: usize| {
                lines
                    .iter()
                    .rev()
                    .find_map(|line| line.strip_prefix(&format!("vcpu {vcpu} ")))
            };
            (0..2).all(|vcpu| last(vcpu).is_some_and(|line| line.starts_with(what)))
        });
        count
    }

    /// Has it end by itself, and gives what each access got from a line on.
    fn stop(mut self, from: usize) -> Vec<BTreeSet<String>> {
        self.folder.write("stop", "");
        assert!(self.child.wait().unwrap().success());
        let mut seen = vec![BTreeSet::new(); reloads::ACCESSES.len()];
        for line in self.lines().iter().skip(from) {
            for (seen, word) in seen.iter_mut().zip(line.split(' ').skip(2)) {
                seen.insert(word.to_owned());
            }
        }
        seen
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn no_access_gets_anything_else_while_attached_policies_change() {
    for (way, what) in [(Way::Dynamic, "plain"), (Way::Static, "plain"), (Way::Dynamic, "own")] {
        let Some(vmm) = Busy::start(way, what) else { continue };
        let folder = &vmm.folder;
        folder.write(
            "vmm.toml",
            "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x277\"\nread = { handler = \"own\" }\nwhy = \"its own\"\n",
        );
        folder.write(
            "denies.toml",
            "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x174\"\nread = \"deny\"\n",
        );
        let own = if what == "own" { "vmm.toml" } else { "none" };
        let mut command = folder.command(&["attach", "-p", "denies.toml", "--vmm-filter", own, &vmm.process()]);
        let attach = Attach::of(&mut command).unwrap();
        let reload = |policy: &str| folder.run(&["reload", &vmm.process(), "-p", policy, "--json"]);
        reload("one.toml").code(0);
        let from = vmm.sees(reloads::OF_ONE);
        for _ in 0..25 {
            for policy in ["two.toml", "one.toml"] {
                reload(policy).code(0);
            }
        }
        vmm.sees(reloads::OF_ONE);
        // What cannot be put in force changes nothing.
        folder.write("bad.toml", "version = 1\ndefault = \"perhaps\"\n");
        reload("bad.toml").code(2);
        let two = fs::read_to_string(folder.path().join("two.toml")).unwrap();
        folder.write("denies.toml", two);
        attach.signal(Signal::SIGHUP);
        vmm.sees(reloads::OF_TWO);
        let seen = vmm.stop(from);
        attach.rest().code(0);
        assert_eq!(seen, reloads::of_either(what), "{way:?} {what}");
    }
}

#[test]
fn where_msrgate_is_killed_while_policies_change_an_access_gets_what_one_of_them_says_or_faults() {
    let mut seed = 11;
    for _ in 0..12 {
        let Some(vmm) = Busy::start(Way::Dynamic, "plain") else {
            return;
        };
        let folder = &vmm.folder;
        for name in ["one.toml", "two.toml"] {
            // Nothing that takes an answer of msrgate.
            let text = fs::read_to_string(folder.path().join(name)).unwrap();
            folder.write(
                name,
                text.replace("{ mask = { keep = \"0x0\", set = \"0x7\" } }", "{ value = 7 }"),
            );
        }
        let mut command = folder.command(&["attach", "-p", "one.toml", "--vmm-filter", "none", &vmm.process()]);
        let attach = Attach::of(&mut command).unwrap();
        let from = vmm.sees(reloads::OF_ONE);
        let reload = |policy: &str| {
            let mut reload = folder.command(&["reload", &vmm.process(), "-p", policy]);
            reload.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        };
        // The moment is chance, and what is asked for depends on none.
        let begin = Instant::now();
        assert!(reload("one.toml").wait().unwrap().success());
        let usual = begin.elapsed().as_micros() as u64;
        let changes = ["two.toml", "one.toml", "two.toml"].map(reload);
        std::thread::sleep(Duration::from_micros(random(&mut seed, 2 * usual)));
        attach.signal(Signal::SIGKILL);
        attach.rest();
        changes.into_iter().for_each(|mut change| _ = change.wait().unwrap());
        let expected: [&[&str]; 7] = [
            &["0x1", "0x2"],
            &["0x0", "0x11", "fault"],
            &["0x0", "0x22", "fault"],
            &["done"],
            &["0x5"],
            &["0x7", "0x9"],
            &["0x7040600070406"],
        ];
        for (seen, expected) in vmm.stop(from).iter().zip(expected) {
            let other = seen.iter().find(|word| !expected.contains(&word.as_str()));
            assert_eq!(other, None);
        }
    }
}
