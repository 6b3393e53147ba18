//! `capture --pid`: the calls of a VMM that runs already.

use super::*;

/// A capture that sees the calls of a VMM, once it says so.
fn follow(folder: &Folder, asked: &Asked) -> (Child, BufReader<std::process::ChildStderr>) {
    let mut command = folder.command(&["capture", "-o", "c.jsonl", "--pid", &asked.process()]);
    let mut capture = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(capture.stderr.take().unwrap());
    let mut line = String::new();
    told.read_line(&mut line).unwrap();
    assert!(line.contains("is traced"), "{line}");
    (capture, told)
}

fn told(folder: &Folder) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.path().join("c.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_running_vmms_calls_are_told_and_it_goes_on_as_before_when_that_ends_in_any_way() {
    for way in [Way::Dynamic, Way::Static] {
        let Some(program) = vmm("running", way) else { continue };
        for end in [Signal::SIGINT, Signal::SIGKILL] {
            let folder = Folder::new();
            let mut asked = Asked::start(&program, &["1", "2"]);
            let without = asked.ask("0 r:0x8b");
            let (mut capture, _told) = follow(&folder, &asked);
            assert_eq!(asked.ask("0 r:0x8b"), without, "{way:?}");
            let added = asked.ask("add");
            let lines = told(&folder);
            assert_eq!(lines.len(), 1, "{way:?} {added} {lines:#?}");
            assert_eq!(
                (
                    text(&lines[0], "call"),
                    count(&lines[0], "vm"),
                    count(&lines[0], "vcpu")
                ),
                ("KVM_CREATE_VCPU", 1, 2),
                "{way:?} {added} {}",
                lines[0]
            );
            assert!(lines[0]["result"].as_i64() > Some(0), "{}", lines[0]);
            // What a vCPU does after its thread was told to stop it does after it has stopped.
            for id in ["0", "1"] {
                assert_eq!(asked.ask(&format!("{id} r:0x8b")), without, "{way:?}");
            }
            let returns = asked.ask("returns");
            kill(Pid::from_raw(capture.id().cast_signed()), end).unwrap();
            let status = capture.wait().unwrap();
            assert_eq!(status.success(), end == Signal::SIGINT, "{status}");
            assert_eq!(asked.ask("1 r:0x8b"), without, "{way:?} {end}");
            // No KVM_RUN came back for the tracer's sake.
            assert_eq!(asked.ask("returns"), returns, "{way:?} {end}");
            asked.end();
        }
    }
}

#[test]
fn a_vmm_that_ends_ends_the_capture_and_one_that_is_traced_is_named() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = Folder::new();
    let asked = Asked::start(&program, &[]);
    let (mut capture, mut rest) = follow(&folder, &asked);
    let second = folder.run(&["capture", "--pid", &asked.process()]).code(3);
    second.says(&["traces it, and one process can do so at a time"]);
    asked.end();
    let mut said = String::new();
    rest.read_to_string(&mut said).unwrap();
    assert!(said.contains("the VMM has ended"), "{said}");
    assert!(capture.wait().unwrap().success());
}
