//! The hypervisor of `examples/bare`, under Debian's Linux: `cargo xtask bare`, and the stage of that name.
//!
//! The guest says what it sees on the first serial line, the hypervisor what it counted on the second, and both are compared with
//! the policy.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use crate::binary::{self, Count, Kind};
use crate::initramfs::Archive;
use crate::job::Series;
use crate::kernel::Kernel;
use crate::lane::{self, Emulator, KERNEL_ARGUMENTS, Lane, RunFolder};
use crate::test::{self, Ending};
use crate::{intel, nested, package, process};

#[derive(Args)]
pub(crate) struct Arguments {
    /// The hardware under the hypervisor
    #[arg(default_value = "svm")]
    hardware: Hardware,
    /// Processors
    #[arg(long, default_value_t = 1, value_name = "N")]
    smp: u32,
    /// What the guest runs
    #[arg(long, default_value = "/guest view")]
    command: String,
    /// Words for the kernel's command line; bare.copy, bare.untold and bare.no_kick are the hypervisor's
    #[arg(long, default_value = "", value_name = "WORDS")]
    words: String,
    /// Boot the same machine without the hypervisor; SVM alone
    #[arg(long)]
    without: bool,
    /// Print for programs
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Hardware {
    /// SVM, as QEMU emulates it
    Svm,
    /// VMX, as Bochs emulates it
    Vmx,
}

/// How much of a processor a boot and what the guest runs may take.
const SVM_LIMIT: Duration = Duration::from_secs(120);
const VMX_LIMIT: Duration = Duration::from_secs(400);

/// Boots, and prints both views.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    let run = || {
        let lab = Lab {
            without: arguments.without,
            ..Lab::prepare(arguments.hardware)?
        };
        lab.boot(arguments.smp, &arguments.words, &arguments.command)
    };
    match run() {
        Ok(views) => {
            match arguments.json {
                true => println!("{}", views.json()),
                false => print!("{views}"),
            }
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("xtask: {why}");
            ExitCode::FAILURE
        }
    }
}

/// What a boot takes.
struct Lab {
    hardware: Hardware,
    kernel: Kernel,
    hypervisor: PathBuf,
    guest: PathBuf,
    cache: PathBuf,
    /// No hypervisor, to compare with.
    without: bool,
}

impl Lab {
    /// Brings emulator and kernel, and builds.
    ///
    /// # Errors
    /// What cannot be had or does not compile.
    fn prepare(hardware: Hardware) -> Result<Lab, String> {
        let cache = crate::lanes();
        let lane = match hardware {
            Hardware::Svm => Lane::Nested,
            Hardware::Vmx => Lane::Intel,
        };
        let kernel = lane::prepare(lane, Series::Linux6_1, &cache)?;
        let built = binary::built(&[
            "build",
            "--release",
            "--manifest-path=examples/bare/Cargo.toml",
            "--target-dir=target/bare",
        ])?;
        let program = |name: &str| {
            let found = built.iter().find(|program| program.name.ends_with(name));
            found
                .map(|program| program.executable.clone())
                .ok_or(format!("cargo built no {name}"))
        };
        Ok(Lab {
            hardware,
            kernel,
            hypervisor: program("::bare")?,
            guest: program("::guest")?,
            cache,
            without: false,
        })
    }

    /// Boots Linux on the hypervisor, runs a command in it and powers off. What is seen may be less than that.
    ///
    /// # Errors
    /// That there is no machine, or that it stands still whenever it is tried.
    fn boot(&self, cpus: u32, words: &str, command: &str) -> Result<Views, String> {
        let folder = RunFolder::create(&self.cache)?;
        let folder = folder.path();
        let failed = |error: std::io::Error| format!("cannot use {}: {error}", folder.display());
        fs::write(folder.join("initrd"), self.initrd(command)?).map_err(failed)?;
        let words = format!("{KERNEL_ARGUMENTS} {words}");
        match self.hardware {
            Hardware::Svm => {
                let words = format!("{words} {}", nested::PERIODIC_TICKS);
                lane::persist(Lane::Nested, || run(&mut self.qemu(cpus, &words), folder, SVM_LIMIT))
            }
            Hardware::Vmx => {
                let modules = [self.kernel.folder.join("vmlinuz"), folder.join("initrd")];
                let mut emulator = intel::bare(cpus, &self.hypervisor, &words, &modules, folder)?;
                run(&mut emulator, folder, VMX_LIMIT)
            }
        }
    }

