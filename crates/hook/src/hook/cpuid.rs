//! KVM_SET_CPUID2, where the policy depends on it: what the policy is for this guest is in force when the call returns.

use std::mem;
use std::sync::Arc;

use libc::{EACCES, EINTR, c_int, c_ulong};
use msrgate_plan::DecisionMap;

use super::{BodyOf, Hook, failed};
use crate::descriptor::Object;
use crate::desk::{Desk, LEAVES, Leaf};
use crate::kernel::{Kernel, errno, set_errno};
use crate::user_filter::word;
use crate::vm::Policy;

/// `_IOW(KVMIO, 0x8a, struct kvm_cpuid)`; the size is that of the header.
pub(super) const KVM_SET_CPUID: u32 = 0x4008_ae8a;
/// `_IOW(KVMIO, 0x90, struct kvm_cpuid2)`.
pub(super) const KVM_SET_CPUID2: u32 = 0x4008_ae90;

impl<K: Kernel> Hook<K> {
    pub(super) fn set_cpuid(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int {
        let Some(Object::Vcpu(slot)) = self.descriptors.object(fd) else {
            return self.kernel.ioctl(fd, request, argument);
        };
        let Some(entered) = self.enter_in_time(fd, slot) else {
            return failed(EINTR);
        };
        let asked = entered
            .body()
            .and_then(|body| Some((body, body.vm.shared.desk.as_ref()?)));
        let Some((body, desk)) = asked else {
            return self.kernel.ioctl(fd, request, argument);
        };
        let Some(leaves) = self.leaves(request as u32, argument as u64) else {
            // The kernel says what is wrong with it. If it finds nothing the vCPU does not run.
            let result = self.kernel.ioctl(fd, request, argument);
            if result >= 0 {
                body.ready.set(false);
            }
            return result;
        };
        match self.resolve(desk, body, &leaves) {
            Ok(policy) => {
                let set = || self.kernel.ioctl(fd, request, argument);
                self.put_in_force(body, policy, set)
            }
            Err(line) => self.refuse_cpuid(body, &line),
        }
    }

    fn refuse_cpuid(&self, body: &BodyOf<K>, line: &str) -> c_int {
        self.kernel.say(&format!("{}: {line}", no_cpuid(body.id)));
        failed(EACCES)
    }

    /// What the policy is for a guest with this CPUID.
    fn resolve(&self, desk: &Desk, body: &BodyOf<K>, leaves: &[Leaf]) -> Result<Arc<Policy>, String> {
        let map = DecisionMap::from_bytes(&desk.ask(leaves)?);
        let map = map.map_err(|_| "`msrgate run` is another version's, or its memory was overwritten")?;
        let known = Arc::clone(&body.vm.state().policy);
        if known.is(&map) {
            return Ok(known);
        }
        // A preset would come too late.
        let policy = Policy::new(map.holding(Vec::new()), known.mode());
        policy.map(Arc::new).map_err(|error| error.to_string())
    }

    /// Puts the policy in force before the kernel takes the CPUID, and takes it back where the kernel does not. Gives
    /// what the VMM's call is to give; on an error nothing has changed.
    fn put_in_force(&self, body: &BodyOf<K>, policy: Arc<Policy>, set: impl FnOnce() -> c_int) -> c_int {
        let before = errno();
        let mut state = body.vm.state();
        // Another vCPU's thread may have brought the same meanwhile.
        let changes = *policy != *state.policy;
        if changes && state.resolved.iter().any(|id| *id != body.id) {
            let line = "the policy means something else for it than for the VM's other vCPUs, and a VM has one filter: \
                        give all of them the same model and features";
            return self.refuse_cpuid(body, line);
        }
        let mask = body.vm.mask();
        let old = mem::replace(&mut state.policy, Arc::clone(&policy));
        if changes && let Err(error) = self.compose(&body.vm, &mut state, mask, &no_cpuid(body.id)) {
            state.policy = old;
            return failed(error);
        }
        set_errno(before);
        let result = set();
        if result < 0 {
            let error = errno();
            state.policy = old;
            if changes && self.compose(&body.vm, &mut state, mask, &no_cpuid(body.id)).is_err() {
                body.ready.set(false);
            }
            return failed(error);
        }
        state.resolved.insert(body.id);
        body.policy.replace(policy);
        body.ready.set(true);
        result
    }

    /// The VMM's `struct kvm_cpuid` or `struct kvm_cpuid2`.
    fn leaves(&self, request: u32, address: u64) -> Option<Vec<Leaf>> {
        let size = if request == KVM_SET_CPUID2 { 40 } else { 24 };
        let mut header = [0; 8];
        self.kernel.read(address, &mut header).then_some(())?;
        let count = usize::try_from(word(&header, 0).ok()?)
            .ok()
            .filter(|count| *count <= LEAVES)?;
        let mut entries = vec![0; count * size];
        let read = entries.is_empty() || self.kernel.read(address + 8, &mut entries);
        read.then_some(())?;
        let leaf = |entry: &[u8]| {
            let field = |number: usize| word(entry, number * 4).ok();
            let (index, first) = match request {
                // The index says something where the flags say so (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
                KVM_SET_CPUID2 => (if field(2)? & 1 == 1 { field(1)? } else { 0 }, 3),
                _ => (0, 1),
            };
            let values = [field(first)?, field(first + 1)?, field(first + 2)?, field(first + 3)?];
            Some((field(0)?, index, values))
        };
        entries.chunks_exact(size).map(leaf).collect()
    }

    /// A vCPU was to run that cannot.
    #[cold]
    pub(super) fn not_ready(&self, body: &BodyOf<K>) -> c_int {
        let mut state = body.vm.state();
        if body.vm.shared.desk.is_some() && !mem::replace(&mut state.told_of_cpuid, true) {
            self.kernel.say(
                "no vCPU runs whose CPUID the VMM has not set, since the policy depends on it: if this VMM never does, \
                 give `msrgate run` the option --cpuid",
            );
        }
        failed(EACCES)
    }
}

fn no_cpuid(id: u32) -> String {
    format!("vCPU {id} does not get this CPUID")
}
