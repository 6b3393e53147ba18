//! What KVM does with MSR filters, statement by statement: the list is `docs/kvm-behaviour.md`.
//!
//! Each body runs on `msrgate-engine` and on live KVM, in real mode and in 64-bit mode, through [`hypervisor`]. Where
//! /dev/kvm does not open only the engine runs, and the test says `skipped`, unless MSRGATE_LANE_REQUIRE is 1.

mod hypervisor;
mod raw_filter;
mod engine;
mod kernel;
mod live;
mod code;

mod numbers;
mod validation;
mod decision;
mod coverage;
mod deflection;
mod completion;
mod draining;
mod concurrency;
mod interception;
mod nested_svm;
mod nested_vmx;
