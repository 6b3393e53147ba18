//! VMMs that run already: what their guests get before, under and after a policy.

mod asked;
mod asks;
mod followed;
mod killed;
mod table;
mod users;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::vmm::vmm_anywhere;
use super::*;
use crate::command::{find, wait_until};
use crate::policies::Attach;

/// A VMM that runs, and is asked.
struct Asked {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    /// What it said first.
    ready: String,
}

impl Asked {
    fn start(program: &Path, arguments: &[&str]) -> Asked {
        let mut command = Command::new(program);
        command.args(arguments);
        Asked::of(command)
    }

    fn of(mut command: Command) -> Asked {
        let pipes = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = pipes.spawn().unwrap();
        let mut asked = Asked {
            to: child.stdin.take(),
            from: BufReader::new(child.stdout.take().unwrap()),
            child,
            ready: String::new(),
        };
        asked.ready = asked.line();
        assert!(asked.ready.starts_with("ready "), "{}", asked.ready);
        asked
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// What a guest gets.
    fn ask(&mut self, what: &str) -> String {
        let to = self.to.as_mut().unwrap();
        // Where it has ended its end tells why.
        let written = to.write_all(format!("{what}\n").as_bytes());
        let line = self.line();
        if written.is_err() || line.is_empty() {
            let mut why = String::new();
            self.child.stderr.take().unwrap().read_to_string(&mut why).unwrap();
            panic!("the VMM has ended: {:?} {why}", self.child.wait());
        }
        line
    }

    fn process(&self) -> String {
        self.child.id().to_string()
    }

    /// It ends as it does by itself: no register was another one's, and no exit came that it does not know.
    fn end(mut self) {
        self.to = None;
        let status = self.child.wait().unwrap();
        let mut why = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut why).unwrap();
        assert!(status.success() && why.is_empty(), "{status:?} {why}");
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const DENIED: &str = "default = \"allow\"\n[[rule]]\nmsr = \"0x174\"\nread = \"deny\"\nwrite = \"deny\"\n";
const NONE: [&str; 2] = ["--vmm-filter", "none"];

#[test]
fn a_guest_gets_what_the_policy_says_while_it_is_attached_and_its_own_before_and_after() {
    for way in Way::IN_C {
        let Some(program) = vmm("running", way) else { continue };
        for options in [&[][..], &["sandbox"]] {
            let folder = with_policy(DENIED);
            let mut vmm = Asked::start(&program, &[&["1", "2"], options].concat());
            assert_eq!(vmm.ask("0 w:0x174=5"), "wrmsr 0x174 done");
            assert_eq!(vmm.ask("1 r:0x174"), "rdmsr 0x174 0x0");
            // One after the other on one VMM.
            for _ in 0..3 {
                let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
                for id in ["0", "1"] {
                    assert_eq!(vmm.ask(&format!("{id} r:0x174")), "rdmsr 0x174 fault", "{way:?}");
                    assert_eq!(vmm.ask(&format!("{id} w:0x174=6")), "wrmsr 0x174 fault", "{way:?}");
                    assert_eq!(vmm.ask(&format!("{id} r:0x175")), "rdmsr 0x175 0x0", "{way:?}");
                }
                attach.detach().code(0).says(&[
                    "1 VM and 2 vCPUs, no access answered",
                    "no thread of the VMM stood still for more than",
                    "detached: no MSR is denied any more",
                ]);
                assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x5", "{way:?}");
            }
            // Nothing was to be seen.
            assert_eq!(vmm.ask("returns"), "0", "{way:?}");
            vmm.end();
        }
    }
}

/// What user space answers without being asked.
const ANSWERED: &str = r#"default = "allow"
[[rule]]
msr = "0x8b"
read = { value = "0x5" }
write = "ignore"
[[rule]]
msr = "0x174"
read = { shadow = "0x11" }
write = "shadow"
[[rule]]
msr = "0x176"
read = "deny"
write = "deny"
log = "all"
"#;

#[test]
fn answers_reach_guests_of_a_vmm_that_runs_and_end_with_the_policy() {
    for way in [Way::Dynamic, Way::Static, Way::StaticPie, Way::Musl] {
        let Some(program) = vmm("running", way) else { continue };
        for options in [&[][..], &["sandbox"]] {
            let folder = with_policy(ANSWERED);
            let mut vmm = Asked::start(&program, &[&["1", "2"], options].concat());
            assert_eq!(vmm.ask("0 w:0x174=5"), "wrmsr 0x174 done");
            let own = vmm.ask("0 r:0x8b");
            for _ in 0..2 {
                let trace = ["--ignore-unknown", "--trace", "trace.jsonl", "--json"];
                let attach = Attach::start(&folder, &[&NONE[..], &trace].concat(), &vmm.process()).unwrap();
                for id in ["0", "1"] {
                    for (access, got) in [
                        ("r:0x8b", "rdmsr 0x8b 0x5"),
                        ("w:0x8b=1", "wrmsr 0x8b done"),
                        ("r:0x174", "rdmsr 0x174 0x11"),
                        ("w:0x174=7", "wrmsr 0x174 done"),
                        ("r:0x174", "rdmsr 0x174 0x7"),
                        ("r:0x176", "rdmsr 0x176 fault"),
                        ("w:0x176=1", "wrmsr 0x176 fault"),
                        ("r:0xdeadbeef", "rdmsr 0xdeadbeef 0x0"),
                    ] {
                        assert_eq!(vmm.ask(&format!("{id} {access}")), got, "{way:?} {options:?} {id}");
                    }
                }
                let ran = attach.detach().code(0);
                let told = summary(&ran);
                assert_eq!((count(&told, "vms"), count(&told, "vcpus")), (1, 2), "{told:#}");
                assert_eq!((&told["detached"], &told["ended"]), (&true.into(), &false.into()));
                assert_eq!((text(&told, "answers"), text(&told, "vmm_filter")), ("process", "none"));
                assert!(count(&told, "longest_stop_ns") > 0);
                assert_eq!(whole(&traced(&folder)), (16, 0), "{way:?}");
                assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x5", "{way:?}");
                assert_eq!(vmm.ask("0 r:0x8b"), own, "{way:?}");
                assert_eq!(vmm.ask("1 r:0xdeadbeef"), "rdmsr 0xdeadbeef fault", "{way:?}");
            }
            // At the end of each policy each KVM_RUN gives EINTR once, as for a signal.
            let returns = vmm.ask("returns");
            assert!(returns.parse::<u64>().unwrap() <= 4, "{way:?} {options:?}: {returns}");
            vmm.end();
        }
    }
}

/// Runs for ever on a CPU.
struct Hog(Child);

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_vmm_whose_threads_hardly_run_sees_no_more_of_it() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    if find("taskset").is_none() {
        return println!("skipped: there is no taskset(1)");
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let cpu = cpus.unwrap().trim().split([',', '-']).next().unwrap();
    let on_cpu = |words: &[&str]| {
        let mut command = Command::new("taskset");
        command.args(["-c", cpu]).args(words);
        command
    };
    let folder = with_policy(ANSWERED);
    let mut command = on_cpu(&["nice", "-n", "19"]);
    command.arg(program).args(["1", "2"]);
    let mut vmm = Asked::of(command);
    {
        // Its threads wait for the CPU for longer than msrgate waits for each of them.
        let hog = || Hog(on_cpu(&["sh", "-c", "while :; do :; done"]).spawn().unwrap());
        let _hogs = [hog(), hog()];
        for _ in 0..3 {
            Attach::start(&folder, &NONE, &vmm.process()).unwrap().detach().code(0);
        }
    }
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
    assert_eq!(vmm.ask("1 r:0x174"), "rdmsr 0x174 0x0");
    let returns = vmm.ask("returns");
    assert!(returns.parse::<u64>().unwrap() <= 6, "{returns}");
    vmm.end();
}

#[test]
fn a_vmm_that_is_stopped_goes_on_with_the_policy_and_is_not_waited_for() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERED);
    let mut vmm = Asked::start(&program, &["1", "1"]);
    let process = Pid::from_raw(vmm.process().parse().unwrap());
    let stop = || {
        kill(process, Signal::SIGSTOP).unwrap();
        wait_until(|| {
            let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
            status.contains("\nState:\tT (stopped)")
        });
    };
    stop();
    refused(&folder, &NONE, &vmm.process(), 3, "it is stopped, as by SIGSTOP");
    kill(process, Signal::SIGCONT).unwrap();
    let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
    stop();
    folder.run(&["reload", &vmm.process(), "-p", "policy.toml"]).code(0);
    kill(process, Signal::SIGCONT).unwrap();
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x11");
    stop();
    attach.detach().code(0);
    kill(process, Signal::SIGCONT).unwrap();
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
    vmm.end();
}

