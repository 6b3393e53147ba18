//! KVM_RUN without a cookie, and what answerers ask.

use std::mem;
use std::sync::Arc;

use libc::EACCES;
use msrgate_answer::layout::{image, question, reply, slot};
use msrgate_core::abi;
use nix::errno::Errno;

use super::{Refusal, Remark, Supervisor};
use crate::ledger::Ring;
use crate::policy::Mode;
use crate::region::{self, Entry, HandedFiles, Region, Table};
use crate::remote::RemoteCalls;
use crate::seccomp::Waiting;
use crate::target::{self, Object};
use crate::tracee::{NO_TSC, Tracee};

/// Why a vCPU does not run whose exits cannot be answered.
const NO_MEMORY: &str = "the VMM gets no memory for its answers";

/// Who calls.
enum Caller {
    /// The VMM.
    Vmm,
    /// An answerer, whose image has these parameters and is there.
    Answerer(u64, [u64; image::COUNT]),
}

impl Supervisor {
    pub(super) fn run(&mut self, waiting: &Waiting<'_>) {
        let [fd, _, _, cookie, code, _] = waiting.arguments;
        let cookies = self.remote.tracer.cookies;
        let image = match cookie == cookies.ask {
            true => region::image_of(waiting.thread, waiting.instruction, &cookies),
            false => None,
        };
        let alive = image.filter(|(_, parameters)| region::is_alive(waiting.thread, parameters));
        if let Some((_, parameters)) = alive
            && code & 0xff == question::EXIT
        {
            return self.exit(waiting, parameters[image::NAME]);
        }
        let caller = image.map_or(Caller::Vmm, |(at, parameters)| Caller::Answerer(at, parameters));
        let tag = match Object::of(waiting.thread, fd as i32) {
            Ok(Object::Vcpu(tag)) if self.vcpus.contains_key(&tag) => tag,
            Ok(Object::Vcpu(_)) => {
                let line = "it was not made under this `msrgate run`";
                return self.refuse(waiting, "a vCPU does not run", line);
            }
            // The kernel says what it is not.
            Ok(_) => return waiting.allow(),
            Err(error) => return self.refuse(waiting, "a vCPU does not run", &error.to_string()),
        };
        let process = target::process(waiting.thread);
        let known = match (&caller, alive) {
            (Caller::Answerer(..), alive) => {
                alive.and_then(|(_, parameters)| self.regions.get(&parameters[image::NAME]))
            }
            (Caller::Vmm, _) => {
                let newest = self.newest.get(&process).and_then(|name| self.regions.get(name));
                newest.filter(|region| region.is_there(process, &cookies))
            }
        };
        match (code & 0xff, &caller, known) {
            (question::BUSY, Caller::Answerer(..), Some(region)) => {
                let another = self.release(region, waiting.thread, tag);
                // The kernel would let it wait; it may as well be interrupted.
                let _ = waiting.give(if another { i64::from(-libc::EINTR) } else { reply::AGAIN });
            }
            _ => {
                let known = known.map(|region| region.name);
                self.enter(waiting, tag, caller, known);
            }
        }
    }

    /// Has a vCPU's exits answered in the process, from its next KVM_RUN on.
    fn enter(&mut self, waiting: &Waiting<'_>, tag: u64, caller: Caller, known: Option<u64>) {
        let Some(vcpu) = self.vcpus.get(&tag) else { return };
        let (id, vm) = (vcpu.id, vcpu.vm);
        let what = format!("vCPU {id} does not run");
        if !vcpu.ready {
            return self.not_ready(waiting, tag);
        }
        let Some((policy, number)) = self.vms.get(&vm).map(|vm| (Arc::clone(&vm.state.policy), vm.number)) else {
            return;
        };
        let table = match self.table(&policy) {
            Ok(table) => table,
            Err(error) => return self.refuse(waiting, &what, &format!("{NO_MEMORY}: {error}")),
        };
        let process = target::process(waiting.thread);
        let region = known.and_then(|name| self.regions.get(&name));
        let ring = || Ring::new(process, (number, id), table.cells);
        let hand_over = || HandedFiles::over(waiting, region, tag, &table, ring);
        let (mut tracee, (mut handed, done)) =
            match self.remote.stop(waiting, process, self.syscall(process), hand_over) {
                Ok(tracee) => tracee,
                Err(None) => return,
                Err(Some(line)) => return self.refuse(waiting, &what, &line),
            };
        let done = done.map_err(|error| Refusal::Line(format!("{NO_MEMORY}: {error}")));
        let done = done.and_then(|()| {
            let at = self.remote.lay_out(&mut tracee, &[0; 4])?;
            if !tracee.may_time(at) {
                return Err(Refusal::Line(NO_TSC.to_owned()));
            }
            let entered = self.entered(&mut tracee, waiting, tag, &table, &mut handed, &caller, known);
            entered.map_err(Refusal::Kernel)
        });
        handed.close(&mut tracee);
        match done {
            Ok(None) => tracee.finish(reply::AGAIN),
            Ok(Some((trampoline, slow))) => {
                if slow {
                    let line = "its KVM_RUN has no room for a jump beside it, so that each one stops its thread, which takes a fraction of a millisecond";
                    self.tell(waiting.thread, "the VMM runs slower", line);
                }
                tracee.redirect(trampoline, libc::SYS_ioctl);
            }
            // It was killed.
            Err(Refusal::Kernel(Errno::ESRCH)) => {}
            Err(refusal) => {
                let line = match refusal {
                    Refusal::Kernel(error) => format!("{NO_MEMORY}: {}", error.desc()),
                    Refusal::Line(line) => line,
                };
                self.tell(waiting.thread, &what, &line);
                tracee.finish(i64::from(-EACCES));
            }
        }
    }

