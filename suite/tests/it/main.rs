//! What needs no KVM: the cases, and properties that hold between the implementations.

mod behaviour_doc;
mod cases;
mod properties;