#[test]
fn a_vmm_whose_threads_are_seldom_in_kvm_run_is_attached_to() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERED);
    let vmm = Asked::start(&program, &["1", "2", "seldom"]);
    for _ in 0..5 {
        Attach::start(&folder, &NONE, &vmm.process()).unwrap().detach().code(0);
    }
    vmm.end();
}

#[test]
fn a_vmms_own_exits_go_on_and_no_other_reaches_it() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(DENIED);
    folder.write(
        "vmm.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x175\"\nread = { handler = \"own\" }\nwrite = \"allow\"\nwhy = \"its own\"\n",
    );
    let mut vmm = Asked::start(&program, &["1", "1", "exits"]);
    let expect = |vmm: &mut Asked, read: &str| {
        assert_eq!(vmm.ask("0 r:0x175"), "rdmsr 0x175 0x7");
        assert_eq!(vmm.ask("0 r:0x174"), read);
    };
    expect(&mut vmm, "rdmsr 0x174 0x0");
    let attach = Attach::start(&folder, &["--vmm-filter", "vmm.toml"], &vmm.process()).unwrap();
    expect(&mut vmm, "rdmsr 0x174 fault");
    assert_eq!(vmm.ask("0 r:0xdeadbeef"), "rdmsr 0xdeadbeef fault");
    attach
        .detach()
        .code(0)
        .says(&["detached: the VMM's own filter is back"]);
    expect(&mut vmm, "rdmsr 0x174 0x0");
    // A capture of the same VMM says the same.
    let captured = Ran::of(
        folder
            .command(&["capture", "-o", "vmm.jsonl", "--"])
            .arg(&program)
            .args(["1", "1", "exits"]),
    );
    captured.code(0);
    let attach = Attach::start(&folder, &["--vmm-filter", "vmm.jsonl"], &vmm.process()).unwrap();
    expect(&mut vmm, "rdmsr 0x174 fault");
    attach.detach().code(0);
    expect(&mut vmm, "rdmsr 0x174 0x0");
    // Where nothing is said nothing is changed.
    let Err(ran) = Attach::start(&folder, &[], &vmm.process()) else {
        panic!("it is put in force");
    };
    ran.code(2).says(&[
        "it cannot be known which MSR filter",
        "--vmm-filter none",
        "--replace-filter",
    ]);
    expect(&mut vmm, "rdmsr 0x174 0x0");
    vmm.end();
}

