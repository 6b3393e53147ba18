use msrgate_core::Msr;
use msrgate_plan::By;

use super::*;
use crate::Policy;

fn map(text: &str) -> DecisionMap {
    let policy = Policy::parse("policy.toml", text).unwrap_or_else(|rejected| panic!("{text}\n{rejected:#?}"));
    policy.decision_map(None).expect("no CPUID")
}

fn actions(map: &DecisionMap, msr: u32) -> (String, String) {
    (
        map.reads().get(Msr(msr)).action.to_string(),
        map.writes().get(Msr(msr)).action.to_string(),
    )
}

#[track_caller]
fn gets(map: &DecisionMap, msr: u32, read: &str, write: &str) {
    assert_eq!(actions(map, msr), (read.to_owned(), write.to_owned()), "{msr:#x}");
}

#[test]
fn crosvms_flags_are_read_old_and_new_alone_and_in_a_command_line() {
    let text = "crosvm run --cpus 4 \\\n --userspace-msr 0x771,type=r,action=pass,filter=yes \\\n\
                --userspace-msr=index=0x79,type=w,action=emu,filter=yes --disable-sandbox \\\n\
                --userspace-msr \"index=0x774,type=rw,action=emu,filter=yes\" vmlinux\n";
    let imported = import(Format::Crosvm, text).expect("flags");
    assert_eq!(imported.remarks.len(), 1, "{:?}", imported.remarks);
    let map = map(&imported.to_string());
    gets(&map, 0x771, "host", "allow");
    gets(&map, 0x79, "allow", "ignore");
    gets(&map, 0x774, "shadow, 0x0 at first", "shadow");
    gets(&map, 0x10, "allow", "allow");

    let alone = "0xce,type=r,action=pass,from=cpu0\n# a comment\nindex=0x199,type=wr,action=pass,filter=yes";
    let imported = import(Format::Crosvm, alone).expect("flags");
    let remarks = imported.remarks.join("\n");
    for what in [
        "MSR_PLATFORM_INFO: crosvm answers only",
        "CPU 0",
        "IA32_PERF_CTL: crosvm writes the host's",
    ] {
        assert!(remarks.contains(what), "{remarks}");
    }
    for (text, what) in [
        ("", "no `--userspace-msr"),
        ("0x10,type=r", "`action` is missing"),
        ("0x10,type=x,action=pass", "`type` is r or w or rw or wr, not `x`"),
        ("0x10,type=r,action=pass,mood=good", "there is no `mood`"),
        ("0x10,type=r,type=r,action=pass", "twice"),
        ("0x100000000,type=r,action=pass", "32 bits"),
        (
            "0x10,type=r,action=pass\n16,type=r,action=pass",
            "line 2: `16,type=r,action=pass`: the index was given",
        ),
        ("crosvm --userspace-msr", "has no value"),
    ] {
        let error = import(Format::Crosvm, text).expect_err(text).to_string();
        assert!(error.contains(what), "{text}: {error}");
    }
}

#[test]
fn a_template_of_firecracker_is_fixed_values_and_masks() {
    let text = r#"{
        "kvm_capabilities": ["!56"],
        "cpuid_modifiers": [{ "leaf": "0x1" }],
        "msr_modifiers": [
            { "addr": "0x10a", "bitmap": "0b0000000000000000000000000000000000000000000000000000000000000101" },
            { "addr": "416", "bitmap": "0bx1_x0" },
            { "addr": "0x8b", "bitmap": "xxxx" }
        ]
    }"#;
    let imported = import(Format::Firecracker, text).expect("a template");
    assert_eq!(imported.comments.len(), 2);
    assert_eq!(imported.remarks.len(), 1);
    assert!(
        imported.remarks[0].starts_with("IA32_MISC_ENABLE: "),
        "{:?}",
        imported.remarks
    );
    let map = map(&imported.to_string());
    gets(&map, 0x10a, "value 0x5", "allow");
    gets(&map, 0x1a0, "mask keep 0xfffffffffffffffa set 0x4", "allow");
    gets(&map, 0x8b, "allow", "allow");
    for (text, what) in [
        ("{", "not a CPU template"),
        ("{\"msr_modifers\":[]}", "msr_modifers"),
        (
            "{\"firecracker_version\":\"1.9.0\",\"guest_cpu_config\":{\"msr_modifiers\":[]}}",
            "jq .guest_cpu_config",
        ),
        (
            "{\"msr_modifiers\":[{\"addr\":\"0x1_0000_0000\",\"bitmap\":\"0\"}]}",
            "32 bits",
        ),
        (
            "{\"msr_modifiers\":[{\"addr\":\"1\",\"bitmap\":\"0b2\"}]}",
            "0, 1 and x",
        ),
        ("{\"msr_modifiers\":[{\"addr\":\"1\",\"bitmap\":\"0b\"}]}", "0, 1 and x"),
        (
            "{\"msr_modifiers\":[{\"addr\":\"1\",\"bitmap\":\"0\"},{\"addr\":\"0x1\",\"bitmap\":\"0\"}]}",
            "twice",
        ),
    ] {
        let error = import(Format::Firecracker, text).expect_err(text).to_string();
        assert!(error.contains(what), "{text}: {error}");
    }
}

