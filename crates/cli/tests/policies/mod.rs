//! Policies that several VMMs run under, and what tests of `run` share.
#![allow(dead_code, reason = "each test uses a part of this")]

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
