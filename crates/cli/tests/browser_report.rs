//! The pages that `--html` writes, in a browser. Skipped where there is none, unless MSRGATE_LANE_REQUIRE is 1.

mod browser;
mod command;

use std::path::PathBuf;

use browser::{Look, Page, chromium};
use command::Folder;
use serde_json::json;

const LOOKS: [Look; 4] = [
    look(1280, 900, "light"),
    look(1280, 900, "dark"),
    look(390, 844, "light"),
    look(390, 844, "dark"),
];

const fn look(width: u32, height: u32, scheme: &'static str) -> Look {
    Look {
        width,
        height,
        scheme,
        script: true,
    }
}

/// A trace of everything that a guest can get under a policy, with costs.
fn busy() -> String {
    let mut text = json!({ "msrgate_trace": 1, "guest": "Linux", "vmm": "QEMU" }).to_string();
    let what = [
        ("rdmsr", 0x8b, "value", 2),
        ("wrmsr", 0x174, "allow", 1),
        ("rdmsr", 0x606, "zero", 4),
        ("wrmsr", 0x48, "only", 6),
        ("wrmsr", 0xc000_0082, "once", 7),
        ("rdmsr", 0x611, "deny", 8),
        ("rdmsr", 0x611, "zero", 9),
        ("rdmsr", 0xc001_0015_u32, "fault", 0),
        ("wrmsr", 0x4b56_4d01, "pass", 1),
        ("rdmsr", 0x4000_0000, "deny", 0),
        ("rdmsr", 0xdead_0000, "fault", 0),
    ];
    for (t, (op, msr, did, rule)) in (0..900_u64).zip(what.into_iter().cycle()) {
        let mut event = json!({
            "t": t * t * 977, "vm": 0, "vcpu": t % 4, "op": op, "msr": msr, "did": did, "rule": rule,
            "value": format!("{:#x}", t % 13 * 0x1234_5678_9abc), "rip": format!("{:#x}", 0xffff_ffff_8100_0000 + t % 30 * 64),
        });
        if did != "allow" {
            event["reason"] = json!("filter");
            event["cost"] = json!(700 + t * 7919 % 5000);
        }
        text.push_str(&format!("\n{event}"));
    }
    text.push('\n');
    text
}

/// A page over both traces and a policy, one over a single trace, one of a guest that gets everything; policies of both
/// defaults, what differs between two, and nothing that differs.
fn pages(folder: &Folder) -> [(&'static str, PathBuf); 7] {
    let both = ["traces/linux-6.1-microvm.jsonl", "traces/linux-6.1-pc-smp2.jsonl"];
    folder.write("busy.jsonl", busy());
    let microvm = "policies/linux-microvm.toml";
    let runs: [(&str, &[&str], i32); 7] = [
        (
            "both",
            &["report", "-p", "policies/fixed-microcode.toml", both[0], both[1]],
            0,
        ),
        ("one", &["report", both[1]], 0),
        ("busy", &["report", "busy.jsonl", "-p", microvm], 0),
        ("deny", &["plan", microvm], 0),
        ("allow", &["plan", "policies/openvmm-stubs.toml"], 0),
        ("diff", &["diff", microvm, "policies/qemu.toml"], 1),
        ("same", &["diff", microvm, microvm], 0),
    ];
    runs.map(|(name, arguments, code)| {
        let file = format!("{name}.html");
        folder.run(&[arguments, &["--html", &file]].concat()).code(code);
        (name, folder.path().join(file))
    })
}

/// The indices that the table shows, from top to bottom.
fn shown(page: &mut Page) -> Vec<String> {
    let cells = page.value(
        "[...document.querySelectorAll('#accesses tbody tr:not([hidden])')].map(row => row.cells[0].textContent + row.dataset.op)",
    );
    serde_json::from_value(cells).expect("texts")
}

/// What has less contrast than WCAG's 4.5 with what is behind it: texts, with both colours.
const FAINT: &str = r"(() => {
    const parse = (text) => (text.match(/[\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
            if (a === 1) return [r, g, b];
            if (a !== 0) throw new Error('a background that is neither there nor not');
        }
        return [255, 255, 255];
    };
    const faint = [];
    let seen = 0;
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const element = node.parentElement;
        if (!node.data.trim() || ['SCRIPT', 'STYLE', 'TITLE', 'title'].includes(element.tagName)) continue;
        if (!element.checkVisibility()) continue;
        seen += 1;
        const style = getComputedStyle(element);
        const [r, g, b, a = 1] = parse(element instanceof SVGElement ? style.fill : style.color);
        const back = behind(element);
        const ink = [r, g, b].map((c, i) => c * a + back[i] * (1 - a));
        const [high, low] = [light(ink), light(back)].sort((x, y) => y - x);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < 4.5) faint.push(`${node.data.trim()}: ${ratio.toFixed(2)}, ${ink} on ${back}`);
    }
    return { seen, faint };
})()";

