//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Args as ClapArgs, ColorChoice, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use msrgate_core::Op;
use msrgate_msrs::Linux;
use msrgate_verify::Kernel;

const AFTER: &str = "\
Exit codes: 0 yes or done; 1 no: findings, a difference, a guest that would break; 2 wrong usage or unreadable input;
3 this machine cannot: no KVM, no permission; 4 the guest or the VMM failed.

A policy in short:
  version = 1
  default = \"allow\"                    # or \"deny\"

  [[rule]]
  # a name, a glob, a class (@pmu), a number, a range, or a list of these
  msr   = \"IA32_BIOS_SIGN_ID\"
  # allow, deny, zero, host, { value }, { shadow }, { mask }, { handler }
  read  = { value = \"0x100000000\" }
  # allow, deny, ignore, shadow, { mask }, { only }, { once }, { handler }
  write = \"ignore\"";

/// An MSR firewall for KVM guests: says what each model-specific register of a guest gets, and proves it.
#[derive(Parser)]
#[command(name = "msrgate", version, after_help = AFTER, max_term_width = 120)]
pub(crate) struct Args {
    /// When to use colour; the environment variables NO_COLOR and CLICOLOR_FORCE decide too
    #[arg(long, value_enum, global = true, value_name = "WHEN", default_value_t = ColorChoice::Auto)]
    pub(crate) color: ColorChoice,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Parse policies, look for mistakes, compile them and prove the result
    Check(CheckArgs),
    /// Show what a policy compiles to: filter ranges, exit reasons, what user space answers
    Plan(PlanArgs),
    /// Say what a guest can reach, by class; or what one access gets and why: rule, range, bit, what the guest sees
    #[command(after_help = EXPLAIN_AFTER)]
    Explain(ExplainArgs),
    /// Say which accesses two policies, plans or raw filters treat differently, or what differs between two scans
    #[command(after_help = DIFF_AFTER)]
    Diff(DiffArgs),
    /// Convert a raw kernel filter or a plan back into a policy
    #[command(after_help = DECOMPILE_AFTER)]
    Decompile(DecompileArgs),
    /// Convert another tool's list of MSRs into a policy
    #[command(after_help = IMPORT_AFTER)]
    Import(ImportArgs),
    /// Run a recorded guest's accesses as a real guest under a policy, on KVM or on the engine
    Replay(ReplayArgs),
    /// Compare this machine's kernel with the engine: under policies, under random filters, while filters change
    Verify(VerifyArgs),
    /// Say what a guest can see on this host: every MSR read, and where that is safe written back, by a real guest
    #[command(after_help = SCAN_AFTER, group = ArgGroup::new("more").multiple(true))]
    Scan(ScanArgs),
    /// Say whether a guest can go from one scanned host to others: which MSR stands in its way, by bit, and what helps
    #[command(after_help = MIGRATE_AFTER)]
    Migrate(MigrateArgs),
    /// Say whether msrgate works on this machine, and what to do where it does not
    Doctor(DoctorArgs),
    /// Write the wrapper that puts policies on the VMs of libvirt or Proxmox, or the drop-in of a systemd service
    #[command(after_help = WRAP_AFTER)]
    Wrap(WrapArgs),
    /// Start a VMM that knows nothing of msrgate, with a policy on its guests
    #[command(after_help = RUN_AFTER)]
    Run(RunArgs),
    /// Put a policy on a VMM that runs already, and take it off again at the end
    #[command(after_help = ATTACH_AFTER)]
    Attach(AttachArgs),
    /// Start a VMM unchanged, and print each MSR filter, exit mask and MSR value that the VMM gives KVM
    #[command(after_help = CAPTURE_AFTER)]
    Capture(CaptureArgs),
    /// Replace the policy of running VMs
    #[command(after_help = RELOAD_AFTER)]
    Reload(ReloadArgs),
    /// Show what guests under msrgate do now: which MSRs, exits and faults a second, what they cost
    #[command(after_help = TOP_AFTER)]
    Top(TopArgs),
    /// Leave a running VMM to itself again, its own MSR filter in force
    Detach(DetachArgs),
    /// Summarise traces: who accessed which MSR, how often, when, and what the access got
    #[command(after_help = REPORT_AFTER)]
    Report(ReportArgs),
    /// Write the smallest policy that allows what the traces show, with a reason for each rule
    #[command(after_help = LEARN_AFTER)]
    Learn(LearnArgs),
    /// Say what lines of a log about MSRs mean: which register, why it failed, who needs it, and the rule to paste
    #[command(after_help = WHY_AFTER)]
    Why(WhyArgs),
    /// Ask about each traced access that a policy does not decide, and write the answers into the policy
    #[command(after_help = REVIEW_AFTER)]
    Review(ReviewArgs),
    /// Look MSRs up by name, index, class or text, and say what the bits of a value mean
    Msr(MsrArgs),
    /// Print the JSON Schema of policy files, for editors
    Schema,
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// Print a man page, in roff: `msrgate man | man -l -`
    Man(ManArgs),
}

/// How much of a list people get, and in which order; programs get all.
#[derive(ClapArgs)]
pub(crate) struct ListArgs {
    /// Show all rows
    #[arg(long, conflicts_with = "top")]
    pub(crate) all: bool,
    /// Which rows come first
    #[arg(long, value_enum, value_name = "KEY", default_value_t = SortArg::Effect, conflicts_with = "json")]
    pub(crate) sort: SortArg,
    /// Show at most N rows
    #[arg(long, value_name = "N", conflicts_with = "json")]
    pub(crate) top: Option<usize>,
}

/// An order of rows.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SortArg {
    /// Those that the policy changed most
    Effect,
    /// Those with the most accesses
    Count,
    /// Those with the smallest index
    Msr,
}

