use msrgate_core::{Filter, Msr, Op, Verdict};

use super::*;

fn verdict(filter: &Filter, msr: u32, op: Op) -> Verdict {
    filter.verdict(Msr(msr), op)
}

/// What the text is refused with.
fn refused(text: &str) -> String {
    match read(text.as_bytes()) {
        Ok(given) => panic!("{text} was read: {given:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_filter_in_json_is_read_as_the_kernel_reads_it() {
    let text = r#"{ "flags": 1, "ranges": [
        { "base": "0x10", "nmsrs": 2, "read": true, "write": false, "bitmap": "0200000000000000" },
        { "base": 16, "nmsrs": "0x3", "flags": "3", "bitmap": "FFffffffffffffff0000" },
        { "base": 0, "nmsrs": 0, "flags": 9, "bitmap": "" }
    ] }"#;
    let filter = read(text.as_bytes()).expect("a filter").filter;
    assert_eq!(filter.ranges().len(), 2);
    assert_eq!(verdict(&filter, 0x10, Op::Read), Verdict::Deny);
    assert_eq!(verdict(&filter, 0x10, Op::Write), Verdict::Allow);
    assert_eq!(verdict(&filter, 0x11, Op::Read), Verdict::Allow);
    assert_eq!(verdict(&filter, 0x13, Op::Read), Verdict::Deny);
}

#[test]
fn what_the_kernel_refuses_is_told_with_its_error_number() {
    let range = |base: &str, nmsrs: &str, flags: &str, bitmap: &str| {
        format!("{{\"base\":{base},\"nmsrs\":{nmsrs},\"flags\":{flags},\"bitmap\":\"{bitmap}\"}}")
    };
    let filter = |flags: &str, ranges: &[String]| format!("{{\"flags\":{flags},\"ranges\":[{}]}}", ranges.join(","));
    let word = "00".repeat(8);
    let good = range("0", "1", "3", &word);
    for (text, what, errno) in [
        (filter("2", std::slice::from_ref(&good)), "flags 0x2", Some("EINVAL")),
        (filter("1", &[]), "deny by default", Some("EINVAL")),
        (
            filter("1", &[range("0", "0", "0", "")]),
            "deny by default",
            Some("EINVAL"),
        ),
        (
            filter("0", &[range("0", "1", "0", &word)]),
            "range 0: its flags are 0x0",
            Some("EINVAL"),
        ),
        (
            filter("0", &[good.clone(), range("0", "1", "4", &word)]),
            "range 1: its flags are 0x4",
            Some("EINVAL"),
        ),
        (
            filter("0", &[range("0", "12289", "1", &word)]),
            "12289 MSRs",
            Some("EINVAL"),
        ),
        (
            filter("0", &[range("0", "65", "1", &word)]),
            "has 8 bytes, and 65 MSRs need 9",
            Some("EFAULT"),
        ),
        (
            filter("0", &[range("0", "9", "1", "00")]),
            "has 1 byte, and 9 MSRs need 2",
            Some("EFAULT"),
        ),
        (filter("0", &vec![good.clone(); 17]), "17 ranges", None),
    ] {
        let error = read(text.as_bytes()).expect_err(&text);
        assert!(error.to_string().contains(what), "{text}: {error}");
        assert_eq!(error.kernel_errno(), errno, "{text}: {error}");
    }
    assert!(read(filter("0", &vec![good; 16]).as_bytes()).is_ok());
}

