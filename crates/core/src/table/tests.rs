use alloc::string::{String, ToString};
use alloc::sync::Arc;

use super::*;

/// Registers of a made-up kernel and CPU: 0x10 holds `kernel`, every other is refused.
struct World {
    kernel: u64,
    asked: Vec<String>,
}

impl MsrBackend for World {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        if msr == Msr(0x10) {
            Ok(self.kernel)
        } else {
            Err(FaultCause::KernelRefused)
        }
    }
    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause> {
        if msr != Msr(0x10) {
            return Err(FaultCause::KernelRefused);
        }
        self.kernel = value;
        Ok(())
    }
    fn host_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::HostUnreadable)
    }
    fn handler_read(&mut self, name: &str, _: Msr) -> Result<u64, FaultCause> {
        self.asked.push(name.to_string());
        Ok(7)
    }
    fn handler_write(&mut self, name: &str, _: Msr, _: u64) -> Result<(), FaultCause> {
        self.asked.push(name.to_string());
        Err(FaultCause::HandlerPanicked)
    }
}

fn world() -> World {
    World {
        kernel: 0xff00,
        asked: Vec::new(),
    }
}

fn entry<A>(first: u32, last: u32, action: A) -> Entry<A> {
    let range = MsrRange::new(Msr(first), Msr(last)).unwrap();
    Entry {
        range,
        action,
        rule: Some(first),
        log: Log::None,
    }
}

const FAULT: (ReadAction, WriteAction) = (ReadAction::Deny, WriteAction::Deny);

fn table(reads: Vec<Entry<ReadAction>>, writes: Vec<Entry<WriteAction>>) -> ActionTable {
    ActionTable::new(reads, writes, FAULT, FAULT).unwrap()
}

fn read(msr: u32, reason: Reason) -> Exit {
    Exit {
        access: Access::Read { msr: Msr(msr) },
        reason,
    }
}

fn write(msr: u32, value: u64, reason: Reason) -> Exit {
    Exit {
        access: Access::Write { msr: Msr(msr), value },
        reason,
    }
}

#[test]
fn what_no_entry_names_faults() {
    let table = table(vec![entry(0x10, 0x20, ReadAction::Value(1))], vec![]);
    let mut state = table.vcpu_state();
    for exit in [
        read(0xf, Reason::Filter),
        read(0x21, Reason::Filter),
        write(0x10, 0, Reason::Filter),
    ] {
        let answer = table.answer(exit, &mut state, &mut world());
        assert_eq!((answer.outcome, answer.why), (Outcome::Fault, Some(FaultCause::NoRule)));
    }
    let answer = table.answer(read(0x20, Reason::Filter), &mut state, &mut world());
    assert_eq!(
        (answer.outcome, answer.did, answer.rule),
        (Outcome::Value(1), Disposition::Value, Some(0x10))
    );
}

#[test]
fn a_shadow_reads_back_what_was_written_on_its_vcpu_alone() {
    let table = table(
        vec![entry(0x10, 0x1f, ReadAction::Shadow(5))],
        vec![entry(0x18, 0x2f, WriteAction::Shadow)],
    );
    let (mut one, mut two) = (table.vcpu_state(), table.vcpu_state());
    let answer = |exit, state: &mut VcpuState| table.answer(exit, state, &mut world()).outcome;
    assert_eq!(answer(read(0x18, Reason::Filter), &mut one), Outcome::Value(5));
    assert_eq!(answer(write(0x18, 9, Reason::Filter), &mut one), Outcome::Done);
    assert_eq!(answer(write(0x2f, 3, Reason::Filter), &mut one), Outcome::Done);
    assert_eq!(answer(read(0x18, Reason::Filter), &mut one), Outcome::Value(9));
    assert_eq!(answer(read(0x19, Reason::Filter), &mut one), Outcome::Value(5));
    assert_eq!(answer(read(0x18, Reason::Filter), &mut two), Outcome::Value(5));
}