#[test]
fn registers_that_a_guest_writes_are_remarked_of_a_template_and_a_dump_is_no_policy() {
    let remarks = |msrs: &[u32], bitmap: &str| {
        let modifiers = msrs
            .iter()
            .map(|msr| format!("{{\"addr\":\"{msr:#x}\",\"bitmap\":\"{bitmap}\"}}"));
        let text = format!("{{\"msr_modifiers\":[{}]}}", modifiers.collect::<Vec<_>>().join(","));
        import(Format::Firecracker, &text).expect("a template").remarks
    };
    let fixed = "0".repeat(64);
    let one = remarks(&[0xc000_0102, 0x10a, 0x8b, 0x35, 0xdead], &fixed);
    assert_eq!(one.len(), 1, "{one:?}");
    assert!(one[0].starts_with("IA32_KERNEL_GS_BASE: "), "{one:?}");
    assert_eq!(remarks(&[0xc000_0102], &"x".repeat(64)), [""; 0], "nothing is fixed");
    let mtrrs: Vec<u32> = (0x200..=0x20f).collect();
    assert_eq!(remarks(&mtrrs, &fixed).len(), 16);
    let dump = remarks(&[&mtrrs[..], &[0xc000_0102]].concat(), &fixed);
    assert_eq!(dump.len(), 1, "{dump:?}");
    assert!(
        dump[0].contains("no policy") && dump[0].contains("17 registers"),
        "{dump:?}"
    );
}

const LIST: &str = "# MSR # Write mask # Comment\n\
                    0x00000010 0x0000000000000000 # \"SMSR_TIME_STAMP_COUNTER\"\n\
                    0x00000199 0x000000000000ffff\n   0x38d\n0xffffffffffffffff # on two lines\n";

#[test]
fn a_list_of_msr_safe_is_reads_and_masks_over_a_default_of_deny() {
    let imported = import(Format::MsrSafe, LIST).expect("a list");
    assert!(imported.remarks.is_empty());
    let map = map(&imported.to_string());
    gets(&map, 0x10, "allow", "deny");
    gets(&map, 0x199, "allow", "mask may change 0xffff, else drop");
    gets(&map, 0x38d, "allow", "allow");
    gets(&map, 0x11, "deny", "deny");
    for (text, what) in [
        ("", "no MSR is listed here"),
        (
            "# MSR # Write mask\n# 0x10 0x0 # \"TSC\"\n  #0x199 0xffff\n# 0x8b\n",
            "behind `#`, where 2 are",
        ),
        ("0x10", "ends before the write mask of 0x10"),
        ("0x10 0\n0x10 0", "line 2: 0x10 was listed before"),
        ("0x10 mask", "line 1: `mask` is not a number"),
        ("0x100000000 0", "32 bits"),
    ] {
        let error = import(Format::MsrSafe, text).expect_err(text).to_string();
        assert!(error.contains(what), "{text}: {error}");
    }
}

#[test]
fn what_can_be_said_in_a_tools_words_comes_back_from_them() {
    for (format, policy) in [
        (
            Format::MsrSafe,
            import(Format::MsrSafe, LIST).expect("a list").to_string(),
        ),
        (
            Format::Crosvm,
            "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x770..=0x772\"\nread = \"host\"\n\
             [[rule]]\nmsr = 0x79\nwrite = \"ignore\"\n"
                .to_owned(),
        ),
    ] {
        let said = map(&policy);
        let text = export(format, &said).expect("words for all of it");
        let again = import(format, &text).expect(&text);
        assert!(again.remarks.is_empty(), "{:?}", again.remarks);
        assert!(
            said.differences(&map(&again.to_string()), By::Actions).is_empty(),
            "{text}"
        );
    }
}

#[test]
fn what_cannot_be_said_is_told_by_range_and_rule() {
    let policy = "version = 1\ndefault = \"deny\"\nunknown = \"ignore\"\n[[rule]]\nmsr = 0x10\nread = \"zero\"\nwrite = \"allow\"\n";
    for (format, whys) in [
        (
            Format::Crosvm,
            &[
                "denies nothing",
                "no other",
                "denies nothing",
                "denies nothing",
                "denies nothing",
                "cannot be answered",
            ][..],
        ),
        (
            Format::MsrSafe,
            &["opens reads or does not", "can be read", "cannot be answered"],
        ),
        (Format::Firecracker, &["decides no access"]),
    ] {
        let unsayable = export(format, &map(policy)).expect_err("no words");
        let found: Vec<&str> = unsayable.iter().map(|part| part.why).collect();
        for why in whys {
            assert!(
                found.iter().any(|found| found.contains(why)),
                "{format:?} {why}: {found:?}"
            );
        }
        let zero = unsayable.iter().find(|part| part.action == "zero");
        assert!(
            format == Format::Firecracker || zero.is_some_and(|part| part.rule == Some(0)),
            "{unsayable:?}"
        );
    }
    let both = "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = 0x10\nread = \"host\"\nwrite = \"ignore\"\n";
    let unsayable = export(Format::Crosvm, &map(both)).expect_err("no words");
    assert!(unsayable[0].why.contains("one action"), "{unsayable:?}");
    let all = "version = 1\ndefault = \"allow\"\n";
    assert!(
        export(Format::MsrSafe, &map(all)).expect_err("no words")[0]
            .why
            .contains("too many")
    );
}
