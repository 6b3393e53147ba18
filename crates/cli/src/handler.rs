//! Handlers that a policy names: code of a VMM, of which this command has none.

use std::io::{self, Write};

use msrgate_core::Msr;
use msrgate_kvm::{Fault, Handler, Handlers};
use msrgate_plan::Plan;

use crate::stream;

/// Says which handlers a policy names, since nothing here is one.
pub(crate) fn tell_of_handlers(plan: &Plan) -> io::Result<()> {
    let handlers: Vec<&str> = plan.table().handlers().collect();
    if handlers.is_empty() {
        return Ok(());
    }
    let names = handlers.join(", ");
    writeln!(
        stream::err(),
        "msrgate: no code answers for the handlers {names} here, so what they decide faults"
    )
}

/// What answers for the handlers of a plan, which this command has no code for: #GP.
pub(crate) fn nobody(plan: &Plan) -> Handlers {
    let names = plan.table().handlers();
    names.fold(Handlers::new(), |handlers, name| handlers.with(name, Nobody))
}

/// Stands for the handlers that a policy names and this command has no code for.
struct Nobody;

impl Handler for Nobody {
    fn read(&self, _: u32, _: Msr) -> Result<u64, Fault> {
        Err(Fault)
    }

    fn write(&self, _: u32, _: Msr, _: u64) -> Result<(), Fault> {
        Err(Fault)
    }
}
