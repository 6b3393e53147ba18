//! What other threads want of a supervisor that serves, and what it keeps for that.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use msrgate_core::VcpuState;
use msrgate_plan::{CompileOptions, DecisionMap, Plan};

use crate::ledger::Leaf;
use crate::policy::Policy;
use crate::running::AttachError;

/// Says what a policy is for a guest with these leaves, without presets, which would come too late; an error is one line for
/// people.
pub type Resolve = Box<dyn Fn(Vec<Leaf>) -> Result<(Plan, CompileOptions), String> + Send>;

/// A policy that is to take the place of the one in force.
pub struct Reload {
    /// The policy; where it depends on the guest's CPUID, what is in force until that is known.
    pub plan: Plan,
    /// How it was compiled.
    pub options: CompileOptions,
    /// What the policy is for a guest's CPUID, where it depends on that.
    pub resolve: Option<Resolve>,
}

impl fmt::Debug for Reload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reload").finish_non_exhaustive()
    }
}

/// What a policy that took the place of another came to.
#[derive(Debug)]
#[non_exhaustive]
pub struct Reloaded {
    /// On how many VMs it was put in force.
    pub vms: usize,
    /// How long the thread of the VMM stood still that stood still longest.
    pub longest: Duration,
    /// What was in force, on the first VM if there is one.
    pub before: DecisionMap,
    /// What is in force there.
    pub after: DecisionMap,
}

/// Another thread's way to a supervisor that serves.
#[derive(Clone, Debug)]
pub struct Control {
    commands: Sender<Command>,
    wake: Arc<PipeWriter>,
}

impl Control {
    /// Puts another policy in force on all VMs and on those to come, in place of the one that is; waits until it is.
    ///
    /// # Errors
    /// One line for people: then the old one is in force, everywhere.
    pub fn reload(&self, reload: Reload) -> Result<Reloaded, String> {
        let (answer, answered) = channel();
        let over = || "the VMM has ended".to_owned();
        let sent = self.commands.send(Command::Reload(Box::new(reload), answer));
        sent.map_err(|_| over())?;
        // Where nobody reads, nobody answers.
        let _ = (&*self.wake).write_all(&[0]);
        answered.recv().map_err(|_| over())?
    }

    /// Has VMs that ran already left to themselves, and waits until they are; tells whether the VMM has a filter of its own.
    pub(crate) fn take_off(&self) -> Result<bool, AttachError> {
        let (answer, answered) = channel();
        let sent = self.commands.send(Command::TakeOff(answer));
        sent.map_err(|_| AttachError::Gone)?;
        let _ = (&*self.wake).write_all(&[0]);
        answered.recv().unwrap_or(Err(AttachError::Gone))
    }
}

/// What another thread wants.
#[derive(Debug)]
pub(crate) enum Command {
    Reload(Box<Reload>, Sender<Result<Reloaded, String>>),
    TakeOff(Sender<Result<bool, AttachError>>),
}

/// Where commands come from.
pub(crate) struct Commands {
    commands: Receiver<Command>,
    pub(crate) wake: PipeReader,
}

impl Commands {
    pub(crate) fn new() -> io::Result<(Commands, Control)> {
        let (commands, receiver) = (channel(), io::pipe()?);
        let control = Control {
            commands: commands.0,
            wake: Arc::new(receiver.1),
        };
        let commands = Commands {
            commands: commands.1,
            wake: receiver.0,
        };
        Ok((commands, control))
    }

    /// One, where there is a byte to be read.
    pub(crate) fn next(&mut self) -> Option<Command> {
        self.wake.read_exact(&mut [0]).ok()?;
        self.commands.try_recv().ok()
    }

    /// One, where there is one.
    pub(crate) fn try_next(&mut self) -> Option<Command> {
        let command = self.commands.try_recv().ok()?;
        // Its byte comes behind it.
        self.wake.read_exact(&mut [0]).ok()?;
        Some(command)
    }
}

/// What was in force on a VM just before.
pub(crate) struct Before {
    pub(crate) policy: Arc<Policy>,
    pub(crate) plan: Arc<Plan>,
    pub(crate) states: HashMap<u64, VcpuState>,
}

/// vCPUs that may still have an exit which a filter before has made.
pub(crate) struct Unsettled {
    /// Region, slot, and what its answerer had counted.
    pub(crate) vcpus: Vec<(u64, usize, u64)>,
    /// Whether some may still read a table before.
    pub(crate) reading: bool,
    pub(crate) since: Instant,
}

impl Unsettled {
    /// Whether the next policy waits for it; not for long, since a thread may stand still for as long as it likes.
    pub(crate) fn holds_up(&self) -> bool {
        self.reading && self.since.elapsed() < Duration::from_secs(2)
    }

    /// Whether exits of filters before are taken for nobody's: a vCPU may stay in its guest for as long as it likes too.
    pub(crate) fn is_over(&self) -> bool {
        self.since.elapsed() >= Duration::from_secs(60)
    }

    /// In how many milliseconds to look again.
    pub(crate) fn next(&self) -> u16 {
        (self.since.elapsed().as_millis() / 64).clamp(1, 1000) as u16
    }
}