#[test]
fn shadows_of_unknown_msrs_fill_up_and_then_fault() {
    let shadow = (ReadAction::Shadow(0), WriteAction::Shadow);
    let table = ActionTable::new(vec![], vec![], shadow, FAULT).unwrap();
    let mut state = table.vcpu_state();
    for msr in 0..ActionTable::SPARE_CELLS as u32 {
        for value in [1, 2] {
            let exit = write(msr, u64::from(msr) + value, Reason::Unknown);
            assert_eq!(table.answer(exit, &mut state, &mut world()).outcome, Outcome::Done);
        }
    }
    let full = table.answer(write(0x1000, 1, Reason::Unknown), &mut state, &mut world());
    assert_eq!((full.outcome, full.why), (Outcome::Fault, Some(FaultCause::ShadowFull)));
    let kept = table.answer(read(255, Reason::Unknown), &mut state, &mut world());
    assert_eq!(kept.outcome, Outcome::Value(257));
}

#[test]
fn a_mask_shows_and_changes_only_its_bits() {
    let mask = |otherwise| WriteAction::Mask {
        may_change: 0xf,
        otherwise,
    };
    let keep = entry(0x10, 0x11, ReadAction::Mask { keep: 0xf000, set: 1 });
    let deny = table(vec![keep.clone()], vec![entry(0x10, 0x10, mask(OnLockedBits::Deny))]);
    let drop = table(vec![keep], vec![entry(0x10, 0x10, mask(OnLockedBits::Drop))]);
    let mut state = deny.vcpu_state();
    let mut world = world();
    assert_eq!(
        deny.answer(read(0x10, Reason::Filter), &mut state, &mut world).outcome,
        Outcome::Value(0xf001)
    );
    let refused = deny.answer(read(0x11, Reason::Filter), &mut state, &mut world);
    assert_eq!(
        (refused.outcome, refused.why),
        (Outcome::Fault, Some(FaultCause::KernelRefused))
    );
    let locked = deny.answer(write(0x10, 0x1, Reason::Filter), &mut state, &mut world);
    assert_eq!((locked.why, world.kernel), (Some(FaultCause::BitsLocked), 0xff00));
    assert_eq!(
        deny.answer(write(0x10, 0xff05, Reason::Filter), &mut state, &mut world)
            .outcome,
        Outcome::Done
    );
    assert_eq!(world.kernel, 0xff05);
    assert_eq!(
        drop.answer(write(0x10, 0x1, Reason::Filter), &mut state, &mut world)
            .outcome,
        Outcome::Done
    );
    assert_eq!(world.kernel, 0xff01);
}

#[test]
fn the_first_write_counts_and_a_refused_one_does_not() {
    let table = table(vec![], vec![entry(0x10, 0x11, WriteAction::Once)]);
    let mut state = table.vcpu_state();
    let mut world = world();
    assert_eq!(
        table
            .answer(write(0x10, 1, Reason::Filter), &mut state, &mut world)
            .outcome,
        Outcome::Done
    );
    let later = table.answer(write(0x10, 2, Reason::Filter), &mut state, &mut world);
    assert_eq!((later.why, world.kernel), (Some(FaultCause::AlreadyWritten), 1));
    for _ in 0..2 {
        let refused = table.answer(write(0x11, 1, Reason::Filter), &mut state, &mut world);
        assert_eq!(refused.why, Some(FaultCause::KernelRefused));
    }
}

#[test]
fn only_listed_values_reach_the_kernel() {
    let table = table(vec![], vec![entry(0x10, 0x10, WriteAction::Only(Arc::new([1, 2])))]);
    let mut state = table.vcpu_state();
    let mut world = world();
    assert_eq!(
        table
            .answer(write(0x10, 2, Reason::Filter), &mut state, &mut world)
            .outcome,
        Outcome::Done
    );
    let other = table.answer(write(0x10, 3, Reason::Filter), &mut state, &mut world);
    assert_eq!((other.why, world.kernel), (Some(FaultCause::ValueNotListed), 2));
}

