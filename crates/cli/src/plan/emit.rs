//! A plan's filter as source code.

use std::io::{self, Write};

use msrgate_core::{
    ActionTable, Argument, ArgumentKey, Disposition, FilterRange, MsrRange, OnLockedBits, Op, ReadAction, Verdict,
    WriteAction,
};
use msrgate_plan::Plan;
use msrgate_policy::foreign::{Format, export};

use crate::exit::{Exit, Failure};
use crate::load::Loaded;
use crate::{stream, words};

/// What a C header is made of: `policy_` and `POLICY_` stand for the policy's name, and words between `@` for what the plan says.
const HEADER: &str = include_str!("header.h");

/// A C header: the filter as a constant, what else is answered as tables, and the functions that answer by them.
pub(crate) fn c(out: &mut impl Write, loaded: &Loaded) -> io::Result<()> {
    let plan = &loaded.plan;
    let name = identifier(&loaded.policy.name);
    let upper = name.to_uppercase();
    let table = plan.table();
    let mut tables = Tables {
        upper: &upper,
        handlers: Vec::new(),
        values: Vec::new(),
    };
    let rows = |range: MsrRange, row: String| {
        let (first, last) = (range.first().0, range.last().0);
        format!("\t{{ {first:#x}, {last:#x}, {row} }},\n")
    };
    let mut reads = String::new();
    for entry in table.reads() {
        reads += &rows(entry.range, tables.row(entry.action.did(), entry.action.arguments()));
    }
    let mut writes = String::new();
    for entry in table.writes() {
        writes += &rows(entry.range, tables.row(entry.action.did(), entry.action.arguments()));
    }
    let mut fallbacks = |(read, write): &(ReadAction, WriteAction)| {
        let read = rows(MsrRange::ALL, tables.row(read.did(), read.arguments()));
        read + &rows(MsrRange::ALL, tables.row(write.did(), write.arguments()))
    };
    let (unknown, invalid) = (fallbacks(table.unknown()), fallbacks(table.invalid()));
    let cell_count = table
        .cells()
        .last()
        .map_or(0, |(range, cell)| cell as u64 + range.len());
    let cells = table.cells();
    let cells: String = cells.map(|(range, cell)| rows(range, cell.to_string())).collect();
    let keeps = |(read, write): &(ReadAction, WriteAction)| read.keeps().is_some() || write.keeps().is_some();
    let spare = match keeps(table.unknown()) || keeps(table.invalid()) {
        true => ActionTable::SPARE_CELLS,
        false => 0,
    };
    let presets = plan.presets().iter();
    let presets: String = presets
        .map(|preset| format!("\t{{ {:#x}, {:#x}ull }},\n", preset.msr.0, preset.value))
        .collect();
    let values = tables.values.iter().map(|value| format!("\t{value:#x}ull,\n"));
    let places = tables.handlers.iter().enumerate().map(|(place, handler)| {
        let handler = identifier(handler).to_uppercase();
        format!("#define {upper}_HANDLER_{handler} {place}\n")
    });

    let mut text = HEADER
        .replace("POLICY_", &format!("{upper}_"))
        .replace("policy_", &format!("{name}_"));
    for (word, by) in [
        ("@head@", head(loaded)),
        ("@hash@", words::hex(&plan.map().hash())),
        ("@reasons@", format!("{:#x}", plan.reasons().bits())),
        ("@filter@", c_filter(plan, &name)),
        ("@presets@", presets),
        ("@reads@", reads),
        ("@writes@", writes),
        ("@unknown@", unknown),
        ("@invalid@", invalid),
        ("@values@", values.collect()),
        ("@cells@", cells),
        ("@cell_count@", cell_count.to_string()),
        ("@spare@", spare.to_string()),
        ("@handler_places@", places.collect()),
        ("@handler_count@", tables.handlers.len().to_string()),
    ] {
        text = text.replace(word, &by);
    }
    write!(out, "{text}")
}

/// The comment at the head of a C header.
fn head(loaded: &Loaded) -> String {
    let name = identifier(&loaded.policy.name);
    format!(
        "/* The policy `{}` for VMMs in C, made by msrgate.\n *\n \
         * {name}_install() once for a VM, {name}_add_vcpu() for each vCPU with a zeroed `struct {name}_state`, and\n \
         * {name}_answer() after each KVM_RUN that gave 0.\n */",
        comment(&loaded.policy.name),
    )
}