#[test]
fn a_filter_of_the_vmms_own_is_kept_or_lost_as_is_said() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(DENIED);
    folder.write(
        "vmm.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x175\"\nread = \"deny\"\nwrite = \"allow\"\nwhy = \"its own\"\n",
    );
    let mut vmm = Asked::start(&program, &["1", "1", "filter"]);
    for (options, under, after) in [
        (&["--vmm-filter", "vmm.toml"][..], "fault", "fault"),
        (&["--replace-filter"], "0x0", "0x0"),
    ] {
        assert_eq!(vmm.ask("0 r:0x175"), "rdmsr 0x175 fault");
        let attach = Attach::start(&folder, options, &vmm.process()).unwrap();
        assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 fault");
        assert_eq!(vmm.ask("0 r:0x175"), format!("rdmsr 0x175 {under}"));
        attach.detach().code(0);
        assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
        assert_eq!(vmm.ask("0 r:0x175"), format!("rdmsr 0x175 {after}"));
    }
    vmm.end();
}

#[test]
fn a_filter_that_the_vmm_sets_later_is_in_force_together_with_the_policy() {
    for way in [Way::Dynamic, Way::Static, Way::Musl] {
        let Some(program) = vmm("running", way) else { continue };
        let folder = with_policy(ANSWERED);
        let mut vmm = Asked::start(&program, &["1", "2"]);
        let expect = |vmm: &mut Asked, what: &[(&str, &str)]| {
            for (msr, got) in what {
                for id in ["0", "1"] {
                    assert_eq!(
                        vmm.ask(&format!("{id} r:{msr}")),
                        format!("rdmsr {msr} {got}"),
                        "{way:?}"
                    );
                }
            }
        };
        for _ in 0..2 {
            let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
            // Once and again: the second takes the place of the first.
            assert_eq!(vmm.ask("deny 0x179"), "0");
            expect(
                &mut vmm,
                &[
                    ("0x174", "0x11"),
                    ("0x175", "0x0"),
                    ("0x179", "fault"),
                    ("0x176", "fault"),
                ],
            );
            assert_eq!(vmm.ask("deny 0x175"), "0");
            expect(
                &mut vmm,
                &[
                    ("0x174", "0x11"),
                    ("0x175", "fault"),
                    ("0x8b", "0x5"),
                    ("0x176", "fault"),
                ],
            );
            assert_ne!(vmm.ask("0 r:0x179"), "rdmsr 0x179 fault");
            // What it denies is an exit of its own then, and what the policy denies is none.
            assert_eq!(vmm.ask("exits"), "0");
            expect(&mut vmm, &[("0x174", "0x11"), ("0x175", "0x7"), ("0x176", "fault")]);
            attach
                .detach()
                .code(0)
                .says(&["detached: the VMM's own filter is back"]);
            expect(&mut vmm, &[("0x174", "0x0"), ("0x175", "0x7"), ("0x176", "0x0")]);
        }
        vmm.end();
    }
}

#[test]
fn a_filter_that_the_vmm_sets_later_takes_the_place_of_a_policy_that_the_kernel_alone_carries_out() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(DENIED);
    let mut vmm = Asked::start(&program, &["1", "1"]);
    let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 fault");
    assert_eq!(vmm.ask("deny 0x175"), "0");
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
    attach.detach().code(0);
    // A trace is written by the answerer, which sees to it.
    let trace = [&NONE[..], &["--trace", "trace.jsonl"]].concat();
    let attach = Attach::start(&folder, &trace, &vmm.process()).unwrap();
    assert_eq!(vmm.ask("deny 0x175"), "0");
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 fault");
    assert_eq!(vmm.ask("0 r:0x175"), "rdmsr 0x175 fault");
    attach.detach().code(0);
    vmm.end();
}

