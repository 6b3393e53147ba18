//! What people see: lines that fit their terminal, the verdict first, and colour where it is wanted.

use crate::command::{Folder, Ran, Terminal, fits_any_terminal, on_terminal, plain};

const LONG: &str = "version = 1\nname = \"a policy\"\ndefault = \"deny\"\n\n[[rule]]\nmsr = [\"@x86_64\", \"IA32_TSC_DEADLINE\", \"IA32_EFER\"]\nread = \"allow\"\nwrite = \"allow\"\n\
     why = \"a reason that goes on until it is longer than any line of a terminal of eighty columns could be, by far\"\n\n\
     [[rule]]\nmsr = \"MSR_CORE_THREAD_COUNT\"\nread = { shadow = \"0x1234567812345678\" }\nwrite = \"shadow\"\n";

#[test]
fn every_command_fits_a_terminal_and_breaks_no_name() {
    let folder = Folder::furnished();
    folder.write("long.toml", LONG.replace("\"@x86_64\", ", ""));
    folder.write(
        "wrong.toml",
        LONG.replace("@x86_64", "IA32_TSC_DEADLIN")
            .replace("\"shadow\"", "\"shadwo\""),
    );
    for line in [
        "report traces/linux-6.1-microvm.jsonl --all",
        "report traces/linux-6.1-pc-smp2.jsonl traces/linux-6.1-microvm.jsonl",
        "report -p long.toml traces/linux-6.1-pc-smp2.jsonl --sort count --top 9",
        "report -p policies/linux-pc.toml traces/linux-6.1-pc-smp2.jsonl --all",
        "replay --backend engine -p long.toml traces/linux-6.1-microvm.jsonl",
        "replay --backend engine -p long.toml traces/linux-6.1-microvm.jsonl --all",
        "plan long.toml",
        "plan policies/linux-pc.toml",
        "plan --state policies/linux-pc.toml",
        "explain long.toml IA32_EFER",
        "explain long.toml 0x35",
        "diff long.toml policies/linux-pc.toml --all",
        "diff policies/qemu.toml policies/linux-microvm.toml",
        "msr",
        "msr @pmu",
        "msr IA32_EFER",
        "msr 0x35f",
        "check long.toml policies/sandbox.toml",
        "check wrong.toml",
        "check missing.toml",
    ] {
        let arguments: Vec<&str> = line.split(' ').collect();
        fits_any_terminal(|| folder.command(&arguments), Terminal::Both);
    }
    fits_any_terminal(
        || folder.command(&["learn", "--since", "long.toml", TRACE]),
        Terminal::Error,
    );
}

const REPLAY: [&str; 5] = ["replay", "--backend", "engine", "-p", "linux.toml"];
const TRACE: &str = "traces/linux-6.1-microvm.jsonl";

/// A policy that serves Linux but for what it denies here.
fn furnished() -> Folder {
    let folder = Folder::furnished();
    folder.write(
        "linux.toml",
        "version = 1\ndefault = \"allow\"\n\n[[rule]]\nmsr = [\"IA32_APIC_BASE\", \"IA32_TSC_DEADLINE\"]\nwrite = \"deny\"\n",
    );
    folder
}

/// The first words of a table's rows.
fn rows(ran: &Ran) -> Vec<String> {
    let rows = ran.out.lines().filter(|line| line.starts_with("0x"));
    let words = rows.map(|row| {
        row.split_whitespace()
            .take(4)
            .map(str::to_owned)
            .collect::<Vec<_>>()
            .join(" ")
    });
    words.collect()
}

#[test]
fn a_replay_says_first_what_the_policy_changed_and_the_rest_is_a_count() {
    let folder = furnished();
    let ran = folder.run(&[&REPLAY[..], &[TRACE]].concat()).code(1);
    let first = ran.out.lines().next();
    assert_eq!(first, Some("the policy changed 498 of 664 accesses"), "{}", ran.out);
    let changed = ["0x6e0 IA32_TSC_DEADLINE wrmsr 497", "0x1b IA32_APIC_BASE wrmsr 1"];
    assert_eq!(rows(&ran), changed, "{}", ran.out);
    let ran = ran.shows(&["more rows, where nothing changed; --all shows all"]);
    let all = folder.run(&[&REPLAY[..], &["--all", TRACE]].concat()).code(1);
    let beside = ran
        .out
        .lines()
        .find_map(|line| line.strip_prefix("and ")?.split(' ').next()?.parse().ok());
    assert_eq!(beside, Some(rows(&all).len() - changed.len()));
    assert_eq!(rows(&all)[..2], changed);
}