#[test]
fn a_page_fits_asks_nothing_and_can_be_read_on_desktop_and_phone_light_and_dark() {
    let Some(chromium) = chromium() else {
        return;
    };
    let folder = Folder::furnished();
    let mut page = Page::new(&chromium, folder.path());
    for (name, file) in pages(&folder) {
        for look in LOOKS {
            page.show(&file, look);
            let widths = page.value("[document.documentElement.scrollWidth, innerWidth]");
            assert_eq!(widths, json!([look.width, look.width]), "{name} {look:?} overflows");
            let cut = page.value(
                "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)\
                 .map(box => [box.getAttribute('aria-labelledby'), box.scrollWidth, box.clientWidth])",
            );
            match look.width {
                1280 => assert_eq!(cut, json!([]), "{name} {look:?} cuts columns off"),
                _ => assert!(
                    name == "same" || cut != json!([]),
                    "{name}: the table scrolls in its own box"
                ),
            }
            let contrast = page.value(FAINT);
            let least = if name == "same" { 3 } else { 200 };
            assert!(contrast["seen"].as_u64() > Some(least), "{contrast}");
            assert_eq!(contrast["faint"], json!([]), "{name} {look:?}");
            assert_eq!(page.complaints(), [""; 0], "{name} {look:?}");
            page.picture(&format!("{name}-{}-{}", look.width, look.scheme));
        }
    }
}

#[test]
fn a_page_says_its_verdict_first_and_each_link_leads_to_what_is_there() {
    let Some(chromium) = chromium() else {
        return;
    };
    let folder = Folder::furnished();
    let mut page = Page::new(&chromium, folder.path());
    let verdicts = [
        (
            "both",
            "good",
            "fixed-microcode denies nothing that the guest was served with",
            2,
        ),
        ("one", "odd", "3 of 386 accesses faulted in the guest", 1),
        (
            "busy",
            "bad",
            "linux-microvm denies 164 of the 574 accesses that the guest was served with",
            2,
        ),
        ("deny", "even", "linux-microvm lets a guest read ", 7),
        (
            "allow",
            "even",
            "openvmm-stubs leaves to the kernel what a guest does, but for reads of ",
            1,
        ),
        ("diff", "odd", "A and B differ in ", 7),
        ("same", "good", "A and B are equal", 0),
    ];
    for ((name, file), (other, tone, text, links)) in pages(&folder).into_iter().zip(verdicts) {
        assert_eq!(name, other);
        for look in [LOOKS[0], LOOKS[2]] {
            page.show(&file, look);
            let first = page.value(
                "(() => { const heads = [...document.querySelectorAll('h1, h2, h3')]; return { \
                 text: heads[0].textContent, level: heads[0].tagName, tone: heads[0].className, \
                 top: heads[0].getBoundingClientRect().top, others: heads.filter(head => head.tagName === 'H1').length }; })()",
            );
            let told = first["text"].as_str().expect("text");
            assert!(told.starts_with(text), "{name}: {told}");
            assert_eq!(
                (&first["level"], &first["tone"], &first["others"]),
                (&json!("H1"), &json!(format!("verdict {tone}")), &json!(1)),
                "{name}"
            );
            assert!(first["top"].as_f64() < Some(100.0), "{name}: {first}");
            let about = page.value("document.querySelectorAll('.about li').length").as_u64();
            assert!(about >= Some(links), "{name}: the verdict is about {about:?}");
            let dead = page.value(
                "[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))\
                 .filter(href => !href.startsWith('#') || !document.getElementById(href.slice(1)))",
            );
            assert_eq!(dead, json!([]), "{name}: links to what is not there");
            let twice = page.value(
                "[...document.querySelectorAll('[id]')].map(e => e.id).filter((id, at, all) => all.indexOf(id) !== at)",
            );
            assert_eq!(twice, json!([]), "{name}: ids that are there twice");
            let nameless = page.value(
                "[...document.querySelectorAll('table, section, [role=region]')].filter(e => { \
                 const by = e.getAttribute('aria-labelledby'); \
                 return by ? !document.getElementById(by)?.textContent : !e.getAttribute('aria-label'); })\
                 .map(e => e.outerHTML.slice(0, 99))",
            );
            assert_eq!(nameless, json!([]), "{name}: without a name for a screen reader");
            assert_eq!(page.complaints(), [""; 0], "{name} {look:?}");
        }
    }
    // A click on the first thing leads to its row, which is seen.
    let [_, (_, one), ..] = pages(&folder);
    page.show(&one, LOOKS[2]);
    page.click(".about a");
    page.value("new Promise(done => setTimeout(done, 50))");
    let seen = page.value(
        "(() => { const row = document.querySelector('tr:target'); const { top, bottom } = row.getBoundingClientRect(); \
         return row.dataset.got.includes('faulted') && top >= 0 && bottom <= innerHeight; })()",
    );
    assert_eq!(seen, true);
}

