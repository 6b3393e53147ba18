//! The C that `plan --emit c` prints answers as the library does.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use msrgate_core::{Access, Exit, FaultCause, Msr, MsrBackend, Outcome, Reason};
use msrgate_plan::Plan;
use msrgate_policy::Policy;

use crate::command::{Folder, Ran, find};

const DRIVER: &str = include_str!("answers.c");

/// What answers.c has for registers, handlers and the physical CPU.
struct Registers([u64; 512]);

impl Registers {
    fn new() -> Registers {
        Registers(std::array::from_fn(|index| {
            0x0101_0101_0101_0101 * (index as u64 & 0xff)
        }))
    }

    fn at(&mut self, msr: Msr) -> Result<&mut u64, FaultCause> {
        match msr.0 % 8 {
            5 => Err(FaultCause::KernelRefused),
            _ => Ok(&mut self.0[msr.0 as usize % 512]),
        }
    }
}

impl MsrBackend for Registers {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        self.at(msr).map(|value| *value)
    }

    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause> {
        self.at(msr).map(|register| *register = value)
    }

    fn host_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        let value = Ok(3 * u64::from(msr.0));
        value.and_then(|value| {
            if msr.0 % 4 == 1 {
                Err(FaultCause::HostUnreadable)
            } else {
                Ok(value)
            }
        })
    }

    fn handler_read(&mut self, _: &str, msr: Msr) -> Result<u64, FaultCause> {
        match msr.0 % 2 {
            1 => Err(FaultCause::HandlerFault),
            _ => Ok(u64::from(msr.0 ^ 0x1234)),
        }
    }

    fn handler_write(&mut self, _: &str, _: Msr, value: u64) -> Result<(), FaultCause> {
        match value % 2 {
            1 => Err(FaultCause::HandlerFault),
            _ => Ok(()),
        }
    }
}

/// Numbers that are the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) as usize % end
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

const READS: [&str; 10] = [
    "\"allow\"",
    "\"deny\"",
    "\"zero\"",
    "{ value = \"0x8000000000000001\" }",
    "{ shadow = 5 }",
    "{ mask = { keep = 0xff, set = 0x1081 } }",
    "\"host\"",
    "{ handler = \"a\" }",
    "{ handler = \"b-1\" }",
    "{ shadow = 0 }",
];

const WRITES: [&str; 10] = [
    "\"allow\"",
    "\"deny\"",
    "\"ignore\"",
    "\"shadow\"",
    "{ mask = { may_change = 0xff0 } }",
    "{ mask = { may_change = 0xf, otherwise = \"drop\" } }",
    "{ only = [1, 7, 9] }",
    "{ once = true }",
    "{ handler = \"b-1\" }",
    "{ handler = \"c\" }",
];

/// A policy over few MSRs, so that rules meet.
fn policy(numbers: &mut Numbers) -> String {
    let mut text = format!(
        "version = 1\nname = \"policy\"\ndefault = {}\n",
        numbers.of(&["\"allow\"", "\"deny\""])
    );
    for kernel in ["unknown", "invalid"] {
        if numbers.below(2) == 0 {
            let read = numbers.of(&["\"deny\"", "\"zero\"", "{ shadow = 3 }", "{ handler = \"u\" }"]);
            let write = numbers.of(&["\"deny\"", "\"ignore\"", "\"shadow\"", "{ handler = \"u\" }"]);
            let _ = writeln!(text, "{kernel} = {{ read = {read}, write = {write} }}");
        }
    }
    for rule in 0..2 + numbers.below(8) {
        // No two rules name the same MSRs.
        let first = 0x10 + rule + 10 * numbers.below(4);
        let last = first + numbers.below(6);
        let (read, write) = (numbers.of(&READS), numbers.of(&WRITES));
        let _ = writeln!(
            text,
            "[[rule]]\nmsr = \"{first:#x}..={last:#x}\"\nread = {read}\nwrite = {write}"
        );
    }
    text
}

/// Accesses as answers.c reads them, and what the library answers.
fn exits(plan: &Plan, numbers: &mut Numbers) -> (String, String) {
    let (mut given, mut wanted) = (String::new(), String::new());
    let mut state = plan.table().vcpu_state();
    let mut registers = Registers::new();
    for _ in 0..600 {
        // Seldom so far away that spare shadows run out.
        let msr = match numbers.below(40) {
            0 => Msr(0x4000_0000 + numbers.below(1000) as u32),
            _ => Msr(0x0e + numbers.below(50) as u32),
        };
        let reason = numbers.of(&[Reason::Filter, Reason::Filter, Reason::Unknown, Reason::Invalid]);
        let value = numbers.of(&[0, 1, 7, 9, 0xff0, 0x1234, u64::MAX]);
        let access = match numbers.below(2) {
            0 => Access::Read { msr },
            _ => Access::Write { msr, value },
        };
        let is_write = u32::from(matches!(access, Access::Write { .. }));
        let _ = writeln!(given, "{is_write} {:x} {} {value:x}", msr.0, reason as u32);
        let answer = plan
            .table()
            .answer(Exit::new(access, reason), &mut state, &mut registers);
        let _ = match answer.outcome {
            Outcome::Value(value) => writeln!(wanted, "{value:x}"),
            Outcome::Done => writeln!(wanted, "done"),
            Outcome::Fault => writeln!(wanted, "fault"),
        };
    }
    (given, wanted)
}

#[test]
fn the_c_that_plan_prints_answers_as_the_library_does() {
    let Some(cc) = find("cc").filter(|_| Path::new("/usr/include/linux/kvm.h").exists()) else {
        println!("skipped: there is no C compiler, or no <linux/kvm.h>");
        return;
    };
    let folder = Folder::new();
    folder.write("answers.c", DRIVER);
    for seed in 1..=25u64 {
        let mut numbers = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let text = policy(&mut numbers);
        folder.write("policy.toml", &text);
        folder.write(
            "policy.h",
            folder.run(&["plan", "--emit", "c", "policy.toml"]).code(0).out,
        );
        let policy = Policy::parse("policy.toml", &text).expect("a policy");
        let plan = Plan::compile_for(&policy.decision_map(None).expect("a map"), &policy.options()).expect("a plan");
        let (given, wanted) = exits(&plan, &mut numbers);
        folder.write("exits", given);
        let flags = [
            "-std=gnu99",
            "-Wall",
            "-Wextra",
            "-Wconversion",
            "-pedantic",
            "-Werror",
            "-o",
            "answers",
            "answers.c",
        ];
        Ran::of(Command::new(&cc).args(flags).current_dir(folder.path())).code(0);
        let run = Ran::of(
            Command::new("sh")
                .args(["-c", "./answers < exits"])
                .current_dir(folder.path()),
        );
        let printed = run.code(0).out;
        for (number, (got, wanted)) in printed.lines().zip(wanted.lines()).enumerate() {
            assert_eq!(got, wanted, "access {number} under\n{text}");
        }
        assert_eq!(printed.lines().count(), wanted.lines().count());
    }
}
