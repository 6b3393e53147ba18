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
        "explain long.toml",
        "explain policies/qemu-rapl.toml --all",
        "explain policies/linux-pc.toml @mce",
        "explain policies/linux-pc.toml @mce --all",
        "plan policies/linux-pc.toml --all",
        "msr --leaks",
        "diff long.toml policies/linux-pc.toml --all",
        "diff policies/qemu.toml policies/linux-microvm.toml",
        "msr",
        "msr @pmu",
        "msr IA32_EFER",
        "msr 0x35f",
        "check long.toml policies/deny-all.toml",
        "check wrong.toml",
        "check missing.toml",
    ] {
        let arguments: Vec<&str> = line.split(' ').collect();
        fits_any_terminal(|| folder.command(&arguments), Terminal::Both);
    }
    for line in [
        &["learn", "--since", "long.toml", TRACE][..],
        &["review", "long.toml", TRACE, "--accept", "served", "--dry-run"],
    ] {
        fits_any_terminal(|| folder.command(line), Terminal::Error);
    }
    folder.write("answers", "allow\ndeny\nignore\n");
    let asked = [
        "review",
        "policies/linux-pc.toml",
        "traces/linux-6.1-microvm.jsonl",
        "--answers",
        "answers",
        "--dry-run",
    ];
    fits_any_terminal(|| folder.command(&asked), Terminal::Error);
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

/// What the command shows on a wide terminal, without its colours.
fn shown(folder: &Folder, arguments: &[&str]) -> String {
    plain(&on_terminal(folder.command(arguments), 200, Terminal::Both))
}

/// The first words of a table's rows.
fn rows(text: &str) -> Vec<String> {
    let rows = text.lines().filter(|line| line.starts_with("0x"));
    let words = rows.map(|row| row.split_whitespace().take(4).collect::<Vec<_>>().join(" "));
    words.collect()
}

#[test]
fn a_replay_says_first_what_the_policy_changed_and_the_rest_is_a_count() {
    let folder = furnished();
    let replay = [&REPLAY[..], &[TRACE]].concat();
    let text = shown(&folder, &replay);
    assert_eq!(
        text.lines().next(),
        Some("the policy changed 398 of 564 accesses"),
        "{text}"
    );
    let changed = ["0x6e0 IA32_TSC_DEADLINE wrmsr 397", "0x1b IA32_APIC_BASE wrmsr 1"];
    assert_eq!(rows(&text), changed, "{text}");
    let rest = text
        .lines()
        .find(|line| line.ends_with("more rows, where nothing changed; --all shows all"));
    let rest = rest.and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let all = shown(&folder, &[&replay[..], &["--all"]].concat());
    assert_eq!(rest, Some(rows(&all).len() - changed.len()), "{text}");
    assert_eq!(rows(&all)[..2], changed);
    // A pipe has them all.
    assert_eq!(folder.run(&replay).code(1).out, all);
}

#[test]
fn rows_come_in_the_order_that_is_asked_for_and_as_many() {
    let folder = furnished();
    let report = |options: &[&str]| shown(&folder, &[&["report", TRACE], options].concat());
    let by_msr = rows(&report(&["--sort", "msr", "--all"]));
    let index =
        |row: &String| u32::from_str_radix(row[2..].split(' ').next().unwrap_or_default(), 16).expect("an index");
    assert!(by_msr.is_sorted_by_key(index) && by_msr.len() > 40, "{by_msr:?}");
    let most = rows(&report(&["--sort", "count", "--top", "5"]));
    assert!(
        most.len() == 5 && most[0] == "0x6e0 IA32_TSC_DEADLINE wrmsr 397",
        "{most:?}"
    );
    // The one that faulted.
    assert_eq!(rows(&report(&["--top", "1"])), ["0xc0011028 FP_CFG rdmsr 1"]);
    assert_eq!(rows(&report(&[])).len(), 40);
    let rest = format!("and {} more rows; --all shows all", by_msr.len() - 40);
    assert!(report(&[]).contains(&rest), "{rest}");
    let piped = folder.run(&["report", TRACE]).code(0).out;
    assert_eq!(rows(&piped).len(), by_msr.len());
    let diff = [
        "diff",
        "linux.toml",
        "policies/linux-pc.toml",
        "--top",
        "1",
        "--sort",
        "count",
    ];
    let ran = folder.run(&diff).code(1).shows(&["more ranges; --all shows all"]);
    assert_eq!(rows(&ran.out).len(), 1, "{}", ran.out);
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
