//! A small VMM of its own make, which knows nothing of msrgate: real-mode guests that access MSRs, on kvm-ioctls.
//!
//! ```text
//! small_vmm [--filter] [--vcpus N] [--set INDEX=VALUE] [--vendors NAME,…] [--sandbox] ACCESS…
//! msrgate run -p policies/fixed-microcode.toml -- small_vmm r:0x8b w:0x174=8 r:0x174
//! ```
//!
//! An access is `r:INDEX` or `w:INDEX=VALUE`; `t:INDEX=COUNT` reads so often, and prints the time of one on standard
//! error. What each got is printed, a line each: `rdmsr 0x8b 0x1`, `wrmsr 0x174 done`, `rdmsr 0xdead fault`.
//!
//! `--filter` gives the VM a filter of this VMM's own, and handlers for what it denies: a read of 0x35 (cores and
//! threads) gets 0x20004, as some VMMs do it. An exit that it has no handler for ends this VMM with a panic, as it
//! ends others.
//!
//! `--set` puts a value into each vCPU's MSR before it runs (KVM_SET_MSRS), and prints what the VMM reads there after
//! it has run (KVM_GET_MSRS): `vmm 0x8b 0x7`.
//!
//! `--vendors` gives the vCPUs a CPUID, in the order of the list: that of KVM, by the maker `intel` or `amd`. Without it
//! they have none.
//!
//! `--sandbox` lets each vCPU's thread make no system call but KVM_RUN.

#![expect(unsafe_code, reason = "guest memory is mapped by hand")]

use std::error::Error;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES, KVM_MSR_EXIT_REASON_FILTER, Msrs, kvm_enable_cap, kvm_msr_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuExit, VcpuFd, VmFd};

/// Guest memory of one vCPU, in bytes.
const MEMORY: usize = 0x1_0000;
const HANDLER: usize = 0x500;
const CODE: usize = 0x8000;
/// Where the guest reports EAX, EDX and whether it faulted.
const PORTS: [u16; 3] = [0x21, 0x22, 0x23];
/// IA32_CORE_THREAD_COUNT.
const CORE_THREAD_COUNT: u32 = 0x35;

#[derive(Clone, Copy)]
enum Access {
    Read(u32),
    Write(u32, u64),
    /// So many reads, timed.
    Timed(u32, u32),
}

/// What the command line asks for.
#[derive(Default)]
struct Options {
    filter: bool,
    vcpus: usize,
    set: Vec<(u32, u64)>,
    vendors: Vec<String>,
    sandbox: bool,
    accesses: Vec<Access>,
}

/// Runs the guests that `arguments` ask for, and prints what they saw.
pub(crate) fn main_with(arguments: impl Iterator<Item = String>) -> Result<(), Box<dyn Error>> {
    let options = parse(arguments)?;
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    if options.filter {
        own_filter(&vm)?;
    }
    let threads: Vec<_> = (0..options.vcpus.max(1))
        .map(|id| {
            let mut vcpu = new_vcpu(&vm, id, &options.accesses)?;
            if let Some(vendor) = options.vendors.get(id) {
                set_cpuid(&kvm, &vcpu, vendor)?;
            }
            set(&vcpu, &options.set)?;
            let (accesses, msrs) = (options.accesses.clone(), options.set.clone());
            let sandboxed = options.sandbox;
            let result = Arc::new(OnceLock::new());
            let told = Arc::clone(&result);
            let thread = std::thread::spawn(move || {
                // All the memory that the lines take, while it can be had.
                let lines = String::with_capacity(64 * (accesses.len() + msrs.len()));
                let entered = match sandboxed {
                    true => sandbox().map_err(|error| format!("seccomp: {error}")),
                    false => Ok(()),
                };
                let _ = told.set(entered.and_then(|()| run(&mut vcpu, &accesses, &msrs, lines)));
                // To end takes calls, so that in a sandbox the process does it.
                if sandboxed {
                    loop {
                        std::hint::spin_loop();
                    }
                }
            });
            Ok((thread, result))
        })
        .collect::<Result<_, Box<dyn Error>>>()?;
    for (thread, result) in threads {
        while result.get().is_none() && !thread.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let result = result.get().ok_or("a vCPU's thread panicked")?;
        print!("{}", result.clone()?);
    }
    Ok(())
}

