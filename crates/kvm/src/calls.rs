//! What a VMM's sandbox must let through.

use msrgate_core::{ReadAction, ReadSource, WriteAction, WriteTarget, abi};
use msrgate_plan::Plan;

use crate::HostMsrs;

/// When a system call is made, and so by which thread.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Stage {
    /// [`probe`](crate::probe()) and [`Capabilities::install`](crate::Capabilities::install): by the thread that makes the VM.
    Install,
    /// [`Gate::vcpu`](crate::Gate::vcpu): by the thread that makes the vCPU.
    Vcpu,
    /// [`VcpuGate::dispatch_raw`](crate::VcpuGate::dispatch_raw): by the vCPU's thread.
    Dispatch,
    /// [`VcpuGate::drain_raw`](crate::VcpuGate::drain_raw): by the vCPU's thread, or another while the vCPU is stopped.
    Drain,
    /// [`Gate::replace`](crate::Gate::replace) and [`Gate::remove`](crate::Gate::remove): by the thread that calls them.
    Replace,
    /// Dropping a gate: by the thread that does.
    Drop,
}

impl Stage {
    /// The name that JSON uses.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Install => "install",
            Stage::Vcpu => "vcpu",
            Stage::Dispatch => "dispatch",
            Stage::Drain => "drain",
            Stage::Replace => "replace",
            Stage::Drop => "drop",
        }
    }
}

/// A system call that msrgate makes in a VMM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub struct SystemCall {
    /// When the VMM makes the call.
    pub stage: Stage,
    /// The call's name, as in `syscalls(2)`.
    pub name: &'static str,
    /// The call's second argument where that is to be compared: an ioctl's request, or the command of `fcntl`.
    pub argument: Option<u32>,
    /// What the argument is called in the kernel's headers.
    pub argument_name: Option<&'static str>,
}

/// The system calls that `plan` takes, by stage: for the lists of a VMM's seccomp filters.
///
/// The VMM's own are not among them: KVM_RUN outside of a drain, and what its allocator and its handlers do. A lock that two
/// threads want at once takes `futex`; where the plan is never replaced none is taken after installing.
pub fn system_calls(plan: &Plan) -> Vec<SystemCall> {
    let table = plan.table();
    let is_host = HostMsrs::are_read_by(table);
    let is_read = |action: &ReadAction| action.source() == ReadSource::Register;
    // What is masked is read before it is written.
    let is_masked = |action: &WriteAction| matches!(action, WriteAction::Mask { .. });
    let gets = table.read_actions().any(is_read) || table.write_actions().any(is_masked);
    let is_written = |action: &WriteAction| action.target() == WriteTarget::Register;
    let sets = table.write_actions().any(is_written);
    let presets = !plan.presets().is_empty();
    let when = |is: bool, calls: &[SystemCall]| if is { calls.to_vec() } else { Vec::new() };
    // The device of each CPU, after the list of CPUs.
    let open = |stage| ["openat", "statx", "lseek", "read", "close"].map(|name| plain(stage, name));

    let mut calls = vec![
        request(Stage::Install, abi::CHECK_EXTENSION, "KVM_CHECK_EXTENSION"),
        duplicate(Stage::Install),
        request(Stage::Install, abi::ENABLE_CAP, "KVM_ENABLE_CAP"),
        request(Stage::Install, abi::SET_MSR_FILTER, "KVM_X86_SET_MSR_FILTER"),
    ];
    calls.extend(when(is_host, &open(Stage::Install)));
    calls.push(duplicate(Stage::Vcpu));
    calls.push(request(Stage::Vcpu, abi::GET_CPUID2, "KVM_GET_CPUID2"));
    calls.extend(when(presets, &[get(Stage::Vcpu), set(Stage::Vcpu)]));
    calls.extend(when(gets, &[get(Stage::Dispatch)]));
    calls.extend(when(sets, &[set(Stage::Dispatch)]));
    let host = ["pread64", "getcpu"].map(|name| plain(Stage::Dispatch, name));
    calls.extend(when(is_host, &host));
    calls.push(request(Stage::Drain, abi::RUN, "KVM_RUN"));
    calls.push(request(Stage::Replace, abi::ENABLE_CAP, "KVM_ENABLE_CAP"));
    calls.push(request(Stage::Replace, abi::SET_MSR_FILTER, "KVM_X86_SET_MSR_FILTER"));
    calls.extend(when(is_host, &open(Stage::Replace)));
    calls.push(plain(Stage::Drop, "close"));
    calls
}

fn get(stage: Stage) -> SystemCall {
    request(stage, abi::GET_MSRS, "KVM_GET_MSRS")
}

fn set(stage: Stage) -> SystemCall {
    request(stage, abi::SET_MSRS, "KVM_SET_MSRS")
}

fn duplicate(stage: Stage) -> SystemCall {
    SystemCall {
        name: "fcntl",
        ..request(stage, libc::F_DUPFD_CLOEXEC.cast_unsigned(), "F_DUPFD_CLOEXEC")
    }
}

fn request(stage: Stage, argument: u32, name: &'static str) -> SystemCall {
    SystemCall {
        argument: Some(argument),
        argument_name: Some(name),
        ..plain(stage, "ioctl")
    }
}

fn plain(stage: Stage, name: &'static str) -> SystemCall {
    SystemCall {
        stage,
        name,
        argument: None,
        argument_name: None,
    }
}