/// The options of a subcommand that also writes a page for a browser.
#[derive(ClapArgs)]
pub(crate) struct HtmlArgs {
    /// Write a page for a browser instead of text; `-` prints the page. The page fetches nothing from any network
    #[arg(long, value_name = "FILE|-", conflicts_with = "json")]
    pub(crate) html: Option<PathBuf>,
}

/// The guest's CPUID, for policies that depend on it.
#[derive(ClapArgs)]
pub(crate) struct CpuidArgs {
    /// The guest's CPUID: `host` for what KVM on this machine offers a guest, a file with what `cpuid -r -1` printed, or
    /// a trace whose header has it
    #[arg(long, value_name = "FILE|host")]
    pub(crate) cpuid: Option<PathBuf>,
}

/// What the guest is known to do.
#[derive(ClapArgs)]
pub(crate) struct ProfileArgs {
    /// A trace of such a guest: which MSRs it touches often. Ranges that decide most stand first, and what a policy with
    /// `spill` passes through from user space is what the guest touches least
    #[arg(long, value_name = "TRACE")]
    pub(crate) profile: Option<PathBuf>,
}

#[derive(ClapArgs)]
pub(crate) struct CheckArgs {
    /// Policy files
    #[arg(required = true, value_name = "POLICY")]
    pub(crate) policies: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
    /// Name what passes the filter on this version of Linux, such as 6.12, instead of on the running kernel
    #[arg(long, value_name = "VERSION")]
    pub(crate) kernel: Option<Linux>,
    /// Print findings only, and nothing about a policy that has none
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Change the files where a finding's help says how: a misspelt name, a rule that never counts. What a policy means stays
    #[arg(long)]
    pub(crate) fix: bool,
    /// The format of the findings
    #[arg(long, value_enum, default_value_t = FormatArg::Text)]
    pub(crate) format: FormatArg,
    /// Print one JSON object, as --format json
    #[arg(long, conflicts_with = "format")]
    pub(crate) json: bool,
}

/// How `check` prints findings.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// For people: findings on standard error
    Text,
    /// One JSON object
    Json,
    /// GitHub's workflow commands, which annotate the lines of a change
    Github,
    /// SARIF 2.1.0, which code hosts and editors read
    Sarif,
}

#[derive(ClapArgs)]
pub(crate) struct PlanArgs {
    /// Policy file
    pub(crate) policy: PathBuf,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
    /// Plan for this machine's kernel: a fixed answer that the kernel can hold becomes a preset, and costs no exit. Without
    /// --host the plan is the same everywhere, and has no presets
    #[arg(long)]
    pub(crate) host: bool,
    /// Show what has to be saved with a guest under this policy, and what must not be
    #[arg(long, conflicts_with_all = ["emit", "html"])]
    pub(crate) state: bool,
    /// Show each range that is denied, and the classes of which nothing is reached
    #[arg(long, conflicts_with_all = ["emit", "state", "json", "html"])]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) html: HtmlArgs,
    /// Print one JSON object
    #[arg(long, conflicts_with = "emit")]
    pub(crate) json: bool,
    /// Print the plan as source code to build into a VMM; not with --state, and with --host only as C
    #[arg(long, value_enum, conflicts_with = "html")]
    pub(crate) emit: Option<Emit>,
}

/// What `plan` prints for programs.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Emit {
    /// The same as --json
    Json,
    /// A C header: the filter, and what answers exits
    C,
    /// Rust: bitmaps and ranges for the `kvm-ioctls` crate
    Rust,
    /// crosvm's flags, if they can express the whole policy
    Crosvm,
    /// msr-safe's allow-list, if it can express the whole policy
    MsrSafe,
}

const EXPLAIN_AFTER: &str = "\
For example, all that a guest can reach, what of it is for machine checks, and why one access gets what it gets:
  msrgate explain policy.toml
  msrgate explain policy.toml @mce
  msrgate explain policy.toml IA32_MCG_CTL write";

