//! The policy language, from outside.

mod agreement;

mod docs;
mod effort;
mod faults;
mod policies;
mod properties;