    /// Gives where the VMM's call goes on, and whether each one has to wait to be led there.
    #[expect(
        clippy::too_many_arguments,
        reason = "what is known of the call, the vCPU and the process"
    )]
    fn entered(
        &mut self,
        tracee: &mut Tracee,
        waiting: &Waiting<'_>,
        tag: u64,
        table: &Arc<Table>,
        handed: &mut HandedFiles,
        caller: &Caller,
        known: Option<u64>,
    ) -> Result<Option<(u64, bool)>, Errno> {
        let name = match known {
            Some(name) => name,
            None => self.settle(tracee, handed, caller)?,
        };
        let vcpu = self.vcpus.get(&tag).ok_or(Errno::EBADF)?;
        let vm = self.vms.get(&vcpu.vm).ok_or(Errno::EBADF)?;
        let entry = Entry {
            vcpu: tag,
            fd: waiting.arguments[0],
            table,
            mask: u64::from(vm.mask.bits()),
            flags: self.flags(),
            who: u64::from(vm.number) | u64::from(vcpu.id) << 32,
        };
        let region = self.regions.get_mut(&name).ok_or(Errno::EBADF)?;
        region.enter(tracee, handed, &entry)?;
        if let Some((ring, _)) = &handed.ring {
            self.ledger.add(Arc::clone(ring));
        }
        self.ledger.run(&vcpu.cpuid);
        self.look_at_reset(tracee, waiting.arguments[0], tag, name);
        match caller {
            Caller::Answerer(..) => Ok(None),
            Caller::Vmm => {
                let site = tracee.site();
                self.regions
                    .get_mut(&name)
                    .ok_or(Errno::EBADF)?
                    .trampolines
                    .detour(tracee, site)
                    .map(Some)
            }
        }
    }

    /// The flags of each vCPU's slot.
    pub(super) fn flags(&self) -> u64 {
        let flags = [
            (self.setup.events, slot::EVENTS),
            (self.setup.rip, slot::RIP),
            (self.setup.mode != Mode::Enforce, slot::REDO),
            (self.lets_go(), slot::LET_GO),
        ];
        let set = flags.into_iter().filter(|(on, _)| *on);
        set.fold(0, |all, (_, flag)| all | flag)
    }

    /// A region in a process that has none.
    fn settle(&mut self, tracee: &mut Tracee, handed: &mut HandedFiles, caller: &Caller) -> Result<u64, Errno> {
        let control = handed.control.take().ok_or(Errno::EBADF)?;
        let fd = control.1;
        let inherited = match caller {
            Caller::Vmm => None,
            Caller::Answerer(at, parameters) => Some((*at, *parameters)),
        };
        let name = self.new_tag();
        let cookies = self.remote.tracer.cookies;
        let stacks = !target::is_go(tracee.process);
        let region = Region::new(tracee, control, name, &cookies, stacks, inherited);
        tracee.close(fd);
        self.regions.insert(name, region?);
        self.newest.insert(tracee.process, name);
        Ok(name)
    }

    /// A vCPU that the VMM has reset remembers nothing. Looked at where it runs next, since a VMM resets a vCPU before it
    /// loads a saved state too, which undoes no lock.
    fn look_at_reset(&mut self, tracee: &mut Tracee, fd: u64, tag: u64, region: u64) {
        let Some(vcpu) = self.vcpus.get_mut(&tag) else { return };
        if mem::replace(&mut vcpu.placed, false) && is_reset(&mut self.remote, tracee, fd) {
            vcpu.state = None;
            if let Some(ring) = self.regions.get(&region).and_then(|region| region.ring(tag)) {
                ring.forget_shadows(self.cells.words());
            }
        }
    }

    /// A vCPU was to run that cannot.
    fn not_ready(&mut self, waiting: &Waiting<'_>, tag: u64) {
        let vm = self.vcpus.get(&tag).and_then(|vcpu| self.vms.get_mut(&vcpu.vm));
        if vm.is_some_and(|vm| !mem::replace(&mut vm.state.told_of_cpuid, true)) {
            (self.say)(Remark::NoCpuid);
        }
        let _ = waiting.give(i64::from(-EACCES));
    }
}

/// "Processor State After Reset": CS has a base that no other state has in real mode, and RIP is at the first instruction.
/// A guest can bring this about too, so it says something only where the VMM has just set the state.
fn is_reset(remote: &mut RemoteCalls, tracee: &mut Tracee, fd: u64) -> bool {
    let mut special = [0; abi::SREGS_BYTES];
    // `struct kvm_segment`, the first one CS: base, limit, selector.
    let cs = remote.ioctl(tracee, fd, abi::GET_SREGS, &mut special).is_ok()
        && special.first_chunk().map(|base| u64::from_le_bytes(*base)) == Some(0xffff_0000)
        && special.get(12..14) == Some(&[0, 0xf0]);
    let mut registers = [0; abi::REGS_BYTES];
    let read = remote.ioctl(tracee, fd, abi::GET_REGS, &mut registers).is_ok();
    let rip = registers
        .get(abi::REGS_RIP..)
        .and_then(<[u8]>::first_chunk)
        .map(|rip| u64::from_le_bytes(*rip));
    cs && read && rip == Some(0xfff0)
}