    fn qemu(&self, cpus: u32, words: &str) -> Command {
        let mut command = nested::machine(cpus, 512, &["console", "output"]);
        command.args(["-initrd", "initrd", "-append", words]);
        let vmlinux = self.kernel.folder.join("vmlinux");
        if self.without {
            command.arg("-kernel").arg(&vmlinux);
        } else {
            command.arg("-kernel").arg(&self.hypervisor);
            // It lands where its own headers say, and the hypervisor enters it there.
            command.args(["-device", &format!("loader,file={}", vmlinux.display())]);
        }
        command
    }

    /// Busybox, the module that shows MSRs, the guest's program, and an init that runs `command`.
    fn initrd(&self, command: &str) -> Result<Vec<u8>, String> {
        let mut archive = Archive::default();
        for directory in ["/proc", "/sys", "/dev"] {
            archive.directory(Path::new(directory));
        }
        archive.copy(Path::new("/bin/busybox"), Path::new("/bin/busybox"))?;
        archive.copy(&self.kernel.folder.join("modules/msr.ko"), Path::new("/msr.ko"))?;
        archive.copy(&self.guest, Path::new("/guest"))?;
        archive.libraries(&self.guest)?;
        let init = format!(
            "#!/bin/busybox sh\nB=/bin/busybox\n$B mount -t proc none /proc\n$B mount -t devtmpfs none /dev\n\
             $B insmod /msr.ko\n{{ {command}; echo status $?; }} 2>&1 | $B sed 's/^/guest /'\n\
             # What the console has not sent yet is lost.\n$B usleep 300000\n$B poweroff -f\n"
        );
        archive.file(Path::new("/init"), 0o755, init.as_bytes());
        Ok(archive.finish())
    }
}

/// Waits until the emulator ends, or the hypervisor says that it does not go on.
///
/// # Errors
/// That neither comes: the end of the console is with it.
fn run(emulator: &mut Command, folder: &Path, limit: Duration) -> Result<Views, String> {
    for port in ["console", "output"] {
        let _ = fs::remove_file(folder.join(port));
    }
    let failed = |error: std::io::Error| format!("cannot run {}: {error}", folder.display());
    let log = fs::File::create(folder.join("log")).map_err(failed)?;
    let began = Instant::now();
    emulator
        .current_dir(folder)
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log);
    let mut emulator = Emulator::start(emulator)?;
    let mut processor_time = Duration::ZERO;
    let read = |name: &str| String::from_utf8_lossy(&fs::read(folder.join(name)).unwrap_or_default()).into_owned();
    loop {
        processor_time = emulator.processor_time().unwrap_or(processor_time);
        let ended = emulator.ended()?;
        let output = read("output");
        if ended || output.ends_with("halted\n") {
            let console = read("console");
            let lines = console
                .lines()
                .filter_map(|line| line.trim_end().strip_prefix("guest "));
            return Ok(Views {
                guest: lines.map(|line| format!("{line}\n")).collect(),
                hypervisor: read("output"),
                took: began.elapsed(),
                processor_time,
            });
        }
        // A busy machine leaves the emulator little time.
        if processor_time > limit || began.elapsed() > 10 * limit {
            return Err(format!(
                "the emulated machine did not come to its end within {} s of a processor\n{output}{}",
                limit.as_secs(),
                lane::last_words(folder)
            ));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// What the guest saw and what the hypervisor counted, a line each.
struct Views {
    guest: String,
    hypervisor: String,
    took: Duration,
    /// The emulator's, which others on the machine do not add to.
    processor_time: Duration,
}

impl std::fmt::Display for Views {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:<48}| the hypervisor", "the guest")?;
        for line in self.guest.lines() {
            // An access, and how often it left the guest.
            let beside = match line.split(' ').collect::<Vec<_>>()[..] {
                [op @ ("read" | "write"), msr, _] => {
                    format!(
                        "{} {op}s of {msr} by processor 0",
                        self.count(&format!("cpu 0 msr {msr}"), &format!("{op}s"))
                    )
                }
                _ => String::new(),
            };
            writeln!(f, "{line:<48}| {beside}")?;
        }
        for line in self.hypervisor.lines().filter(|line| !line.contains(" msr ")) {
            writeln!(f, "{:<48}| {line}", "")?;
        }
        writeln!(
            f,
            "{:.1} s, {:.1} of a processor",
            self.took.as_secs_f64(),
            self.processor_time.as_secs_f64()
        )
    }
}

