//! A whole VMM whose guest is under a policy, to copy and to put a guest of your own in.
//!
//! ```text
//! cargo run -p msrgate --example vmm
//! ```
//!
//! The guest reads three MSRs and writes each low byte to a port; then it halts.

#![expect(unsafe_code, reason = "guest memory is given to the kernel by its address")]

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use msrgate::{Dispatch, Fault, Handlers, Plan, Policy, probe};

/// What the guest gets. A VMM reads it from a file; `msrgate check` says what is wrong with one.
pub const POLICY: &str = r#"
version = 1
default = "deny"

[[rule]]
msr   = "IA32_BIOS_SIGN_ID"
read  = { value = "0x11" }
write = "ignore"
why   = "the guest sees this microcode revision"

[[rule]]
msr   = "IA32_SYSENTER_CS"
read  = "allow"
write = "allow"
why   = "the guest's own"

[[rule]]
msr   = "MSR_CORE_THREAD_COUNT"
read  = { handler = "cores" }
why   = "the VMM knows how many it gave the guest"
"#;

/// Where the guest writes what it has read.
const PORT: u16 = 0x10;

/// `mov ecx, MSR; rdmsr; out PORT, al` for each MSR, and `hlt`, in real mode.
const CODE: [u8; 34] = [
    0x66, 0xb9, 0x8b, 0, 0, 0, 0x0f, 0x32, 0xe6, 0x10, // IA32_BIOS_SIGN_ID
    0x66, 0xb9, 0x74, 1, 0, 0, 0x0f, 0x32, 0xe6, 0x10, // IA32_SYSENTER_CS
    0x66, 0xb9, 0x35, 0, 0, 0, 0x0f, 0x32, 0xe6, 0x10, // MSR_CORE_THREAD_COUNT
    0xf4, 0, 0, 0,
];

/// Where the code lies in the guest.
const ADDRESS: u64 = 0x1000;

#[repr(align(4096))]
struct Memory([u8; 4096]);

fn main() -> ExitCode {
    match run(POLICY) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the guest under a policy to its end, and gives what it wrote to the port.
pub fn run(policy: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    let policy = Policy::parse("vmm.toml", policy)?;
    let plan = Plan::compile_for(&policy.decision_map(None)?, &policy.options())?;
    let handlers = Handlers::new().with_fns("cores", |_vcpu, _msr| Ok(4), |_vcpu, _msr, _value| Err(Fault));

    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    // Before a vCPU runs, and for each VM anew: a plan may be shared.
    let gate = probe(&kvm)?.install(&vm, Arc::new(plan), handlers)?;

    let mut memory = Box::new(Memory([0xf4; 4096]));
    let mut vcpu = guest(&vm, &mut memory)?;
    // After KVM_SET_CPUID2, if there is one.
    let vcpu_gate = gate.vcpu(&vcpu, 0)?;

    let mut written = Vec::new();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_)) => {
                if let Dispatch::Answered(answered) = vcpu_gate.dispatch_vcpu(&mut vcpu) {
                    println!("{:?} got {:?}", answered.access, answered.answer.outcome);
                }
            }
            // From here on, what a VMM does anyway.
            Ok(VcpuExit::IoOut(PORT, bytes)) => {
                println!("the guest has read {bytes:x?}");
                written.extend_from_slice(bytes);
            }
            Ok(VcpuExit::Hlt) => return Ok(written),
            Ok(exit) => return Err(format!("the guest stopped: {exit:?}").into()),
            // A signal. `kvm_run` says nothing new then.
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// One vCPU in real mode, before the first instruction of its code.
fn guest(vm: &VmFd, memory: &mut Memory) -> Result<VcpuFd, Box<dyn Error>> {
    memory.0[..CODE.len()].copy_from_slice(&CODE);
    let region = kvm_userspace_memory_region {
        guest_phys_addr: ADDRESS,
        memory_size: memory.0.len() as u64,
        userspace_addr: memory.0.as_mut_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the memory is whole pages, and `run` keeps it until after the last KVM_RUN.
    unsafe { vm.set_user_memory_region(region)? };
    let vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (ADDRESS, 2);
    vcpu.set_regs(&regs)?;
    Ok(vcpu)
}