#[test]
fn a_bitmap_with_a_bit_for_each_msr_will_do_and_its_end_within_a_word_is_remarked() {
    for (nmsrs, bitmap, copied) in [
        (1, "fe", 8),
        (8, "fe", 8),
        (9, "fe00", 8),
        (65, "feffffffffffffff00", 16),
    ] {
        let text = format!(r#"{{"flags":0,"ranges":[{{"base":16,"nmsrs":{nmsrs},"flags":3,"bitmap":"{bitmap}"}}]}}"#);
        let given = read(text.as_bytes()).expect(&text);
        let [remark] = given.remarks.as_slice() else {
            panic!("{:?}", given.remarks)
        };
        assert!(remark.contains(&format!("the kernel copies {copied}")), "{remark}");
        assert_eq!(verdict(&given.filter, 0x10, Op::Read), Verdict::Deny);
        assert_eq!(given.filter.ranges()[0].bitmap().len() * 8, copied);
    }
}

#[test]
fn a_filter_in_json_may_have_names_and_lists_and_a_byte_order_mark() {
    let text = "\u{feff}{\"flags\":\"KVM_MSR_FILTER_DEFAULT_DENY\",\"ranges\":[{\"base\":\"0x174\",\"nmsrs\":3,\
        \"flags\":\"KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE\",\"bitmap\":[5,0,0,0,0,0,0,0]}]}";
    let filter = read(text.as_bytes()).expect("a filter").filter;
    let verdicts = [0x174, 0x175, 0x176, 0x177].map(|msr| verdict(&filter, msr, Op::Write) == Verdict::Allow);
    assert_eq!(verdicts, [true, false, true, false]);
    for (text, what) in [
        ("{\"flags\":\"KVM_MSR_FILTER_DENY\",\"ranges\":[]}", "not a number"),
        (
            "{\"flags\":0,\"ranges\":[{\"base\":1,\"nmsrs\":1,\"flags\":1,\"bitmap\":[256]}]}",
            "nor an array of bytes",
        ),
        (
            "{\"flags\":0,\"ranges\":[{\"base\":1,\"nmsrs\":1,\"flags\":1,\"bitmap\":\"0x01\"}]}",
            "nor an array of bytes",
        ),
        ("[{\"base\":1}]", "a default beside its ranges"),
    ] {
        assert!(refused(text).contains(what), "{text}: {}", refused(text));
    }
}

#[test]
fn what_the_kernel_takes_for_something_else_is_remarked() {
    let text = r#"{ "default": "allow", "ranges": [
        { "base": "0xfffffff0", "nmsrs": 16, "flags": 3, "bitmap": "0000000000000000" },
        { "base": "0x7f0", "nmsrs": 32, "flags": 3, "bitmap": "0000000000000000" }
    ] }"#;
    let given = read(text.as_bytes()).expect("the kernel takes it");
    assert_eq!(given.remarks.len(), 2);
    assert!(
        given.remarks[0].contains("range 0 ends behind 0xffffffff"),
        "{:?}",
        given.remarks
    );
    assert!(
        given.remarks[1].contains("range 1 denies MSRs of 0x800..=0x8ff"),
        "{:?}",
        given.remarks
    );
    assert_eq!(verdict(&given.filter, u32::MAX - 3, Op::Read), Verdict::Allow);
    assert_eq!(verdict(&given.filter, 0x800, Op::Read), Verdict::Allow);
}

#[test]
fn json_that_is_no_filter_says_what_is_wrong_and_where() {
    for (text, what) in [
        ("{", "line 1: this is not JSON"),
        ("{}", "`default` is missing"),
        ("{\"default\":\"allow\"}", "`ranges` is missing"),
        (
            "{\"default\":\"maybe\",\"ranges\":[]}",
            "neither \"allow\" nor \"deny\"",
        ),
        ("{\"default\":\"deny\",\"flags\":1,\"ranges\":[]}", "not both"),
        ("{\"default\":\"allow\",\"ranges\":[5]}", "`ranges[0]` is not an object"),
        ("{\"default\":\"allow\",\"ranges\":[{\"bse\":1}]}", "`ranges[0].bse`"),
        ("{\"default\":\"allow\",\"rages\":[]}", "`rages` is not a key"),
        (
            "{\"default\":\"allow\",\"ranges\":[{\"base\":1,\"nmsrs\":1,\"flags\":1,\"bitmap\":\"0\"}]}",
            "`ranges[0].bitmap` is neither a string of pairs",
        ),
        (
            "{\"default\":\"allow\",\"ranges\":[{\"base\":\"0x1_0000_0000\",\"nmsrs\":1,\"flags\":1,\"bitmap\":\"\"}]}",
            "more than 32 bits",
        ),
        (
            "{\"default\":\"allow\",\"ranges\":[],\"actions\":[{\"first\":1,\"last\":0}]}",
            "`actions[0]` ends before it begins",
        ),
        (
            "{\"default\":\"allow\",\"ranges\":[],\"unknown\":{\"read\":\"deny\",\"write\":\"deny\"},\
             \"invalid\":{\"read\":\"deny\",\"write\":\"deny\"},\
             \"actions\":[{\"first\":1,\"last\":1,\"op\":\"rdmsr\",\"action\":\"deny\"}]}",
            "say different things of rdmsr 0x1",
        ),
    ] {
        assert!(refused(text).contains(what), "{text}: {}", refused(text));
    }
}

/// The filter of the kernel's own test of user-space MSR exits, as its source has it.
const SELFTEST: &str = r#"
#include "test_util.h"
#define MSR_NON_EXISTENT 0x474f4f00 /* nobody's */

static u64 deny_bits = 0;
struct kvm_msr_filter filter_allow = {
	.flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
	.ranges = {
		{
			.flags = KVM_MSR_FILTER_READ |
				 KVM_MSR_FILTER_WRITE,
			.nmsrs = 1,
			/* Test an MSR the kernel knows about. */
			.base = MSR_IA32_XSS,
			.bitmap = (uint8_t*)&deny_bits,
		}, {
			.flags = KVM_MSR_FILTER_READ,
			.nmsrs = 1,
			.base = MSR_NON_EXISTENT, // by a macro
			.bitmap = (uint8_t*)&deny_bits,
		},
	},
};
"#;

