//! A plan's filter as source code.

use std::io::{self, Write};

use msrgate_core::{FilterRange, Op, Verdict};
use msrgate_plan::Plan;
use msrgate_policy::foreign::{Format, export};

use crate::exit::{Exit, Failure};
use crate::load::Loaded;
use crate::{stream, words};

/// A C header: one bitmap a range, and `struct kvm_msr_filter` as a constant.
pub(crate) fn c(out: &mut impl Write, loaded: &Loaded) -> io::Result<()> {
    let plan = &loaded.plan;
    let name = identifier(&loaded.policy.name);
    let filter = plan.filter();
    writeln!(
        out,
        "/* The MSR filter of the policy `{}`, made by msrgate.",
        comment(&loaded.policy.name)
    )?;
    writeln!(out, " * Policy hash {}.", words::hex(&plan.map().hash()))?;
    writeln!(out, " *")?;
    writeln!(
        out,
        " * First KVM_ENABLE_CAP(KVM_CAP_X86_USER_SPACE_MSR) with args[0] = {}_REASONS, then",
        name.to_uppercase()
    )?;
    writeln!(
        out,
        " * KVM_X86_SET_MSR_FILTER; the other way round a denied access may fault before the mask is set."
    )?;
    spilled(out, plan, " *")?;
    writeln!(out, " */")?;
    writeln!(out, "#include <linux/kvm.h>\n")?;
    writeln!(
        out,
        "#define {}_REASONS {:#x}\n",
        name.to_uppercase(),
        plan.reasons().bits()
    )?;
    for (slot, range) in filter.ranges().iter().enumerate() {
        // The kernel copies whole longs, so the arrays are of longs.
        writeln!(out, "/* {} */", describe(range))?;
        writeln!(
            out,
            "static const __u64 {name}_bitmap_{slot}[{}] = {{",
            range.bitmap().len()
        )?;
        words(out, range, "ULL")?;
        writeln!(out, "}};\n")?;
    }
    let default = match filter.default_verdict() {
        Verdict::Allow => "KVM_MSR_FILTER_DEFAULT_ALLOW",
        Verdict::Deny => "KVM_MSR_FILTER_DEFAULT_DENY",
    };
    writeln!(
        out,
        "static const struct kvm_msr_filter {name}_filter = {{\n\t.flags = {default},"
    )?;
    writeln!(out, "\t.ranges = {{")?;
    for (slot, range) in filter.ranges().iter().enumerate() {
        writeln!(
            out,
            "\t\t{{\n\t\t\t.flags = {},\n\t\t\t.nmsrs = {},\n\t\t\t.base = {:#x},",
            flags(range, "KVM_MSR_FILTER_READ", "KVM_MSR_FILTER_WRITE"),
            range.nmsrs(),
            range.base()
        )?;
        writeln!(out, "\t\t\t.bitmap = (__u8 *){name}_bitmap_{slot},\n\t\t}},")?;
    }
    writeln!(out, "\t}},\n}};")
}

/// Rust for the `kvm-ioctls` crate: one bitmap a range, and the ranges.
pub(crate) fn rust(out: &mut impl Write, loaded: &Loaded) -> io::Result<()> {
    let plan = &loaded.plan;
    let name = identifier(&loaded.policy.name).to_uppercase();
    let filter = plan.filter();
    writeln!(
        out,
        "// The MSR filter of the policy `{}`, made by msrgate.",
        comment(&loaded.policy.name)
    )?;
    writeln!(out, "// Policy hash {}.", words::hex(&plan.map().hash()))?;
    writeln!(out, "//")?;
    writeln!(
        out,
        "// First enable KVM_CAP_X86_USER_SPACE_MSR with args[0] = {name}_REASONS, then call `set_msr_filter`; the other"
    )?;
    writeln!(out, "// way round a denied access may fault before the mask is set.")?;
    spilled(out, plan, "//")?;
    writeln!(
        out,
        "use kvm_ioctls::{{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags}};\n"
    )?;
    writeln!(out, "pub const {name}_REASONS: u64 = {:#x};", plan.reasons().bits())?;
    let default = match filter.default_verdict() {
        Verdict::Allow => "ALLOW",
        Verdict::Deny => "DENY",
    };
    writeln!(
        out,
        "pub const {name}_DEFAULT: MsrFilterDefaultAction = MsrFilterDefaultAction::{default};\n"
    )?;
    for (slot, range) in filter.ranges().iter().enumerate() {
        let bytes = range.bitmap_bytes();
        writeln!(
            out,
            "/// {}. Whole 8-byte words, since that is what the kernel copies.",
            describe(range)
        )?;
        writeln!(out, "pub static {name}_BITMAP_{slot}: [u8; {}] = [", bytes.len())?;
        for row in bytes.chunks(16) {
            let row: Vec<String> = row.iter().map(|byte| format!("{byte:#04x}")).collect();
            writeln!(out, "    {},", row.join(", "))?;
        }
        writeln!(out, "];\n")?;
    }
    writeln!(
        out,
        "pub fn {}_ranges() -> [MsrFilterRange<'static>; {}] {{",
        name.to_lowercase(),
        filter.ranges().len()
    )?;
    writeln!(out, "    [")?;
    for (slot, range) in filter.ranges().iter().enumerate() {
        writeln!(out, "        MsrFilterRange {{")?;
        writeln!(
            out,
            "            flags: {},",
            flags(range, "MsrFilterRangeFlags::READ", "MsrFilterRangeFlags::WRITE")
        )?;
        writeln!(out, "            base: {:#x},", range.base())?;
        writeln!(out, "            msr_count: {},", range.nmsrs())?;
        writeln!(out, "            bitmap: &{name}_BITMAP_{slot},")?;
        writeln!(out, "        }},")?;
    }
    writeln!(out, "    ]\n}}")
}

