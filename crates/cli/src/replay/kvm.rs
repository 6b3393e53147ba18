//! A replayed guest on this machine's KVM.

use std::sync::Arc;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use msrgate_core::{Access, Event, Msr, Op, Outcome};
use msrgate_guest::{GuestError, Mode, Options};
use msrgate_kvm::{Fault, Gate, Handler, Handlers, VcpuGate};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;

use super::{Got, Machine, with_source};
use crate::exit::{Exit, Failure};

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
                    .install(guest.vm(), Arc::clone(plan), nobody(plan))
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
    fn run(&mut self, events: &[Event], got: &mut Vec<Got>) -> Result<(), Failure> {
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
                Err(GuestError::Broke { position, .. }) => Some(position),
                Err(error) => return Err(Failure::Line(Exit::Guest, with_source(&error))),
            };
            got.extend(vcpu.seen().iter().map(|seen| Got {
                outcome: seen.outcome,
                answer: seen.exit.and_then(|exit| exit.answer),
            }));
            let Some(position) = broke else {
                return Ok(());
            };
            // The guest cannot go on from this access, which is a fault of the hardest kind; those after it go on.
            got.push(Got {
                outcome: Outcome::Fault,
                answer: None,
            });
            rest = rest.get(position + 1..).unwrap_or_default();
        }
        Ok(())
    }
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

/// A CPUID as KVM_SET_CPUID2 takes it.
pub(crate) fn to_kvm(cpuid: &Cpuid) -> Result<CpuId, Failure> {
    /// The subleaf counts.
    const SIGNIFICANT_INDEX: u32 = 1;
    let several = |leaf: u32| cpuid.entries().filter(|(other, ..)| *other == leaf).count() > 1;
    let entries: Vec<kvm_cpuid_entry2> = cpuid
        .entries()
        .map(|(function, index, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
            function,
            index,
            flags: if several(function) { SIGNIFICANT_INDEX } else { 0 },
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| Failure::input("the CPUID has more leaves than KVM takes"))
}