#[derive(ClapArgs)]
pub(crate) struct ExplainArgs {
    /// Policy file, or a plan or a raw filter in any form of docs/formats.md; or the code of a finding, such as W009, for what it
    /// means
    pub(crate) policy: PathBuf,
    /// The MSR: a name or an index; or a class, as `@pmu`. If omitted, all that a guest can reach
    pub(crate) msr: Option<String>,
    /// The direction; both if omitted
    #[arg(value_enum)]
    pub(crate) op: Option<OpArg>,
    /// Of a class or of all, show what is denied too
    #[arg(long, conflicts_with = "json")]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
    /// Plan for this machine's kernel: a fixed answer that the kernel can hold costs no exit
    #[arg(long)]
    pub(crate) host: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OpArg {
    #[value(alias = "rdmsr")]
    Read,
    #[value(alias = "wrmsr")]
    Write,
}

impl From<OpArg> for Op {
    fn from(op: OpArg) -> Op {
        match op {
            OpArg::Read => Op::Read,
            OpArg::Write => Op::Write,
        }
    }
}

const DIFF_AFTER: &str = "\
A and B are told apart by what they hold: a policy in TOML, what `msrgate plan --json` prints, or a raw filter
(docs/formats.md). A raw filter says only what is left to the kernel, so with one of them that is what is compared. What
`msrgate scan --json` prints of two hosts is compared by what guests see and what KVM tells a VMM.

For example, what a change of a policy changes for guests, and what a kernel's filter has that a policy has not:
  msrgate diff old.toml new.toml
  msrgate diff policy.toml filter.json";

#[derive(ClapArgs)]
pub(crate) struct DiffArgs {
    /// A policy, a plan, a raw filter or a scan; `-` for standard input
    pub(crate) a: PathBuf,
    /// What A is compared with; a scan only with a scan
    pub(crate) b: PathBuf,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) html: HtmlArgs,
    #[command(flatten)]
    pub(crate) list: ListArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

const DECOMPILE_AFTER: &str = "\
The policy is the shortest that is found, and says the same: it is read back and compared before it is printed.

For example, what the filter of somebody's VMM does:
  msrgate capture -o c.jsonl -- VMM
  msrgate decompile c.jsonl
What a filter in somebody's source does, and what a change of it would change:
  msrgate decompile filter.json > policy.toml
  msrgate diff filter.json policy.toml";

#[derive(ClapArgs)]
pub(crate) struct DecompileArgs {
    /// A raw filter, a plan or a capture, in any form of docs/formats.md; `-` for standard input
    pub(crate) filter: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

const IMPORT_AFTER: &str = "\
Where no policy says just that, the nearest is written, standard error says where it differs, and the exit code is 1.
docs/formats.md has the formats. The text of the tracepoint kvm:kvm_msr needs no import: it is a trace.";

#[derive(ClapArgs)]
pub(crate) struct ImportArgs {
    /// The tool whose format the file has
    #[arg(long, value_enum, value_name = "TOOL")]
    pub(crate) from: Tool,
    /// The file; `-` for standard input
    pub(crate) file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// A tool that has words of its own for MSRs.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tool {
    /// crosvm's flags --userspace-msr
    Crosvm,
    /// msr_modifiers of a CPU template of Firecracker
    Firecracker,
    /// An allow-list of msr-safe
    MsrSafe,
}

#[derive(ClapArgs)]
pub(crate) struct ReplayArgs {
    /// Policy file
    #[arg(short, long, value_name = "POLICY")]
    pub(crate) policy: PathBuf,
    /// Traces: JSON Lines, `-` for standard input
    #[arg(required = true, value_name = "TRACE")]
    pub(crate) traces: Vec<PathBuf>,
    /// Where the guest runs
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub(crate) backend: BackendArg,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
    #[command(flatten)]
    pub(crate) list: ListArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where a replayed guest runs.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendArg {
    /// On KVM where /dev/kvm opens, else on the engine
    Auto,
    /// A real guest on this machine's KVM
    Kvm,
    /// The engine, with MSRs that answer as the trace says
    Engine,
}

#[derive(ClapArgs)]
#[command(group = ArgGroup::new("what").required(true))]
pub(crate) struct VerifyArgs {
    /// Policy files: each is installed, and an access is made on both sides of every boundary
    #[arg(value_name = "POLICY", group = "what")]
    pub(crate) policies: Vec<PathBuf>,
    /// Make this many random calls, most of them invalid, and compare their results and effects
    #[arg(long, value_name = "N", group = "what")]
    pub(crate) random: Option<u64>,
    /// Count which MSRs the hardware passes through before, under and after a filter
    #[arg(long, group = "what")]
    pub(crate) interception: bool,
    /// Replace a filter under running vCPUs for this many seconds
    #[arg(long, value_name = "SECONDS", group = "what")]
    pub(crate) swap: Option<u64>,
    /// Try every MSR of the ranges instead of the boundaries
    #[arg(long, conflicts_with_all = ["random", "interception", "swap"])]
    pub(crate) full: bool,
    /// The seed of the random calls; if omitted, a random seed, which is printed
    #[arg(long, value_name = "S", conflicts_with_all = ["policies", "interception", "swap"])]
    pub(crate) seed: Option<u64>,
    /// How many accesses to make under each random filter that the kernel accepts
    #[arg(long, value_name = "K", conflicts_with_all = ["policies", "interception", "swap"], default_value_t = 24)]
    pub(crate) accesses: usize,
    /// The kernel version that the engine imitates; if omitted, this machine's. `newest` is without that kernel's known gap at
    /// IA32_TSC_DEADLINE
    #[arg(long, value_parser = PossibleValuesParser::new(Kernel::profiles()))]
    pub(crate) profile: Option<String>,
    /// The guest's processor mode
    #[arg(long, value_enum, default_value_t = ModeArg::Real)]
    pub(crate) mode: ModeArg,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeArg {
    /// Real mode
    Real,
    /// 64-bit mode
    Long,
}

const SCAN_AFTER: &str = "\
Scanned are 0..=0x3fff, 0x40000000..=0x400011ff, 0x4b564d00..=0x4b564dff, 0xc0000000..=0xc0003fff and
0xc0010000..=0xc0013fff. What a new kernel or new microcode changed for guests:
  msrgate scan --json > before.json
  msrgate scan --against before.json";

#[derive(ClapArgs)]
pub(crate) struct ScanArgs {
    /// Put this policy on the guest
    #[arg(short, long, value_name = "POLICY")]
    pub(crate) policy: Option<PathBuf>,
    /// Compare with an earlier scan, a file that `scan --json` wrote
    #[arg(long, value_name = "FILE")]
    pub(crate) against: Option<PathBuf>,
    /// Also scan every MSR of the database
    #[arg(long, group = "more")]
    pub(crate) all_known: bool,
    /// Also scan these MSRs: a range, a name, a glob or a class (@pmu); may be given several times
    #[arg(long, value_name = "FIRST..=LAST", group = "more")]
    pub(crate) range: Vec<String>,
    /// Scan only what --all-known and --range name
    #[arg(long, requires = "more")]
    pub(crate) only: bool,
    /// Put the guest's local APIC into x2APIC mode, in which the APIC's registers are MSRs (0x800..=0x8ff) that no filter stops
    #[arg(long)]
    pub(crate) x2apic: bool,
    /// List only MSRs that tell of the host and its other guests, and what they tell
    #[arg(long, conflicts_with_all = ["json", "against", "html"])]
    pub(crate) leaks: bool,
    /// Which MSRs the guest writes back
    #[arg(long, value_enum, default_value_t = WriteArg::Safe)]
    pub(crate) write: WriteArg,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) html: HtmlArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which MSRs a scan writes back.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WriteArg {
    /// None
    None,
    /// Those where a write is not a command, such as to send an interrupt
    Safe,
    /// All; the scan names each access that breaks the guest
    All,
}

const MIGRATE_AFTER: &str = "\
Each host is scanned where it is; the answer needs neither. With two files the guest goes from the first to the second; with more
it is to go from each to each.
  msrgate scan --json > a.json       # on the one host
  msrgate scan --json > b.json       # on the other
  msrgate migrate a.json b.json
  msrgate migrate --policy fleet.toml a.json b.json c.json

A table of Firecracker's (MSR_ADDR,VALUE) and a fingerprint of cpu-template-helper are scans too, as far as they go. What QEMU
said when it died is a table of one line:
  printf 'MSR_ADDR,VALUE\\n0x48b,0x1582e00000000\\n' | msrgate migrate - b.json";

#[derive(ClapArgs)]
pub(crate) struct MigrateArgs {
    /// Scans, which `scan --json` wrote, or what Firecracker's tools wrote; `-` for standard input
    #[arg(required = true, num_args = 2.., value_name = "SCAN")]
    pub(crate) scans: Vec<PathBuf>,
    /// What is known of the guest: a trace of it, for what it accesses and its CPUID, or what `cpuid -r -1` printed in it
    #[arg(long, value_name = "TRACE|CPUID")]
    pub(crate) guest: Option<PathBuf>,
    /// Write the policy under which a guest sees the same on all hosts; `-` prints it in place of the answer
    #[arg(long, value_name = "FILE|-")]
    pub(crate) policy: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

const WRAP_AFTER: &str = "\
What is written says at its beginning where it goes and what to change; standard error says it too. A VM gets the policy
DIR/NAME.toml, else DIR/UUID.toml (Proxmox: DIR/VMID.toml), else DIR/default.toml; without one of these it does not start.

For example, for libvirt:
  msrgate wrap libvirt -o /usr/local/bin/qemu-msrgate
  virsh edit VM       # <emulator>/usr/local/bin/qemu-msrgate</emulator>";

#[derive(ClapArgs)]
pub(crate) struct WrapArgs {
    /// What starts the VMs
    #[arg(value_enum)]
    pub(crate) manager: Manager,
    /// Write it into this file, which is made executable; standard output if left out
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Overwrite the file
    #[arg(long, requires = "output")]
    pub(crate) force: bool,
    /// The VMM that is started under msrgate
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) vmm: Option<PathBuf>,
    /// Where the policies are
    #[arg(long, value_name = "DIR", default_value = "/etc/msrgate")]
    pub(crate) policies: PathBuf,
    /// Where traces go, a file for each VM and start; without it there are none
    #[arg(long, value_name = "DIR")]
    pub(crate) traces: Option<PathBuf>,
    /// The service that starts the VMM; its drop-in takes the service's command line
    #[arg(long, value_name = "SERVICE")]
    pub(crate) service: Option<String>,
}

/// What starts VMs.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Manager {
    /// libvirt: `<emulator>` of a domain
    Libvirt,
    /// Proxmox VE: in place of its kvm
    Proxmox,
    /// A systemd service that starts a VMM
    Systemd,
}

const RELOAD_AFTER: &str = "\
The policy is read, checked, compiled and proven first. On any failure the old one stays in force, on all VMs. An access gets \
what the old policy says or what the new one says; none gets anything else meanwhile. SIGHUP to msrgate reads the file again \
that `msrgate run -p` named.

What the kernel itself holds for the VMM's whole life cannot be replaced: a fixed answer that it was given at the start, where the \
new policy leaves the register to the guest. The command says so then.";

#[derive(ClapArgs)]
pub(crate) struct ReloadArgs {
    /// msrgate's process or the VMM's; may be left out where one VMM runs under msrgate
    #[arg(value_name = "PID")]
    pub(crate) process: Option<i32>,
    /// Policy file
    #[arg(short, long, value_name = "POLICY")]
    pub(crate) policy: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where accesses go whose rule says `log`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogArg {
    /// To the journal of systemd, with fields
    Journald,
    /// To standard error, for people
    Stderr,
}

const TOP_AFTER: &str = "\
On a terminal the figures are anew each second, until `q`. Shown are VMMs of this user's; root sees all. `exits` are accesses \
that the kernel handed over and that were answered; what the policy leaves to the kernel makes none. `CPU` and `each` are the time \
between an exit and its answer. Leaving the guest and entering it again takes a processor 1 to 2 µs more for each exit, which \
cannot be seen from here.";

#[derive(ClapArgs)]
pub(crate) struct TopArgs {
    /// Print the figures of one interval, and exit
    #[arg(long)]
    pub(crate) once: bool,
    /// Print the counts so far as JSON, and exit
    #[arg(long, conflicts_with = "once")]
    pub(crate) json: bool,
    /// Seconds between two updates
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    pub(crate) interval: f64,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "it is not a number".to_owned())?;
    match (0.1..=3600.0).contains(&seconds) {
        true => Ok(seconds),
        false => Err("it is not between 0.1 and 3600".to_owned()),
    }
}

#[derive(ClapArgs)]
pub(crate) struct DetachArgs {
    /// msrgate's process or the VMM's; may be left out where one VMM runs under msrgate
    #[arg(value_name = "PID")]
    pub(crate) process: Option<i32>,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

const RUN_AFTER: &str = "\
Options come before the VMM; what follows its name is its own. `--` before it may be left out.

The VMM keeps its terminal, signals and exit status. Signals that msrgate gets go on to it, but for SIGUSR1, which \
prints the summary so far on standard error; it is printed at the end too, and SIGHUP, which reads the policy again. \
Any 64-bit VMM will do, however it is written and linked: nothing is loaded into it, its calls wait for msrgate. To other users \
than root the kernel allows that only with no_new_privs, which is set then.

A policy that depends on the guest's CPUID is resolved for the one that the VMM sets, without --cpuid.";

#[derive(ClapArgs)]
pub(crate) struct RunArgs {
    /// Policy file
    #[arg(short, long, value_name = "POLICY", required_unless_present_any = ["ignore_unknown", "learn"])]
    pub(crate) policy: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
    /// Change nothing for the guest; record the first access to each MSR that the policy does not leave to the kernel
    #[arg(long, requires = "policy", conflicts_with = "ignore_unknown")]
    pub(crate) audit: bool,
    /// Without a policy, record in the trace which MSRs the guests access
    #[arg(long, value_enum, value_name = "WHAT", num_args = 0..=1, require_equals = true,
        default_missing_value = "first", requires = "file", conflicts_with_all = ["policy", "audit", "ignore_unknown"])]
    pub(crate) learn: Option<LearnArg>,
    /// Answer MSRs that KVM does not know: a read gets zero, a write is ignored, for this VMM's guests alone
    #[arg(long)]
    pub(crate) ignore_unknown: bool,
    #[command(flatten)]
    pub(crate) trace: TraceArgs,
    /// Where to log accesses whose rule has `log`: the journal, with fields, or standard error. By default it is the journal
    /// where standard error is the journal's
    #[arg(long, value_enum, value_name = "WHERE")]
    pub(crate) log: Option<LogArg>,
    /// Offer counts as OpenMetrics text: to who asks at PORT or ADDRESS:PORT by HTTP, from this machine alone without an
    /// address, or in FILE, which is written every 5 seconds and at the end
    #[arg(long, value_name = "ADDRESS:PORT|FILE")]
    pub(crate) metrics: Option<crate::metrics::Place>,
    /// Let what the VMM starts gain rights (setuid programs), as without msrgate. Refused where the policy cannot be kept
    /// so: to others than root the kernel lets no calls wait then
    #[arg(long)]
    pub(crate) allow_new_privs: bool,
    /// Print the summary as one JSON object, the last line of standard error
    #[arg(long)]
    pub(crate) json: bool,
    /// The VMM and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "VMM")]
    pub(crate) command: Vec<OsString>,
}

/// What is written down.
#[derive(ClapArgs)]
pub(crate) struct TraceArgs {
    /// Record each access that the policy decides, as JSON Lines; `-` prints each access on standard error for people. In the
    /// file's name `%n` is the VM's name, `%p` the VMM's process, `%t` the time, and `%%` a percent sign
    #[arg(long = "trace", value_name = "FILE|-")]
    pub(crate) file: Option<PathBuf>,
    /// Keep only the newest accesses: a FILE of this size, such as 100M, is moved to FILE.1, or the first such number that is free, in
    /// place of the part before it, and a new FILE begins
    #[arg(long = "trace-size", value_name = "SIZE", requires = "file", value_parser = size)]
    pub(crate) size: Option<u64>,
    /// Record the guest's instruction pointer with each access
    #[arg(long, requires = "file")]
    pub(crate) rip: bool,
}

/// The smallest part of a trace: its header may have a CPUID of 256 leaves.
const SMALLEST: u64 = 64 << 10;

/// A number of bytes, or with `K`, `M` or `G` of kibibytes and so on.
fn size(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.split_at_checked(text.len().saturating_sub(1)) {
        Some((number, "K")) => (number, 10),
        Some((number, "M")) => (number, 20),
        Some((number, "G")) => (number, 30),
        _ => (text, 0),
    };
    let bytes = number
        .parse()
        .ok()
        .and_then(|number: u64| number.checked_mul(1 << shift));
    let bytes = bytes.ok_or("write it as a number of bytes, or as `500K`, `100M` or `2G`")?;
    if bytes < SMALLEST {
        return Err(format!("a part of a trace takes {}K at least", SMALLEST >> 10));
    }
    Ok(bytes)
}

/// Which accesses are learned.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LearnArg {
    /// The first access to each MSR in each direction; nothing changes for the guest
    First,
    /// Every access, made by the host in the guest's place; the guest may see something else
    All,
}

const ATTACH_AFTER: &str = "\
msrgate stays, and takes the policy off where it gets SIGINT or SIGTERM: the VMM's own filter and mask are put back. Where msrgate is \
killed the policy stays, and the VMM goes on; what msrgate decides anew at each access (`host`, `mask`, `only`, `once`, a handler) is \
#GP from then on. With --audit and --learn nothing stays.

The kernel does not tell which filter a VMM has given it, and it has one at a time. So msrgate has to know: it does of the VMMs that \
docs/attach.md names, and has to be told of others, by --vmm-filter. For example, with what the same VMM did when it was started \
by hand:
  msrgate capture -o vmm.jsonl -- VMM
  msrgate attach -p policy.toml --vmm-filter vmm.jsonl PID
Of a VMM that gives the kernel no filter:
  msrgate attach -p policy.toml --vmm-filter none PID";

#[derive(ClapArgs)]
pub(crate) struct AttachArgs {
    /// Policy file
    #[arg(short, long, value_name = "POLICY", required_unless_present_any = ["ignore_unknown", "learn"])]
    pub(crate) policy: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
    /// Change nothing for the guest; record the first access to each MSR that the policy does not leave to the kernel
    #[arg(long, requires = "policy", conflicts_with = "ignore_unknown")]
    pub(crate) audit: bool,
    /// Without a policy, record in the trace which MSRs the guests access
    #[arg(long, value_enum, value_name = "WHAT", num_args = 0..=1, require_equals = true,
        default_missing_value = "first", requires = "file", conflicts_with_all = ["policy", "audit", "ignore_unknown"])]
    pub(crate) learn: Option<LearnArg>,
    /// Which of the VMM's VMs, where it has several: its descriptor, or `all`
    #[arg(long, value_name = "N|all")]
    pub(crate) vm: Option<VmArg>,
    /// The filter that the VMM has given the kernel: a raw filter, a plan or a capture, in any form of docs/formats.md; a policy;
    /// or `none`. The policy and this filter are in force together
    #[arg(long, value_name = "FILE|none")]
    pub(crate) vmm_filter: Option<PathBuf>,
    /// Lose the filter that the VMM may have given the kernel, and the exits that it may have asked for
    #[arg(long, conflicts_with = "vmm_filter")]
    pub(crate) replace_filter: bool,
    /// MSRs that KVM does not know read as zero and ignore writes, for this VMM's guests alone
    #[arg(long)]
    pub(crate) ignore_unknown: bool,
    #[command(flatten)]
    pub(crate) trace: TraceArgs,
    /// Print the summary as one JSON object, the last line of standard error
    #[arg(long)]
    pub(crate) json: bool,
    /// The VMM's process
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) process: i32,
}

