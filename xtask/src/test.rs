//! `cargo xtask test`: the stages, in order, and their sum.

use std::env;
use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use crate::binary::{self, Binary, Count, Kind, POLICY_UNOPTIMISED, SCOPE};
use crate::job::{Job, Root, Series, quoted};
use crate::lane::{self, Failure, Lane};
use crate::{bare, bochs, capi, checker, dist, fuzz, headers, house, no_std, package, process, published};

/// What the help ends with.
pub(crate) const HELP: &str = "\
MSRGATE_REQUIRE=host,nested,intel,browser,bare names lanes, and the stages browser and bare, that fail where they
would be skipped.

Integration tests whose names start with `live` run in the lanes only, and those whose names start with
`nested`, which boot Linux in a VM, in the nested lane only; one at a time. Those whose names start with `browser`
run in the stage browser, which installs Debian's chromium as root by itself, those that start with `bare` in the
stage bare. Those in lanes see
MSRGATE_LANE (host, nested or intel), MSRGATE_LANE_KERNEL, MSRGATE_LANE_REQUIRE=1 (a KVM that does
not open is a failure), MSRGATE_BIN (the released msrgate) and what `cargo xtask nested --help`
names. A test that prints a line `skipped: REASON` counts as skipped.";

#[derive(Args)]
pub(crate) struct Arguments {
    /// Run this stage and no other; may be given more than once
    #[arg(long, value_name = "STAGE")]
    only: Vec<Stage>,
    /// Leave out the lanes in emulators
    #[arg(long)]
    fast: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// Formatting
    Fmt,
    /// Crates and modules: no circle, no arrow up
    House,
    /// Lints
    Clippy,
    /// Tests that need no KVM
    Unit,
    /// Examples in documentation
    Doctest,
    /// Documentation
    Doc,
    /// core, engine and plan without std
    NoStd,
    /// Licences and sources of dependencies
    Deny,
    /// The database of MSRs against the headers of Debian's kernel
    Headers,
    /// The library for VMMs in C
    Capi,
    /// The Debian package and the tarball, installed and used
    Dist,
    /// The tests of the published crates, from their packages
    Packages,
    /// Every order in which a filter is replaced, under loom
    Loom,
    /// A few seconds of libFuzzer for each target
    Fuzz,
    /// Tests of the crates with unsafe code under a memory checker
    Memory,
    /// Pages in a browser
    Browser,
    /// Live tests on this machine's KVM
    Host,
    /// Live tests on kvm_amd in an emulator
    Nested,
    /// Linux guests of an unmodified QEMU under `msrgate run`, in the nested lane
    Qemu,
    /// Live tests on kvm_intel in an emulator
    Intel,
    /// Linux on the hypervisor of examples/bare, in an emulator
    Bare,
}

impl Stage {
    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_string())
    }

    /// Whether others run beside it, since it does not keep all CPUs busy.
    fn beside(self) -> bool {
        matches!(
            self,
            Self::Capi
                | Self::Dist
                | Self::Packages
                | Self::Loom
                | Self::Fuzz
                | Self::Memory
                | Self::Browser
                | Self::Bare
                | Self::Host
        ) || self.lane().is_some()
    }

    /// Whether it has live tests run the released command.
    fn runs_the_command(self, fast: bool) -> bool {
        self == Self::Host || self.lane().is_some() && !fast
    }

    /// The lane that it runs in an emulator.
    fn lane(self) -> Option<Lane> {
        match self {
            Self::Nested | Self::Qemu => Some(Lane::Nested),
            Self::Intel => Some(Lane::Intel),
            _ => None,
        }
    }

    /// The kernels on which it runs in its lane.
    fn kernels(self) -> &'static [Series] {
        match self {
            Self::Nested | Self::Intel => &[Series::Linux6_1, Series::Linux6_12],
            // What KVM does is not the question there.
            Self::Qemu => &[Series::Linux6_1],
            _ => &[],
        }
    }
}

/// How a stage ended.
pub(crate) enum Ending {
    /// Its checks or tests ran; a check counts as one.
    Ran { count: Count, note: String },
    /// It could not run, and why.
    Skipped(String),
}

struct Report {
    stage: Stage,
    /// The stage, and the kernel where it runs on several.
    name: String,
    ending: Ending,
    time: Duration,
}