#[test]
fn several_vms_are_named_and_one_or_all_of_them_get_the_policy() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(DENIED);
    let mut vmm = Asked::start(&program, &["2", "2"]);
    let ready = vmm.ready.clone();
    let fds: Vec<&str> = ready.split(' ').skip(1).collect();
    let Err(ran) = Attach::start(&folder, &NONE, &vmm.process()) else {
        panic!("it is put in force");
    };
    ran.code(2).says(&[&format!(
        "has 2 VMs, of descriptors {}, {}: say `--vm N`",
        fds[0], fds[1]
    )]);
    let attach = Attach::start(&folder, &["--vm", fds[1], "--vmm-filter", "none"], &vmm.process()).unwrap();
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
    assert_eq!(vmm.ask("1 r:0x174"), "rdmsr 0x174 fault");
    // Nobody else puts another one over it.
    let Err(ran) = Attach::start(&folder, &["--vm", fds[1], "--vmm-filter", "none"], &vmm.process()) else {
        panic!("it is put in force");
    };
    ran.code(3).says(&["another `msrgate attach` has it"]);
    attach.detach().code(0);
    let attach = Attach::start(&folder, &["--vm", "all", "--vmm-filter", "none"], &vmm.process()).unwrap();
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 fault");
    assert_eq!(vmm.ask("1 r:0x174"), "rdmsr 0x174 fault");
    attach.detach().code(0);
    for (options, says) in [
        (["--vm", "99"], "has no VM of descriptor 99"),
        (["--vm", "x"], "write it as a number, or as `all`"),
    ] {
        let Err(ran) = Attach::start(&folder, &[&options[..], &NONE].concat(), &vmm.process()) else {
            panic!("it is put in force");
        };
        ran.code(2).says(&[says]);
    }
    vmm.end();
}

/// A number that is another one each time.
fn random(seed: &mut u32, most: u64) -> u64 {
    *seed = seed.wrapping_mul(1_103_515_245).wrapping_add(12345);
    u64::from(*seed >> 4) % most
}

/// Attaches and is killed, over and over, at another moment each time. `states` are what the guest may get then, before and under the
/// policy; what was killed is followed by an `attach` that is not, under which the guest gets `live`, and by one that is killed once
/// the policy is in force.
fn killed_at_any_moment(options: &[&str], rounds: u32, accesses: &[&str], states: [&[&str]; 2], live: &[&str]) {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(options[0]);
    let options = [&NONE[..], &options[1..]].concat();
    let mut vmm = Asked::start(&program, &["1", "2"]);
    let process = vmm.process();
    let begin = Instant::now();
    Attach::start(&folder, &options, &process).unwrap().detach().code(0);
    let usual = begin.elapsed().as_micros() as u64;
    let takes = taken(&process);
    // Threads that were on their way are there.
    let settled = || {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
        let mut statuses =
            tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default());
        let stands = |status: String| {
            // One of them may be the kernel's own.
            let is_kernels = status.starts_with("Name:\tkvm-");
            !status.contains("TracerPid:\t0") || !is_kernels && !status.contains("SigBlk:\t0000000000000000")
        };
        !statuses.any(stands)
    };
    let mut gets = |id: u32| -> Vec<String> {
        let accesses = accesses.iter();
        accesses.map(|access| vmm.ask(&format!("{id} {access}"))).collect()
    };
    let mut seed = 7;
    for round in 0..rounds {
        let mut command = folder.command(&["attach", "-p", "policy.toml"]);
        command
            .args(&options)
            .arg(&process)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut attach = command.spawn().unwrap();
        // Half of it is the command's own start and end. The moment is chance, and what is asked for depends on none.
        std::thread::sleep(Duration::from_micros(usual / 8 + random(&mut seed, usual)));
        if random(&mut seed, 3) == 0 {
            let _ = kill(Pid::from_raw(attach.id().cast_signed()), Signal::SIGINT);
            std::thread::sleep(Duration::from_micros(random(&mut seed, usual / 2)));
        }
        attach.kill().unwrap();
        attach.wait().unwrap();
        wait_until(settled);
        for id in [0, 1] {
            let got = gets(id);
            assert!(states.iter().any(|state| got == **state), "round {round}: {got:?}");
        }
        if round % 4 == 3 {
            let attach = Attach::start(&folder, &options, &process).unwrap();
            assert_eq!(gets(0), live);
            attach.detach().code(0);
            assert_eq!(gets(1), states[0]);
            let attach = Attach::start(&folder, &options, &process).unwrap();
            attach.signal(Signal::SIGKILL);
            attach.rest();
            wait_until(settled);
            assert_eq!(gets(0), states[1]);
        }
    }
    // What is not killed takes away what was left.
    Attach::start(&folder, &options, &process).unwrap().detach().code(0);
    assert_eq!(taken(&process), takes);
    vmm.end();
}

/// How many mappings, kilobytes of addresses and descriptors a process has.
fn taken(process: &str) -> [usize; 3] {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{process}/{file}")).unwrap();
    let status = read("status");
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let size = size.trim().trim_end_matches(" kB").parse().unwrap();
    let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().count();
    [read("maps").lines().count(), size, descriptors]
}