#[allow(dead_code, reason = "a test starts it otherwise")]
fn main() -> ExitCode {
    match main_with(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // In one write, so that no other line begins within it.
            let line = format!("small_vmm: {error}\n");
            let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, Box<dyn Error>> {
    let mut options = Options::default();
    while let Some(argument) = arguments.next() {
        match argument.split_once(':') {
            None if argument == "--filter" => options.filter = true,
            None if argument == "--sandbox" => options.sandbox = true,
            None if argument == "--vcpus" => {
                options.vcpus = arguments.next().ok_or("--vcpus takes a number")?.parse()?
            }
            None if argument == "--set" => {
                let argument = arguments.next().unwrap_or_default();
                let (msr, value) = argument.split_once('=').ok_or("--set takes INDEX=VALUE")?;
                options.set.push((u32::try_from(number(msr)?)?, number(value)?));
            }
            None if argument == "--vendors" => {
                let list = arguments.next().unwrap_or_default();
                options.vendors = list.split(',').map(str::to_owned).collect();
            }
            Some(("r", msr)) => options.accesses.push(Access::Read(u32::try_from(number(msr)?)?)),
            Some(("w", access)) => {
                let (msr, value) = access.split_once('=').ok_or("a write is w:INDEX=VALUE")?;
                let access = Access::Write(u32::try_from(number(msr)?)?, number(value)?);
                options.accesses.push(access);
            }
            Some(("t", access)) => {
                let (msr, count) = access.split_once('=').ok_or("a timed read is t:INDEX=COUNT")?;
                let (msr, count) = (u32::try_from(number(msr)?)?, u32::try_from(number(count)?)?);
                options.accesses.push(Access::Timed(msr, count));
            }
            _ => return Err(format!("`{argument}` is no access").into()),
        }
    }
    Ok(options)
}

fn number(text: &str) -> Result<u64, Box<dyn Error>> {
    Ok(match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16)?,
        None => text.parse()?,
    })
}

/// Everything but reads of one MSR, which this VMM answers itself.
fn own_filter(vm: &VmFd) -> Result<(), Box<dyn Error>> {
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [u64::from(KVM_MSR_EXIT_REASON_FILTER), 0, 0, 0],
        ..Default::default()
    })?;
    let denied = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ,
        base: CORE_THREAD_COUNT,
        msr_count: 1,
        // The kernel reads whole words.
        bitmap: &[0; 8],
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[denied])?;
    Ok(())
}

fn new_vcpu(vm: &VmFd, id: usize, accesses: &[Access]) -> Result<VcpuFd, Box<dyn Error>> {
    let program = program(accesses);
    let base = id * MEMORY;
    let (rights, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: a new mapping where the kernel likes; it replaces none.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), MEMORY, rights, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the mapping is this long, zeroed and writable, and nothing else refers to it yet.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u8>(), MEMORY) };
    // #GP: notes it in BL, steps over the two bytes of RDMSR or WRMSR.
    let handler = [0x55, 0x89, 0xe5, 0x83, 0x46, 0x02, 0x02, 0x5d, 0xb3, 0x01, 0xcf];
    bytes[HANDLER..HANDLER + handler.len()].copy_from_slice(&handler);
    bytes[CODE..CODE + program.len()].copy_from_slice(&program);
    // The interrupt table is at address 0, where the first vCPU's memory is; all share its handler.
    bytes[13 * 4..13 * 4 + 2].copy_from_slice(&(HANDLER as u16).to_le_bytes());
    let region = kvm_userspace_memory_region {
        slot: u32::try_from(id)?,
        guest_phys_addr: base as u64,
        memory_size: MEMORY as u64,
        userspace_addr: memory as u64,
        flags: 0,
    };
    // SAFETY: the mapping is that long and is never unmapped.
    unsafe { vm.set_user_memory_region(region)? };

    let vcpu = vm.create_vcpu(id as u64)?;
    let mut special = vcpu.get_sregs()?;
    special.cs.base = base as u64;
    special.cs.selector = u16::try_from(base / 16)?;
    special.ss.base = base as u64;
    special.ss.selector = special.cs.selector;
    vcpu.set_sregs(&special)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = CODE as u64;
    registers.rsp = 0x4000;
    registers.rflags = 2;
    vcpu.set_regs(&registers)?;
    Ok(vcpu)
}