/// Which VMs of a VMM are meant.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum VmArg {
    /// The one of this descriptor.
    One(i32),
    /// All.
    All,
}

impl std::str::FromStr for VmArg {
    type Err = String;

    fn from_str(text: &str) -> Result<VmArg, String> {
        match text {
            "all" => Ok(VmArg::All),
            number => {
                let number = number.parse().ok().filter(|number| *number >= 0);
                number
                    .map(VmArg::One)
                    .ok_or_else(|| "write it as a number, or as `all`".to_owned())
            }
        }
    }
}

const CAPTURE_AFTER: &str = "\
A line is a JSON object: the call and what the kernel gave for it. `decompile`, `diff` and `explain` take the file, and look at \
the last filter that the kernel took; they take a line of it alone too.

For example, what a VMM does with its guests' MSRs, and how that differs from a policy:
  msrgate capture -o c.jsonl -- qemu-system-x86_64 ...
  msrgate decompile c.jsonl
  msrgate diff c.jsonl policy.toml
An earlier filter of it, by its line:
  sed -n 4p c.jsonl | msrgate decompile -
What a VMM that runs already asks for when a guest of it moves away:
  msrgate capture -o c.jsonl --pid 4711

The VMM keeps its terminal, signals and exit status, and gets what the kernel gives. To other users than root the kernel allows \
that only with no_new_privs, which is set then.";