impl Views {
    /// What `cargo xtask bench` takes.
    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "processor_seconds": self.processor_time.as_secs_f64(),
            "hypervisor": self.hypervisor.lines().collect::<Vec<_>>(),
        })
    }

    /// The numbers of a line of the hypervisor's by their names: that which begins with these words.
    fn count(&self, line: &str, name: &str) -> u64 {
        let line = self
            .hypervisor
            .lines()
            .find_map(|text| text.strip_prefix(line)?.strip_prefix(' '));
        let words: Vec<&str> = line.unwrap_or_default().split(' ').collect();
        words
            .chunks(2)
            .find(|pair| pair[0] == name)
            .and_then(|pair| pair.get(1)?.parse().ok())
            .unwrap_or(0)
    }

    /// The number of wrong reads, and of all, where the guest counted them.
    fn wrong(&self) -> Option<(u64, u64)> {
        let line = self.guest.lines().find(|line| line.starts_with("live "))?;
        let number = |name: &str| line.split(' ').skip_while(|word| *word != name).nth(1)?.parse().ok();
        Some((number("wrong")?, number("reads")?))
    }
}

/// What a guest of the first policy sees, whatever the hardware.
fn view(views: &Views, cpus: u32) -> Vec<String> {
    // The hypervisor's last word, when the guest has turned the machine off.
    if views.hypervisor.lines().last() != Some("end") {
        return vec!["the guest did not come to its end".into()];
    }
    let seen = [
        &*format!("processors {cpus}"),
        "microcode 0xa0b0c0d",
        "flag svm 0",
        "flag vmx 0",
        "read 0x8b 0xa0b0c0d0a0b0c0d",
        "read 0x17 fault",
        "read 0xc0010062 fault",
        "read 0x4b564d00 0x0",
        "read 0x4d530000 0x1",
        "write 0x8b done",
        "write 0x17 fault",
        "write 0xc0010062 fault",
        "write 0x4b564d00 done",
        "status 0",
    ];
    let missing = seen
        .into_iter()
        .filter(|line| !views.guest.lines().any(|seen| seen == *line));
    let mut wrong: Vec<String> = missing.map(|line| format!("the guest does not see: {line}")).collect();
    let counted = [
        ("cpu 0 msr 0x8b", "reads", 1),
        ("cpu 0 msr 0x8b", "writes", 1),
        ("cpu 0 msr 0xc0010062", "reads", 1),
        ("cpu 0 msr 0x4d530000", "reads", 1),
        ("cpu 0", "faults", 4),
        ("cpu 0", "cpuid", 1),
    ];
    let few = counted
        .into_iter()
        .filter(|(line, name, least)| views.count(line, name) < *least);
    wrong.extend(few.map(|(line, name, least)| format!("the hypervisor counts fewer than {least} {name} of {line}")));
    // A candidate that the policy allows comes to no exit.
    if views.count("cpu 0 msr 0xc0000103", "reads") > 0 {
        wrong.push("TSC_AUX leaves the guest".into());
    }
    wrong.extend(allocations(views));
    wrong
}