#[test]
fn what_one_attach_leaves_the_next_one_uses() {
    for way in [Way::Dynamic, Way::Static, Way::Musl] {
        let Some(program) = vmm("running", way) else { continue };
        let folder = with_policy(ANSWERED);
        let mut vmm = Asked::start(&program, &["1", "2"]);
        let audit = [&NONE[..], &["--audit", "--trace", "trace.jsonl"]].concat();
        let mut first = None;
        for round in 0..12 {
            let options = if round % 3 == 2 { &audit[..] } else { &NONE };
            let got = if round % 3 == 2 { "0x0" } else { "0x11" };
            for is_killed in [false, true] {
                let attach = Attach::start(&folder, options, &vmm.process()).unwrap();
                for id in ["0", "1"] {
                    assert_eq!(
                        vmm.ask(&format!("{id} r:0x174")),
                        format!("rdmsr 0x174 {got}"),
                        "{way:?} {round}"
                    );
                }
                if is_killed {
                    attach.signal(Signal::SIGKILL);
                    attach.rest();
                } else {
                    attach.detach().code(0);
                    let taken = taken(&vmm.process());
                    assert_eq!(*first.get_or_insert(taken), taken, "{way:?} {round}");
                }
            }
        }
        vmm.end();
    }
}

#[test]
fn where_msrgate_is_killed_one_filter_or_the_other_is_whole() {
    let accesses = ["r:0x174", "w:0x174=0", "r:0xdeadbeef"];
    let own = ["rdmsr 0x174 0x0", "wrmsr 0x174 done", "rdmsr 0xdeadbeef fault"];
    let denied = ["rdmsr 0x174 fault", "wrmsr 0x174 fault", "rdmsr 0xdeadbeef fault"];
    killed_at_any_moment(&[DENIED], 60, &accesses, [&own, &denied], &denied);
}

#[test]
fn where_msrgate_is_killed_answers_go_on_or_have_not_begun() {
    let policy = "default = \"allow\"\n[[rule]]\nmsr = \"0x174\"\nread = { value = \"0x5\" }\nwrite = \"ignore\"\n";
    let accesses = ["w:0x174=0", "r:0x174", "r:0xdeadbeef"];
    let own = ["wrmsr 0x174 done", "rdmsr 0x174 0x0", "rdmsr 0xdeadbeef fault"];
    let answered = ["wrmsr 0x174 done", "rdmsr 0x174 0x5", "rdmsr 0xdeadbeef fault"];
    killed_at_any_moment(&[policy], 60, &accesses, [&own, &answered], &answered);
}

/// How an `attach` ends where nothing is put in force.
#[track_caller]
fn refused(folder: &Folder, options: &[&str], process: &str, code: i32, says: &str) {
    match Attach::start(folder, options, process) {
        Ok(_) => panic!("it is put in force"),
        Err(ran) => {
            let ran = ran.code(code).says(&[says]);
            assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
        }
    }
}

#[test]
fn what_cannot_be_attached_to_is_refused_in_a_line_that_says_what_to_do() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(DENIED);
    let vmm = Asked::start(&program, &["1", "1"]);
    let process = vmm.process();
    refused(&folder, &NONE, "2147483647", 4, "there is no process 2147483647");
    let own = std::process::id().to_string();
    refused(&folder, &NONE, &own, 4, "has no VM");
    refused(&folder, &NONE, &own, 4, &format!("{process} (`"));
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let names = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
    let thread = names.into_iter().find(|name| *name != process).unwrap();
    refused(
        &folder,
        &NONE,
        &thread,
        4,
        &format!("it is a thread of process {process}"),
    );
    // Another tracer, on all threads as debuggers are.
    nix::sys::ptrace::seize(
        Pid::from_raw(process.parse().unwrap()),
        nix::sys::ptrace::Options::empty(),
    )
    .unwrap();
    refused(&folder, &NONE, &process, 3, &format!("process {own} traces it"));
    let thread = Pid::from_raw(process.parse().unwrap());
    nix::sys::ptrace::interrupt(thread).unwrap();
    nix::sys::wait::waitpid(thread, Some(nix::sys::wait::WaitPidFlag::__WALL)).unwrap();
    nix::sys::ptrace::detach(thread, None).unwrap();
    vmm.end();
    refused(&folder, &NONE, &process, 4, &format!("there is no process {process}"));
}

#[test]
fn a_vmm_whose_threads_may_not_read_the_tsc_gets_denials_alone() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERED);
    let mut vmm = Asked::start(&program, &["1", "2", "tsc"]);
    refused(&folder, &NONE, &vmm.process(), 3, "may not read the TSC (PR_SET_TSC)");
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
    let denied = with_policy(DENIED);
    let attach = Attach::start(&denied, &NONE, &vmm.process()).unwrap();
    assert_eq!(vmm.ask("1 r:0x174"), "rdmsr 0x174 fault");
    attach.detach().code(0);
    vmm.end();
    // Nor does a vCPU run whose first exit would end the VMM.
    let mut command = under(&folder, &["-p", "policy.toml"], &program, &["1", "1", "tsc"]);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let _open = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    for line in ["vCPU 0 does not run", "may not read the TSC (PR_SET_TSC)"] {
        assert!(said.contains(line), "{said}");
    }
}

#[test]
fn a_vmm_that_is_still_starting_is_attached_to_once_it_has_a_vcpu() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(DENIED);
    let mut vmm = Asked::start(&program, &["1", "0"]);
    refused(&folder, &NONE, &vmm.process(), 4, "it is still starting");
    vmm.ask("add");
    let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
    vmm.ask("start");
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 fault");
    attach.detach().code(0);
    vmm.end();
}

