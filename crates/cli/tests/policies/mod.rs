//! Policies that several VMMs run under, and what tests of `run` share.
#![allow(dead_code, reason = "each test uses a part of this")]

use std::io::Read;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::command::{Folder, Ran};

/// Options of `run`: the revision of microcode is 0x1000000.
pub(crate) const MICROCODE: &[&str] = &["-p", "policies/fixed-microcode.toml"];

/// What a guest of this maker's processor gets.
pub(crate) const BY_VENDOR: &str = r#"default = "allow"
[[rule]]
msr = "0x8b"
read = { value = "0x11" }
write = "ignore"
when = { vendor = "intel" }
[[rule]]
msr = "0x8b"
read = { value = "0x22" }
write = "ignore"
when = { vendor = "amd" }
"#;

/// A policy of more ranges than a filter has, the last for IA32_PAT (0x277) and IA32_STAR.
pub(crate) fn too_much() -> String {
    let allowed = (0..15)
        .map(|slot| 0x5000_0000 + (slot << 20))
        .chain([0x277, 0xc000_0081_u32]);
    let rules: String = allowed
        .map(|msr| format!("[[rule]]\nmsr = \"{msr:#x}\"\nread = \"allow\"\nwrite = \"allow\"\n"))
        .collect();
    format!("default = \"deny\"\nspill = \"user-space\"\n{rules}")
}

/// A folder with the policies that come with msrgate, and this one as `policy.toml`.
pub(crate) fn with_policy(text: &str) -> Folder {
    let folder = Folder::furnished();
    folder.write("policy.toml", format!("version = 1\nname = \"test\"\n{text}"));
    folder
}

/// The summary of `--json`.
pub(crate) fn summary(ran: &Ran) -> Value {
    let last = ran.err.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {}", ran.err))
}

/// `attach` while its policy is in force.
pub(crate) struct Attach(pub(crate) Child);

impl Attach {
    /// Once the policy is in force; `Err` with how the command ended where it does not come to that.
    pub(crate) fn start(folder: &Folder, options: &[&str], process: &str) -> Result<Attach, Ran> {
        let mut command = folder.command(&["attach", "-p", "policy.toml"]);
        Attach::of(command.args(options).arg(process))
    }

    pub(crate) fn of(command: &mut Command) -> Result<Attach, Ran> {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut err = String::new();
        // One letter at a time: what follows is the summary's.
        let stderr = child.stderr.as_mut().unwrap();
        let mut byte = [0];
        while !err.contains("takes the policy off again") && !err.contains("SIGINT ends that") {
            if stderr.read(&mut byte).unwrap() == 0 {
                let code = child.wait().unwrap().code();
                let out = String::new();
                return Err(Ran { code, out, err });
            }
            err.push(char::from(byte[0]));
        }
        while byte != *b"\n" {
            assert_eq!(stderr.read(&mut byte).unwrap(), 1);
        }
        Ok(Attach(child))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }

    pub(crate) fn rest(mut self) -> Ran {
        let mut err = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        let code = self.0.wait().unwrap().code();
        let out = String::new();
        Ran { code, out, err }
    }

    /// The end that a user asks for.
    pub(crate) fn detach(self) -> Ran {
        self.signal(Signal::SIGINT);
        self.rest()
    }
}