/// Which MSRs below 0x200 a filter lets be read.
fn open(text: &str) -> Vec<u32> {
    assert_eq!(RawFormat::of(text.as_bytes()), RawFormat::C, "{text}");
    let given = read(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"));
    let open = |msr: &u32| verdict(&given.filter, *msr, Op::Read) == Verdict::Allow;
    (0..0x200).filter(open).collect()
}

#[test]
fn a_filter_in_c_is_read_as_people_write_it() {
    let filter = read(SELFTEST.as_bytes()).expect("a filter").filter;
    assert_eq!(verdict(&filter, 0xda0, Op::Write), Verdict::Deny);
    assert_eq!(verdict(&filter, 0x474f_4f00, Op::Read), Verdict::Deny);
    assert_eq!(verdict(&filter, 0x474f_4f00, Op::Write), Verdict::Allow);

    // One filter in many ways: 0x10 and 0x13 may be read, all else may not.
    for text in [
        "{ .flags = 1, .ranges = { { .flags = 1, .nmsrs = 4, .base = 0x10, .bitmap = (__u8[8]){ 0x09 } } } }",
        "{ KVM_MSR_FILTER_DEFAULT_DENY, { { 1, 4, 16, (const uint8_t []){ 8 | 1, 0 } }, { 0 }, } };",
        "static const unsigned long long map[1] = { (0x8ULL | 1) };\n\
         const struct kvm_msr_filter f = { .flags = 0x1, .ranges = { [3] = { .nmsrs = 4U, .base = IA32_TIME_STAMP_COUNTER, \
         .bitmap = (void *)map } } };",
        "#include <linux/kvm.h>\n#define BASE (0x10)\n#define COUNT(x) sizeof(x)\nuint64_t one = 9;\n\
         static struct kvm_msr_filter filter = { 1, { { 1, 4, BASE, (__u8 *)(void *)&one } } };\nstatic u64 more[] = { 1 };",
        "#ifndef GUARD\n#define GUARD\nstatic const __u64 one = 9;\n\
         static const struct kvm_msr_filter f = { 1, { { 1, 4, 16, (__u8 *)&one } } };\n\
         #define MSRGATE_ANSWERS\nstatic inline int f_answer(void) { return one; }\n#endif",
        "__u8 map[KVM_MSR_FILTER_MAX_BITMAP_SIZE] = { [0] = 011, [7] = 0b11111111 };\n\
         kvm_msr_filter f{ .flags = 1, .ranges = { { .flags = 1, .nmsrs = 4, .base = 0x10, .bitmap = map } } };",
    ] {
        let text = text.replace("{ .nmsrs = 4U", "{ .flags = 1, .nmsrs = 4U");
        assert_eq!(open(&text), [0x10, 0x13], "{text}");
    }
}

/// What an initialiser alone would be silently wrong on.
#[test]
fn c_whose_filter_is_not_what_its_initialiser_says_is_refused_with_the_line() {
    let filter = "struct kvm_msr_filter f = { .ranges = { { 3, 1, 0x10, bits } } };";
    let with = |before: &str, after: &str| format!("static __u8 bits[8] = {{ 1 }};\n{before}\n{filter}\n{after}");
    for (text, line) in [
        // A macro changes a bitmap, or the filter.
        (
            with(
                "#define ALLOW(n) bits[(n) / 8] |= 1 << ((n) % 8)",
                "int main(void) { ALLOW(4); }",
            ),
            4,
        ),
        (
            with("#define DENY(i) f.ranges[i].nmsrs = 1", "int main(void) { DENY(0); }"),
            4,
        ),
        (
            with("#define OF(a, b) a##b[0]", "int main(void) { OF(bi, ts) = 0; }"),
            4,
        ),
        (with("#define KVM_MSR bits", "int main(void) { KVM_MSR[0] = 0; }"), 4),
        (
            with(
                "#define SET(x) ioctl(vm, KVM_X86_SET_MSR_FILTER, x)",
                "int main(void) { SET(g()); }",
            ),
            4,
        ),
        (
            with("#define FILTER(x) struct kvm_msr_filter x = { 1 }", "FILTER(g);"),
            4,
        ),
        // What follows could change what is not constant; only a guard at the beginning is harmless.
        (with("", "#define MSRGATE_ANSWERS\nvoid g(void) { bits[0] = 0; }"), 4),
        (with("#ifndef NESTED\n#define NESTED", "#endif"), 2),
        (with("#ifndef A\n#define B", "#endif"), 2),
        // Names are their function's.
        (with("", "void dirty_log(int fd) { __u8 bits[8] = { 0xff }; }"), 4),
        (with("", "void g(struct poll *f) { while (f) f = f->next; }"), 4),
        (
            "void intel(int vm) { struct kvm_msr_filter filter; filter.flags = 0; }\n\
             void amd(int vm) { struct kvm_msr_filter filter; filter.flags = 0; }"
                .to_owned(),
            1,
        ),
        (
            with(
                "",
                "void clear(int vm) { struct kvm_msr_filter g; memset(&g, 0, sizeof(g)); }",
            ),
            4,
        ),
        (with("", "struct kvm_msr_filter g = { 1 };"), 4),
        (with("", "void g(void) { set(&(struct kvm_msr_filter){ 1 }); }"), 4),
        (
            with(
                "",
                "void g(struct kvm_msr_filter *g) { ioctl(vm, KVM_X86_SET_MSR_FILTER, g); }",
            ),
            4,
        ),
        (with("", "void g(void) { prepare(vm, KVM_X86_SET_MSR_FILTER, &f); }"), 4),
        (
            with(
                "int ioctl(int vm, int call, struct kvm_msr_filter *filter) { filter->flags = 1; }",
                "",
            ),
            2,
        ),
        // Assignments after C++'s braces.
        (
            "uint64_t bits = 1;\nkvm_msr_filter f{ .flags = 0 };\nf.ranges[0].nmsrs = 1;".to_owned(),
            3,
        ),
        (with("", "void g(void) { bits[0] = 0xff; }"), 4),
        (with("", "void g(void) { fill(&f); }"), 4),
        // What is not in the text, and what may not hold.
        (
            format!("static __u8 bits[8] = {{\n#include \"bits.inc\"\n}};\n{filter}"),
            2,
        ),
        (
            "struct kvm_msr_filter f = { .ranges = {\n#ifndef NESTED\n { 3, 1, 1, 0 },\n#endif\n} };".to_owned(),
            2,
        ),
        (format!("static __u8 bits[8];\n#if X\n{filter}\n#endif"), 2),
        (
            format!("#ifndef X\nstatic __u8 bits[8];\n#else\nstatic __u8 other[8] = {{ 1 }};\n#endif\n{filter}"),
            1,
        ),
        (
            format!("#ifndef X\n#define X\n#endif\n#if 0\nstatic __u8 bits[8];\n{filter}\n#endif"),
            3,
        ),
        (
            format!("#ifndef X\n#define X\n#else\nstatic __u8 bits[8];\n{filter}\n#endif"),
            3,
        ),
        (
            "#ifdef X\n#define N 1\n#endif\nstruct kvm_msr_filter f = { .flags = N };".to_owned(),
            1,
        ),
        (
            "#define N 1\n#undef N\nstruct kvm_msr_filter f = { .flags = N };".to_owned(),
            2,
        ),
        (
            "#define N 1\n#define N 0\nstruct kvm_msr_filter f = { .flags = N };".to_owned(),
            2,
        ),
        (
            "#define N 0 | M\nstruct kvm_msr_filter f = { .flags = N };".to_owned(),
            2,
        ),
        (
            "enum { MSR_EFER = 1 };\nstruct kvm_msr_filter f = { .ranges = { { 3, 1, MSR_EFER, 0 } } };".to_owned(),
            1,
        ),
        (with("typedef unsigned char __u8;", ""), 2),
        (format!("#define __u8 short\nstatic __u8 bits[8];\n{filter}"), 2),
        (
            format!("static __u8 bits[8];\n#define kvm_msr_filter other\n{filter}"),
            3,
        ),
        (
            "#define flags other\nstruct kvm_msr_filter f = { .flags = 1 };".to_owned(),
            2,
        ),
        // What is unknown, where nothing stands before it.
        ("__u64 deny = 0;\nstruct kvm_msr_filter f = { .flags = 0, .ranges = { { 1,\n1, MSR_OURS, (__u8 *)&deny } } };".to_owned(), 3),
        // C++'s constants are names of numbers.
        ("static const unsigned MSR_EFER = 1;\nstruct kvm_msr_filter f = { .ranges = { { 3, 1, MSR_EFER, 0 } } };".to_owned(), 2),
        // The calls of a program, and what has no say in the filter.
        (with("", "int main(void) { if (ioctl(vm, KVM_X86_SET_MSR_FILTER, &f) < 0) return 1; }"), 4),
        ("#ifdef DEBUG\nint verbose;\n#endif\ndouble hz = 1.5e9;\nstruct kvm_msr_filter f = { 0 };".to_owned(), 1),
        ("double hz = 1.5e9;\nstruct kvm_msr_filter f = { 0 };".to_owned(), 1),
        (
            "void wait_for(int fd) { struct poll p; while (poll_it(fd)) { p.flags = 0; } }\n__u64 deny = 0;\n\
             struct kvm_msr_filter f = { .flags = 0, .ranges = { { .flags = KVM_MSR_FILTER_READ,\n\
             .nmsrs = 1, .base = MSR_OURS, .bitmap = (__u8 *)&deny } } };"
                .to_owned(),
            1,
        ),
        // Linux and the manual mean different MSRs.
        (
            "struct kvm_msr_filter f = { .ranges = {\n{ 3, 1, MSR_IA32_PMC0, 0 } } };".to_owned(),
            2,
        ),
        // What a compiler takes for something else.
        (with("// ask \\", ""), 2),
        (with("const char *text = R\"(\";)\";", ""), 2),
        (with("%:define bits other", ""), 2),
        (with("/* what *\\\n/ bits[0] = 0; /* */", ""), 2),
        (with("int b\\\nits;", ""), 2),
        (with("#include <a> \\ \nstatic u8 b;", ""), 2),
        (with("/* what *\\ \n/ static u8 b; /* */", ""), 2),
        (with("#define N 0 /*\n*/ | 1", "struct kvm_msr_filter g = { .flags = N };"), 5),
    ] {
        assert_eq!(RawFormat::of(text.as_bytes()), RawFormat::C, "{text}");
        let error = read(text.as_bytes()).expect_err(&text);
        assert_eq!(error.line(), Some(line), "{text}: {error}");
        assert!(error.to_string().contains("`msrgate capture` prints the filter"), "{text}: {error}");
    }
}

#[test]
fn c_that_is_no_literal_initialiser_or_that_the_kernel_refuses_is_told_with_its_line() {
    let range = "{ .flags = 3, .nmsrs = 9, .base = 0, .bitmap = b }";
    let with =
        |bitmap: &str, range: &str| format!("{bitmap}\nstruct kvm_msr_filter f = {{ .ranges = {{ {range} }} }};");
    let flags = |flags: &str| format!("struct kvm_msr_filter f = {{\n .flags = {flags} }};");
    for (text, what) in [
        (with("uint8_t b[1] = { 0 };", range), "has 1 byte, and 9 MSRs need 2"),
        (with("", "{ 1, 1, 1, NULL }"), "EFAULT"),
        (flags("4"), "flags 0x4"),
        (
            with("static u64 b[1];", &format!("[16] = {range}")),
            "line 2: this list has room for 16",
        ),
        (
            with("static u64 b[1];", &format!("[1] = {range}, [0] = {range}")),
            "line 2: an index leads back",
        ),
        (with("static u64 b;", range), "`b` is neither an array"),
        (
            with("static u64 *b = x;", range),
            "line 1: `static` is neither a type of unsigned integers",
        ),
        (with("u64 b[2];", range), "a variable has no initialiser"),
        (with("static u64 b[2], c;", range), "`;` is missing"),
        (with("static u64 b[2][2];", range), "`;` is missing"),
        (
            with("static bool b[2] = { 1 };", range),
            "`static bool` is neither a type",
        ),
        (with("u8 b[1] = { 1, 2 };", range), "line 1: this list has room for 1"),
        (
            with("u8 b[2] = { 0x100 };", range),
            "line 1: `0x100` is not known as a number of at most 0xff",
        ),
        (with("u8 b[2] = { 1 << 3 };", range), "line 1: `}` is missing"),
        (with("u8 b[2] = { ~1 };", range), "line 1: `~` is not known"),
        (with("u8 b[2] = \"\\x01\";", range), "line 1: `{` is missing"),
        (
            with("u8 b[0xffffffff] = { 1 };", range),
            "line 1: `0xffffffff` is not known as a number of at most",
        ),
        (with("", "{ 1, 1, 1, p }"), "line 2: `p` is neither an array"),
        (with("u8 b[8] = { 1 };", "{ 1, 1, 1, b + 1 }"), "line 2: `}` is missing"),
        (with("", "{ 1, 1, 1, 0, 0 }"), "a range has four fields"),
        (
            with("", "{ .nmsrs = 1, .flags = 1 }"),
            "`flags` is not a field that may stand here",
        ),
        (
            with("", "{ .nmsrs = 1, .nmsrs = 1 }"),
            "`nmsrs` is not a field that may stand here",
        ),
        (with("", "{ flags: 1 }"), "`flags` is not known as a number"),
        (
            "struct kvm_msr_filter f = {\n .flag = 1 };".to_owned(),
            "line 2: `flag` is not a field",
        ),
        (flags("MSR_NOBODY"), "line 2: `MSR_NOBODY` is not known"),
        (flags("msr_efer"), "line 2: `msr_efer` is not known"),
        (flags("0x1_0"), "line 2: `0x1_0` is not known"),
        (flags("08"), "line 2: `08` is not known"),
        (flags("'a'"), "line 2: `'a'` is not known"),
        (flags("0x100000000"), "at most 0xffffffff"),
        (flags(&"(".repeat(5000)), "too deep"),
        ("struct kvm_msr_filter f = { .flags = 1".to_owned(), "`}` is missing"),
        (
            "struct kvm_msr_filter a = { 0 }, b = { 0 };".to_owned(),
            "`;` is missing",
        ),
        (
            "struct kvm_msr_filter f[2] = { { 0 } };".to_owned(),
            "line 1: `{` is missing",
        ),
        ("struct kvm_msr_filter f = g();".to_owned(), "line 1: `{` is missing"),
        (
            "struct kvm_msr_filter f;\nf.flags = 1;".to_owned(),
            "line 1: `{` is missing",
        ),
        (
            "// kvm_msr_filter\nstatic u8 x;".to_owned(),
            "nothing here is a `struct kvm_msr_filter`",
        ),
        (
            "// f\nvoid g(struct kvm_msr_filter *f) { f->flags = 1; }".to_owned(),
            "line 2: `void` is neither a type",
        ),
        (
            "struct kvm_msr_filter a = { 0 };\nstruct kvm_msr_filter b = { 0 };".to_owned(),
            "line 2: here are several filters, `a` and `b`",
        ),
        (
            "{ .flags = 0 };\nf.flags = 1;".to_owned(),
            "line 2: something follows the filter",
        ),
        ("/* */ struct kvm_msr_filter f = { 0 }; /*".to_owned(), "does not end"),
    ] {
        assert_eq!(RawFormat::of(text.as_bytes()), RawFormat::C, "{text}");
        assert!(refused(&text).contains(what), "{text}: {}", refused(&text));
    }
}

#[test]
fn what_gdb_prints_of_a_filter_is_read_as_far_as_it_shows_the_bitmaps() {
    let print = |nmsrs: u32, bitmap: &str| {
        format!(
            "$1 = {{flags = 1, ranges = {{{{flags = 1, nmsrs = {nmsrs}, base = 0x10, bitmap = {bitmap}}}, {{flags = 0, nmsrs = 0, \
             base = 0, bitmap = 0x0}} <repeats 15 times>}}}}\n"
        )
    };
    for (nmsrs, bitmap, msrs) in [
        (4, "0x555555558040 <bits> \"\\t\"", &[0x10, 0x13][..]),
        (16, "0x7ffe00000010 \"\\001\"", &[0x10]),
        (12, "0x55 <a+8> \"\\t\\b\\377\"...", &[0x10, 0x13, 0x1b]),
        (
            24,
            "0x55 '\\001' <repeats 11 times>, \"\\\"\\002\"...",
            &[0x10, 0x18, 0x20],
        ),
        (8, "0x55 \"\"", &[]),
    ] {
        let text = print(nmsrs, bitmap);
        assert_eq!(open(&text), msrs, "{text}");
        assert_eq!(
            open(text.trim_start_matches("$1 = ").replace(", ", ",\n    ").as_str()),
            msrs,
            "{text}"
        );
    }
    for (nmsrs, bitmap, what) in [
        (17, "0x55 <bits> \"\\001\"", "gdb shows 2 of the bitmap's 3 bytes"),
        (9, "0x55 <bits> \"\\001\"...", "gdb shows 1 of the bitmap's 2 bytes"),
        (1, "0x55", "gdb shows 0 of"),
        (
            1,
            "0x55 <error: Cannot access memory at address 0x55>",
            "gdb shows 0 of",
        ),
        (8, "0x55 <bits> \"é\"", "set charset ASCII"),
        (8, "0x55 <bits> <incomplete sequence \\303>", "set charset ASCII"),
        (
            8,
            "0x55 <bits> \"\\001\", <incomplete sequence \\303>",
            "set charset ASCII",
        ),
        (
            8,
            "0x55 <bits> \"\\001\"<error: Cannot access memory at address 0x56>",
            "is missing",
        ),
        (
            8,
            "0x0}, {flags = 0, nmsrs = 0, base = 0, bitmap = 0x0...",
            "gdb shows 0 of",
        ),
    ] {
        let error = refused(&print(nmsrs, bitmap));
        assert!(error.contains("line 1") && error.contains(what), "{bitmap}: {error}");
    }
    let empty = print(0, "0x55 <bits> <error: Cannot access memory at address 0x55>");
    assert!(refused(&empty).contains("EINVAL"), "{}", refused(&empty));
    for text in [
        "$1 = (struct kvm_msr_filter *) 0x555555558040 <f>".to_owned(),
        "$1 = {flags = 0, ranges = {...}}".to_owned(),
        "$1 = {flags = KVM_MSR_FILTER_READ, ranges = {}}".to_owned(),
        print(1, "0x55 \"\"") + "$2 = 1",
    ] {
        assert_eq!(RawFormat::of(text.as_bytes()), RawFormat::C, "{text}");
        assert!(
            refused(&text).contains("only a literal initialiser"),
            "{text}: {}",
            refused(&text)
        );
    }
}

/// The structure with ranges (flags, nmsrs, base, pointer), and what follows it.
fn structure(flags: u32, ranges: &[(u32, u32, u32, u64)], behind: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 392];
    bytes[..4].copy_from_slice(&flags.to_le_bytes());
    for (slot, (flags, nmsrs, base, pointer)) in ranges.iter().enumerate() {
        let at = 8 + slot * 24;
        bytes[at..at + 4].copy_from_slice(&flags.to_le_bytes());
        bytes[at + 4..at + 8].copy_from_slice(&nmsrs.to_le_bytes());
        bytes[at + 8..at + 12].copy_from_slice(&base.to_le_bytes());
        bytes[at + 16..at + 24].copy_from_slice(&pointer.to_le_bytes());
    }
    bytes.extend(behind);
    bytes
}