#[test]
fn a_handler_is_asked_by_its_name() {
    let table = table(
        vec![entry(1, 1, ReadAction::Handler("topology".into()))],
        vec![entry(1, 1, WriteAction::Handler("power".into()))],
    );
    assert_eq!(table.handlers().collect::<Vec<_>>(), ["topology", "power"]);
    let mut state = table.vcpu_state();
    let mut world = world();
    assert_eq!(
        table.answer(read(1, Reason::Filter), &mut state, &mut world).outcome,
        Outcome::Value(7)
    );
    let panicked = table.answer(write(1, 0, Reason::Filter), &mut state, &mut world);
    assert_eq!(
        (panicked.outcome, panicked.why),
        (Outcome::Fault, Some(FaultCause::HandlerPanicked))
    );
    assert_eq!(world.asked, ["topology", "power"]);
}

#[test]
fn a_vcpu_that_is_answering_does_not_answer_again() {
    let table = table(vec![entry(1, 1, ReadAction::Value(1))], vec![]);
    let mut state = table.vcpu_state();
    state.answering = true;
    let answer = table.answer(read(1, Reason::Filter), &mut state, &mut world());
    assert_eq!(
        (answer.outcome, answer.why),
        (Outcome::Fault, Some(FaultCause::ReEntered))
    );
}

#[test]
fn unknown_and_invalid_have_their_own_actions() {
    let zero = (ReadAction::Value(0), WriteAction::Ignore);
    let table = ActionTable::new(vec![], vec![], zero, FAULT).unwrap();
    let mut state = table.vcpu_state();
    let mut answer = |exit| table.answer(exit, &mut state, &mut world()).outcome;
    assert_eq!(answer(read(1, Reason::Unknown)), Outcome::Value(0));
    assert_eq!(answer(write(1, 1, Reason::Unknown)), Outcome::Done);
    assert_eq!(answer(read(1, Reason::Invalid)), Outcome::Fault);
    assert_eq!(answer(read(1, Reason::Filter)), Outcome::Fault);
}

#[test]
fn state_is_carried_to_the_next_table_where_both_keep_it() {
    let shadow = |first, last| {
        table(
            vec![entry(first, last, ReadAction::Shadow(0))],
            vec![entry(first, last, WriteAction::Shadow)],
        )
    };
    let (old, new) = (shadow(0x10, 0x11), shadow(0x11, 0x13));
    let mut state = old.vcpu_state();
    for msr in [0x10, 0x11] {
        assert_eq!(
            old.answer(write(msr, 9, Reason::Filter), &mut state, &mut world())
                .outcome,
            Outcome::Done
        );
    }
    let mut state = state.carried(&old, &new);
    assert_eq!(
        new.answer(read(0x11, Reason::Filter), &mut state, &mut world()).outcome,
        Outcome::Value(9)
    );
    assert_eq!(
        new.answer(read(0x12, Reason::Filter), &mut state, &mut world()).outcome,
        Outcome::Value(0)
    );
}

#[test]
fn entries_that_overlap_are_no_table() {
    let reads = vec![entry(0, 5, ReadAction::Deny), entry(5, 6, ReadAction::Deny)];
    assert_eq!(
        ActionTable::new(reads, vec![], FAULT, FAULT),
        Err(TableError::NotSorted { msr: Msr(5) })
    );
    let all = vec![Entry {
        range: MsrRange::ALL,
        ..entry(0, 0, WriteAction::Shadow)
    }];
    assert_eq!(
        ActionTable::new(vec![], all, FAULT, FAULT),
        Err(TableError::TooManyCells)
    );
}

