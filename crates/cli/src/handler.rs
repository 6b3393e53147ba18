//! Handlers that a policy names: code of a VMM, of which this command has none.

use std::io::{self, Write};

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
