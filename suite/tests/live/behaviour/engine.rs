//! `msrgate-engine`, with the few lines of a hypervisor around it.

use std::sync::Arc;

use msrgate_core::{Access, Exit, Msr, MsrRange, Op, Ops, Outcome, PassthroughMsr, abi};
use msrgate_engine::{
    Advance, Caller, Completion, Errno, Fault, Instruction, Intercepts, Interruption, KvmRunMsr, Msrs, Path, Process,
    Profile, Step, Vcpu, Vm, Written,
};
use msrgate_guest::raw::{Arena, Request};
use msrgate_suite::Machine;
use msrgate_verify::case::memory;

use super::hypervisor::{Batch, Calls, Descriptor, EXIT_IO, Hypervisor, Registers, RunMsr};
use super::kernel::Kernel;

/// Where the access stands, and its length.
const ACCESS: u64 = 0x1000;
const LENGTH: u64 = 2;

pub(crate) struct Engine {
    name: &'static str,
    path: Path,
    vm: Arc<Vm>,
    vcpu: Vcpu,
    machine: Machine,
    registers: Registers,
    /// What stands at [`ACCESS`].
    op: Op,
    /// #GP(0) waits to be delivered.
    fault: bool,
    exit_reason: u32,
    run_bytes: [u8; 24],
    immediate_exit: bool,
}

impl Engine {
    /// Both of KVM's ways to an access, with the profile of the kernel that runs here.
    pub(crate) fn all(kernel: Option<&Kernel>) -> [Engine; 2] {
        let profile = kernel.map_or(Profile::NEWEST, Kernel::profile);
        let emulator = Path::Emulator {
            next_rip: ACCESS + LENGTH,
        };
        [("engine, by VM exit", Path::VmExit), ("engine, by emulator", emulator)]
            .map(|(name, path)| Engine::new(name, path, profile))
    }

    fn new(name: &'static str, path: Path, profile: Profile) -> Engine {
        let vm = Arc::new(Vm::new().with_profile(profile));
        Engine {
            name,
            path,
            vcpu: vcpu(&vm),
            vm,
            machine: Machine::default(),
            registers: Registers {
                rax: 0,
                rbx: 0,
                rcx: 0,
                rdx: 0,
                rip: 0,
            },
            op: Op::Read,
            fault: false,
            exit_reason: 0,
            run_bytes: [0; 24],
            immediate_exit: false,
        }
    }

    fn interrupted(&mut self, interruption: Interruption) -> Result<(), i32> {
        let msr = RunMsr::from_bytes(self.run_bytes);
        let drained = self.vcpu.drain(msr.error, msr.data, interruption);
        if let Some(completion) = drained.completion {
            self.apply(completion);
        }
        if let Some(exit_reason) = drained.exit_reason {
            self.exit_reason = exit_reason;
        }
        Err(Errno::Eintr as i32)
    }

    fn apply(&mut self, completion: Completion) {
        let Completion::Done { written, advance } = completion else {
            self.fault = true;
            return;
        };
        match written {
            Written::Nothing => {}
            Written::RaxRdx { rax, rdx } => (self.registers.rax, self.registers.rdx) = (rax, rdx),
            Written::Register { .. } => panic!("no access here names a register"),
        }
        self.registers.rip = match advance {
            Advance::Skip => self.registers.rip + LENGTH,
            Advance::To(rip) => rip,
        };
    }

    fn exits(&mut self, exit: Exit) {
        let run = KvmRunMsr::from(exit);
        (self.exit_reason, self.run_bytes) = (run.exit_reason, run.to_bytes());
    }
}

fn vcpu(vm: &Arc<Vm>) -> Vcpu {
    let passed_through = PassthroughMsr::new(MsrRange::single(Msr(0x174)), Ops::BOTH);
    Vcpu::new(Arc::clone(vm), Intercepts::vmx([passed_through]))
}

/// The engine's ioctls.
struct EngineCalls(Arc<Vm>);

impl Calls for EngineCalls {
    fn call(&self, on: Descriptor, request: Request, argp: u64, arena: &Arena) -> Result<(), i32> {
        let caller = Caller::new(Process::Native, on);
        let result = self.0.ioctl(request.number(), argp, &memory(arena), caller);
        result.map(|_| ()).map_err(|errno| errno as i32)
    }
}

impl Hypervisor for Engine {
    fn name(&self) -> &str {
        self.name
    }

    fn calls(&mut self) -> Box<dyn Calls> {
        Box::new(EngineCalls(Arc::clone(&self.vm)))
    }

    fn check_extension(&self, on: Descriptor, capability: u32) -> u32 {
        let nothing = |_: u64, _: &mut [u8]| Err(Fault);
        let caller = Caller::new(Process::Native, on);
        let result = self.vm.ioctl(abi::CHECK_EXTENSION, capability.into(), &nothing, caller);
        result.unwrap_or(0)
    }

    fn enter(&mut self, op: Op, rax: u64, rcx: u64, rdx: u64) {
        let _ = self.vcpu.complete(1, 0);
        self.fault = false;
        self.op = op;
        self.registers = Registers {
            rax,
            rbx: 0,
            rcx,
            rdx,
            rip: ACCESS,
        };
    }

    fn run(&mut self) -> Result<(), i32> {
        if self.immediate_exit {
            return self.interrupted(Interruption::ImmediateExit);
        }
        let msr = RunMsr::from_bytes(self.run_bytes);
        if let Some(completion) = self.vcpu.complete(msr.error, msr.data) {
            self.apply(completion);
        } else if self.registers.rip == ACCESS && !self.fault {
            let Registers { rax, rcx, rdx, .. } = self.registers;
            let instruction = match self.op {
                Op::Read => Instruction::Rdmsr { rcx },
                Op::Write => Instruction::Wrmsr { rcx, rax, rdx },
            };
            match self.vcpu.execute(instruction, self.path, &mut self.machine).unwrap() {
                Step::Complete(completion) => self.apply(completion),
                Step::Exit(exit) => {
                    self.exits(exit);
                    return Ok(());
                }
                Step::Failed(errno) | Step::EmulationFailed(errno) => return Err(errno as i32),
            }
        }
        if std::mem::take(&mut self.fault) {
            self.registers.rbx |= 0x100;
        }
        self.exit_reason = EXIT_IO;
        Ok(())
    }

    fn run_into_signal(&mut self) -> Result<(), i32> {
        self.interrupted(Interruption::Signal)
    }

    fn registers(&mut self) -> Registers {
        self.registers
    }

    fn set_registers(&mut self, registers: Registers) {
        self.registers = registers;
    }

    fn exception(&mut self) -> Option<(u8, u32)> {
        self.fault.then_some((13, 0))
    }

    fn exit_reason(&mut self) -> u32 {
        self.exit_reason
    }

    fn set_exit_reason(&mut self, exit_reason: u32) {
        self.exit_reason = exit_reason;
    }

    fn run_bytes(&mut self) -> [u8; 24] {
        self.run_bytes
    }

    fn set_run_bytes(&mut self, bytes: [u8; 24]) {
        self.run_bytes = bytes;
    }

    fn set_immediate_exit(&mut self, on: bool) {
        self.immediate_exit = on;
    }

    fn host_read(&mut self, msr: Msr) -> Option<u64> {
        self.machine.read(msr).ok()
    }

    fn host_write(&mut self, msr: Msr, value: u64) -> bool {
        self.machine.write(msr, value).is_ok()
    }

    fn another_vcpu(&mut self) {
        self.vcpu = vcpu(&self.vm);
        self.machine = Machine::default();
    }

    fn move_to_new_vm(&mut self) {
        assert_eq!(self.vcpu.ready_to_save(), Ok(()));
        self.vm = Arc::new(Vm::new().with_profile(self.vm.profile()));
        self.vcpu = vcpu(&self.vm);
    }

    fn batch(&mut self, accesses: &[Access], answer: &mut dyn FnMut(Access) -> Outcome) -> Batch {
        let mut seen = Batch::new();
        for access in accesses {
            let (completion, reason) = match self
                .vcpu
                .execute((*access).into(), self.path, &mut self.machine)
                .unwrap()
            {
                Step::Complete(completion) => (completion, 0),
                Step::Exit(exit) => {
                    let completion = self.vcpu.answer(answer(exit.access));
                    (completion.unwrap(), exit.reason as u32)
                }
                Step::Failed(errno) | Step::EmulationFailed(errno) => panic!("{errno}"),
            };
            seen.push((completion.outcome(), reason));
        }
        seen
    }
}