#[derive(ClapArgs)]
pub(crate) struct CaptureArgs {
    /// Write the lines to this file instead of standard error, where the VMM prints too
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// See the calls that a running VMM makes from here on, until msrgate is ended: by tracing all its threads, which makes its system
    /// calls many times as slow
    #[arg(long, value_name = "PID", conflicts_with = "command", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pid: Option<i32>,
    /// The VMM and its arguments
    #[arg(required_unless_present = "pid", trailing_var_arg = true, value_name = "VMM")]
    pub(crate) command: Vec<OsString>,
}

const REPORT_AFTER: &str = "\
Example: what a guest did under a policy, and by which rule it got what:
  msrgate run -p policy.toml --trace boot.jsonl -- qemu-system-x86_64 …
  msrgate report -p policy.toml boot.jsonl
  msrgate report -p policy.toml boot.jsonl --html boot.html";

#[derive(ClapArgs)]
pub(crate) struct ReportArgs {
    /// Traces: JSON Lines, `-` for standard input
    #[arg(required = true, value_name = "TRACE")]
    pub(crate) traces: Vec<PathBuf>,
    /// Show beside each row what this policy decides, by which rule and why
    #[arg(short, long, value_name = "POLICY")]
    pub(crate) policy: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) html: HtmlArgs,
    #[command(flatten)]
    pub(crate) list: ListArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

