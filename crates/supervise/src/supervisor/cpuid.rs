//! KVM_SET_CPUID2: where the policy depends on it, what the policy is for this guest is in force when the call returns; a trace
//! has it.

use std::mem;
use std::sync::Arc;

use msrgate_answer::layout::slot;
use msrgate_core::abi;

use super::{Refusal, Supervisor};
use crate::ledger::Leaf;
use crate::policy::Policy;
use crate::seccomp::Waiting;
use crate::target;

/// `KVM_MAX_CPUID_ENTRIES`.
const MAX_ENTRIES: usize = 256;

impl Supervisor {
    pub(super) fn set_cpuid(&mut self, waiting: &Waiting<'_>, tag: u64) {
        let Some(id) = self.vcpus.get(&tag).map(|vcpu| vcpu.id) else {
            return;
        };
        let what = format!("vCPU {id} does not get this CPUID");
        let [fd, request, address, ..] = waiting.arguments;
        let request = request as u32;
        if self.setup.resolve.is_none() {
            // A trace tells of it, and a policy to come may depend on it.
            let leaves = leaves(target::process(waiting.thread), request, address);
            self.note(tag, leaves.unwrap_or_default());
            return waiting.allow();
        }
        let Some(mut tracee) = self.stop(waiting, &what) else {
            return;
        };
        let Some(leaves) = leaves(tracee.process, request, address) else {
            // The kernel says what is wrong with it. If it finds nothing the vCPU does not run.
            let result = tracee.ioctl(fd, request, address);
            if result.is_ok() {
                self.set_ready(tag, false);
            }
            return tracee.give(result);
        };
        let policy = match self.resolve(tag, leaves.clone()) {
            Ok(policy) => policy,
            Err(refusal) => return self.fail(tracee, waiting.thread, &what, refusal),
        };
        let Some(vm) = self.vcpus.get(&tag).map(|vcpu| vcpu.vm) else {
            return;
        };
        let Some(object) = self.vms.get_mut(&vm) else { return };
        // The filter is put in force before the kernel takes the CPUID, and taken back where the kernel does not. A VM's
        // own descriptor is needed for it, and the call has the vCPU's.
        let changes = *policy != *object.state.policy;
        if changes && object.state.resolved.iter().any(|known| *known != id) {
            let line = "the policy means something else for it than for the VM's other vCPUs, and a VM has one filter: \
                        give all of them the same model and features";
            return self.fail(tracee, waiting.thread, &what, Refusal::Line(line.to_owned()));
        }
        let old = mem::replace(&mut object.state.policy, Arc::clone(&policy));
        let vm_fd = object.descriptor(waiting.thread, vm);
        let composed = match (changes, vm_fd) {
            (false, _) => Ok(()),
            (true, Some(vm_fd)) => self.compose(&mut tracee, vm_fd, vm),
            (true, None) => Err(Refusal::Line("the VMM has no descriptor of its VM any more".to_owned())),
        };
        if let Err(refusal) = composed {
            self.put_back(vm, old);
            return self.fail(tracee, waiting.thread, &what, refusal);
        }
        let result = tracee.ioctl(fd, request, address);
        match &result {
            Ok(_) => {
                if let Some(object) = self.vms.get_mut(&vm) {
                    object.state.resolved.insert(id);
                }
                // Its slot, if it has one, is another policy's.
                self.set_ready(tag, true);
                self.note(tag, leaves);
            }
            Err(_) => {
                self.put_back(vm, old);
                if changes
                    && let Some(vm_fd) = vm_fd
                    && self.compose(&mut tracee, vm_fd, vm).is_err()
                {
                    self.set_ready(tag, false);
                }
            }
        }
        tracee.give(result);
    }

    /// The VMM has set this CPUID.
    fn note(&mut self, tag: u64, leaves: Vec<Leaf>) {
        // Of a vCPU that has run the kernel takes no other one (`kvm_set_cpuid`).
        let has_run = self.regions.values().any(|region| region.ring(tag).is_some());
        if let Some(vcpu) = self.vcpus.get_mut(&tag).filter(|_| !has_run) {
            vcpu.cpuid = leaves;
        }
    }

    fn put_back(&mut self, vm: u64, policy: Arc<Policy>) {
        if let Some(object) = self.vms.get_mut(&vm) {
            object.state.policy = policy;
        }
    }

    fn set_ready(&mut self, tag: u64, ready: bool) {
        if let Some(vcpu) = self.vcpus.get_mut(&tag) {
            vcpu.ready = ready;
        }
        let this = |vcpu: u64| (vcpu == tag).then_some(0);
        self.regions.values().for_each(|region| region.tell(slot::READY, this));
    }

    /// What the policy is for a guest with this CPUID.
    fn resolve(&mut self, tag: u64, leaves: Vec<Leaf>) -> Result<Arc<Policy>, Refusal> {
        let resolve = self.setup.resolve.as_ref();
        let resolve = resolve.ok_or_else(|| Refusal::Line("the policy does not depend on it".to_owned()))?;
        let (plan, options) = resolve(leaves).map_err(Refusal::Line)?;
        let policy = Policy::new(plan, options, self.setup.mode);
        // The same policy is one, so that its table is too.
        let vm = self.vcpus.get(&tag).and_then(|vcpu| self.vms.get(&vcpu.vm));
        let known = self.tables.iter().map(|(policy, _)| policy);
        let known = known
            .chain(vm.map(|vm| &vm.state.policy))
            .find(|known| ***known == policy);
        if let Some(known) = known {
            return Ok(Arc::clone(known));
        }
        let policy = Arc::new(policy);
        self.open_host_msrs(&policy)?;
        Ok(policy)
    }
}

/// The first words of a structure.
fn fields<const N: usize>(structure: &[u8]) -> Option<[u32; N]> {
    let words = structure.as_chunks().0.first_chunk::<N>()?;
    Some(words.map(u32::from_le_bytes))
}

/// The VMM's `struct kvm_cpuid` or `struct kvm_cpuid2`.
fn leaves(process: i32, request: u32, address: u64) -> Option<Vec<Leaf>> {
    let size = if request == abi::SET_CPUID2 { 40 } else { 24 };
    let mut header = [0; 8];
    target::read(process, address, &mut header).then_some(())?;
    let [count, _] = fields(&header)?;
    let count = usize::try_from(count).ok();
    let count = count.filter(|count| *count <= MAX_ENTRIES)?;
    let mut entries = vec![0; count * size];
    let read = entries.is_empty() || target::read(process, address + 8, &mut entries);
    read.then_some(())?;
    let leaf = |entry: &[u8]| {
        if request == abi::SET_CPUID2 {
            let [leaf, index, flags, eax, ebx, ecx, edx] = fields(entry)?;
            // The index says something where the flags say so (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
            Some((leaf, if flags & 1 == 1 { index } else { 0 }, [eax, ebx, ecx, edx]))
        } else {
            let [leaf, eax, ebx, ecx, edx] = fields(entry)?;
            Some((leaf, 0, [eax, ebx, ecx, edx]))
        }
    };
    entries.chunks_exact(size).map(leaf).collect()
}