fn allocations(views: &Views) -> Option<String> {
    let none = views.hypervisor.lines().any(|line| line.starts_with("allocations 0 "));
    (!none).then(|| "the hypervisor allocates while the guest runs".into())
}

/// Fails where a read was wrong, or there were too few.
fn no_wrong_read(views: &Views, least: u64) -> Vec<String> {
    let mut wrong: Vec<String> = match views.wrong() {
        Some((0, reads)) if reads >= least => Vec::new(),
        other => vec![format!("of {least} reads and more none is wrong: {other:?}")],
    };
    if views.count("cpu 1", "kicks") == 0 {
        wrong.push("nobody kicked processor 1".into());
    }
    wrong.extend(allocations(views));
    wrong
}

/// Fails where the test above would not notice what this boot does wrong.
fn some_wrong_read(views: &Views) -> Vec<String> {
    match views.wrong() {
        Some((1.., _)) => Vec::new(),
        other => vec![format!("a mistake goes unnoticed: {other:?}")],
    }
}

/// A boot, and what is wrong with what it shows.
struct Trial {
    name: &'static str,
    cpus: u32,
    words: &'static str,
    command: &'static str,
    judge: fn(&Views) -> Vec<String>,
}

/// The stage.
pub(crate) fn check() -> Result<Ending, String> {
    let lab = match Lab::prepare(Hardware::Svm) {
        Ok(lab) => lab,
        Err(why) => return Ok(Ending::Skipped(why)),
    };
    let mut count = lints()?;
    count += tried(&lab, TRIALS);
    count += cases(&lab, None)?;
    Ok(Ending::Ran {
        count,
        note: format!("Linux {} on the hypervisor, SVM in an emulator", lab.kernel.version),
    })
}

const TRIALS: &[Trial] = &[
    Trial {
        name: "linux_sees_the_policy",
        cpus: 1,
        words: "",
        command: "/guest view",
        judge: |views| view(views, 1),
    },
    Trial {
        name: "the_guest_does_not_reach_the_hypervisor",
        cpus: 1,
        words: "",
        command: "$B devmem 0x200000",
        judge: |views| {
            // A nested page fault (0x400) at that address, which ends the guest.
            let stopped = "Unexpected { reason: 400, details: [100000004, 200000]";
            let end = views.hypervisor.lines().any(|line| line.starts_with(stopped));
            let mut wrong: Vec<String> = Vec::from_iter((!end).then(|| "the guest reads on".to_owned()));
            wrong.extend(allocations(views));
            wrong
        },
    },
    Trial {
        name: "a_replaced_filter_holds_on_the_other_processor_too",
        cpus: 2,
        words: "",
        command: "/guest view; /guest live 500 200",
        judge: |views| [view(views, 2), no_wrong_read(views, 100_000)].concat(),
    },
    Trial {
        name: "on_four_processors_too",
        cpus: 4,
        words: "",
        command: "/guest view; /guest live 50 100",
        judge: |views| [view(views, 4), no_wrong_read(views, 5_000)].concat(),
    },
    Trial {
        name: "a_copy_of_the_bitmap_follows_what_execute_took_over",
        cpus: 2,
        words: "bare.copy",
        command: "/guest mixed 50 50",
        judge: |views| no_wrong_read(views, 2_500),
    },
    Trial {
        name: "a_copy_that_does_not_is_noticed",
        cpus: 2,
        words: "bare.untold",
        command: "/guest mixed 50 50",
        judge: some_wrong_read,
    },
    Trial {
        name: "a_processor_that_nobody_kicks_is_noticed",
        cpus: 2,
        words: "bare.no_kick",
        command: "/guest live 20 50",
        judge: some_wrong_read,
    },
];

/// Runs trials one after the other.
fn tried(lab: &Lab, trials: &[Trial]) -> Count {
    let mut count = Count::default();
    for trial in trials {
        count += match lab.boot(trial.cpus, trial.words, trial.command) {
            Ok(views) => judged(trial.name, &(trial.judge)(&views), &views.to_string()),
            Err(why) => judged(trial.name, &[why], ""),
        };
    }
    count
}

