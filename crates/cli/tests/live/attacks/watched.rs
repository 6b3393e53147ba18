//! What can be seen of guests from outside while they run: `top`, metrics, the journal.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::reloads::Live;
use super::*;
use crate::command::{Terminal, find, on_terminal, plain};

const LOOPS: [&str; 4] = ["2", "plain", "r:0x8b", "r:0x10a"];
const POLICY: &str = "version = 1\nname = \"seen\"\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = { value = 1 }\n\
                      [[rule]]\nmsr = \"0x10a\"\nread = \"deny\"\nlog = \"first\"\n";

fn start(options: &[&str]) -> Option<Live> {
    let program = vmm("reloads", Way::Dynamic)?;
    let folder = Live::folder();
    folder.write("seen.toml", POLICY);
    let options = [&["-p", "seen.toml"][..], options].concat();
    let mut live = Live::in_folder(folder, &options, &program, &LOOPS);
    live.until(|live| live.read("out").lines().count() >= 2);
    Some(live)
}

/// What `top --json` has of a run.
fn seen(live: &Live) -> Value {
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", live.pid())).unwrap();
    let monitor: u64 = children.trim().parse().unwrap();
    let all = live.folder.run(&["top", "--json"]).code(0).json();
    let own = list(&all, "vmms").iter().find(|vmm| count(vmm, "process") == monitor);
    own.unwrap_or_else(|| panic!("{monitor} is not in {all:#}")).clone()
}

#[test]
fn top_shows_what_guests_do_now() {
    let Some(mut live) = start(&[]) else { return };
    let of = |state: &Value, msr: &str, key: &str| {
        let rows = list(state, "by_msr").iter();
        rows.filter(|row| text(row, "msr") == msr)
            .map(|row| count(row, key))
            .sum::<u64>()
    };
    let first = seen(&live);
    live.until(|live| {
        let now = seen(live);
        of(&now, "0x8b", "count") > of(&first, "0x8b", "count") && of(&now, "0x10a", "faulted") > 0
    });
    let now = seen(&live);
    assert!(count(&now, "t") > count(&first, "t"));
    let words = [text(&now, "mode"), text(&now, "vmm").rsplit('/').next().unwrap()];
    assert_eq!(words, ["enforce", "reloads-dynamic"]);
    assert_eq!(text(&now, "policy").len(), 64);
    // docs/json.md names these keys.
    let own = ["attached", "mode", "name", "policy", "process", "t", "vmm"];
    let others = [
        "background",
        "by_msr",
        "cost_ns",
        "killed",
        "lost",
        "presets",
        "refused",
        "reloads",
        "signal",
        "trace",
        "vcpus",
        "vms",
    ];
    let keys: BTreeSet<&str> = now.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, own.into_iter().chain(others).collect());
    let once = || live.folder.command(&["top", "--once", "--interval", "0.2"]);
    let shown = Ran::of(&mut once()).code(0);
    let lines: Vec<&str> = shown.out.lines().filter(|line| line.contains("0x10a")).collect();
    assert!(
        shown.out.contains("reloads-dynamic") && !lines.is_empty(),
        "{}",
        shown.out
    );
    live.folder.run(&["top", "--interval", "0"]).code(2);
    assert_eq!(live.stop().0, Some(0));
}

#[test]
fn top_fits_any_terminal() {
    let Some(live) = start(&[]) else { return };
    let mut command = live.folder.command(&["top", "--once", "--interval", "0.1"]);
    assert!(Ran::of(&mut command).code(0).out.contains("exits/s"));
    // The figures change, so that nothing is compared but how wide it is.
    for columns in [40, 80, 200] {
        let command = live.folder.command(&["top", "--once", "--interval", "0.1"]);
        let shown = plain(&on_terminal(command, columns, Terminal::Output));
        for line in shown.lines() {
            assert!(line.chars().count() <= usize::from(columns), "{columns}: {line:?}");
        }
    }
    assert_eq!(live.stop().0, Some(0));
}

/// Reads OpenMetrics text by a client library, and prints counters by name and labels.
const PARSE: &str = r#"
import sys, json
from prometheus_client.openmetrics.parser import text_string_to_metric_families
found = {}
for family in text_string_to_metric_families(sys.stdin.read()):
    for sample in family.samples:
        found[sample.name + json.dumps(sample.labels, sort_keys=True)] = sample.value
print(json.dumps(found))
"#;

/// A Python that has the client library; `None`, and a line that says why, where there is none.
fn python() -> Option<std::path::PathBuf> {
    let has = |python: &Path| {
        let mut command = Command::new(python);
        let status = command.args(["-c", "import prometheus_client"]).output();
        status.is_ok_and(|output| output.status.success())
    };
    let Some(python) = find("python3") else {
        println!("skipped: there is no python3");
        return None;
    };
    if has(&python) {
        return Some(python);
    }
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("prometheus");
    let own = venv.join("bin/python3");
    if !has(&own) {
        let made = Command::new(&python).args(["-m", "venv"]).arg(&venv).output();
        if !made.is_ok_and(|output| output.status.success()) {
            println!("skipped: python3 makes no venv");
            return None;
        }
        let pip = [
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "prometheus_client",
        ];
        let _ = Command::new(&own).args(pip).output();
    }
    if !has(&own) {
        println!("skipped: pip does not bring prometheus_client");
        return None;
    }
    Some(own)
}

