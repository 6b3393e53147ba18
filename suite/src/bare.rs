//! The hypervisor of `examples/bare`: the engine under real VMRUN and real bitmaps, in an emulator.
//!
//! It runs in QEMU, whose memory is a file. In it, at 64 MiB, lie the number of the last message, that of the last answer, and
//! their sizes, 32 bits each; a message lies 1 MiB further, an answer 2 MiB. A message's first byte says what it is:
//!
//! ```text
//! v  a new VM: whether unknown MSRs are ignored                                        → nothing
//! p  a plan in its bytes, in place of the one before                                   → 0 where it was read
//! c  a call: process, descriptor, request, address, and the memory that it reads from  → an error's number, or 0
//! k  the VM dies                                                                       → nothing
//! a  an access of the guest, the answer to its exit, and calls before that             → see `Reply`
//! q  the machine powers off                                                            → nothing ever
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::thread;

use msrgate_core::{Access, Outcome, Reason, Verdict};
use msrgate_guest::raw::Arena;
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;
use msrgate_verify::case::PAGES;

use crate::compiled::{compile, cpuid};
use crate::plan::action;
use crate::{AccessStep, Call, CallResult, Case, Descriptor, Implementation, Process, Seen, Stop, Subject, perform};

/// The hypervisor on a machine of its own, for all cases.
pub struct Bare(Mutex<Line>);

/// The machine, its memory, and what was counted.
struct Line {
    machine: Child,
    memory: File,
    /// Messages and answers, for a machine that shares no memory.
    record: Option<File>,
    turn: u32,
    counts: Interceptions,
}

const ASKED: u64 = 64 << 20;
const MESSAGE: u64 = ASKED + (1 << 20);
const ANSWER: u64 = ASKED + (2 << 20);
const MEBIBYTES: u64 = 128;

/// How many accesses the guest made, and how many of them left it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Interceptions {
    /// How many accesses left the guest, by the hypervisor's count.
    pub left: u64,
    /// All that were made.
    pub made: u64,
}

impl Bare {
    /// Starts the machine, or says why it cannot be had. The environment's `MSRGATE_BARE` is the emulator's command, a line for each
    /// word, to which its memory is added; `MSRGATE_BARE_RECORD` is a file for all messages and answers, each after its size.
    pub fn start() -> Result<Bare, String> {
        let command = std::env::var("MSRGATE_BARE")
            .map_err(|_| "MSRGATE_BARE names no emulator: cargo xtask test --only bare")?;
        let mut words = command.lines();
        let mut command = Command::new(words.next().unwrap_or_default());
        let path = std::env::temp_dir().join(format!("msrgate-bare-{}", std::process::id()));
        let failed = |error| format!("{}: {error}", path.display());
        let memory = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(failed)?;
        memory.set_len(MEBIBYTES << 20).map_err(failed)?;
        let backend = format!(
            "memory-backend-file,id=memory,mem-path={},size={MEBIBYTES}M,share=on",
            path.display()
        );
        command.args(words).args([
            "-object",
            &backend,
            "-machine",
            "memory-backend=memory",
            "-m",
            &MEBIBYTES.to_string(),
        ]);
        // It lists the features that it does not emulate.
        command.stdin(Stdio::null()).stderr(Stdio::null());
        // A child that is to end with its parent ends with the thread that started it (PR_SET_PDEATHSIG): one that stays.
        let (started, machine) = channel();
        thread::spawn(move || {
            let _ = started.send(command.spawn());
            loop {
                thread::park();
            }
        });
        let machine = machine.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()));
        let record = std::env::var_os("MSRGATE_BARE_RECORD").map(File::create).transpose();
        let mut line = Line {
            machine: machine.map_err(|error| format!("the emulator does not start: {error}"))?,
            memory,
            record: record.map_err(|error| format!("MSRGATE_BARE_RECORD: {error}"))?,
            turn: 0,
            counts: Interceptions::default(),
        };
        let answer = line.ask(&[b'v', 0]);
        // Both have it open by now.
        let _ = fs::remove_file(&path);
        match answer {
            Ok(_) => Ok(Bare(Mutex::new(line))),
            Err(stop) => Err(format!("the hypervisor does not start: {stop:?}")),
        }
    }

    /// What was counted since this was last asked.
    pub fn take_counts(&self) -> Interceptions {
        std::mem::take(&mut self.line().counts)
    }

    fn line(&self) -> std::sync::MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let _ = self.machine.kill();
        let _ = self.machine.wait();
    }
}

