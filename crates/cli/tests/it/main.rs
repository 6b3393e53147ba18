//! The command's tests that any machine runs: modules of one program, since each program is linked by itself.

#[path = "../allows/mod.rs"]
mod allows;
#[path = "../command/mod.rs"]
mod command;
#[path = "../filter/mod.rs"]
mod filter;
#[path = "../picture/mod.rs"]
mod picture;

mod answers;
mod bad_input;
mod captures;
mod ci;
mod decompile;
mod diff;
mod documents;
mod formats;
mod inputs;
mod json;
mod layout;
mod kernels;
mod learn;
mod migrate;
mod pages;
mod pictures;
mod plan;
mod replay;
mod report;
mod review;
mod run;
mod surface;
mod terminal;
mod usage;
mod why;
mod wrap;