/// Runs the stages and prints their sum. Fails where anything failed.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    let required = match required(&env::var("MSRGATE_REQUIRE").unwrap_or_default()) {
        Ok(required) => required,
        Err(why) => {
            eprintln!("xtask: {why}");
            return ExitCode::from(2);
        }
    };
    let chosen = |stage: &&Stage| arguments.only.is_empty() || arguments.only.contains(stage);
    let (beside, alone): (Vec<Stage>, Vec<Stage>) = Stage::value_variants()
        .iter()
        .filter(chosen)
        .partition(|stage| stage.beside());
    // What takes long to build is built beside the stages before; who needs it tells what failed.
    if beside.contains(&Stage::Intel) && !arguments.fast {
        thread::spawn(bochs::program);
    }
    if beside.iter().any(|stage| stage.runs_the_command(arguments.fast)) {
        thread::spawn(binary::released);
    }
    let mut reports = Vec::new();
    for stage in alone {
        println!("== {}", stage.name());
        let began = Instant::now();
        let ending = run(stage, &Ok(None));
        reports.push(Report::new(stage, stage.name(), ending, began, &required));
    }
    reports.extend(side_by_side(&beside, arguments.fast, &required));
    sum_up(&reports)
}

/// Prints how a chore of its own ended. Fails where anything failed, and where it could not run.
pub(crate) fn tell(result: Result<Ending, String>) -> ExitCode {
    match result {
        Ok(Ending::Ran { count, note }) => {
            println!("{count}; {note}");
            if count.failed == 0 {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Ok(Ending::Skipped(why)) | Err(why) => {
            eprintln!("xtask: {why}");
            ExitCode::FAILURE
        }
    }
}

impl Report {
    /// A stage that is over; its last line is printed. One that is required fails where it was skipped.
    fn new(stage: Stage, name: String, mut ending: Ending, began: Instant, required: &[Stage]) -> Self {
        if let Ending::Skipped(why) = &ending
            && required.contains(&stage)
        {
            ending = one(false, format!("required, and cannot run: {why}"));
        }
        let report = Self {
            stage,
            name,
            ending,
            time: began.elapsed(),
        };
        println!("-- {}\n", report.line());
        report
    }

    fn line(&self) -> String {
        let time = self.time.as_secs_f64();
        let (result, rest) = match &self.ending {
            Ending::Ran { count, note } => {
                let result = if count.failed == 0 { "passed" } else { "FAILED" };
                (result, format!("{count}; {note}"))
            }
            Ending::Skipped(why) => ("skipped", why.clone()),
        };
        format!("{:<12} {result:<8} {time:>7.1} s  {rest}", self.name)
    }

    fn count(&self) -> Count {
        match &self.ending {
            Ending::Ran { count, .. } => count.clone(),
            Ending::Skipped(_) => Count {
                skipped: 1,
                ..Count::default()
            },
        }
    }
}

fn sum_up(reports: &[Report]) -> ExitCode {
    let mut sum = Count::default();
    println!("== stages");
    for report in reports {
        println!("{}", report.line());
        sum += report.count();
    }
    println!("\n== lanes");
    for report in reports {
        if matches!(report.stage, Stage::Unit | Stage::Host) || report.stage.lane().is_some() {
            match &report.ending {
                Ending::Ran { count, note } => println!("lane {}: {note}: {count}", report.name),
                Ending::Skipped(why) => println!("lane {}: skipped: {why}", report.name),
            }
        }
    }
    println!("\n{sum}");
    if sum.failed == 0 {
        return ExitCode::SUCCESS;
    }
    // The end says what failed and how, since of a long output the end is what is kept.
    println!("\n== failures\n{}", sum.failures);
    let failed = reports.iter().filter(|report| report.count().failed > 0);
    let names: Vec<_> = failed.map(|report| report.name.as_str()).collect();
    println!("failed: {}", names.join(", "));
    ExitCode::FAILURE
}

/// The stages of the lanes that must not be skipped, from a list with commas.
fn required(list: &str) -> Result<Vec<Stage>, String> {
    let names = list.split(',').map(str::trim).filter(|name| !name.is_empty());
    let stages = names.map(|name| match name {
        "host" => Ok(&[Stage::Host][..]),
        "nested" => Ok(&[Stage::Nested, Stage::Qemu][..]),
        "intel" => Ok(&[Stage::Intel][..]),
        "browser" => Ok(&[Stage::Browser][..]),
        "bare" => Ok(&[Stage::Bare][..]),
        _ => Err(format!(
            "MSRGATE_REQUIRE names no lane `{name}`; there are host, nested, intel, browser, bare"
        )),
    });
    Ok(stages.collect::<Result<Vec<_>, _>>()?.concat())
}

fn run(stage: Stage, work: &Result<Option<Work>, String>) -> Ending {
    let result = match stage {
        Stage::Fmt => check("fmt", &["--all", "--check"]),
        Stage::House => house::check(),
        Stage::Clippy => check(
            "clippy",
            &[
                &SCOPE[..],
                &["--all-targets"],
                // A build script compiles a plan, that of `examples/embedded`; nothing else of these crates runs.
                &POLICY_UNOPTIMISED,
                &["--config", "profile.dev.package.msrgate-plan.opt-level=0"],
                &["--", "-D", "warnings"],
            ]
            .concat(),
        ),
        Stage::Unit => unit(),
        Stage::Doctest => doctest(),
        Stage::Doc => check(
            "doc",
            &[&SCOPE[..], &["--no-deps", "--document-private-items"]].concat(),
        ),
        Stage::NoStd => no_std::build().map(|(built, note)| one(built, note)),
        Stage::Deny => deny(),
        Stage::Headers => headers::compare(),
        Stage::Capi => capi::check(),
        Stage::Dist => dist::check(),
        Stage::Packages => published::check(),
        Stage::Loom => checker::orders(),
        Stage::Fuzz => fuzz::short(),
        Stage::Memory => checker::memory(),
        Stage::Browser => browser(),
        Stage::Bare => bare::check(),
        Stage::Host => host(work),
        Stage::Nested | Stage::Qemu | Stage::Intel => Err("a lane in an emulator runs beside the others".into()),
    };
    result.unwrap_or_else(broken)
}

/// A stage that could not be carried out.
fn broken(why: String) -> Ending {
    let _ = process::print(&format!("{why}\n"));
    one(false, why.lines().next().unwrap_or_default().to_string())
}

/// A stage, and the kernel on which it runs where it has several.
type Step = (Stage, Option<Series>);

/// What runs side by side, the longest first. The steps of one follow each other.
fn chains(stages: &[Stage]) -> Vec<Vec<Step>> {
    // They build in one folder, for which one would wait for the other, or run on this machine's KVM, whose parameters tests of
    // `host` change.
    const IN_A_ROW: [Stage; 5] = [Stage::Packages, Stage::Capi, Stage::Dist, Stage::Host, Stage::Memory];
    const LONGEST_FIRST: [Stage; 7] = [
        Stage::Intel,
        Stage::Nested,
        Stage::Qemu,
        Stage::Bare,
        Stage::Fuzz,
        Stage::Loom,
        Stage::Browser,
    ];
    let chosen = |stage: &&Stage| stages.contains(stage);
    let row: Vec<Step> = IN_A_ROW.iter().filter(chosen).map(|stage| (*stage, None)).collect();
    let mut chains = Vec::from_iter((!row.is_empty()).then_some(row));
    for stage in LONGEST_FIRST.iter().filter(chosen) {
        match stage.kernels() {
            [] => chains.push(vec![(*stage, None)]),
            kernels => chains.extend(kernels.iter().map(|series| vec![(*stage, Some(*series))])),
        }
    }
    chains
}

/// Runs stages that keep one CPU busy each, as many at a time as there are CPUs.
fn side_by_side(stages: &[Stage], left_out: bool, required: &[Stage]) -> Vec<Report> {
    let chains = chains(stages);
    let omitted = |stage: Stage| left_out && (stage.lane().is_some() || stage == Stage::Bare);
    // What they run is built first, and once.
    let work = if stages.iter().any(|stage| stage.runs_the_command(left_out)) {
        Work::find()
    } else {
        Ok(None)
    };
    let workers = thread::available_parallelism().map_or(1, |cpus| cpus.get().min(chains.len()));
    let next = AtomicUsize::new(0);
    let printing = Mutex::new(Vec::new());
    let worker = || {
        while let Some(chain) = chains.get(next.fetch_add(1, Ordering::Relaxed)) {
            for &(stage, series) in chain {
                let name = series.map_or(stage.name(), |series| format!("{} {}", stage.name(), series.name()));
                println!("starting {name}");
                let began = Instant::now();
                let step = || match (stage.lane(), series) {
                    _ if omitted(stage) => Ending::Skipped("left out by --fast".into()),
                    (Some(lane), Some(series)) => match &work {
                        Ok(Some(work)) => emulated(lane, series, work, work.tests(stage)).unwrap_or_else(broken),
                        Ok(None) => no_live_tests(),
                        Err(why) => broken(why.clone()),
                    },
                    _ => run(stage, &work),
                };
                // What several write at once is printed when each is over.
                let (ending, text) = if workers > 1 {
                    process::kept(step)
                } else {
                    (step(), String::new())
                };
                let mut reports = printing.lock().unwrap_or_else(PoisonError::into_inner);
                println!("== {name}\n{text}");
                reports.push(Report::new(stage, name, ending, began, required));
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(worker);
        }
    });
    let mut reports = printing.into_inner().unwrap_or_else(PoisonError::into_inner);
    reports.sort_by(|a, b| (a.stage as usize, &a.name).cmp(&(b.stage as usize, &b.name)));
    reports
}

/// A stage that is one check.
pub(crate) fn one(passed: bool, note: String) -> Ending {
    let passed = u64::from(passed);
    Ending::Ran {
        count: Count {
            passed,
            failed: 1 - passed,
            ..Count::default()
        },
        note,
    }
}

pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = process::bound("cargo");
    command.args(arguments).current_dir(crate::root());
    command
}

pub(crate) fn watched(command: &mut Command) -> Result<(bool, String), String> {
    let (status, text) =
        process::watch(command).map_err(|error| format!("cannot run {}: {error}", process::shown(command)))?;
    Ok((status.success(), text))
}

fn check(name: &str, arguments: &[&str]) -> Result<Ending, String> {
    let mut command = cargo(&[&[name], arguments].concat());
    command.env("RUSTDOCFLAGS", "-D warnings");
    let (passed, _) = watched(&mut command)?;
    Ok(one(passed, process::shown(&command)))
}

fn deny() -> Result<Ending, String> {
    if !has("deny") {
        return Ok(Ending::Skipped("cargo-deny is not installed".into()));
    }
    check("deny", &["--all-features", "check", "bans", "licenses", "sources"])
}

/// Whether cargo has this subcommand.
fn has(subcommand: &str) -> bool {
    cargo(&[subcommand, "--version"])
        .output()
        .is_ok_and(|done| done.status.success())
}

fn unit() -> Result<Ending, String> {
    const NO_LANE: &str = "not (kind(test) & binary(/^(live|nested|browser|bare)/))";
    // One test has shellcheck look at a script, and passes it over where it is not there.
    if let Err(why) = package::require(&[("shellcheck", "shellcheck")]) {
        let _ = process::print(&format!("no shellcheck: {why}\n"));
    }
    if !has("nextest") {
        return unit_by_cargo();
    }
    let filter = ["-E", NO_LANE];
    let mut command = cargo(
        &[
            &["nextest", "run", "--no-fail-fast", "--no-tests=pass"],
            &SCOPE[..],
            &filter,
        ]
        .concat(),
    );
    let (passed, text) = watched(&mut command)?;
    let mut count = binary::summed(&text);
    if !passed && count.failed == 0 {
        return Ok(one(false, "cargo nextest: the tests do not build".into()));
    }
    let list = [
        "nextest",
        "list",
        "--run-ignored",
        "only",
        "--message-format",
        "oneline",
    ];
    let ignored = process::output(&mut cargo(&[&list, &SCOPE[..], &filter].concat()))?;
    count.skipped = ignored.lines().count() as u64;
    Ok(Ending::Ran {
        count,
        note: "cargo nextest".into(),
    })
}

fn unit_by_cargo() -> Result<Ending, String> {
    let mut count = Count::default();
    for binary in binary::tests()?.iter().filter(|binary| binary.kind == Kind::Test) {
        count += on_this_machine(binary, &[], &[])?;
    }
    Ok(Ending::Ran {
        count,
        note: "without cargo nextest, which is not installed".into(),
    })
}

/// Has the tests of the generated documents write what they would compare.
pub(crate) fn docs() -> Result<Ending, String> {
    const TESTS: [&str; 2] = [
        "manual::tests::the_documented_options_are_those_of_the_command_line",
        "json::tests::the_documented_keys_are_those_that_commands_print",
    ];
    let program = ["--bin", "msrgate", "--", "--exact"];
    let mut command = cargo(&[&["test"], &SCOPE[..], &program, &TESTS].concat());
    let (passed, text) = watched(command.env("MSRGATE_WRITE_DOCS", "1"))?;
    Ok(Ending::Ran {
        count: checked(&text, passed),
        note: "docs/cli.md and docs/json.md".into(),
    })
}

/// Has the tests of the pictures make what they would compare.
pub(crate) fn pictures() -> Result<Ending, String> {
    const TESTS: [&str; 6] = ["--package", "msrgate-cli", "--test", "it", "--test", "live"];
    let mut command = cargo(&[&["test"], &TESTS[..], &["--", "pictures::"]].concat());
    let (passed, text) = watched(command.env("MSRGATE_WRITE_PICTURES", "1"))?;
    Ok(Ending::Ran {
        count: checked(&text, passed),
        note: "docs/pictures".into(),
    })
}

fn doctest() -> Result<Ending, String> {
    let (passed, text) = watched(&mut cargo(&[&["test", "--doc"], &SCOPE[..]].concat()))?;
    let mut count = binary::counted(&text);
    if !passed && count.failed == 0 {
        count.failed = 1;
    }
    Ok(Ending::Ran {
        count,
        note: "cargo test --doc".into(),
    })
}

fn host(work: &Result<Option<Work>, String>) -> Result<Ending, String> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Ok(Ending::Skipped(format!("/dev/kvm does not open: {error}")));
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // Modules that are built in are listed there too, where they have parameters.
    let modules = fs::read_dir("/sys/module").map_err(|error| format!("cannot read /sys/module: {error}"))?;
    let modules = modules.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let vendor = modules
        .filter(|name| name.starts_with("kvm_"))
        .collect::<Vec<_>>()
        .join(" ");
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find(|line| line.starts_with("model name"));
    let model = model
        .and_then(|line| line.split_once(": "))
        .map_or("?", |(_, name)| name);
    let note = format!("Linux {}, {vendor}, {model}", release.trim());
    let Some(work) = work.as_ref().map_err(Clone::clone)? else {
        return Ok(no_live_tests());
    };
    // A test starts a domain of libvirt's, and is skipped where it cannot be installed.
    if let Err(why) = package::require(&LIBVIRT) {
        let _ = process::print(&format!("no libvirt: {why}\n"));
    }
    let mut count = Count::default();
    for binary in &work.live {
        let _ = process::print(&format!("running {}\n", binary.name));
        let program = work.program.to_string_lossy();
        let settings = [
            ("MSRGATE_LANE", "host"),
            ("MSRGATE_LANE_KERNEL", release.trim()),
            ("MSRGATE_LANE_REQUIRE", "1"),
            ("MSRGATE_BIN", &*program),
        ];
        count += on_this_machine(binary, &[], &settings)?;
    }
    Ok(Ending::Ran { count, note })
}

