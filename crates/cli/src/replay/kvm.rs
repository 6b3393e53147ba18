//! A replayed guest on this machine's KVM.

use std::sync::Arc;

use kvm_ioctls::Kvm;
use msrgate_core::{Access, Event, Op, Outcome};
use msrgate_guest::{GuestError, Mode, Options};
use msrgate_kvm::{Gate, Handlers, VcpuGate};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;

use super::machine::{AccessResult, Machine};
use crate::cpuid::to_kvm;
use crate::exit::{Exit, Failure, with_source};

/// One vCPU in a VM of its own.
pub(crate) struct Guest {
    guest: msrgate_guest::Guest,
    /// Dropped with the guest: a gate that went away would leave its filter, and nobody to answer.
    gate: Option<(Gate, VcpuGate)>,
    accesses: Vec<Access>,
}

impl Guest {
    pub(crate) fn new(plan: Option<&Arc<Plan>>, cpuid: Option<&Cpuid>) -> Result<Guest, Failure> {
        let machine = |error: &dyn std::error::Error| Failure::Line(Exit::Machine, with_source(error));
        let device = msrgate_kvm::open().map_err(|error| machine(&error))?;
        let probed = msrgate_kvm::probe(&device).map_err(|error| machine(&error))?;
        let kvm = Kvm::new().map_err(|error| machine(&error))?;
        let options = Options {
            cpuid: cpuid.map(to_kvm).transpose()?,
            vcpus: 1,
            irqchip: true,
        };
        let failed = |error: GuestError| Failure::Line(Exit::Guest, with_source(&error));
        let mut guest = msrgate_guest::Guest::new(&kvm, Mode::Real, &options).map_err(failed)?;
        let gate = match plan {
            None => None,
            Some(plan) => {
                let gate = probed
                    .install(
                        guest.vm(),
                        Arc::clone(plan),
                        Handlers::faulting(plan.table().handlers()),
                    )
                    .map_err(|error| machine(&error))?;
                let vcpu = guest.vcpu(0).map_err(failed)?;
                let vcpu_gate = gate.vcpu(vcpu.fd(), 0).map_err(|error| machine(&error))?;
                Some((gate, vcpu_gate))
            }
        };
        Ok(Guest {
            guest,
            gate,
            accesses: Vec::new(),
        })
    }
}

impl Machine for Guest {
    fn run(&mut self, events: &[Event], got: &mut Vec<AccessResult>) -> Result<(), Failure> {
        self.accesses.clear();
        self.accesses.extend(events.iter().map(|event| match event.op {
            Op::Read => Access::Read { msr: event.msr },
            Op::Write => Access::Write {
                msr: event.msr,
                value: event.value,
            },
        }));
        let gate = self.gate.as_ref().map(|(_, gate)| gate);
        let mut rest = self.accesses.as_slice();
        while !rest.is_empty() {
            let vcpu = self
                .guest
                .vcpu(0)
                .map_err(|error| Failure::Line(Exit::Guest, with_source(&error)))?;
            let ran = vcpu.run(rest, &mut |pending| {
                if let Some(gate) = gate {
                    pending.dispatch(gate);
                }
            });
            let broke = match ran {
                Ok(_) => None,
                Err(GuestError::GuestDied { position, .. }) => Some(position),
                Err(error) => return Err(Failure::Line(Exit::Guest, with_source(&error))),
            };
            got.extend(vcpu.seen().iter().map(|seen| AccessResult {
                outcome: seen.outcome,
                answer: seen.exit.and_then(|exit| exit.answer),
            }));
            let Some(position) = broke else {
                return Ok(());
            };
            // The guest cannot go on from this access, which is a fault of the hardest kind; those after it go on.
            got.push(AccessResult {
                outcome: Outcome::Fault,
                answer: None,
            });
            rest = rest.get(position + 1..).unwrap_or_default();
        }
        Ok(())
    }
}