/// The filter in C: its bitmaps, and `struct kvm_msr_filter`.
fn c_filter(plan: &Plan, name: &str) -> String {
    let filter = plan.filter();
    let mut text = String::new();
    for (slot, range) in filter.ranges().iter().enumerate() {
        // The kernel copies whole longs, so the arrays are of longs.
        let words = range.bitmap();
        text += &format!(
            "/* {} */\nstatic const __u64 {name}_bitmap_{slot}[{}] = {{\n",
            describe(range),
            words.len()
        );
        for row in words.chunks(4) {
            let row: Vec<String> = row.iter().map(|word| format!("{word:#018x}ULL")).collect();
            text += &format!("\t{},\n", row.join(", "));
        }
        text += "};\n\n";
    }
    let default = match filter.default_verdict() {
        Verdict::Allow => "KVM_MSR_FILTER_DEFAULT_ALLOW",
        Verdict::Deny => "KVM_MSR_FILTER_DEFAULT_DENY",
    };
    text += &format!("static const struct kvm_msr_filter {name}_filter = {{\n\t.flags = {default},\n");
    let ranges = filter.ranges();
    // A slot that is not used, since standard C has no empty list.
    text += if ranges.is_empty() {
        "\t.ranges = {\n\t\t{ 0, 0, 0, 0 },\n"
    } else {
        "\t.ranges = {\n"
    };
    for (slot, range) in filter.ranges().iter().enumerate() {
        text += &format!(
            "\t\t{{\n\t\t\t.flags = {},\n\t\t\t.nmsrs = {},\n\t\t\t.base = {:#x},\n\t\t\t.bitmap = (__u8 *){name}_bitmap_{slot},\n\t\t}},\n",
            flags(range, "KVM_MSR_FILTER_READ", "KVM_MSR_FILTER_WRITE"),
            range.nmsrs(),
            range.base()
        );
    }
    text + "\t},\n};"
}

/// What the rows of the tables refer to.
struct Tables<'a> {
    upper: &'a str,
    handlers: Vec<String>,
    values: Vec<u64>,
}

impl Tables<'_> {
    /// An action and what it is given, as two numbers.
    fn row<'b>(&mut self, did: Disposition, given: impl Iterator<Item = (ArgumentKey, Argument<'b>)>) -> String {
        let mut numbers: Vec<u64> = Vec::new();
        for (_, argument) in given {
            match argument {
                Argument::Number(value) | Argument::Implied(value) => numbers.push(value),
                Argument::OnLockedBits(otherwise) => numbers.push((otherwise == OnLockedBits::Deny).into()),
                Argument::Numbers(values) => {
                    numbers.extend([self.values.len() as u64, values.len() as u64]);
                    self.values.extend(values);
                }
                Argument::Name(name) => {
                    let known = self.handlers.iter().position(|handler| handler == name);
                    numbers.push(known.unwrap_or(self.handlers.len()) as u64);
                    if known.is_none() {
                        self.handlers.push(name.to_owned());
                    }
                }
            }
        }
        numbers.resize(2, 0);
        let action = match did {
            Disposition::Allow => Disposition::Pass,
            Disposition::Zero => Disposition::Value,
            did => did,
        };
        let numbers: Vec<String> = numbers.iter().map(|number| format!("{number:#x}ull")).collect();
        format!(
            "{}_{}, {}",
            self.upper,
            action.name().to_uppercase(),
            numbers.join(", ")
        )
    }
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
    write!(out, "{}", spilled(plan))?;
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
        rust_bytes(out, &format!("{name}_BITMAP_{slot}"), &bytes)?;
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
    writeln!(out, "    ]\n}}\n")?;
    writeln!(
        out,
        "/// The whole plan, with what is answered: `msrgate::Plan::from_bytes` proves it once more, and needs no kvm-ioctls."
    )?;
    rust_bytes(out, &format!("{name}_PLAN"), &plan.to_bytes())
}

fn rust_bytes(out: &mut impl Write, name: &str, bytes: &[u8]) -> io::Result<()> {
    writeln!(out, "pub static {name}: [u8; {}] = [", bytes.len())?;
    for row in bytes.chunks(16) {
        let row: Vec<String> = row.iter().map(|byte| format!("{byte:#04x}")).collect();
        writeln!(out, "    {},", row.join(", "))?;
    }
    writeln!(out, "];\n")
}

/// What the filter alone would deny, as lines of a comment.
fn spilled(plan: &Plan) -> String {
    let mut text = String::new();
    for (number, (range, op)) in plan.spilled().enumerate() {
        if number == 0 {
            text += "//\n\
                 // The filter has no room to allow these accesses, which the policy leaves to the kernel. They exit as\n\
                 // KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR: the VMM must pass them on with KVM_GET_MSRS and KVM_SET_MSRS,\n\
                 // on the vCPU's thread before it runs again, and set `error` to 1 where these do not take the MSR:\n";
        }
        text += &format!("//   {op} {range}\n");
    }
    text
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
        format!("{} cannot express the whole policy", format.name()),
    ))
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
