/work/main/target2/debug/deps/msrgate_supervise-2c6033b09da10198.d: crates/supervise/src/lib.rs crates/supervise/src/supervisor.rs crates/supervise/src/supervisor/cpuid.rs crates/supervise/src/supervisor/exit.rs crates/supervise/src/supervisor/msrs.rs crates/supervise/src/supervisor/run.rs crates/supervise/src/policy.rs crates/supervise/src/watch.rs crates/supervise/src/table.rs crates/supervise/src/region.rs crates/supervise/src/hands.rs crates/supervise/src/stopped.rs crates/supervise/src/target.rs crates/supervise/src/seccomp.rs crates/supervise/src/raw_filter.rs crates/supervise/src/ledger.rs crates/supervise/src/memory.rs crates/supervise/src/frame.rs crates/supervise/src/host.rs crates/supervise/src/kvm.rs crates/supervise/src/spawn.rs

/work/main/target2/debug/deps/libmsrgate_supervise-2c6033b09da10198.rmeta: crates/supervise/src/lib.rs crates/supervise/src/supervisor.rs crates/supervise/src/supervisor/cpuid.rs crates/supervise/src/supervisor/exit.rs crates/supervise/src/supervisor/msrs.rs crates/supervise/src/supervisor/run.rs crates/supervise/src/policy.rs crates/supervise/src/watch.rs crates/supervise/src/table.rs crates/supervise/src/region.rs crates/supervise/src/hands.rs crates/supervise/src/stopped.rs crates/supervise/src/target.rs crates/supervise/src/seccomp.rs crates/supervise/src/raw_filter.rs crates/supervise/src/ledger.rs crates/supervise/src/memory.rs crates/supervise/src/frame.rs crates/supervise/src/host.rs crates/supervise/src/kvm.rs crates/supervise/src/spawn.rs

crates/supervise/src/lib.rs:
crates/supervise/src/supervisor.rs:
crates/supervise/src/supervisor/cpuid.rs:
crates/supervise/src/supervisor/exit.rs:
crates/supervise/src/supervisor/msrs.rs:
crates/supervise/src/supervisor/run.rs:
crates/supervise/src/policy.rs:
crates/supervise/src/watch.rs:
crates/supervise/src/table.rs:
crates/supervise/src/region.rs:
crates/supervise/src/hands.rs:
crates/supervise/src/stopped.rs:
crates/supervise/src/target.rs:
crates/supervise/src/seccomp.rs:
crates/supervise/src/raw_filter.rs:
crates/supervise/src/ledger.rs:
crates/supervise/src/memory.rs:
crates/supervise/src/frame.rs:
crates/supervise/src/host.rs:
crates/supervise/src/kvm.rs:
crates/supervise/src/spawn.rs:
