//! VMMs that stop a vCPU by a signal, whose guest does nothing but make exits: KVM_RUN gives EINTR each time.

use super::*;

/// Has the vCPU kicked so often, and says that no kick is lost and nothing is left over of the access before.
fn none_is_lost(way: Way, options: &[&str], how: &str, kicks: &str) {
    let Some(program) = vmm("kicks", way) else { return };
    let folder = with_policy(ANSWERS);
    let ran = Ran::of(&mut under(&folder, options, &program, &[how, kicks, "0x174"])).code(0);
    assert_eq!(ran.out, "lost 0 disturbed 0\n", "{way:?} {how} {}", ran.err);
}

const ANSWERED: &[&str] = &["-p", "policy.toml"];

#[test]
fn no_signal_with_an_empty_handler_is_lost() {
    none_is_lost(Way::Dynamic, ANSWERED, "signal", "10000");
    for way in [Way::Static, Way::StaticPie, Way::Inline, Way::Musl] {
        none_is_lost(way, ANSWERED, "signal", "1000");
    }
    // The guest's last exit is followed by none: the signal that comes meanwhile counts all the same.
    none_is_lost(Way::Dynamic, ANSWERED, "stay", "500");
}

#[test]
fn no_signal_is_lost_whose_handler_has_a_stack_of_its_own() {
    none_is_lost(Way::Dynamic, ANSWERED, "altstack", "1000");
}

#[test]
fn no_kick_by_immediate_exit_or_by_a_signal_mask_is_lost() {
    for how in ["immediate", "mask"] {
        none_is_lost(Way::Dynamic, ANSWERED, how, "10000");
        none_is_lost(Way::Inline, ANSWERED, how, "1000");
    }
}

#[test]
fn a_vmm_that_is_given_eintr_may_set_registers() {
    none_is_lost(Way::Dynamic, ANSWERED, "moved", "2000");
    let options = [ANSWERED, &["--trace", "trace.jsonl", "--rip"]].concat();
    none_is_lost(Way::Dynamic, &options, "moved", "500");
    none_is_lost(Way::Dynamic, &["--learn=all", "--trace", "trace.jsonl"], "moved", "500");
}