/// Shadows of 0x20..=0x2f, one write of 0x10 and 0x30, and shadows of what the kernel does not know.
fn remembering() -> ActionTable {
    ActionTable::new(
        vec![entry(0x20, 0x2f, ReadAction::Shadow(9))],
        vec![
            entry(0x10, 0x10, WriteAction::Once),
            entry(0x20, 0x2f, WriteAction::Shadow),
            entry(0x30, 0x30, WriteAction::Once),
        ],
        (ReadAction::Shadow(0), WriteAction::Shadow),
        FAULT,
    )
    .unwrap()
}

const SHADOW: EmulatedState = EmulatedState::Shadow {
    msr: Msr(0x21),
    value: 5,
};
const SPARE: EmulatedState = EmulatedState::Shadow {
    msr: Msr(0x999),
    value: 6,
};
const ONCE: EmulatedState = EmulatedState::Once { msr: Msr(0x10) };

#[test]
fn what_a_vcpu_remembers_is_told_and_another_remembers_it() {
    let table = remembering();
    let (mut state, mut world) = (table.vcpu_state(), world());
    for exit in [
        write(0x999, 6, Reason::Unknown),
        write(0x21, 5, Reason::Filter),
        write(0x10, 1, Reason::Filter),
    ] {
        assert_eq!(table.answer(exit, &mut state, &mut world).outcome, Outcome::Done);
    }
    let memories: Vec<EmulatedState> = table.emulated_states(&state).collect();
    assert_eq!(memories, [ONCE, SHADOW, SPARE]);

    let mut other = table.vcpu_state();
    table.restore(&mut other, memories).unwrap();
    assert_eq!(other, state);
    let again = table.answer(write(0x10, 1, Reason::Filter), &mut other, &mut world);
    assert_eq!(again.why, Some(FaultCause::AlreadyWritten));
    let read = table.answer(read(0x21, Reason::Filter), &mut other, &mut world);
    assert_eq!(read.outcome, Outcome::Value(5));
}

#[test]
fn no_memory_unlocks_an_msr_and_a_shadow_takes_the_place_of_another() {
    let table = remembering();
    let mut state = table.vcpu_state();
    table.restore(&mut state, [ONCE, SHADOW]).unwrap();
    table.restore(&mut state, [SPARE]).unwrap();
    assert_eq!(table.emulated_states(&state).collect::<Vec<_>>(), [ONCE, SPARE]);
}

#[test]
fn memories_that_the_table_has_no_place_for_change_nothing() {
    let table = remembering();
    let mut state = table.vcpu_state();
    table.restore(&mut state, [ONCE]).unwrap();
    let before = state.clone();
    let once = |msr| EmulatedState::Once { msr: Msr(msr) };
    let many = (0..=ActionTable::SPARE_CELLS as u32).map(|index| EmulatedState::Shadow {
        msr: Msr(0x1000 + index),
        value: 0,
    });
    let last = EmulatedState::Shadow {
        msr: Msr(0x1000 + ActionTable::SPARE_CELLS as u32),
        value: 0,
    };
    for (memories, error) in [
        (
            vec![SHADOW, once(0x11)],
            EmulatedStateError::NoRoom { memory: once(0x11) },
        ),
        (vec![SHADOW, SHADOW], EmulatedStateError::Twice { memory: SHADOW }),
        (vec![SPARE, SPARE], EmulatedStateError::Twice { memory: SPARE }),
        (
            vec![once(0x30), once(0x30)],
            EmulatedStateError::Twice { memory: once(0x30) },
        ),
        (many.collect(), EmulatedStateError::NoRoom { memory: last }),
    ] {
        assert_eq!(table.restore(&mut state, memories), Err(error));
        assert_eq!(state, before);
    }
    let bare = ActionTable::new(vec![], vec![], FAULT, FAULT).unwrap();
    assert_eq!(
        bare.restore(&mut bare.vcpu_state(), [SPARE]),
        Err(EmulatedStateError::NoRoom { memory: SPARE })
    );
}