pub(crate) fn on_this_machine(binary: &Binary, arguments: &[&str], settings: &[(&str, &str)]) -> Result<Count, String> {
    let mut command = process::bound(&binary.executable);
    command.arg("--show-output").args(arguments);
    command.current_dir(&binary.package).envs(settings.iter().copied());
    command.env("CARGO_MANIFEST_DIR", &binary.package);
    if binary.kind == Kind::LiveTest {
        command.arg("--test-threads=1");
    }
    let (passed, text) = watched(&mut command)?;
    Ok(checked(&text, passed))
}

/// What one binary's run counts, where one that broke off has failed.
pub(crate) fn checked(text: &str, passed: bool) -> Count {
    let mut count = binary::counted(text);
    if !passed && count.failed == 0 || !text.contains("test result: ") {
        count.failed += 1;
    }
    count
}

fn browser() -> Result<Ending, String> {
    if let Err(why) = package::require(&[("chromium", "chromium")]) {
        return Ok(Ending::Skipped(why));
    }
    let mut count = Count::default();
    for binary in binary::tests()?
        .iter()
        .filter(|binary| binary.kind == Kind::BrowserTest)
    {
        count += on_this_machine(binary, &[], &[("MSRGATE_LANE_REQUIRE", "1")])?;
    }
    let version = process::output(process::bound("chromium").arg("--version"))?;
    Ok(Ending::Ran {
        count,
        note: version.trim().to_string(),
    })
}