#[test]
fn the_table_is_sorted_by_a_click_and_by_keys_and_says_so() {
    let Some(chromium) = chromium() else {
        return;
    };
    let folder = Folder::furnished();
    let [(_, file), ..] = pages(&folder);
    let mut page = Page::new(&chromium, folder.path());
    page.show(&file, LOOKS[0]);
    let by_msr = shown(&mut page);
    assert_eq!(
        page.value("document.querySelector('thead th[aria-sort]').textContent"),
        "MSR"
    );
    let counts = "[...document.querySelectorAll('#accesses tbody tr')].map(row => Number(row.dataset.count))";
    let sorted = "[...document.querySelectorAll('thead th[aria-sort]')].map(th => [th.textContent, th.getAttribute('aria-sort')])";
    page.click("#accesses th:nth-child(4) button");
    let up: Vec<u64> = serde_json::from_value(page.value(counts)).expect("counts");
    assert!(up.is_sorted() && up.first() < up.last(), "{up:?}");
    assert_eq!(page.value(sorted), json!([["Count", "ascending"]]));
    assert_ne!(shown(&mut page), by_msr);
    // From there with the keyboard: once more for the other direction, and on to the next column.
    page.press("Enter", "\r");
    let down: Vec<u64> = serde_json::from_value(page.value(counts)).expect("counts");
    assert!(down.iter().rev().is_sorted() && down.len() == up.len(), "{down:?}");
    assert_eq!(page.value(sorted), json!([["Count", "descending"]]));
    page.press("Tab", "");
    page.press(" ", " ");
    assert_eq!(page.value(sorted), json!([["When", "ascending"]]));
    // A region that scrolls takes the keys too.
    assert_eq!(page.value("document.querySelector('.tall').tabIndex"), 0);
    page.click("#accesses th:nth-child(1) button");
    assert_eq!(shown(&mut page), by_msr);
    assert_eq!(page.complaints(), [""; 0]);
}

#[test]
fn the_table_is_filtered_by_text_direction_and_what_was_got() {
    let Some(chromium) = chromium() else {
        return;
    };
    let folder = Folder::furnished();
    folder.write(
        "deny.toml",
        "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = \"@mtrr\"\nread = \"allow\"\nwrite = \"allow\"\n",
    );
    let traces = ["traces/linux-6.1-microvm.jsonl", "traces/linux-6.1-pc-smp2.jsonl"];
    folder
        .run(&[&["report", "--html", "page.html", "-p", "deny.toml"], &traces[..]].concat())
        .code(0);
    let mut page = Page::new(&chromium, folder.path());
    page.show(&folder.path().join("page.html"), LOOKS[2]);
    let all = shown(&mut page);
    let status = "document.querySelector('[role=status]').textContent";
    let report = folder
        .run(&[&["report", "--json"], &traces[..]].concat())
        .code(0)
        .json();
    // Thousands have a comma too.
    let told = page.value(status).as_str().map(|text| text.replace(',', ""));
    assert_eq!(
        told,
        Some(format!("{} rows {} accesses", all.len(), report["accesses"]))
    );
    // What the policy denies, and so all but the MTRRs.
    page.click("input[name=broken]");
    let broken = shown(&mut page);
    assert!(
        broken.len() < all.len() && broken.iter().all(|row| !row.starts_with("0x20")),
        "{broken:?}"
    );
    page.click("input[name=broken]");
    page.click("#find");
    for key in "TSC write".chars() {
        page.press(&key.to_string(), &key.to_string());
    }
    assert_eq!(shown(&mut page), [""; 0]);
    assert_eq!(page.value("document.querySelector('.none').hidden"), false);
    page.value("document.querySelector('#find').value = 'lstar Syscall'; document.querySelector('#find').dispatchEvent(new Event('input'))");
    assert_eq!(shown(&mut page), ["0xc0000082wrmsr"]);
    assert!(
        page.value(status)
            .as_str()
            .is_some_and(|text| text.starts_with("1 of "))
    );
    page.click("input[value=wrmsr]");
    assert_eq!(shown(&mut page), [""; 0]);
    // The map leads to a row that the filter hides.
    page.value("location.hash = '#wrmsr-0xc0000082'");
    page.value("new Promise(done => setTimeout(done, 50))");
    assert_eq!(shown(&mut page), all);
    page.click("input[value=allowed]");
    let faulted = shown(&mut page);
    assert!((1..all.len()).contains(&faulted.len()), "{faulted:?}");
    assert_eq!(page.complaints(), [""; 0]);
}