const LEARN_AFTER: &str = "\
For example, a policy from two boots, and from what a fleet summed up each on its own:
  msrgate run --learn --trace boot.jsonl -- qemu-system-x86_64 ...
  msrgate learn traces/*.jsonl > guest.toml
  msrgate learn --summary boot.jsonl > host1.summary
  msrgate learn *.summary > fleet.toml
What a later boot needs beyond that policy, and what it did not touch again:
  msrgate learn --since fleet.toml later.jsonl > tighter.toml";

#[derive(ClapArgs)]
pub(crate) struct LearnArgs {
    /// Traces, or summaries that --summary wrote, in any order; `-` for standard input
    #[arg(required = true, value_name = "TRACE")]
    pub(crate) traces: Vec<PathBuf>,
    /// Write a summary instead of a policy: it is small, and `learn` merges it with others
    #[arg(long, conflicts_with_all = ["widen", "json"])]
    pub(crate) summary: bool,
    /// Compare with an older policy, or with the policy that an older summary gives: what is added, and what was not accessed
    /// again
    #[arg(long, value_name = "OLDER", conflicts_with = "summary")]
    pub(crate) since: Option<PathBuf>,
    /// Also learn from traces with missing accesses; the policy may then deny what the guests did
    #[arg(long)]
    pub(crate) incomplete: bool,
    /// Allow more than the traces show, where they show at least half of it
    #[arg(long, value_enum, value_name = "TO", value_delimiter = ',')]
    pub(crate) widen: Vec<WidenArg>,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a learned policy is widened to.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WidenArg {
    /// Whole classes
    Classes,
    /// Ranges without gaps
    Ranges,
}

const REVIEW_AFTER: &str = "\
Each question says who needs the access, what it risks (a register that tells of the host, that the processor works by, that \
guests access while they run) and what it costs. Answers are allow, deny, zero (a read), ignore (a write), value N, shadow, \
skip and quit; a beginning that is clear will do, and an empty line skips. Each answer becomes a rule and is compiled at once: one \
with which the policy no longer fits a filter, or is none, is taken back.

Questions and what becomes of them stand on standard error, and are asked where standard input is a terminal. The policy is \
written at the end, whole or not at all; its text stays, and what it was is kept as POLICY.bak.

For example, from what a guest did under a policy, at a terminal, and without one:
  msrgate run -p guest.toml --audit --trace boot.jsonl -- qemu-system-x86_64 ...
  msrgate review guest.toml boot.jsonl
  msrgate review guest.toml boot.jsonl --accept needed --dry-run
  printf 'allow\\nskip\\nvalue 0x10\\n' | msrgate review guest.toml boot.jsonl --answers -";

#[derive(ClapArgs)]
pub(crate) struct ReviewArgs {
    /// Policy file, which is written
    pub(crate) policy: PathBuf,
    /// Traces, or summaries of traces that `learn` wrote, in any order
    #[arg(required = true, value_name = "TRACE")]
    pub(crate) traces: Vec<PathBuf>,
    /// Ask nothing, and allow of what the policy denies only this
    #[arg(long, value_enum, value_name = "WHAT", conflicts_with = "answers")]
    pub(crate) accept: Option<AcceptArg>,
    /// Take the answers from a file, one a line; `-` for standard input. Questions for which there is none are skipped
    #[arg(long, value_name = "FILE|-")]
    pub(crate) answers: Option<PathBuf>,
    /// Ask about what a rule denies, too
    #[arg(long)]
    pub(crate) denied: bool,
    /// Write the policy into this file, and leave POLICY as it is
    #[arg(short, long, value_name = "FILE", conflicts_with = "dry_run")]
    pub(crate) output: Option<PathBuf>,
    /// Write no file: print the policy
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a review allows without asking; each more than the one before. None allows what tells of the host's other guests.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum AcceptArg {
    /// What an operating system does unguarded, so that it fails without
    Needed,
    /// Also each read that a guest was served with
    Reads,
    /// Also each write that a guest was served with
    Served,
}

const WHY_AFTER: &str = "\
Takes what KVM, a Linux guest, QEMU, Cloud Hypervisor, Firecracker, Xen, VirtualBox, bhyve and VMware say of MSRs, with any
text around it: times, a host's name, marks of a mail or of Markdown, `journalctl -o json`. Other lines are passed over.
For example:
  msrgate why 'kvm [100]: vcpu0, guest rIP: 0x5 ignored rdmsr: 0x641 data 0x0'
  journalctl -k | msrgate why
  msrgate why /var/log/libvirt/qemu/guest.log";

#[derive(ClapArgs)]
pub(crate) struct WhyArgs {
    /// A log, a line of one, or `-` for standard input; standard input where it is left out
    #[arg(value_name = "FILE|LINE|-")]
    pub(crate) logs: Vec<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct MsrArgs {
    /// A name, a glob, an index, a range, a class as `@pmu`, or words such as `intel microcode`; all where it is left out. A
    /// register and a value, as `IA32_EFER 0xd01`, say what its bits mean
    pub(crate) what: Vec<String>,
    /// Of these, list those that tell of the host and its other guests, and what they tell
    #[arg(long)]
    pub(crate) leaks: bool,
    /// Print one JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

#[derive(ClapArgs)]
pub(crate) struct ManArgs {
    /// The subcommand whose page to print; if omitted, the page of msrgate
    pub(crate) subcommand: Option<String>,
    /// Write all pages to this directory instead: msrgate.1, and one for each subcommand
    #[arg(long, value_name = "DIR", conflicts_with = "subcommand")]
    pub(crate) into: Option<PathBuf>,
}