/// What starts a domain without libvirt's daemon; the last brings the user that its driver looks for.
const LIBVIRT: [package::Need; 3] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("virt-qemu-run", "libvirt-daemon-driver-qemu"),
    ("/etc/libvirt/qemu.conf", "libvirt-daemon-system"),
];

fn no_live_tests() -> Ending {
    Ending::Skipped("the workspace has no live tests".into())
}

/// What the lanes run.
struct Work {
    live: Vec<Binary>,
    nested: Vec<Binary>,
    /// Programs that the tests' packages built for them.
    beside: Vec<PathBuf>,
    /// The command as released.
    program: PathBuf,
}

impl Work {
    fn find() -> Result<Option<Self>, String> {
        let of = |kind| move |binary: &Binary| binary.kind == kind;
        let (live, others): (Vec<_>, Vec<_>) = binary::tests()?.into_iter().partition(of(Kind::LiveTest));
        let (nested, others): (Vec<_>, Vec<_>) = others.into_iter().partition(of(Kind::NestedTest));
        if live.is_empty() {
            return Ok(None);
        }
        let beside = others
            .into_iter()
            .filter(|other| other.kind == Kind::Program && live.iter().any(|test| test.package == other.package));
        let beside = beside.map(|binary| binary.executable).collect();
        let program = binary::released()?;
        Ok(Some(Self {
            live,
            nested,
            beside,
            program,
        }))
    }