#[test]
fn a_vmm_in_namespaces_of_its_own_is_attached_to_from_outside() {
    let Some(program) = vmm("running", Way::Static) else {
        return;
    };
    let namespaces = [
        "--user",
        "--map-root-user",
        "--mount-proc",
        "--pid",
        "--net",
        "--ipc",
        "--fork",
        "--kill-child",
    ];
    let can = Command::new("unshare")
        .args(namespaces)
        .args(["sh", "-c", ": < /dev/kvm"])
        .output();
    if !can.is_ok_and(|done| done.status.success()) {
        return println!("skipped: unshare(1) gives no VMM namespaces here");
    }
    let folder = with_policy(ANSWERED);
    let mut command = Command::new("unshare");
    command.args(namespaces).arg(program).args(["1", "2"]);
    let mut vmm = Asked::of(command);
    let parent = vmm.process();
    let inside = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    let own = vmm.ask("1 r:0x174");
    let attach = Attach::start(&folder, &NONE, inside.trim()).unwrap();
    assert_eq!(vmm.ask("1 r:0x174"), "rdmsr 0x174 0x11");
    attach.detach().code(0);
    assert_eq!(vmm.ask("1 r:0x174"), own);
    vmm.end();
}

#[test]
fn what_another_msrgate_answers_is_not_attached_to_from_other_namespaces_either() {
    let Some(program) = vmm("running", Way::Static) else {
        return;
    };
    let can = Command::new("unshare").args(["--net", "true"]).output();
    if !can.is_ok_and(|done| done.status.success()) {
        return println!("skipped: unshare(1) gives no network namespace here");
    }
    let folder = with_policy(ANSWERED);
    let mut vmm = Asked::start(&program, &["1", "1"]);
    let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
    let mut second = Command::new("unshare");
    second.arg("--net").arg(crate::command::program());
    second
        .args(["attach", "-p", "policy.toml"])
        .args(NONE)
        .arg(vmm.process());
    let Err(ran) = Attach::of(second.current_dir(folder.path())) else {
        panic!("it is put in force");
    };
    ran.code(3).says(&[&format!("process {} traces it", attach.0.id())]);
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x11");
    attach.detach().code(0);
    vmm.end();
}

#[test]
fn a_vmm_under_run_is_not_attached_to() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(DENIED);
    let mut vmm = Asked::of(under(&folder, &["-p", "policy.toml"], &program, &["1", "1"]));
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 fault");
    let children = |process: &str| std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap();
    let monitor = children(&vmm.process());
    let of_monitor = children(monitor.trim());
    refused(&folder, &NONE, of_monitor.trim(), 3, "under `msrgate run`");
    assert_eq!(vmm.ask("0 r:0x175"), "rdmsr 0x175 0x0");
}

#[test]
fn a_vmm_that_hides_is_roots_to_attach_to() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    if !super::users::is_root() {
        return;
    }
    let folder = super::users::open_to_all(DENIED, &program);
    let mut vmm = Asked::start(&program, &["1", "1", "hidden"]);
    let mut command = Command::new(folder.path().join("msrgate"));
    command
        .args(["attach", "-p", "policy.toml"])
        .args(NONE)
        .arg(vmm.process())
        .current_dir(folder.path());
    let nobody = std::os::unix::process::CommandExt::uid(&mut command, 65_534);
    let Err(ran) = Attach::of(nobody) else {
        panic!("it is put in force")
    };
    ran.code(3).says(&["it is user 0's: run msrgate as root"]);
    let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 fault");
    attach.detach().code(0);
    vmm.end();
}

#[test]
fn the_end_of_the_vmm_is_the_end_of_attach() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    for policy in [DENIED, ANSWERED] {
        let folder = with_policy(policy);
        let mut vmm = Asked::start(&program, &["1", "1"]);
        let attach = Attach::start(&folder, &[&NONE[..], &["--json"]].concat(), &vmm.process()).unwrap();
        assert_eq!(vmm.ask("0 r:0x176").contains("fault"), policy == ANSWERED);
        vmm.end();
        let told = summary(&attach.rest().code(0));
        assert_eq!(
            (&told["detached"], &told["ended"]),
            (&false.into(), &true.into()),
            "{told:#}"
        );
    }
}

#[test]
fn a_vcpu_that_is_added_is_answered_too() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERED);
    let mut vmm = Asked::start(&program, &["1", "1"]);
    let mut attach = Attach::start(&folder, &[&NONE[..], &["--json"]].concat(), &vmm.process()).unwrap();
    assert_eq!(vmm.ask("add"), "1");
    // A summary each time, until it is counted.
    let mut lines = BufReader::new(attach.0.stderr.take().unwrap()).lines();
    loop {
        attach.signal(Signal::SIGUSR1);
        let line = lines.next().unwrap().unwrap();
        let told: Value = serde_json::from_str(&line).unwrap();
        if count(&told, "vcpus") == 2 {
            break;
        }
    }
    assert_eq!(vmm.ask("start"), "2");
    assert_eq!(vmm.ask("1 r:0x8b"), "rdmsr 0x8b 0x5");
    assert_eq!(vmm.ask("1 r:0x176"), "rdmsr 0x176 fault");
    attach.signal(Signal::SIGINT);
    drop(lines.last());
    assert!(attach.0.wait().unwrap().success());
    assert_eq!(vmm.ask("1 r:0x176"), "rdmsr 0x176 0x0");
    vmm.end();
}