impl Line {
    fn word(&self, at: u64) -> Result<u32, Stop> {
        let mut bytes = [0; 4];
        self.memory.read_exact_at(&mut bytes, at).map_err(Stop::fail)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Sends a message and waits for the answer.
    fn ask(&mut self, message: &[u8]) -> Result<Vec<u8>, Stop> {
        let write = |bytes: &[u8], at| self.memory.write_all_at(bytes, at).map_err(Stop::fail);
        self.turn += 1;
        write(message, MESSAGE)?;
        write(&(message.len() as u32).to_le_bytes(), ASKED + 8)?;
        write(&self.turn.to_le_bytes(), ASKED)?;
        while self.word(ASKED + 4)? != self.turn {
            if let Ok(Some(status)) = self.machine.try_wait() {
                return Err(Stop::fail(format!("the emulator ended: {status}")));
            }
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
        let mut answer = vec![0; self.word(ASKED + 12)? as usize];
        self.memory.read_exact_at(&mut answer, ANSWER).map_err(Stop::fail)?;
        if let Some(record) = &mut self.record {
            for bytes in [message, &answer] {
                let whole = [&(bytes.len() as u32).to_le_bytes(), bytes].concat();
                record.write_all(&whole).map_err(Stop::fail)?;
            }
        }
        Ok(answer)
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl Implementation for Bare {
    fn name(&self) -> &str {
        "bare metal, SVM in an emulator"
    }

    fn start(&self, case: &Case, process: Process) -> Result<Box<dyn Subject + '_>, Stop> {
        self.line().ask(&[b'v', u8::from(case.ignore_msrs)])?;
        let mut running = Running {
            bare: self,
            process,
            cpuid: cpuid(case)?,
            plan: None,
        };
        if let Some(policy) = &case.policy {
            running.replace(policy)?;
        }
        Ok(Box::new(running))
    }
}

struct Running<'a> {
    bare: &'a Bare,
    process: Process,
    cpuid: Option<Cpuid>,
    plan: Option<Plan>,
}

impl Subject for Running<'_> {
    fn access(&mut self, step: &AccessStep) -> Result<Seen, Stop> {
        let (op, value) = match step.access {
            Access::Read { .. } => (0, 0),
            Access::Write { value, .. } => (1, value),
        };
        let (answer, answered) = match step.answer {
            Outcome::Fault => (0, 0),
            Outcome::Value(value) => (1, value),
            Outcome::Done => (2, 0_u64),
        };
        let mut message = vec![b'a', op];
        message.extend(step.msr().0.to_le_bytes());
        message.extend(value.to_le_bytes());
        message.push(answer);
        message.extend(answered.to_le_bytes());
        for call in &step.meanwhile {
            message.extend(encoded(call, self.process)?);
        }
        let mut line = self.bare.line();
        let reply = line.ask(&message)?;
        line.counts.made += 1;
        line.counts.left += u64::from(reply.get(2) == Some(&1));
        drop(line);
        let reply = Reply::of(&reply).ok_or(Stop::fail("the reply is too short"))?;
        if reply.left != u64::from(reply.intercepted) {
            let what = if reply.intercepted { "intercepts" } else { "passes" };
            return Err(Stop::fail(format!(
                "the bitmap {what} it, and it leaves the guest {} times",
                reply.left
            )));
        }
        let results = step.meanwhile.iter().zip(reply.calls);
        for (call, result) in results {
            perform(call, |_| Ok(Some(result)))?;
        }
        Ok(Seen {
            action: self.plan.as_ref().map(|plan| action(plan, step.msr(), step.op())),
            verdict: Some(reply.verdict),
            exit: Some(reply.reason),
            sees: Some(reply.sees.ok_or(Stop::fail("a read leaves bits above EAX and EDX"))?),
        })
    }

    fn call(&mut self, call: &Call) -> Result<Option<CallResult>, Stop> {
        let message = [vec![b'c'], encoded(call, self.process)?].concat();
        Ok(Some(result(number(&self.bare.line().ask(&message)?))))
    }

    fn replace(&mut self, policy: &str) -> Result<(), Stop> {
        let plan = compile(policy, self.cpuid.as_ref())?.plan;
        let message = [vec![b'p'], plan.to_bytes()].concat();
        if self.bare.line().ask(&message)? != [0] {
            return Err(Stop::fail("it does not read the plan"));
        }
        self.plan = Some(plan);
        Ok(())
    }

    fn kill(&mut self) -> Result<(), Stop> {
        self.bare.line().ask(b"k").map(drop)
    }
}

/// What an access came to.
struct Reply {
    verdict: Verdict,
    /// The bit of the engine's bitmap.
    intercepted: bool,
    /// How often the guest left.
    left: u64,
    reason: Option<Reason>,
    sees: Option<Outcome>,
    /// The results of calls that were made while it waited.
    calls: Vec<CallResult>,
}

impl Reply {
    fn of(bytes: &[u8]) -> Option<Reply> {
        let ([verdict, intercepted, left, reason, sees], rest) = bytes.split_first_chunk()?;
        let (value, calls) = rest.split_first_chunk::<8>()?;
        Some(Reply {
            verdict: if *verdict == 1 { Verdict::Allow } else { Verdict::Deny },
            intercepted: *intercepted == 1,
            left: u64::from(*left),
            reason: Reason::from_bits(u32::from(*reason)),
            sees: match sees {
                0 => Some(Outcome::Fault),
                1 => Some(Outcome::Value(u64::from_le_bytes(*value))),
                2 => Some(Outcome::Done),
                _ => None,
            },
            calls: calls.chunks(4).map(|bytes| result(number(bytes))).collect(),
        })
    }
}

fn result(number: u64) -> CallResult {
    CallResult(i32::try_from(number).unwrap_or(-1))
}

/// A call as a message has it, with what is not 0 of the memory that it may read.
fn encoded(call: &Call, process: Process) -> Result<Vec<u8>, Stop> {
    let descriptor = match call.on {
        Descriptor::System => 0,
        Descriptor::Vm => 1,
        Descriptor::Vcpu => 2,
        Descriptor::AnotherProcess => return Err(Stop::skip("it does not know which process made a VM")),
    };
    let mut arena = Arena::new(PAGES).map_err(Stop::fail)?;
    let (request, argp) = call.place(process, &mut arena);
    let mut bytes = vec![u8::from(process == Process::Compat), descriptor];
    bytes.extend(request.number().to_le_bytes());
    bytes.extend(argp.to_le_bytes());
    bytes.extend(arena.address(0).unwrap_or(0).to_le_bytes());
    bytes.push(PAGES as u8);
    for page in 0..PAGES {
        let page = arena.page(page).unwrap_or_default();
        let first = page.iter().position(|byte| *byte != 0).unwrap_or(0);
        let used = page
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1 - first);
        bytes.extend((first as u16).to_le_bytes());
        bytes.extend((used as u16).to_le_bytes());
        bytes.extend(page.iter().skip(first).take(used));
    }
    Ok(bytes)
}