#[test]
fn the_bytes_of_the_structure_are_read_with_offsets_and_with_addresses() {
    let behind: Vec<u8> = [[1u8, 0, 0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0]].concat();
    for (pointers, first) in [
        ([0x7ffd_0000_1000, 0x7ffd_0000_2000], [1, 2]),
        ([0, 0], [1, 2]),
        ([400, 392], [2, 1]),
        ([392, 392], [1, 1]),
    ] {
        let ranges = [(1, 2, 0x10, pointers[0]), (0, 0, 0, 77), (2, 2, 0x20, pointers[1])];
        let filter = read(&structure(1, &ranges, &behind)).expect("a filter").filter;
        let bitmaps: Vec<u64> = filter.ranges().iter().map(|range| range.bitmap()[0]).collect();
        assert_eq!(bitmaps, first, "{pointers:x?}");
    }
    for (ranges, behind, what) in [
        (&[(1, 2, 0x10, 0)][..], &behind[..], "here are 408 bytes"),
        (&[(1, 2, 0x10, 392), (1, 2, 0x10, 0xffff)], &behind, "some pointers"),
        (&[(1, 200, 0x10, 392)], &behind, "EFAULT"),
        (&[(9, 2, 0x10, 392)], &behind, "EINVAL"),
        (&[(1, 12289, 0x10, 392)], &[], "EINVAL"),
    ] {
        let error = read(&structure(0, ranges, behind)).expect_err(what).to_string();
        assert!(error.contains(what), "{what}: {error}");
    }
    // As a 32-bit process has it: 16 bytes a range, behind the flags alone.
    let mut small = 1u32.to_le_bytes().to_vec();
    for word in [1u32, 3, 0x174, 0xffff_0000] {
        small.extend(word.to_le_bytes());
    }
    small.resize(260, 0);
    small.extend([5, 0, 0, 0, 0, 0, 0, 0]);
    let given = read(&small).expect("a filter");
    assert!(given.remarks[0].contains("32-bit"), "{:?}", given.remarks);
    let verdicts = [0x174, 0x175, 0x176].map(|msr| verdict(&given.filter, msr, Op::Read));
    assert_eq!(verdicts, [Verdict::Allow, Verdict::Deny, Verdict::Allow]);
    let error = read(&[0; 100]).expect_err("too short").to_string();
    assert!(error.contains("here are 100 bytes"), "{error}");
}

