//! Programs answer for handlers, and where they do not the guest gets #GP.

use std::io::{BufRead, Write};
use std::os::unix::net::UnixListener;
use std::thread;

use super::*;

/// Rules that name handlers, and who answers.
fn policy(handlers: &str) -> Folder {
    with_policy(&format!(
        "default = \"allow\"\n\
         [handlers]\n{handlers}\n\
         [[rule]]\nmsr = \"0x35\"\nread = {{ handler = \"cores\" }}\nwrite = {{ handler = \"cores\" }}\n"
    ))
}

/// A shell's script that answers each line by this part of a `case`.
fn script(cases: &str) -> String {
    let text = format!("while read -r line; do case $line in {cases} esac; done");
    format!("cores = {{ command = [\"sh\", \"-c\", {text:?}] }}")
}

const READ: &str = r#"*'"op":"read","msr":"0x35","vm":0,"vcpu":0}'*) echo '{"value": "0x20004"}';;"#;

#[test]
fn a_program_answers_reads_and_writes_and_is_told_their_values() {
    if !kvm_opens() {
        return;
    }
    let writes = r#" *'"value":"0x7"'*) echo '{"done": true}';; *'"value"'*) echo '{"fault": true}';;"#;
    let folder = policy(&script(&format!("{READ}{writes}")));
    let ran = under(
        &folder,
        &["-p", "policy.toml", "--json"],
        "r:0x35 w:0x35=7 w:0x35=8 r:0x35",
    )
    .code(0);
    let expected = [
        "rdmsr 0x35 0x20004",
        "wrmsr 0x35 done",
        "wrmsr 0x35 fault",
        "rdmsr 0x35 0x20004",
    ];
    assert_eq!(seen(&ran), expected);
    let summary = summary(&ran);
    assert!(count(&list(&summary, "by_msr")[0], "cost_ns") > 0, "{summary}");
    let checked = folder.run(&["check", "policy.toml"]);
    assert!(!checked.out.contains("N011"), "{}", checked.out);
}

#[test]
fn a_program_behind_a_socket_answers() {
    if !kvm_opens() {
        return;
    }
    let folder = policy("cores = { socket = \"cores.sock\" }");
    let listener = UnixListener::bind(folder.path().join("cores.sock")).unwrap();
    let answering = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut asked = 0;
        for line in std::io::BufReader::new(&stream).lines() {
            asked += 1;
            let value: Value = serde_json::from_str(&line.unwrap()).unwrap();
            assert_eq!(text(&value, "op"), "read");
            (&stream).write_all(b"{\"value\": 9}\n").unwrap();
        }
        asked
    });
    let ran = under(&folder, &["-p", "policy.toml"], "r:0x35 r:0x35 r:0x35").code(0);
    assert_eq!(seen(&ran), ["rdmsr 0x35 0x9"; 3]);
    assert_eq!(answering.join().unwrap(), 3);
}

#[test]
fn without_an_answer_the_guest_gets_a_fault_and_is_asked_for_no_more() {
    if !kvm_opens() {
        return;
    }
    let failing = [
        // It never answers.
        (
            "*) echo '{\"value\": 1}'; read -r line; sleep 100;;",
            "no answer within 10 s",
        ),
        ("*) exit;;", "it has ended"),
        ("*) echo nonsense;;", "`nonsense` is neither"),
        ("*) echo '{\"done\": true}';;", "is neither"),
        (
            "*) printf '%s\\n%s\\n' '{\"value\": 1}' '{\"value\": 2}';;",
            "more than one line",
        ),
    ];
    for (cases, why) in failing {
        let folder = policy(&script(cases));
        let ran = under(&folder, &["-p", "policy.toml"], "r:0x35 r:0x35 r:0x35 r:0x174").code(0);
        assert_eq!(seen(&ran)[1..3], ["rdmsr 0x35 fault"; 2], "{cases}");
        assert_eq!(seen(&ran)[3], "rdmsr 0x174 0x0");
        assert!(ran.err.contains(why), "{cases}: {}", ran.err);
        assert_eq!(ran.err.matches("is asked no more").count(), 1, "{}", ran.err);
    }
}

#[test]
fn a_handler_that_nobody_answers_for_is_refused_before_the_vmm_starts() {
    let refused = [
        ("", "the handler `cores`"),
        ("cores = { command = [\"no-such-program\"] }", "`no-such-program`"),
        ("cores = { socket = \"none.sock\" }", "`none.sock`"),
        ("cores = { command = [] }", "E"),
        (
            "cores = { command = [\"a\"], socket = \"b\" }",
            "either a command or a socket",
        ),
    ];
    for (handlers, why) in refused {
        let folder = policy(handlers);
        let ran = Ran::of(&mut folder.command(&["run", "-p", "policy.toml", "--", "touch", "started"]));
        assert!(ran.err.contains(why), "{handlers}: {}", ran.err);
        assert!(!folder.path().join("started").exists(), "{handlers}");
    }
}
