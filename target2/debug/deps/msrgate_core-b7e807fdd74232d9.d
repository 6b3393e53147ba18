/work/main/target2/debug/deps/msrgate_core-b7e807fdd74232d9.d: crates/core/src/lib.rs crates/core/src/msr.rs crates/core/src/access.rs crates/core/src/filter.rs crates/core/src/lookup.rs crates/core/src/bitmap.rs crates/core/src/exit.rs crates/core/src/action.rs crates/core/src/table.rs crates/core/src/table/memory.rs crates/core/src/event.rs crates/core/src/abi.rs

/work/main/target2/debug/deps/libmsrgate_core-b7e807fdd74232d9.rmeta: crates/core/src/lib.rs crates/core/src/msr.rs crates/core/src/access.rs crates/core/src/filter.rs crates/core/src/lookup.rs crates/core/src/bitmap.rs crates/core/src/exit.rs crates/core/src/action.rs crates/core/src/table.rs crates/core/src/table/memory.rs crates/core/src/event.rs crates/core/src/abi.rs

crates/core/src/lib.rs:
crates/core/src/msr.rs:
crates/core/src/access.rs:
crates/core/src/filter.rs:
crates/core/src/lookup.rs:
crates/core/src/bitmap.rs:
crates/core/src/exit.rs:
crates/core/src/action.rs:
crates/core/src/table.rs:
crates/core/src/table/memory.rs:
crates/core/src/event.rs:
crates/core/src/abi.rs:
