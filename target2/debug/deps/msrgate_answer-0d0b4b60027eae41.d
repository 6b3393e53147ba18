/work/main/target2/debug/deps/msrgate_answer-0d0b4b60027eae41.d: crates/answer/src/lib.rs crates/answer/src/layout.rs /work/main/target2/debug/build/msrgate-answer-446ea2b044dc91c2/out/answer.bin

/work/main/target2/debug/deps/libmsrgate_answer-0d0b4b60027eae41.rmeta: crates/answer/src/lib.rs crates/answer/src/layout.rs /work/main/target2/debug/build/msrgate-answer-446ea2b044dc91c2/out/answer.bin

crates/answer/src/lib.rs:
crates/answer/src/layout.rs:
/work/main/target2/debug/build/msrgate-answer-446ea2b044dc91c2/out/answer.bin:

# env-dep:OUT_DIR=/work/main/target2/debug/build/msrgate-answer-446ea2b044dc91c2/out