    /// What a lane's stage runs.
    fn tests(&self, stage: Stage) -> &[Binary] {
        match stage {
            Stage::Qemu => &self.nested,
            _ => &self.live,
        }
    }
}

/// The line that stands before each binary's output in a lane, and the one after it.
const BEGIN: &str = "@@ begin ";
const END: &str = "@@ end ";

/// What the harness of a live test is told in a lane; none where the test does not run there.
///
/// What asks KVM itself runs on each kernel of each vendor; what msrgate makes of it on each kernel and on each vendor once.
/// How that looks, and how long it takes, is the same everywhere.
fn part(lane: Lane, series: Series, binary: &Binary) -> Option<&'static str> {
    let whole = (lane, series) == (Lane::Intel, Series::Linux6_12);
    match &*binary.name {
        _ if (lane, series) == (Lane::Nested, Series::Linux6_1) => Some(""),
        "bench::live_quick" => None,
        "cli::live" if whole => Some("--skip fits_any_terminal --skip have_a_page"),
        "cli::live" => Some(
            "database:: migrate:: scan:: verify:: --skip under_each_policy --skip fits_any_terminal --skip have_a_page",
        ),
        "suite::live" if !whole => Some("--skip embedded --skip library_in_c"),
        _ => Some(""),
    }
}