/// Prints what was seen and what is wrong with it, and counts it.
fn judged(name: &str, wrong: &[String], shown: &str) -> Count {
    let ending = if wrong.is_empty() { "ok" } else { "FAILED" };
    let text = format!("{name} {ending}\n{shown}{}\n", wrong.join("\n"));
    let _ = process::print(&text);
    match wrong {
        [] => Count {
            passed: 1,
            ..Count::default()
        },
        _ => Count {
            failed: 1,
            failures: text,
            ..Count::default()
        },
    }
}

/// The tests of the suite that speak with the hypervisor; `record` is where all that is said goes.
fn cases(lab: &Lab, record: Option<&Path>) -> Result<Count, String> {
    let mut emulator = nested::machine(1, 128, &[]);
    emulator
        .arg("-kernel")
        .arg(&lab.hypervisor)
        .args(["-append", "bare.cases"]);
    // What it panics with is for people.
    emulator.args(["-serial", "null", "-serial", "stdio"]);
    let words = std::iter::once(emulator.get_program()).chain(emulator.get_args());
    let command = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join("\n");
    let record = record.map(Path::to_string_lossy);
    let mut settings = vec![("MSRGATE_BARE", &*command), ("MSRGATE_LANE_REQUIRE", "1")];
    settings.extend(record.as_deref().map(|record| ("MSRGATE_BARE_RECORD", record)));
    let mut count = Count::default();
    for binary in binary::tests()?.iter().filter(|binary| binary.kind == Kind::BareTest) {
        count += test::on_this_machine(binary, &[], &settings)?;
    }
    Ok(count)
}

/// What the intel lane adds: the same hypervisor on VMX, under Linux, and under the cases, which are to get the answers that they
/// get on SVM.
///
/// # Errors
/// What cannot be had or does not compile.
pub(crate) fn on_vmx() -> Result<Count, String> {
    const TRIAL: Trial = Trial {
        name: "linux_sees_the_policy_on_vmx_and_a_replaced_filter_holds_on_both_processors",
        cpus: 2,
        words: "",
        command: "/guest view; /guest live 20 50",
        judge: |views| [view(views, 2), no_wrong_read(views, 1_000)].concat(),
    };
    let lab = Lab::prepare(Hardware::Vmx)?;
    package::require(nested::NEEDS)?;
    let mut count = tried(&lab, &[TRIAL]);
    let folder = RunFolder::create(&lab.cache)?;
    let folder = folder.path();
    let record = folder.join("record");
    count += cases(&lab, Some(&record))?;
    let mut emulator = intel::bare(1, &lab.hypervisor, "bare.cases", &[record], folder)?;
    let views = run(&mut emulator, folder, VMX_LIMIT)?;
    let wrong = match views
        .hypervisor
        .trim()
        .strip_prefix("cases ")
        .and_then(|count| count.parse().ok())
    {
        Some(1000_u32..) => Vec::new(),
        _ => vec!["another answer than on SVM, or too few".to_owned()],
    };
    count += judged("the_cases_get_the_same_answers_on_vmx", &wrong, &views.to_string());
    Ok(count)
}

/// Formatting and lints, which those of the workspace do not reach.
fn lints() -> Result<Count, String> {
    const MANIFEST: &str = "--manifest-path=examples/bare/Cargo.toml";
    let lints: [&[&str]; 2] = [
        &["fmt", MANIFEST, "--check"],
        &[
            "clippy",
            MANIFEST,
            "--release",
            "--target-dir=target/bare",
            "--",
            "-D",
            "warnings",
        ],
    ];
    let mut count = Count::default();
    for lint in lints {
        let mut command = test::cargo(lint);
        match test::watched(&mut command)?.0 {
            true => count.passed += 1,
            false => {
                count.failed += 1;
                count.failures.push_str(&format!("{}\n", process::shown(&command)));
            }
        }
    }
    Ok(count)
}