#[test]
fn a_vcpu_that_is_added_is_answered_from_its_first_access_on_whatever_had_its_descriptor_before() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERED);
    // One that may wait and no more, too.
    for options in [&["1", "1"][..], &["1", "1", "waits"]] {
        let mut vmm = Asked::start(&program, options);
        let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
        let mut descriptors = Vec::new();
        for id in 1..5 {
            assert_eq!(vmm.ask("add"), id.to_string());
            vmm.ask("start");
            assert_eq!(vmm.ask(&format!("{id} r:0x8b")), "rdmsr 0x8b 0x5", "{id}");
            assert_eq!(vmm.ask(&format!("{id} r:0x176")), "rdmsr 0x176 fault", "{id}");
            // A sandboxed one is not let send a signal.
            if options.len() == 2 {
                descriptors.push(vmm.ask("drop"));
            }
        }
        descriptors.dedup();
        assert!(descriptors.len() <= 1, "{descriptors:?}");
        attach.detach().code(0);
        assert_eq!(vmm.ask("0 r:0x176"), "rdmsr 0x176 0x0");
        vmm.end();
    }
}

#[test]
fn a_vcpu_whose_thread_is_lost_in_it_is_answered_on_another_thread() {
    for way in [Way::Dynamic, Way::Static] {
        let Some(program) = vmm("running", way) else { continue };
        for policy in [ANSWERED, asks::ASKED] {
            let folder = with_policy(policy);
            let got = if policy == ANSWERED { "0x11" } else { "0x100" };
            let expect = |vmm: &mut Asked| {
                for round in 0..20 {
                    assert_eq!(vmm.ask("lose"), "lost");
                    assert_eq!(vmm.ask("1 r:0x174"), format!("rdmsr 0x174 {got}"), "{way:?} {round}");
                    assert_eq!(vmm.ask("0 r:0x174"), format!("rdmsr 0x174 {got}"), "{way:?} {round}");
                }
            };
            // Both vCPUs are in their guests all the time, so that the kernel does not say what their threads do.
            let mut vmm = Asked::start(&program, &["1", "2"]);
            let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
            expect(&mut vmm);
            attach.detach().code(0);
            assert_eq!(vmm.ask("1 r:0x174"), "rdmsr 0x174 0x0");
            vmm.end();
            let mut vmm = Asked::of(under(&folder, &["-p", "policy.toml"], &program, &["1", "2"]));
            expect(&mut vmm);
            vmm.to = None;
            assert!(vmm.child.wait().unwrap().success());
        }
    }
}

#[test]
fn vms_and_vcpus_are_the_same_by_other_descriptors() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    for (policy, got) in [(DENIED, "fault"), (ANSWERED, "0x11"), (asks::ASKED, "0x100")] {
        let folder = with_policy(policy);
        let mut vmm = Asked::start(&program, &["1", "1"]);
        let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
        assert_eq!(vmm.ask("0 r:0x174"), format!("rdmsr 0x174 {got}"));
        for _ in 0..3 {
            assert_eq!(vmm.ask("move"), "moved");
            assert_eq!(vmm.ask("0 r:0x174"), format!("rdmsr 0x174 {got}"));
            // Its number is that of the VM that was.
            vmm.ask("vm");
        }
        folder.run(&["reload", &vmm.process(), "-p", "policy.toml"]).code(0);
        assert_eq!(vmm.ask("0 r:0x174"), format!("rdmsr 0x174 {got}"));
        attach.detach().code(0).says(&["detached: no MSR is denied any more"]);
        assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
        vmm.end();
        // What lives on without a descriptor keeps the policy, which is said.
        let mut vmm = Asked::start(&program, &["1", "1"]);
        let attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
        vmm.ask("close");
        attach
            .detach()
            .code(3)
            .says(&["the VMM has closed its VM and runs its vCPUs on"]);
        vmm.end();
    }
}

#[test]
fn a_vm_that_is_made_later_is_said_not_to_be_under_the_policy() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    for (policy, got) in [(ANSWERED, "0x11"), (DENIED, "fault")] {
        let folder = with_policy(policy);
        let mut vmm = Asked::start(&program, &["1", "1"]);
        // Whatever became of the one before.
        for is_killed in [true, false] {
            let mut attach = Attach::start(&folder, &NONE, &vmm.process()).unwrap();
            if is_killed {
                attach.signal(Signal::SIGKILL);
                attach.rest();
                continue;
            }
            vmm.ask("vm");
            let mut lines = BufReader::new(attach.0.stderr.take().unwrap()).lines();
            let line = lines.next().unwrap().unwrap();
            assert!(line.contains("the VMM has made a VM"), "{line}");
            assert_eq!(vmm.ask("0 r:0x174"), format!("rdmsr 0x174 {got}"));
            attach.signal(Signal::SIGINT);
            let rest: Vec<String> = lines.map(Result::unwrap).collect();
            assert!(!rest.iter().any(|line| line.contains("has made a VM")), "{rest:?}");
            assert!(attach.0.wait().unwrap().success());
        }
        assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
        vmm.end();
    }
}