/// Runs tests in a lane, and prints what they wrote.
fn emulated(lane: Lane, series: Series, work: &Work, tests: &[Binary]) -> Result<Ending, String> {
    // The nested lane sees all files of this machine as they are; the other has what it is given.
    let bare = lane == Lane::Intel;
    // Seconds for one binary, so that one which hangs does not take the others' time.
    let patience = 1500;
    // The tests' harness tells how long each test took only where unstable options may be used.
    let mut script = String::from("export MSRGATE_LANE_REQUIRE=1 RUSTC_BOOTSTRAP=1\n");
    script.push_str(&format!(
        "export MSRGATE_BIN={}\n",
        quoted(&work.program.to_string_lossy())
    ));
    let chosen = tests
        .iter()
        .filter_map(|binary| Some((binary, part(lane, series, binary)?)));
    let chosen: Vec<(&Binary, &str)> = chosen.collect();
    for (binary, which) in &chosen {
        let package = quoted(&binary.package.to_string_lossy());
        let executable = quoted(&binary.executable.to_string_lossy());
        script.push_str(&format!(
            "cd {package}; export CARGO_MANIFEST_DIR={package}; echo '{BEGIN}{}'\n\
             timeout -s KILL {patience} {executable} {which} --test-threads=1 --show-output -Zunstable-options --report-time; echo \"{END}$?\"\n",
            binary.name
        ));
    }
    let root = crate::root();
    let data = ["testdata", "policies", "traces"].map(|name| root.join(name));
    let mut programs: Vec<_> = chosen.iter().map(|(binary, _)| binary.executable.clone()).collect();
    programs.extend(work.beside.iter().cloned());
    programs.push(work.program.clone());
    let packages = chosen.iter().map(|(binary, _)| binary.package.join("Cargo.toml"));
    let add = data.into_iter().filter(|folder| folder.is_dir()).chain(packages);
    let job = Job {
        series,
        script,
        // With two, QEMU's emulator hangs or crashes now and then where the kernel patches its own code: KVM does so for
        // the first VM and after the last.
        cpus: 1,
        mebibytes: if bare { 512 } else { 1536 },
        timeout: Duration::from_secs(3000),
        root: if bare { Root::Initramfs } else { Root::Host },
        add: if bare {
            add.map(|path| (path.clone(), path)).collect()
        } else {
            Vec::new()
        },
        programs: if bare { programs } else { Vec::new() },
        kvm_parameters: String::new(),
        vendor_parameters: String::new(),
        verbose: false,
    };
    let done = match lane::run(lane, &job) {
        Ok(done) => done,
        Err(Failure::Unavailable(why)) => return Ok(Ending::Skipped(why)),
        Err(Failure::Broken(why)) => return Err(format!("the lane failed, not a test: {why}")),
    };
    let text = String::from_utf8_lossy(&done.output);
    let _ = process::print(&text);
    let (version, module) = (&done.version, lane.vendor_module());
    let mut note = format!("Linux {version}, {module}, up after {:.1} s", done.boot.as_secs_f64());
    if done.status.is_none() {
        note.push_str(&format!(", out of time after {} s", job.timeout.as_secs()));
    }
    let mut count = parts(&text, chosen.len());
    if (lane, series) == (Lane::Intel, Series::Linux6_1) {
        count += bare::on_vmx()?;
        note.push_str("; and on the hypervisor");
    }
    Ok(Ending::Ran { count, note })
}