#[test]
fn dumps_of_those_bytes_are_read_whichever_tool_made_them() {
    let bytes = structure(0, &[(1, 2, 0x8b, 0x7ffd_0000_1000)], &[0xfe, 0x22, 0x5c, 0, 0, 0, 0, 0]);
    let rows = |row: &dyn Fn(usize, &[u8]) -> String| {
        bytes
            .chunks(16)
            .enumerate()
            .map(|(at, row_bytes)| row(at * 16, row_bytes) + "\n")
            .collect::<String>()
    };
    let pairs = |row: &[u8]| {
        row.iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let quoted: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    let octal: String = bytes.iter().map(|byte| format!("\\{byte:03o}")).collect();
    let dumps = [
        rows(&|at, row| {
            let groups: Vec<String> = row.chunks(2).map(|pair| pairs(pair).replace(' ', "")).collect();
            format!("{at:08x}: {:39}  ..a b..", groups.join(" "))
        }),
        rows(&|_, row| pairs(row).replace(' ', "")),
        rows(&|at, row| format!("{at:08x}  {}  |..a b..|", pairs(row))) + "00000190\n",
        rows(&|at, row| format!("{at:07o} {}", pairs(row))) + "0000620\n",
        rows(&|_, row| format!(" {}", pairs(row))),
        rows(&|at, row| {
            let words: Vec<String> = row.iter().map(|byte| format!("0x{byte:02x}")).collect();
            format!("0x7fffffffe{at:03x} <filter+{at}>:\t{}", words.join("\t"))
        }),
        rows(&|at, row| {
            let words: Vec<String> = row
                .as_chunks()
                .0
                .iter()
                .map(|word| format!("0x{:08x}", u32::from_le_bytes(*word)))
                .collect();
            format!("0x7fffffffe{at:03x}:\t{}", words.join("\t"))
        }),
        format!("write(1, \"{quoted}\", 400) = 400\n"),
        format!("write(1, \"{octal}\", 400) = 400\n"),
        format!("{quoted}\n"),
    ];
    for dump in dumps {
        assert_eq!(RawFormat::of(dump.as_bytes()), RawFormat::Dump, "{dump}");
        let filter = read(dump.as_bytes())
            .unwrap_or_else(|error| panic!("{dump}: {error}"))
            .filter;
        assert_eq!(filter.ranges()[0].bitmap(), [0x5c_22fe], "{dump}");
        assert_eq!(
            (filter.ranges()[0].base(), filter.ranges()[0].nmsrs()),
            (0x8b, 2),
            "{dump}"
        );
    }
    let hex: Vec<String> = bytes.iter().map(|byte| format!("0x{byte:02x}")).collect();
    let in_c = format!(
        "unsigned char filter_bin[] = {{\n  {}\n}};\nunsigned int filter_bin_len = 400;\n",
        hex.join(", ")
    );
    let filter = read(in_c.as_bytes()).expect("a filter").filter;
    assert_eq!(filter.ranges()[0].bitmap(), [0x5c_22fe]);
    for (dump, what) in [
        ("00000000  00 00\n*\n00000188\n", "line 2: `*`"),
        ("0000000 0000 0001\n", "words and not bytes"),
        ("00 11\nzz\n", "line 2: this is not a line of a dump"),
        ("00 11\n", "here are 2 bytes"),
        ("write(1, \"\\x00\\x01\"..., 392) = 392", "cut off"),
        ("write(1, \"\\x00\\x01", "does not end"),
    ] {
        assert!(refused(dump).contains(what), "{dump}: {}", refused(dump));
    }
}

#[test]
fn each_form_is_told_by_how_it_begins() {
    for (text, form) in [
        ("version = 1\n", RawFormat::Policy),
        ("# kvm_msr_filter of ours\nversion = 1\n", RawFormat::Policy),
        ("[[rule]]\nmsr = 1\n", RawFormat::Policy),
        ("", RawFormat::Policy),
        ("garbage\n", RawFormat::Policy),
        ("  { \"a\": 1 }", RawFormat::Json),
        ("{", RawFormat::Json),
        ("{ .flags = 0 }", RawFormat::C),
        ("// kvm\nstatic int a;", RawFormat::C),
        (
            "#include <linux/kvm.h>\nstatic __u64 b[1] = {\n};\nvoid f(struct kvm_msr_filter *f) {}",
            RawFormat::C,
        ),
        ("\0\0\0\0", RawFormat::Bytes),
        (
            "ioctl(15, KVM_X86_SET_MSR_FILTER, 0x7ffd1e3f0b40) = 0\n",
            RawFormat::Other(STRACE),
        ),
        (
            "1 ioctl(15, _IOC(_IOC_WRITE, 0xae, 0xc6, 0x188), 0x7ffd) = -1 EINVAL (Invalid argument)\n",
            RawFormat::Other(STRACE),
        ),
        (
            "let f = kvm_msr_filter { flags: 0, ..Default::default() };",
            RawFormat::Other(RUST),
        ),
        ("vm.set_msr_filter(action, &[MsrFilterRange {", RawFormat::Other(RUST)),
        (
            "// The MSR filter of the policy `q`, made by msrgate.\nuse kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange};",
            RawFormat::Other(OWN_RUST),
        ),
        (
            "// kvm_msr_filter\nret = ioctl(fd, KVM_X86_SET_MSR_FILTER, &f);",
            RawFormat::C,
        ),
        ("00000000: 0100 0000  ....", RawFormat::Dump),
    ] {
        assert_eq!(RawFormat::of(text.as_bytes()), form, "{text:?}");
    }
}
