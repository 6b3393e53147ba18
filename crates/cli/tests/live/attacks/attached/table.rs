//! The table of `docs/under-any-vmm.md`: what guests get before, under and after a policy, by the VMM, the way and the policy.

use std::fmt::Write;

use super::*;

const DOCUMENT: &str = include_str!("../../../../../../docs/under-any-vmm.md");
const BEGIN: &str = "<!-- written by the test `table` -->\n";
const END: &str = "<!-- end -->\n";

/// What a column has: a policy, options, and the access of which a cell says what it gets.
const KINDS: [(&str, &str, &[&str], &str); 7] = [
    ("`deny`", "read = \"deny\"", &[], "r:0x174"),
    ("`value`", "read = { value = \"0x5\" }", &[], "r:0x174"),
    ("`ignore`", "write = \"ignore\"", &[], "w:0x174=7"),
    (
        "`mask`",
        "read = { mask = { keep = \"0\", set = \"0x9\" } }",
        &[],
        "r:0x174",
    ),
    (
        "`--ignore-unknown`",
        "write = \"allow\"",
        &["--ignore-unknown"],
        "r:0xdeadbeef",
    ),
    (
        "`--audit`",
        "read = \"deny\"",
        &["--audit", "--trace", "trace.jsonl"],
        "r:0x174",
    ),
    ("`--learn`", "", &["--learn", "--trace", "trace.jsonl"], "r:0x174"),
];

/// What a guest gets, as a cell shows it, and what its register has then.
fn got(vmm: &mut Asked, access: &str) -> String {
    let line = vmm.ask(&format!("0 {access}"));
    let got = line.rsplit(' ').next().unwrap().replace("fault", "#GP");
    // A write is put back, and what came of it is shown.
    match access.starts_with('w') {
        true => {
            let value = vmm.ask("0 r:0x174");
            vmm.ask("0 w:0x174=0");
            format!("{got}, {}", value.rsplit(' ').next().unwrap())
        }
        false => got,
    }
}

/// A cell: before, under and after; or that the way is refused.
fn cell(program: &Path, arguments: &[&str], is_run: bool, kind: (&str, &str, &[&str], &str)) -> String {
    let (_, rule, options, access) = kind;
    let folder = with_policy(&format!(
        "default = \"allow\"\n[[rule]]\nmsr = \"0x174\"\n{}\n",
        if rule.is_empty() { "read = \"allow\"" } else { rule }
    ));
    let mut vmm = Asked::start(program, arguments);
    let before = got(&mut vmm, access);
    let process = vmm.process();
    let (under, after) = if is_run {
        vmm.end();
        let policy: &[&str] = if rule.is_empty() { &[] } else { &["-p", "policy.toml"] };
        vmm = Asked::of(super::super::under(
            &folder,
            &[policy, options].concat(),
            program,
            arguments,
        ));
        let under = got(&mut vmm, access);
        // What changes nothing lasts as long as the VMM.
        if options.contains(&"--audit") || options.contains(&"--learn") {
            return format!("{before} → {under}");
        }
        folder.run(&["detach", &vmm.process()]).code(0);
        (under, got(&mut vmm, access))
    } else {
        let mut command = folder.command(&["attach"]);
        if !rule.is_empty() {
            command.args(["-p", "policy.toml"]);
        }
        let attach = match Attach::of(command.args(NONE).args(options).arg(process)) {
            Ok(attach) => attach,
            Err(ran) => {
                assert_eq!(ran.code, Some(3), "{}", ran.err);
                return "refused".to_owned();
            }
        };
        let under = got(&mut vmm, access);
        attach.detach().code(0);
        (under, got(&mut vmm, access))
    };
    assert_eq!(after, before, "{kind:?}");
    if !is_run {
        vmm.end();
    }
    format!("{before} → {under} → {after}")
}

#[test]
fn the_table_of_ways_is_what_guests_get() {
    let vmms = Way::IN_C
        .into_iter()
        .map(|way| (way, way.name().to_owned(), &["1", "1"][..]));
    let sandboxes = [
        (Way::Static, "static, sandboxed".to_owned(), &["1", "1", "sandbox"][..]),
        (
            Way::Static,
            "static, sandboxed but for `futex`".to_owned(),
            &["1", "1", "waits"][..],
        ),
    ];
    let mut table = String::from("| VMM | way |");
    KINDS.iter().for_each(|kind| write!(table, " {} |", kind.0).unwrap());
    table += "\n| --- | --- |";
    KINDS.iter().for_each(|_| table += " --- |");
    table += "\n";
    let mut rows = Vec::new();
    let mut is_whole = true;
    for (way, name, arguments) in vmms.chain(sandboxes) {
        let Some(program) = vmm("running", way) else {
            is_whole = false;
            continue;
        };
        for (is_run, word) in [(true, "run"), (false, "attach")] {
            let cells = KINDS.map(|kind| cell(&program, arguments, is_run, kind));
            rows.push(format!("| {name} | `{word}` | {} |\n", cells.join(" | ")));
        }
    }
    let (before, rest) = DOCUMENT.split_once(BEGIN).expect("the table's begin");
    let (shown, after) = rest.split_once(END).expect("the table's end");
    if std::env::var_os("MSRGATE_WRITE_DOCS").is_some() {
        assert!(is_whole, "a VMM could not be built");
        let text = [before, BEGIN, "\n", &table, &rows.concat(), "\n", END, after].concat();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/under-any-vmm.md");
        std::fs::write(path, text).unwrap();
        return;
    }
    assert!(
        shown.contains(&table),
        "{table}\nis not in docs/under-any-vmm.md:\n{shown}"
    );
    for row in rows {
        assert!(shown.contains(&row), "{row}\nis not in docs/under-any-vmm.md:\n{shown}");
    }
}
