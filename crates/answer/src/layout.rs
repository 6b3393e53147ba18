//! Where the supervisor and the answerer find what they share: offsets in words of eight bytes, unless said otherwise.

/// The image: code, and parameters that the supervisor fills in before it is mapped.
pub mod image {
    /// What an image of any version begins with, behind a jump of two bytes.
    pub const KIND: &[u8; 14] = b"msrgate answer";
    /// Bytes before the first parameter.
    pub const PARAMETERS: usize = 2 + KIND.len();
    /// Address of [`super::private`].
    pub const PRIVATE: usize = 0;
    /// Address of [`super::control`].
    pub const CONTROL: usize = 1;
    /// What a KVM_RUN of the answerer has as its fourth argument, which KVM ignores.
    pub const RUN: usize = 2;
    /// What a question of the answerer has there; 0 where no call waits, and then exits alone are asked for, through memory.
    pub const ASK: usize = 3;
    /// Bytes that the kernel puts on the stack below the red zone for the extended state where a signal is delivered
    /// (`xstate_sigframe_size`); 0 where stacks must not be written to.
    pub const FRAME: usize = 4;
    /// What this image is called: the child of a fork has it too, but for [`super::private`].
    pub const NAME: usize = 5;
    /// How many parameters.
    pub const COUNT: usize = 6;
}

/// Memory of the process alone, which a fork leaves as zeros in the child (MADV_WIPEONFORK).
pub mod private {
    /// 1 where the rest is there.
    pub const ALIVE: usize = 0;
    /// Not 0 while the thread is there that questions through memory wake: the kernel clears it where the thread ends.
    pub const KEPT: usize = 1;
    /// What it is where threads may wait until it is looked which vCPU a descriptor is.
    pub const WAITS: u64 = 2;
    /// How often somebody was called through memory; the lower half is a futex.
    pub const BELL: usize = 2;
    /// How often of these it was wanted that it is looked which vCPU a descriptor is.
    pub const WANTED: usize = 3;
    /// From here on what the VMM itself asks of a VM, by a call that would take the policy's place; [`super::own`].
    pub const OWN: usize = 4;
    /// From here on a word for each slot: odd while a thread runs the vCPU, and another number each time.
    pub const BUSY: usize = OWN + super::own::WORDS;
    /// How long it is.
    pub const WORDS: usize = BUSY + super::control::SLOTS;
}

/// A call of the VMM's own that is asked for through memory, by code in its instruction's stub.
pub mod own {
    /// 1 while a thread asks.
    pub const LOCK: usize = 0;
    /// [`ASKED`] until there is an answer.
    pub const STATE: usize = 1;
    /// The descriptor.
    pub const FD: usize = 2;
    /// The request.
    pub const REQUEST: usize = 3;
    /// The argument.
    pub const ARGUMENT: usize = 4;
    /// What the call gives; [`LET`] where the thread is to make it.
    pub const RESULT: usize = 5;
    /// How long it is.
    pub const WORDS: usize = 6;

    /// There is no answer yet.
    pub const ASKED: u64 = 1;
    /// None of these calls gives this.
    pub const LET: i64 = 1;
}

/// Memory that only the supervisor writes, and a fork does not hand on.
pub mod control {
    /// From here on a word for each descriptor: the number of its vCPU's slot, from 1 on.
    pub const DESCRIPTORS: usize = 0;
    /// Descriptors that have a word.
    pub const LIMIT: usize = 1 << 16;
    /// vCPUs that a process has at a time.
    pub const SLOTS: usize = 1 << 14;
    /// What [`super::private::WANTED`] was when it was last looked which vCPUs there are; the lower half is a futex. It is in the slot
    /// of number 0, which is no vCPU's.
    pub const LOOKED: usize = LIMIT;
    /// How long a slot is.
    pub const SLOT: usize = 8;
    /// How long it is.
    pub const WORDS: usize = LIMIT + SLOTS * SLOT;
}

/// A vCPU's slot.
pub mod slot {
    /// Address of its `kvm_run`.
    pub const RUN: usize = 0;
    /// Address of its [`super::table`].
    pub const TABLE: usize = 1;
    /// Address of its [`super::vcpu`].
    pub const VCPU: usize = 2;
    /// The reasons for which the VMM asked for exits.
    pub const MASK: usize = 3;
    /// [`EVENTS`], [`RIP`], [`REDO`], [`UNSETTLED`], [`LET_GO`].
    pub const FLAGS: usize = 4;
    /// The VM's number, and the vCPU's in the upper half.
    pub const WHO: usize = 5;
    /// 1 where it may run.
    pub const READY: usize = 6;
    /// The number of the last question through memory that has an answer, which is a futex, and the answer in the upper half.
    pub const ANSWER: usize = 7;

    /// Each access makes an event.
    pub const EVENTS: u64 = 1;
    /// Events have the guest's RIP.
    pub const RIP: u64 = 2;
    /// Accesses may have to be made again by the guest.
    pub const REDO: u64 = 4;
    /// An exit may have been made by another filter than the table's: what no entry names is asked for.
    pub const UNSETTLED: u64 = 8;
    /// Where nobody is there any more who could be asked, the VM has the VMM's own filter again.
    pub const LET_GO: u64 = 16;
}

/// What exits get, which only the supervisor writes.
pub mod table {
    /// What an exit of reason filter gets that no entry names: an entry for reads, one for writes; then the same for
    /// reasons unknown and invalid.
    pub const DEFAULTS: usize = 0;
    /// How many entries there are for reads, and for writes.
    pub const COUNTS: usize = 6 * ENTRY;
    /// From here on entries for reads, then for writes: each sorted by MSR and disjoint.
    pub const ENTRIES: usize = COUNTS + 2;