fn set_cpuid(kvm: &Kvm, vcpu: &VcpuFd, vendor: &str) -> Result<(), Box<dyn Error>> {
    let name = match vendor {
        "intel" => b"GenuineIntel",
        "amd" => b"AuthenticAMD",
        _ => return Err(format!("`{vendor}` is no maker").into()),
    };
    let word = |at: usize| name[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    for leaf in cpuid.as_mut_slice().iter_mut().filter(|leaf| leaf.function == 0) {
        (leaf.ebx, leaf.edx, leaf.ecx) = (word(0), word(4), word(8));
    }
    vcpu.set_cpuid2(&cpuid)
        .map_err(|error| format!("KVM_SET_CPUID2: {error}"))?;
    Ok(())
}

fn entries(msrs: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, String> {
    let entry = |(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&msrs.map(entry).collect::<Vec<_>>()).map_err(|error| format!("{error:?}"))
}

fn set(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), Box<dyn Error>> {
    match vcpu.set_msrs(&entries(msrs.iter().copied())?)? {
        count if count == msrs.len() => Ok(()),
        count => Err(format!("the kernel takes {count} MSRs of {}", msrs.len()).into()),
    }
}

/// What the VMM reads of the MSRs that it has set.
fn vmms(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<String, String> {
    let mut entries = entries(msrs.iter().map(|(msr, _)| (*msr, 0)))?;
    vcpu.get_msrs(&mut entries)
        .map_err(|error| format!("KVM_GET_MSRS: {error}"))?;
    let lines = entries.as_slice().iter();
    Ok(lines
        .map(|entry| format!("vmm {:#x} {:#x}\n", entry.index, entry.data))
        .collect())
}

/// Real-mode code that makes the accesses and reports each.
fn program(accesses: &[Access]) -> Vec<u8> {
    let mut code = Vec::new();
    let load = |code: &mut Vec<u8>, register: u8, value: u32| {
        code.extend([0x66, register]);
        code.extend(value.to_le_bytes());
    };
    for access in accesses {
        let (msr, value, instruction) = match *access {
            Access::Read(msr) | Access::Timed(msr, _) => (msr, 0, 0x32),
            Access::Write(msr, value) => (msr, value, 0x30),
        };
        load(&mut code, 0xb9, msr);
        load(&mut code, 0xb8, value as u32);
        load(&mut code, 0xba, (value >> 32) as u32);
        code.extend([0x31, 0xdb]);
        if let Access::Timed(_, count) = *access {
            // mov edi, count; again: rdmsr; dec edi; jnz again
            load(&mut code, 0xbf, count);
            code.extend([0x0f, instruction, 0x66, 0x4f, 0x75, 0xfa]);
        } else {
            code.extend([0x0f, instruction]);
        }
        code.extend([0x66, 0xe7, 0x21, 0x66, 0x89, 0xd0, 0x66, 0xe7, 0x22]);
        code.extend([0x88, 0xd8, 0xe6, 0x23]);
    }
    code.push(0xf4);
    code
}

/// For any system call that this thread makes from here on, but KVM_RUN, the kernel kills the process.
fn sandbox() -> Result<(), std::io::Error> {
    const RUN: u32 = 0xae80;
    // Offsets in `struct seccomp_data`: the number, and the lower half of the second argument.
    const NUMBER: u32 = 0;
    const REQUEST: u32 = 24;
    let (load, jump, end) = (
        (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16,
        (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        (libc::BPF_RET | libc::BPF_K) as u16,
    );
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        step(load, NUMBER, 0, 0),
        step(jump, libc::SYS_ioctl as u32, 0, 3),
        step(load, REQUEST, 0, 0),
        step(jump, RUN, 0, 1),
        step(end, libc::SECCOMP_RET_ALLOW, 0, 0),
        step(end, libc::SECCOMP_RET_KILL_PROCESS, 0, 0),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: takes numbers and touches no memory of ours.
    let mut result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if result == 0 {
        // SAFETY: the kernel reads the program, so many steps at the address, which live over the call.
        result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    }
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn run(vcpu: &mut VcpuFd, accesses: &[Access], msrs: &[(u32, u64)], mut lines: String) -> Result<String, String> {
    let mut reported = [0; 2];
    let mut accesses = accesses.iter();
    let mut since = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) if PORTS[..2].contains(&port) => {
                let value = data.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
                reported[usize::from(port - PORTS[0])] = value;
            }
            Ok(VcpuExit::IoOut(_, data)) => {
                let faulted = data.first() == Some(&1);
                let value = u64::from(reported[1]) << 32 | u64::from(reported[0]);
                let line = match accesses.next() {
                    Some(Access::Read(msr)) if faulted => format!("rdmsr {msr:#x} fault\n"),
                    Some(Access::Read(msr)) => format!("rdmsr {msr:#x} {value:#x}\n"),
                    Some(Access::Timed(msr, count)) => {
                        let each = since.elapsed().as_nanos() / u128::from(*count).max(1);
                        eprintln!("rdmsr {msr:#x} takes {each} ns");
                        format!("rdmsr {msr:#x} {value:#x}\n")
                    }
                    Some(Access::Write(msr, _)) if faulted => format!("wrmsr {msr:#x} fault\n"),
                    Some(Access::Write(msr, _)) => format!("wrmsr {msr:#x} done\n"),
                    None => return Err("the guest reports more than it was asked".to_owned()),
                };
                lines.push_str(&line);
                since = Instant::now();
            }
            Ok(VcpuExit::X86Rdmsr(exit)) if exit.index == CORE_THREAD_COUNT => {
                *exit.data = 0x2_0004;
                *exit.error = 0;
            }
            Ok(VcpuExit::Hlt) if msrs.is_empty() => return Ok(lines),
            Ok(VcpuExit::Hlt) => return Ok(lines + &vmms(vcpu, msrs)?),
            Ok(exit) => panic!("no handler for {exit:?}"),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(format!("KVM_RUN: {error}")),
        }
    }
}