/// What the VMM has to pass on, since the filter alone would deny it: within a comment whose lines begin with `margin`.
fn spilled(out: &mut impl Write, plan: &Plan, margin: &str) -> io::Result<()> {
    for (number, (range, op)) in plan.spilled().enumerate() {
        if number == 0 {
            writeln!(
                out,
                "{margin}\n\
                 {margin} The filter has no room to allow these accesses, which the policy leaves to the kernel. They exit as\n\
                 {margin} KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR: the VMM must pass them on with KVM_GET_MSRS and KVM_SET_MSRS,\n\
                 {margin} on the vCPU's thread before it runs again, and set `error` to 1 where these do not take the MSR:"
            )?;
        }
        writeln!(out, "{margin}   {op} {range}")?;
    }
    Ok(())
}

/// Another tool's words for the policy, or why it has none, by rule.
pub(crate) fn foreign(out: &mut impl Write, loaded: &Loaded, format: Format) -> Result<(), Failure> {
    let unsayable = match export(format, loaded.plan.map()) {
        Ok(text) => return Ok(write!(out, "{text}")?),
        Err(unsayable) => unsayable,
    };
    let mut stderr = stream::err();
    for part in &unsayable {
        let place = part.rule.and_then(|rule| loaded.policy.rule_place(rule));
        let place = place.unwrap_or_else(|| "the default".to_owned());
        writeln!(
            stderr,
            "msrgate: {place}: {} of {} gets `{}`: {}",
            part.op, part.range, part.action, part.why
        )?;
    }
    Err(Failure::Line(
        Exit::No,
        format!("{} cannot say all that the policy says", format.name()),
    ))
}

fn words(out: &mut impl Write, range: &FilterRange, suffix: &str) -> io::Result<()> {
    for row in range.bitmap().chunks(4) {
        let row: Vec<String> = row.iter().map(|word| format!("{word:#018x}{suffix}")).collect();
        writeln!(out, "\t{},", row.join(", "))?;
    }
    Ok(())
}

fn describe(range: &FilterRange) -> String {
    let ops: Vec<&str> = Op::ALL
        .into_iter()
        .filter(|op| range.ops().contains(*op))
        .map(Op::name)
        .collect();
    let span = range.span().map(|span| span.to_string()).unwrap_or_default();
    format!("{} of {span}", ops.join(" and "))
}

fn flags(range: &FilterRange, read: &str, write: &str) -> String {
    let words = [(Op::Read, read), (Op::Write, write)];
    let set: Vec<&str> = words
        .into_iter()
        .filter(|(op, _)| range.ops().contains(*op))
        .map(|(_, word)| word)
        .collect();
    set.join(" | ")
}

/// A policy's name as an identifier of C and Rust.
fn identifier(name: &str) -> String {
    let mut identifier: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '_'
            }
        })
        .collect();
    if !identifier.starts_with(|c: char| c.is_ascii_alphabetic()) {
        identifier.insert_str(0, "msr_");
    }
    identifier
}

/// A text that ends no comment.
fn comment(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect::<String>()
        .replace("*/", "* /")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_becomes_an_identifier_and_ends_no_comment() {
        assert_eq!(identifier("linux-microvm"), "linux_microvm");
        assert_eq!(identifier("1st; *\"x"), "msr_1st____x");
        assert_eq!(comment("a */ b\nc"), "a * / b c");
    }
}