/// Counts each binary's part of a lane's output; one whose part has no end has failed.
fn parts(text: &str, binaries: usize) -> Count {
    let mut count = Count::default();
    let mut seen = 0;
    for part in text.split(BEGIN).skip(1) {
        seen += 1;
        let status = part.lines().rev().find_map(|line| line.strip_prefix(END));
        count += checked(part, status == Some("0"));
    }
    count.failed += (binaries - seen.min(binaries)) as u64;
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "test result: ok. 2 passed; 0 failed; 0 ignored\n";

    #[test]
    fn a_binary_that_breaks_off_has_failed() {
        let text = format!("@@ begin a\n{GOOD}@@ end 0\n@@ begin b\nrunning 1 test\n@@ end 139\n");
        assert_eq!(
            parts(&text, 2),
            Count {
                passed: 2,
                failed: 1,
                ..Count::default()
            }
        );
    }

    #[test]
    fn a_binary_that_never_ran_has_failed() {
        let text = format!("@@ begin a\n{GOOD}@@ end 0\n");
        assert_eq!(
            parts(&text, 3),
            Count {
                passed: 2,
                failed: 2,
                ..Count::default()
            }
        );
    }

    #[test]
    fn an_exit_status_other_than_0_fails_a_binary_whose_tests_passed() {
        let text = format!("@@ begin a\n{GOOD}@@ end 1\n");
        assert_eq!(parts(&text, 1).failed, 1);
    }

    #[test]
    fn each_stage_beside_others_runs_once_on_each_kernel_and_one_at_a_time_on_this_machines_kvm() {
        let beside: Vec<Stage> = Stage::value_variants()
            .iter()
            .copied()
            .filter(|stage| stage.beside())
            .collect();
        let chains = chains(&beside);
        for stage in beside {
            let steps = chains.concat().into_iter().filter(|step| step.0 == stage).count();
            assert_eq!(steps, stage.kernels().len().max(1), "{}", stage.name());
        }
        let with = |stage| chains.iter().position(|chain| chain.contains(&(stage, None)));
        assert_eq!(with(Stage::Host), with(Stage::Memory));
    }

    #[test]
    fn only_what_needs_another_machine_can_be_required() {
        let all = [
            Stage::Host,
            Stage::Nested,
            Stage::Qemu,
            Stage::Intel,
            Stage::Browser,
            Stage::Bare,
        ];
        assert!(required("host, nested,intel,browser,bare").is_ok_and(|stages| stages == all));
        assert!(required("").is_ok_and(|stages| stages.is_empty()));
        assert!(required("clippy").is_err());
    }
}