#[test]
fn rows_come_in_the_order_that_is_asked_for_and_as_many() {
    let folder = furnished();
    let report = |options: &[&str]| rows(&folder.run(&[&["report", TRACE], options].concat()).code(0));
    let by_msr = report(&["--sort", "msr", "--all"]);
    let index =
        |row: &String| u32::from_str_radix(row[2..].split(' ').next().unwrap_or_default(), 16).expect("an index");
    assert!(by_msr.is_sorted_by_key(index) && by_msr.len() > 40, "{by_msr:?}");
    let count = |row: &String| -> u64 {
        let words: Vec<&str> = row.split(' ').collect();
        words.last().and_then(|word| word.parse().ok()).unwrap_or_default()
    };
    let named: Vec<u64> = report(&["--sort", "count", "--top", "5"]).iter().map(count).collect();
    assert!(named.len() == 5 && named[0] == 497, "{named:?}");
    // The one that faulted.
    assert_eq!(report(&["--top", "1"]), ["0xc0011028 FP_CFG rdmsr 1"]);
    assert_eq!(report(&[]).len(), 40);
    folder
        .run(&["report", TRACE, "--top", "3"])
        .code(0)
        .shows(&[&format!("and {} more rows; --all shows all", by_msr.len() - 3)]);
    let diff = ["diff", "linux.toml", "policies/linux-pc.toml"];
    let ran = folder
        .run(&[&diff[..], &["--top", "1", "--sort", "count"]].concat())
        .code(1);
    assert!(
        rows(&ran).len() == 1 && ran.out.contains("more ranges; --all"),
        "{}",
        ran.out
    );
    assert!(
        ran.out
            .lines()
            .next()
            .is_some_and(|line| line.ends_with("accesses differ")),
        "{}",
        ran.out
    );
    folder
        .run(&["report", TRACE, "--json", "--top", "3"])
        .code(2)
        .says(&["--json"]);
}

#[test]
fn in_a_pipe_a_row_is_one_line_and_the_same_whatever_the_terminal() {
    let folder = furnished();
    let report = ["report", "-p", "linux.toml", "traces/linux-6.1-pc-smp2.jsonl", "--all"];
    let ran = folder.run(&report).code(0);
    let header = ran.out.lines().find(|line| line.starts_with("MSR ")).expect("a header");
    for title in [
        "name", "op", "count", "got", "policy", "values", "vCPUs", "first s", "last s",
    ] {
        assert!(header.contains(title), "{header}");
    }
    let mut command = folder.command(&report);
    assert_eq!(Ran::of(command.env("COLUMNS", "40")).out, ran.out);
}

#[test]
fn colour_is_where_it_is_wanted_in_every_command() {
    let folder = furnished();
    folder.write(
        "wrong.toml",
        "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = 1\nread = \"no\"\n",
    );
    let replay = [&REPLAY[..], &[TRACE]].concat();
    let commands: [&[&str]; 10] = [
        &["--help"],
        &["report"],
        &["check", "linux.toml"],
        &["check", "wrong.toml"],
        &["report", TRACE],
        &replay,
        &["plan", "linux.toml"],
        &["diff", "linux.toml", "policies/qemu.toml"],
        &["msr", "@tsc"],
        &["explain", "missing.toml", "0x10"],
    ];
    for arguments in commands {
        let ran = |flags: &[&str], variables: &[(&str, &str)]| {
            let mut command = folder.command(&[flags, arguments].concat());
            let ran = Ran::of(command.envs(variables.iter().copied()));
            ran.out + &ran.err
        };
        let coloured = |text: &str| text.contains("\u{1b}[");
        let bare = ran(&[], &[]);
        assert!(!coloured(&bare), "{arguments:?}");
        for (flags, variables, wanted) in [
            (&["--color", "always"][..], &[][..], true),
            (&["--color=always"], &[("NO_COLOR", "1"), ("TERM", "dumb")], true),
            (&[], &[("CLICOLOR_FORCE", "1")], true),
            (&[], &[("CLICOLOR_FORCE", "0")], false),
            (&[], &[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], false),
            (&["--color", "never"], &[("CLICOLOR_FORCE", "1")], false),
        ] {
            let shown = ran(flags, variables);
            assert_eq!(
                coloured(&shown),
                wanted,
                "{flags:?} {arguments:?} {variables:?}: {shown}"
            );
            assert_eq!(plain(&shown), bare, "{arguments:?}");
        }
        let after = Ran::of(&mut folder.command(&[arguments, &["--color", "always"]].concat()));
        assert!(coloured(&(after.out + &after.err)), "{arguments:?}");
        assert!(
            coloured(&on_terminal(folder.command(arguments), 80, Terminal::Both)),
            "{arguments:?}"
        );
        let never = [arguments, &["--color", "never"]].concat();
        assert!(
            !coloured(&on_terminal(folder.command(&never), 80, Terminal::Both)),
            "{arguments:?}"
        );
    }
}
