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
    /// Whether there is colour; NO_COLOR and CLICOLOR_FORCE say so too
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
    /// Say what an access gets and why: rule, range, bit, what the guest sees
    Explain(ExplainArgs),
    /// Say which accesses two policies, plans or raw filters treat differently
    #[command(after_help = DIFF_AFTER)]
    Diff(DiffArgs),
    /// Write the policy that a raw kernel filter or a plan is
    #[command(after_help = DECOMPILE_AFTER)]
    Decompile(DecompileArgs),
    /// Write what another tool says of MSRs as a policy
    #[command(after_help = IMPORT_AFTER)]
    Import(ImportArgs),
    /// Run a recorded guest's accesses as a real guest under a policy, on KVM or on the engine
    Replay(ReplayArgs),
    /// Compare this machine's kernel with the engine: under policies, under random filters, while filters change
    Verify(VerifyArgs),
    /// Say what a guest can see on this host: every MSR read, and where that is safe written back, by a real guest
    #[command(after_help = SCAN_AFTER, group = ArgGroup::new("more").multiple(true))]
    Scan(ScanArgs),
    /// Start a VMM that knows nothing of msrgate, its guests under a policy
    #[command(after_help = RUN_AFTER)]
    Run(RunArgs),
    /// Start a VMM as it is, and print the filters and masks of MSRs that it gives KVM, each as it does so
    #[command(after_help = CAPTURE_AFTER)]
    Capture(CaptureArgs),
    /// Say what traces tell: who asked for what, how often, when, and what it got
    #[command(after_help = REPORT_AFTER)]
    Report(ReportArgs),
    /// Write the smallest policy that serves what was traced, with reasons
    #[command(after_help = LEARN_AFTER)]
    Learn(LearnArgs),
    /// Look MSRs up by name, index, class or text
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
    /// Show so many rows at most
    #[arg(long, value_name = "N", conflicts_with = "json")]
    pub(crate) top: Option<usize>,
}

/// An order of rows.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SortArg {
    /// Those in which most is not as it was
    Effect,
    /// Those with the most accesses
    Count,
    /// Those of the smallest index
    Msr,
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
    /// Tell what passes the filter on this version of Linux, such as 6.12. Without it: on the kernel that runs here
    #[arg(long, value_name = "VERSION")]
    pub(crate) kernel: Option<Linux>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct PlanArgs {
    /// Policy file
    pub(crate) policy: PathBuf,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
    /// For this machine's kernel: fixed answers that it holds itself cost no exit (presets). Without it the plan is the
    /// same everywhere, and has none
    #[arg(long)]
    pub(crate) host: bool,
    /// Show what has to be saved with a guest under this policy, and what must not be
    #[arg(long, conflicts_with = "emit")]
    pub(crate) state: bool,
    /// Print one JSON object
    #[arg(long, conflicts_with = "emit")]
    pub(crate) json: bool,
    /// Print the plan as source, to build into a VMM; not with --state, and with --host in C alone
    #[arg(long, value_enum)]
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
    /// Flags of crosvm, if they can say all of the policy
    Crosvm,
    /// An allow-list of msr-safe, if it can say all of the policy
    MsrSafe,
}

#[derive(ClapArgs)]
pub(crate) struct ExplainArgs {
    /// Policy file, or a plan or a raw filter in any form of docs/formats.md
    pub(crate) policy: PathBuf,
    /// The MSR: a name or an index
    pub(crate) msr: String,
    /// The direction; both where it is left out
    #[arg(value_enum)]
    pub(crate) op: Option<OpArg>,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
    /// For this machine's kernel: fixed answers that it holds itself cost no exit
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
(docs/formats.md). A raw filter says only what is left to the kernel, so with one of them that is what is compared.

For example, what a change of a policy changes for guests, and what a kernel's filter has that a policy has not:
  msrgate diff old.toml new.toml
  msrgate diff policy.toml filter.json";

#[derive(ClapArgs)]
pub(crate) struct DiffArgs {
    /// A policy, a plan or a raw filter; `-` for standard input
    pub(crate) a: PathBuf,
    /// Another
    pub(crate) b: PathBuf,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
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
    /// Whose words they are
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
    /// Policy files: each is put in force and every boundary in it is tried
    #[arg(value_name = "POLICY", group = "what")]
    pub(crate) policies: Vec<PathBuf>,
    /// Make this many random calls, most of them wrong, and compare what they give and what they do
    #[arg(long, value_name = "N", group = "what")]
    pub(crate) random: Option<u64>,
    /// Count which MSRs the hardware passes through before, under and after a filter
    #[arg(long, group = "what")]
    pub(crate) interception: bool,
    /// Replace a filter under running vCPUs for this many seconds
    #[arg(long, value_name = "SECONDS", group = "what")]
    pub(crate) swap: Option<u64>,
    /// Try every MSR of the ranges, not their boundaries alone
    #[arg(long, conflicts_with_all = ["random", "interception", "swap"])]
    pub(crate) full: bool,
    /// What the random calls follow from; one that is printed where it is left out
    #[arg(long, value_name = "S", conflicts_with_all = ["policies", "interception", "swap"])]
    pub(crate) seed: Option<u64>,
    /// Accesses under each random filter that is accepted
    #[arg(long, value_name = "K", conflicts_with_all = ["policies", "interception", "swap"], default_value_t = 24)]
    pub(crate) accesses: usize,
    /// The kernel that the engine takes after; that of this machine's version where it is left out. `newest` is without
    /// that kernel's known gap at IA32_TSC_DEADLINE
    #[arg(long, value_parser = PossibleValuesParser::new(Kernel::profiles()))]
    pub(crate) profile: Option<String>,
    /// What the guest runs in
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
    /// Say what differs from an earlier scan, a file that `scan --json` wrote
    #[arg(long, value_name = "FILE")]
    pub(crate) against: Option<PathBuf>,
    /// Scan all MSRs of the database too
    #[arg(long, group = "more")]
    pub(crate) all_known: bool,
    /// Scan these too: a range, a name, a glob or a class (@pmu); may be given several times
    #[arg(long, value_name = "FIRST..=LAST", group = "more")]
    pub(crate) range: Vec<String>,
    /// Scan nothing but what --all-known and --range name
    #[arg(long, requires = "more")]
    pub(crate) only: bool,
    /// The guest's local APIC is in x2APIC mode: its registers are MSRs then (0x800..=0x8ff), which no filter stops
    #[arg(long)]
    pub(crate) x2apic: bool,
    /// Which MSRs are written back
    #[arg(long, value_enum, default_value_t = WriteArg::Safe)]
    pub(crate) write: WriteArg,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which MSRs a scan writes back.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WriteArg {
    /// None
    None,
    /// Those where a write is no command, such as to send an interrupt
    Safe,
    /// All: what breaks the guest is told
    All,
}

const RUN_AFTER: &str = "\
Options come before the VMM; what follows its name is its own. `--` before it may be left out.

The VMM keeps its terminal, signals and exit status. Signals that msrgate gets go on to it, but for SIGUSR1, which \
prints the summary so far on standard error; it is printed at the end too. \
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
    /// Change nothing: write down the first touch of each MSR that the policy does not leave to the kernel
    #[arg(long, requires = "policy", conflicts_with = "ignore_unknown")]
    pub(crate) audit: bool,
    /// Without a policy, write down in the trace what the guests touch
    #[arg(long, value_enum, value_name = "WHAT", num_args = 0..=1, require_equals = true,
        default_missing_value = "first", requires = "trace", conflicts_with_all = ["policy", "audit", "ignore_unknown"])]
    pub(crate) learn: Option<LearnArg>,
    /// MSRs that KVM does not know read as zero and ignore writes, for this VMM's guests alone
    #[arg(long)]
    pub(crate) ignore_unknown: bool,
    /// Write down each access that the policy decides: JSON Lines, or for people on standard error with `-`. In the name
    /// `%n` is the VM's name, `%p` the VMM's process, `%t` the time, and `%%` a percent sign
    #[arg(long, value_name = "FILE|-")]
    pub(crate) trace: Option<PathBuf>,
    /// Keep the newest accesses only: where FILE has this size, such as 100M, it takes the place of FILE.1, and FILE is
    /// begun anew
    #[arg(long, value_name = "SIZE", requires = "trace", value_parser = size)]
    pub(crate) trace_size: Option<u64>,
    /// Have the guest's instruction pointer in the trace
    #[arg(long, requires = "trace")]
    pub(crate) rip: bool,
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
    /// The first touch of each MSR and direction; the guest sees what it always sees
    First,
    /// Every access, passed on to the kernel as the host would make it: the guest may see something else
    All,
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

The VMM keeps its terminal, signals and exit status, and gets what the kernel gives. To other users than root the kernel allows \
that only with no_new_privs, which is set then.";

#[derive(ClapArgs)]
pub(crate) struct CaptureArgs {
    /// Write the lines into this file, and not to standard error among what the VMM prints there
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// The VMM and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "VMM")]
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
    /// Say beside each row what this policy decides, by which rule and why
    #[arg(short, long, value_name = "POLICY")]
    pub(crate) policy: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) cpuid: CpuidArgs,
    /// Write one page for a browser, with a timeline and a map, that asks nothing of any network; `-` prints it
    #[arg(long, value_name = "FILE|-", conflicts_with = "json")]
    pub(crate) html: Option<PathBuf>,
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
    /// Write a summary in place of a policy: small, and to be merged with others by `learn`
    #[arg(long, conflicts_with_all = ["widen", "json"])]
    pub(crate) summary: bool,
    /// Say what is otherwise than in an older policy, or than in the policy that an older summary gives: what is added,
    /// and what was not touched again
    #[arg(long, value_name = "OLDER", conflicts_with = "summary")]
    pub(crate) since: Option<PathBuf>,
    /// Learn from traces that accesses are missing from, too: the policy may deny what the guests did
    #[arg(long)]
    pub(crate) incomplete: bool,
    /// Allow more than was seen, where at least half of it was seen
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

#[derive(ClapArgs)]
pub(crate) struct MsrArgs {
    /// A name, a glob, an index, a range, a class as `@pmu`, or words such as `intel microcode`; all where it is left out
    pub(crate) what: Vec<String>,
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
    /// The page of this subcommand; that of msrgate where it is left out
    pub(crate) subcommand: Option<String>,
    /// Write all pages into this directory instead: msrgate.1, and one of each subcommand
    #[arg(long, value_name = "DIR", conflicts_with = "subcommand")]
    pub(crate) into: Option<PathBuf>,
}