/// A guest in ROM that goes on telling what it reads of three MSRs, at the debug port: a letter each, from `0`, `a` and `0` on, `F` for
/// a fault.
fn rom() -> Vec<u8> {
    let mut code = vec![0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x70]; // ds = ss = 0, sp = 0x7000
    code.extend([0xc7, 0x06, 0x34, 0x00, 0, 0]); // the fault's handler, whose offset comes below
    code.extend([0xc7, 0x06, 0x36, 0x00, 0x00, 0xf0]);
    let again = code.len();
    for (msr, first) in [(0x174_u32, b'0'), (0x35, b'a'), (0x176, b'0')] {
        code.extend([0x66, 0xb9]); // mov ecx, msr
        code.extend(msr.to_le_bytes());
        code.extend([0xc6, 0x06, 0x00, 0x06, 0x00, 0x0f, 0x32]); // byte [0x600] = 0; rdmsr
        code.extend([0x04, first, 0x80, 0x3e, 0x00, 0x06, 0x00]); // add al, first; cmp byte [0x600], 0
        code.extend([0x74, 0x02, 0xb0, b'F', 0xe6, 0xe9]); // je; mov al, 'F'; out 0xe9, al
    }
    code.extend([
        0xb0, b'\n', 0xe6, 0xe9, 0x66, 0xb9, 0xe8, 0x03, 0x00, 0x00, 0x66, 0x49, 0x75, 0xfc,
    ]); // a line's end, and a while
    let back = again as i16 - (code.len() as i16 + 3);
    code.push(0xe9);
    code.extend(back.to_le_bytes());
    let handler = code.len() as u16;
    code[13..15].copy_from_slice(&handler.to_le_bytes());
    code.extend([0x55, 0x89, 0xe5, 0x83, 0x46, 0x02, 0x02, 0x5d]); // the next instruction
    code.extend([0xc6, 0x06, 0x00, 0x06, 0x01, 0xcf]); // byte [0x600] = 1; iret
    code.resize(0xfff0, 0);
    code.extend([0xea, 0x00, 0x00, 0x00, 0xf0]); // jmp f000:0000
    code.resize(0x1_0000, 0);
    code
}

#[test]
fn a_qemu_that_runs_gets_the_policy_beside_its_own_answers() {
    if vmm("running", Way::Dynamic).is_none() {
        return;
    }
    let Some(qemu) = find("qemu-system-x86_64") else {
        return println!("skipped: there is no qemu-system-x86_64");
    };
    for sandbox in ["off", "on"] {
        let denied =
            "default = \"allow\"\n[[rule]]\nmsr = \"0x174\"\nread = \"deny\"\n[[rule]]\nmsr = \"0x176\"\nread = ";
        let folder = with_policy(denied);
        folder.write("rom", rom());
        let mut command = Command::new(&qemu);
        command.args([
            "-accel",
            "kvm",
            "-M",
            "pc",
            "-smp",
            "2",
            "-m",
            "16",
            "-display",
            "none",
            "-nodefaults",
        ]);
        command.args(["-bios", "rom", "-debugcon", "file:out", "-sandbox", sandbox]);
        let child = command
            .current_dir(folder.path())
            .stderr(Stdio::null())
            .stdin(Stdio::null())
            .spawn();
        let mut qemu = child.unwrap();
        let lines = || {
            let text = std::fs::read(folder.path().join("out")).unwrap_or_default();
            let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::to_vec);
            lines.collect::<Vec<_>>()
        };
        // Behind what was being said.
        let later = |qemu: &mut Child| {
            let before = lines().len();
            wait_until(|| {
                assert!(qemu.try_wait().unwrap().is_none(), "QEMU has ended");
                lines().len() > before + 2
            });
            lines().swap_remove(before + 1)
        };
        // Two threads: `a` and 2. The revision of microcode is what this machine's KVM says.
        let own = later(&mut qemu);
        assert!(own.len() == 3 && own.starts_with(b"0c") && own != b"0c5", "{own:?}");
        for read in ["{ value = \"0x5\" }", "{ mask = { keep = \"0\", set = \"0x5\" } }"] {
            folder.write("policy.toml", format!("version = 1\nname = \"test\"\n{denied}{read}\n"));
            let attach = Attach::start(&folder, &[], &qemu.id().to_string()).unwrap();
            assert_eq!(later(&mut qemu), b"Fc5");
            let reloaded = folder.run(&["reload", &qemu.id().to_string(), "-p", "policy.toml"]);
            reloaded.code(0);
            assert_eq!(later(&mut qemu), b"Fc5");
            attach
                .detach()
                .code(0)
                .says(&["detached: the VMM's own filter is back"]);
            assert_eq!(later(&mut qemu), own);
        }
        qemu.kill().unwrap();
        qemu.wait().unwrap();
    }
}
