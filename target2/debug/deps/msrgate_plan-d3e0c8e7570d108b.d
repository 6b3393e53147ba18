/work/main/target2/debug/deps/msrgate_plan-d3e0c8e7570d108b.d: crates/plan/src/lib.rs crates/plan/src/intervals.rs crates/plan/src/map.rs crates/plan/src/cover.rs crates/plan/src/pack.rs crates/plan/src/shortfall.rs crates/plan/src/preset.rs crates/plan/src/plan.rs crates/plan/src/proof.rs crates/plan/src/change.rs crates/plan/src/spill.rs crates/plan/src/order.rs crates/plan/src/note.rs crates/plan/src/compose.rs crates/plan/src/differ.rs crates/plan/src/encode.rs

/work/main/target2/debug/deps/libmsrgate_plan-d3e0c8e7570d108b.rmeta: crates/plan/src/lib.rs crates/plan/src/intervals.rs crates/plan/src/map.rs crates/plan/src/cover.rs crates/plan/src/pack.rs crates/plan/src/shortfall.rs crates/plan/src/preset.rs crates/plan/src/plan.rs crates/plan/src/proof.rs crates/plan/src/change.rs crates/plan/src/spill.rs crates/plan/src/order.rs crates/plan/src/note.rs crates/plan/src/compose.rs crates/plan/src/differ.rs crates/plan/src/encode.rs

crates/plan/src/lib.rs:
crates/plan/src/intervals.rs:
crates/plan/src/map.rs:
crates/plan/src/cover.rs:
crates/plan/src/pack.rs:
crates/plan/src/shortfall.rs:
crates/plan/src/preset.rs:
crates/plan/src/plan.rs:
crates/plan/src/proof.rs:
crates/plan/src/change.rs:
crates/plan/src/spill.rs:
crates/plan/src/order.rs:
crates/plan/src/note.rs:
crates/plan/src/compose.rs:
crates/plan/src/differ.rs:
crates/plan/src/encode.rs:
