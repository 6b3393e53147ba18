//! What a guest sees: its processors, some MSRs through Linux's `/dev/cpu/N/msr`, and whether a filter that is replaced holds at
//! once. It runs in Linux on the hypervisor; each line that it prints is a name and values.
//!
//! ```text
//! guest view
//! guest live REPLACEMENTS READS   READS for each replacement, on processor 1
//! guest mixed REPLACEMENTS READS  with reads in between that leave the guest under either filter
//! ```

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

const BIOS_SIGN_ID: u32 = 0x8b;
const TSC_AUX: u32 = 0xc000_0103;
/// The hypervisor's own: which filter is in force.
const WHICH: u32 = 0x4d53_0000;
/// What the second filter gives for TSC_AUX. The first one lets the processor answer.
const SECOND: u64 = 0x5eed;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| {
        arguments
            .get(at)
            .and_then(|text| text.parse().ok())
            .ok_or("a number is missing")
    };
    match arguments.first().map(String::as_str) {
        Some("view") => view(),
        Some("live") => live(number(1)?, number(2)?, false),
        Some("mixed") => live(number(1)?, number(2)?, true),
        _ => Err("view, live or mixed".into()),
    }
}

/// The MSRs of one processor.
struct Msrs(File);

impl Msrs {
    fn of(cpu: u32) -> io::Result<Msrs> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/dev/cpu/{cpu}/msr"))
            .map(Msrs)
    }

    /// The value; an error where RDMSR faults.
    fn read(&self, msr: u32) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, msr.into())?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, msr: u32, value: u64) -> io::Result<()> {
        self.0.write_all_at(&value.to_le_bytes(), msr.into())
    }
}

fn view() -> Result<(), Box<dyn Error>> {
    let info = fs::read_to_string("/proc/cpuinfo")?;
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name));
        line.and_then(|line| Some(line.split_once(':')?.1.trim()))
            .unwrap_or("?")
    };
    println!(
        "processors {}",
        info.lines().filter(|line| line.starts_with("processor")).count()
    );
    println!("microcode {}", field("microcode"));
    let flags: Vec<&str> = field("flags").split(' ').collect();
    for flag in ["svm", "vmx"] {
        println!("flag {flag} {}", u8::from(flags.contains(&flag)));
    }
    let msrs = Msrs::of(0)?;
    for msr in [BIOS_SIGN_ID, 0x17, 0xc001_0062, 0x4b56_4d00, WHICH, TSC_AUX] {
        match msrs.read(msr) {
            Ok(value) => println!("read {msr:#x} {value:#x}"),
            Err(_) => println!("read {msr:#x} fault"),
        }
    }
    for msr in [BIOS_SIGN_ID, 0x17, 0xc001_0062, 0x4b56_4d00] {
        match msrs.write(msr, 0) {
            Ok(()) => println!("write {msr:#x} done"),
            Err(_) => println!("write {msr:#x} fault"),
        }
    }
    Ok(())
}

/// Keeps the calling thread on one processor.
fn stay_on(cpu: usize) -> io::Result<()> {
    #[expect(unsafe_code, reason = "std has no word for it")]
    unsafe extern "C" {
        fn sched_setaffinity(pid: i32, size: usize, mask: *const u64) -> i32;
    }
    let mask = 1_u64 << cpu;
    #[expect(unsafe_code, reason = "a call of the C library")]
    // SAFETY: reads the eight bytes of `mask`; 0 is the calling thread.
    match unsafe { sched_setaffinity(0, 8, &mask) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Replaces the filter by processor 0 while processor 1 reads. A read that began and ended between two replacements shows the
/// filter of that time, or is wrong.
fn live(replacements: u64, reads_for_each: u64, mixed: bool) -> Result<(), Box<dyn Error>> {
    /// The filter in force; 0 while that is not known.
    static NOW: AtomicU64 = AtomicU64::new(0);
    static READS: AtomicU64 = AtomicU64::new(0);
    static OVER: AtomicBool = AtomicBool::new(false);
    let reader = thread::spawn(move || -> io::Result<(u64, u64)> {
        stay_on(1)?;
        let msrs = Msrs::of(1)?;
        let (mut wrong, mut changes, mut last) = (0, 0, 0);
        while !OVER.load(SeqCst) {
            let before = NOW.load(SeqCst);
            let value = msrs.read(TSC_AUX)?;
            if mixed {
                msrs.read(BIOS_SIGN_ID)?;
            }
            let after = NOW.load(SeqCst);
            changes += u64::from(value != last);
            last = value;
            wrong += u64::from(before == after && before != 0 && (value == SECOND) != (before == 2));
            READS.fetch_add(1, SeqCst);
        }
        Ok((wrong, changes))
    });
    stay_on(0)?;
    let msrs = Msrs::of(0)?;
    for which in [2, 1].into_iter().cycle().take(usize::try_from(replacements)?) {
        NOW.store(0, SeqCst);
        msrs.write(WHICH, which)?;
        NOW.store(which, SeqCst);
        let enough = READS.load(SeqCst) + reads_for_each;
        while READS.load(SeqCst) < enough && !reader.is_finished() {
            std::hint::spin_loop();
        }
    }
    OVER.store(true, SeqCst);
    let (wrong, changes) = reader.join().map_err(|_| "the reader panicked")??;
    println!(
        "live replacements {replacements} reads {} changes {changes} wrong {wrong}",
        READS.load(SeqCst)
    );
    Ok(())
}