/// What the client library reads.
fn parsed(python: &Path, text: &str) -> Value {
    let mut command = Command::new(python);
    command.args(["-c", PARSE]).stdin(std::process::Stdio::piped());
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "the client library refuses it:\n{text}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn metrics_are_read_by_the_client_library_of_prometheus() {
    let Some(mut live) = start(&["--metrics", "0"]) else {
        return;
    };
    live.until(|live| live.read("err").contains("metrics are at http://127.0.0.1:"));
    let err = live.read("err");
    let address = err
        .split("http://")
        .nth(1)
        .unwrap()
        .split('/')
        .next()
        .unwrap()
        .to_owned();
    let get = || {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: msrgate\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("HTTP/1.1 200 OK") && head.contains("openmetrics-text"),
            "{head}"
        );
        body.to_owned()
    };
    // Whoever is slow holds up others for a while, and no guest.
    let _silent = TcpStream::connect(&address).unwrap();
    let text = get();
    assert!(text.ends_with("# EOF\n"), "{text}");
    let Some(python) = python() else { return };
    let read = parsed(&python, &text);
    let faults = r#"msrgate_faults_total{"msr": "0x10a", "name": "IA32_ARCH_CAPABILITIES", "op": "rdmsr"}"#;
    assert!(read[faults].as_f64().unwrap() > 0.0, "{read:#}");
    assert_eq!(read["msrgate_vcpus_total{}"], 2.0, "{read:#}");
    live.until(|_| parsed(&python, &get())[faults].as_f64() > read[faults].as_f64());
    assert_eq!(live.stop().0, Some(0));
}

#[test]
fn metrics_in_a_file_are_whole_at_each_moment_and_last_at_the_end() {
    let Some(mut live) = start(&["--metrics", "metrics.txt", "--json"]) else {
        return;
    };
    live.until(|live| live.folder.path().join("metrics.txt").exists());
    assert!(live.read("metrics.txt").ends_with("# EOF\n"));
    let path = live.folder.path().to_path_buf();
    live.folder.write("stop", "");
    live.until_end();
    let text = std::fs::read_to_string(path.join("metrics.txt")).unwrap();
    let err = std::fs::read_to_string(path.join("err")).unwrap();
    let summary: Value = serde_json::from_str(err.lines().last().unwrap()).unwrap();
    let rows = list(&summary, "by_msr").iter();
    let row = rows.into_iter().find(|row| super::text(row, "msr") == "0x10a").unwrap();
    let line = format!("op=\"rdmsr\"}} {}\n", count(row, "count"));
    assert!(text.contains(&line) && text.ends_with("# EOF\n"), "{text}\n{summary:#}");
    let left: Vec<_> = std::fs::read_dir(&path).unwrap().flatten().collect();
    assert!(
        left.iter()
            .all(|entry| !entry.file_name().to_string_lossy().starts_with('.')),
        "{left:?}"
    );
}

#[test]
fn what_is_logged_goes_to_the_journal_with_fields() {
    let Some(program) = vmm("accesses", Way::Dynamic) else {
        return;
    };
    let policy = "default = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = { value = 1 }\nlog = \"all\"\n[[rule]]\nmsr = \"0x10a\"\nread = \"deny\"\nlog = \"all\"\n";
    let folder = with_policy(policy);
    folder.write("run/systemd/journal/x", "");
    let socket = folder.path().join("run/systemd/journal/socket");
    let journal = UnixDatagram::bind(&socket).unwrap();
    journal.set_read_timeout(Some(Duration::from_secs(600))).unwrap();
    // The journal's place is another one for this process alone.
    let script = "mount --make-rprivate / && mount --bind run /run && exec \"$@\"";
    let under = |journal_stream: bool, options: &[&str]| {
        let mut command = Command::new("unshare");
        let start = match journal_stream {
            // Standard error is said to be the journal's.
            true => "exec 2>err; export JOURNAL_STREAM=$(stat -L -c %d:%i /dev/fd/2); exec \"$@\"",
            false => "exec \"$@\"",
        };
        command.args(["-m", "sh", "-c", script, "sh", "sh", "-c", start, "sh"]);
        command.arg(crate::command::program()).arg("run").args(options);
        command
            .arg("--")
            .arg(&program)
            .args(["r:0x8b", "r:0x10a"])
            .current_dir(folder.path());
        Ran::of(&mut command)
    };
    let receive = || {
        let mut bytes = [0; 4096];
        let length = journal.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    };
    let may = Command::new("unshare").args(["-m", "true"]).output();
    if !may.is_ok_and(|output| output.status.success()) {
        println!("skipped: `unshare -m` makes no mounts of its own");
        return;
    }
    for (stream, options) in [
        (false, &["-p", "policy.toml", "--log", "journald"][..]),
        (true, &["-p", "policy.toml"]),
    ] {
        let ran = under(stream, options).code(0);
        assert!(!ran.err.contains("rdmsr(0x8b"), "{}", ran.err);
        let (first, second) = (receive(), receive());
        for field in [
            "MSR=0x8b\n",
            "OP=rdmsr\n",
            "VALUE=0x1\n",
            "DID=value\n",
            "VM=0\n",
            "VCPU=0\n",
            "RULE=0\n",
            "PRIORITY=6\n",
            "SYSLOG_IDENTIFIER=msrgate\n",
        ] {
            assert!(first.contains(field), "{field} is not in {first}");
        }
        for field in ["MSR=0x10a\n", "DID=deny\n", "RULE=1\n", "PRIORITY=4\n"] {
            assert!(second.contains(field), "{field} is not in {second}");
        }
    }
    let ran = under(false, &["-p", "policy.toml"]).code(0);
    assert!(ran.err.contains("rdmsr(0x8b"), "{}", ran.err);
    drop(journal);
    under(false, &["-p", "policy.toml", "--log", "journald"])
        .code(3)
        .says(&["cannot write to the journal"]);
}