    /// How long an entry is.
    pub const ENTRY: usize = 6;
    /// First MSR, and the last in the upper half.
    pub const RANGE: usize = 0;
    /// What is to be done, and the rule in the upper half.
    pub const KIND: usize = 1;
    /// The value of a read; a shadow's before it is written.
    pub const VALUE: usize = 2;
    /// What an event says was done: `Disposition`, `FaultCause` + 1 or 0 from bit 8 on, the reason from bit 16 on. Of
    /// [`ROUTE`] what is said where the VMM did not ask for such exits.
    pub const TOLD: usize = 3;
    /// How much is logged: 0 nothing, 1 all, 2 the first, 3 so many a second as the upper half says.
    pub const LOG: usize = 4;
    /// A shadow's place in [`super::vcpu::CELLS`], of the range's first MSR.
    pub const CELL: usize = 5;

    /// Nothing: the exit is the VMM's if it asked for such, and a fault else.
    pub const ROUTE: u64 = 0;
    /// A read gets the value.
    pub const ANSWER: u64 = 1;
    /// A write is done.
    pub const DONE: u64 = 2;
    /// The guest gets #GP.
    pub const FAULT: u64 = 3;
    /// A read gets the cell's value.
    pub const LOAD: u64 = 4;
    /// A write goes to the cell.
    pub const STORE: u64 = 5;
    /// The supervisor answers.
    pub const ASK: u64 = 6;
}

/// A vCPU's memory, which both write: nothing there decides what the guest may do.
pub mod vcpu {
    /// Events written, by the answerer.
    pub const WRITTEN: usize = 0;
    /// Events taken, by the supervisor.
    pub const TAKEN: usize = 1;
    /// Events that found the ring full, since the last one that did not.
    pub const MISSED: usize = 2;
    /// Accesses that no tally has room for.
    pub const UNCOUNTED: usize = 3;
    /// The supervisor's answer to a question: value, what an event says, rule, log.
    pub const REPLY: usize = 4;
    /// The guest's registers, while an access is being made again.
    pub const REGISTERS: usize = 8;
    /// The key of the tally of an access that the guest is making again, or 0: it is not known yet whether the kernel
    /// carries it out.
    pub const PENDING: usize = 26;
    /// 1 where the event of that access stands behind the written ones.
    pub const PENDING_EVENT: usize = 27;
    /// Odd while the thread is in KVM_RUN, and reads no table.
    pub const RUNS: usize = 28;
    /// The number of the last question through memory, and behind it the CPU and the descriptor.
    pub const ASKED: usize = 29;
    /// What it is: a question and a write's value, as the fifth and sixth argument would be.
    pub const QUESTION: usize = 30;
    /// Counts by MSR and direction.
    pub const TALLIES: usize = 32;
    /// How many there is room for.
    pub const TALLY_COUNT: usize = 1024;
    /// Words of a tally: key, count, value, what was done, ticks; how many of the accesses faulted, what was done with the
    /// last of these, and its RIP.
    pub const TALLY: usize = 8;
    /// How far from its place a tally is looked for.
    pub const PROBES: usize = 32;
    /// The ring.
    pub const EVENTS: usize = TALLIES + TALLY_COUNT * TALLY;
    /// Events that it holds.
    pub const EVENT_COUNT: usize = 4096;
    /// Words of an event: time, value, RIP, MSR and VM, vCPU and rule, what was done, log, ticks that it took.
    pub const EVENT: usize = 8;
    /// From here on two words for each MSR with a shadow: whether it was written, and what.
    pub const CELLS: usize = EVENTS + EVENT_COUNT * EVENT;

    /// Where in the word of a question the CPU is, of 12 bits, and the descriptor.
    pub const CPU: u32 = 32;
    /// Likewise.
    pub const FD: u32 = 44;

    /// In an event's word of what was done: a write.
    pub const WRITE: u64 = 1 << 24;
    /// What the policy would do: `Disposition` + 1.
    pub const WOULD: u32 = 40;
    /// `kvm_run.flags`.
    pub const WITHIN: u32 = 48;
    /// There is a RIP.
    pub const HAS_RIP: u64 = 1 << 32;
    /// There is a cost.
    pub const HAS_COST: u64 = 1 << 33;
    /// So many events are missing here as the value says, and there is no access.
    pub const GAP: u64 = 1 << 34;
}

/// Questions, as the fifth argument's lowest byte.
pub mod question {
    /// The descriptor has no slot that may run.
    pub const WHO: u64 = 0;
    /// KVM_RUN ran another vCPU than the slot's.
    pub const OTHER: u64 = 1;
    /// Another thread runs the slot's vCPU.
    pub const BUSY: u64 = 2;
    /// An exit: reason from bit 8 on, 1 for a write at bit 12, the slot from bit 16 on, MSR from bit 32 on; a write's value
    /// is the sixth argument.
    pub const EXIT: u64 = 3;
}

/// What questions get; less than 0 is an error for the VMM.
pub mod reply {
    /// Look again.
    pub const AGAIN: i64 = 0;
    /// The access gets what [`super::vcpu::REPLY`] says: a value, or done.
    pub const ANSWERED: i64 = 1;
    /// It gets #GP.
    pub const FAULTED: i64 = 2;
    /// The exit is the VMM's.
    pub const VMM: i64 = 3;
    /// The guest makes the access again.
    pub const REDO: i64 = 4;
    /// Likewise, and it is an event.
    pub const TOLD: i64 = 5;
}
