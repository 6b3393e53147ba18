//! Traces and policies learned from them, from outside.

mod policies;
mod properties;