#[test]
fn without_its_script_a_page_has_everything_but_its_tools() {
    let Some(chromium) = chromium() else {
        return;
    };
    let folder = Folder::furnished();
    let [(_, file), ..] = pages(&folder);
    let look = Look {
        script: false,
        ..LOOKS[2]
    };
    let mut page = Page::new(&chromium, folder.path());
    page.show(&file, look);
    assert_eq!(page.value("document.querySelector('.tools').checkVisibility()"), false);
    assert_eq!(page.value("document.querySelectorAll('button').length"), 0);
    assert!(shown(&mut page).len() > 100);
    assert_eq!(page.value("document.documentElement.scrollWidth"), 390);
    assert_eq!(page.complaints(), [""; 0]);
}

#[test]
fn a_hostile_trace_runs_nothing_fetches_nothing_and_breaks_no_layout() {
    let Some(chromium) = chromium() else {
        return;
    };
    let folder = Folder::new();
    let evil = "</title></script></style><script>document.title='owned'</script><img src=http://192.0.2.1/x onerror=\"document.title='owned'\">\u{202e}\u{0}";
    let header = json!({
        "msrgate_trace": 1, "guest": evil, "vmm": format!("{evil}{}", "x".repeat(10_000)), "host": "y".repeat(500),
        "kernel": evil, "mode": evil, "cpu": evil, "policy": evil,
    });
    let name = "<script>document.title=\"owned\"<\u{2044}script>&'.jsonl";
    let mut text = format!("{header}\n");
    for t in [0, u64::MAX, 5] {
        text.push_str(&format!("{{\"op\":\"rdmsr\",\"msr\":4294967295,\"t\":{t},\"vm\":4294967295,\"vcpu\":{},\"rule\":4294967295,\"cost\":{t},\"rip\":18446744073709551615}}\n", t % 7));
    }
    folder.write(name, text);
    let evil_in_toml = "</script><script>document.title='owned'</script>".replace('\'', "\\\"");
    folder.write("p.toml", format!("version = 1\nname = \"{evil_in_toml}\"\ndefault = \"allow\"\n[[rule]]\nmsr = 5\nread = \"zero\"\nwhy = \"{evil_in_toml}\"\n"));
    folder
        .run(&["report", "-p", "p.toml", "--html", "page.html", name, name])
        .code(0);
    let mut page = Page::new(&chromium, folder.path());
    for look in [LOOKS[0], LOOKS[3]] {
        page.show(&folder.path().join("page.html"), look);
        assert_eq!(page.value("document.title"), "msrgate report: 2 traces");
        assert_eq!(page.value("document.scripts.length + document.images.length"), 1);
        assert_eq!(page.value("document.documentElement.scrollWidth"), look.width);
        assert!(
            page.value("document.body.textContent")
                .as_str()
                .is_some_and(|text| text.contains("<img src=http"))
        );
        assert_eq!(page.complaints(), [""; 0]);
        page.picture(&format!("hostile-{}", look.width));
    }
}

#[test]
fn a_guest_that_touches_everything_makes_no_endless_page() {
    let Some(chromium) = chromium() else {
        return;
    };
    let folder = Folder::new();
    let mut text = "{\"msrgate_trace\":1}\n".to_owned();
    for msr in 0..40_000_u32 {
        let index = msr.wrapping_mul(97) % 0x10000 + if msr % 2 == 0 { 0 } else { 0xc000_0000 };
        text.push_str(&format!(
            "{{\"t\":{msr},\"vcpu\":{},\"op\":\"rdmsr\",\"msr\":{index}}}\n",
            msr % 300
        ));
    }
    folder.write("all.jsonl", text);
    let html = folder.run(&["report", "--html", "-", "all.jsonl"]).code(0).out;
    assert!(html.len() < 16 << 20, "{} bytes", html.len());
    folder.write("page.html", &html);
    let mut page = Page::new(&chromium, folder.path());
    page.show(&folder.path().join("page.html"), LOOKS[0]);
    assert_eq!(shown(&mut page).len(), 4096);
    page.click("#accesses th:nth-child(4) button");
    assert!(
        page.value("document.querySelector('.notes').textContent")
            .as_str()
            .is_some_and(|text| text.contains("4,096 MSRs"))
    );
    assert_eq!(page.complaints(), [""; 0]);
}
