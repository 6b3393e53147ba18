//! `msrgate doctor`: whether msrgate works on this machine, and what to do where it does not.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_enable_cap, kvm_msr_entry};
use kvm_ioctls::Kvm;
use msrgate_core::{Msr, Reason, Reasons};
use msrgate_kvm::{Handlers, ProbeError};
use msrgate_msrs::{BypassKind, Entry, Linux};
use msrgate_plan::{DecisionMap, Plan};

use crate::args::DoctorArgs;
use crate::exit::{Exit, Failure, with_source};
use crate::json::{self, Printed, object};
use crate::stream::{self, Stream, Tone};
use crate::words;

/// How many vCPUs one VM has for what is tried, which every kernel takes.
const MOST_VCPUS: u64 = 64;

pub(crate) fn run(args: &DoctorArgs) -> Result<Exit, Failure> {
    let host = Host::new(Path::new("/"));
    let device = msrgate_kvm::open();
    let mut checks = vec![host.kvm(device.as_ref().err())];
    checks.extend(kvm(device.is_ok()));
    checks.extend(host.without_kvm());
    let failed = checks.iter().filter(|check| check.status == Status::Fail).count() as u64;
    match args.json {
        true => json::print(&printed(&checks))?,
        false => print(&mut stream::page(), &checks, failed)?,
    }
    Ok(match failed {
        0 => Exit::Yes,
        _ => Exit::No,
    })
}

/// How a check ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Status {
    /// Nothing is wrong.
    Pass,
    /// msrgate works, and something is to be known.
    Warn,
    /// msrgate does not work.
    Fail,
    /// There is nothing to check, or nothing to check it by.
    Skipped,
}

impl Status {
    const fn name(self) -> &'static str {
        match self {
            Status::Pass => "pass",
            Status::Warn => "warn",
            Status::Fail => "fail",
            Status::Skipped => "skipped",
        }
    }

    const fn tone(self) -> Tone {
        match self {
            Status::Pass => Tone::Good,
            Status::Warn => Tone::Odd,
            Status::Fail => Tone::Bad,
            Status::Skipped => Tone::Plain,
        }
    }
}

/// A thing that was looked at.
#[derive(Debug)]
pub(crate) struct Check {
    name: &'static str,
    status: Status,
    says: String,
    /// What to do.
    remedy: Option<String>,
}

impl Check {
    fn new(name: &'static str, status: Status, says: impl Into<String>) -> Check {
        Check {
            name,
            status,
            says: says.into(),
            remedy: None,
        }
    }

    fn remedy(self, remedy: impl Into<String>) -> Check {
        Check {
            remedy: Some(remedy.into()),
            ..self
        }
    }

    fn printed(&self) -> impl Printed {
        object! {
            /// What was looked at.
            check: self.name,
            /// `"pass"`, `"warn"`: msrgate works, and something is to be known; `"fail"`: it does not work; `"skipped"`:
            /// there is nothing to check.
            status: self.status.name(),
            /// What was found.
            says: &self.says,
            /// What to do; null if nothing.
            remedy: &self.remedy,
        }
    }
}

pub(crate) fn printed(checks: &[Check]) -> impl Printed {
    object! {
        /// Whether no check failed.
        ok: checks.iter().all(|check| check.status != Status::Fail),
        /// What was looked at, in order.
        checks: checks.iter().map(Check::printed).collect::<Vec<_>>(),
    }
}

fn print(out: &mut Stream<impl Write>, checks: &[Check], failed: u64) -> io::Result<()> {
    match failed {
        0 => out.say(Tone::Good, "msrgate works on this machine")?,
        failed => {
            let checks = words::counted(failed, "check", "checks");
            out.say(
                Tone::Bad,
                &format!("msrgate does not work on this machine: {checks} failed"),
            )?;
        }
    }
    writeln!(out)?;
    for check in checks {
        let status = check.status.name().to_uppercase();
        let colour = out.colour;
        let painted = check.status.tone().paint(&status, colour).into_owned();
        let gap = " ".repeat(9 - status.len());
        out.coloured(&format!(
            "{painted}{gap}{:<13} {}\n",
            check.name,
            stream::shown(&check.says, "")
        ))?;
        if let Some(remedy) = &check.remedy {
            writeln!(out, "{:23}{remedy}", "")?;
        }
    }
    Ok(())
}

/// What KVM does when it is asked.
fn kvm(opens: bool) -> Vec<Check> {
    if !opens {
        let skipped = |name| Check::new(name, Status::Skipped, "/dev/kvm does not open");
        return ["filter", "exits", "features"].map(skipped).into();
    }
    vec![filter(), exits(), features()]
}

/// Whether a VM takes a filter.
fn filter() -> Check {
    const NAME: &str = "filter";
    let tried = || -> Result<(), Box<dyn std::error::Error>> {
        let kvm = Kvm::new()?;
        let capabilities = msrgate_kvm::probe(&kvm)?;
        let plan = Plan::compile(&DecisionMap::allow_all())?;
        let vm = kvm.create_vm()?;
        capabilities.install(&vm, Arc::new(plan), Handlers::new())?;
        Ok(())
    };
    match tried() {
        Ok(()) => Check::new(NAME, Status::Pass, "a VM takes an MSR filter (KVM_CAP_X86_MSR_FILTER)"),
        Err(error) => {
            Check::new(NAME, Status::Fail, with_source(error.as_ref())).remedy("Linux 5.10 and newer has MSR filters")
        }
    }
}

/// For which reasons the kernel hands accesses to user space.
fn exits() -> Check {
    const NAME: &str = "exits";
    let takes = |reason: Reason| {
        let mut request = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            ..Default::default()
        };
        if let Some(first) = request.args.first_mut() {
            *first = Reasons::of(reason).bits().into();
        }
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm());
        vm.and_then(|vm| vm.enable_cap(&request)).is_ok()
    };
    let (has, lacks): (Vec<Reason>, Vec<Reason>) = Reason::ALL.into_iter().partition(|reason| takes(*reason));
    let names = |reasons: &[Reason]| reasons.iter().map(Reason::to_string).collect::<Vec<_>>().join(", ");
    let says = format!("KVM hands accesses to user space by: {}", names(&has));
    match lacks.as_slice() {
        [] => Check::new(NAME, Status::Pass, says),
        lacks => Check::new(
            NAME,
            Status::Fail,
            format!("KVM does not hand accesses over by: {}", names(lacks)),
        )
        .remedy("Linux 5.10 and newer does (KVM_CAP_X86_USER_SPACE_MSR)"),
    }
}

/// Whether KVM takes what it offers of the registers that tell a guest what its processor can do: QEMU sets those as it starts a
/// guest.
fn features() -> Check {
    const NAME: &str = "features";
    let one = |msr, data| {
        let entry = kvm_msr_entry {
            index: msr,
            data,
            ..Default::default()
        };
        Msrs::from_entries(&[entry]).ok()
    };
    let tried = || -> Result<Vec<Msr>, kvm_ioctls::Error> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let mut refused = Vec::new();
        for (id, msr) in (0..).zip(kvm.get_msr_feature_index_list()?.as_slice().to_vec()) {
            let Some(mut offer) = one(msr, 0).filter(|_| id < MOST_VCPUS) else {
                continue;
            };
            if kvm.get_msrs(&mut offer)? != 1 {
                continue;
            }
            // A vCPU for each: some take a value only before another has one.
            let vcpu = vm.create_vcpu(id)?;
            vcpu.set_cpuid2(&cpuid)?;
            if vcpu.set_msrs(&offer).unwrap_or_default() != 1 {
                refused.push(Msr(msr));
            }
        }
        Ok(refused)
    };
    let refused = match tried() {
        Ok(refused) => refused,
        Err(error) => {
            return Check::new(
                NAME,
                Status::Skipped,
                format!("KVM does not say what it offers: {error}"),
            );
        }
    };
    if refused.is_empty() {
        return Check::new(
            NAME,
            Status::Pass,
            "KVM takes what it offers VMMs of registers that tell of features",
        );
    }
    let named = |msr: &Msr| match msrgate_msrs::by_msr(*msr) {
        Some(entry) => format!("{msr} {}", entry.name()),
        None => msr.to_string(),
    };
    let names: Vec<String> = refused.iter().map(named).collect();
    let entries = refused.iter().filter_map(|msr| msrgate_msrs::by_msr(*msr));
    let properties: Vec<&str> = entries.filter_map(Entry::qemu_property).collect();
    let remedy = match words::switches(&properties) {
        none if none.is_empty() => "a newer kernel may take it; `msrgate why` says more of such a message".to_owned(),
        switches => format!("with QEMU `-cpu MODEL,{switches}`, for `-cpu host` too; a newer kernel may take it"),
    };
    let says = format!(
        "KVM offers a VMM what it then refuses: {}. QEMU may end with `failed to set MSR`",
        names.join(", ")
    );
    Check::new(NAME, Status::Warn, says).remedy(remedy)
}

/// The files of a machine.
struct Host {
    root: PathBuf,
}

impl Host {
    fn new(root: &Path) -> Host {
        Host { root: root.to_owned() }
    }

    fn read(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path.trim_start_matches('/'))).ok()?;
        Some(text.trim().to_owned())
    }

    fn has(&self, path: &str) -> bool {
        self.root.join(path.trim_start_matches('/')).exists()
    }

    /// What does not ask KVM.
    fn without_kvm(&self) -> Vec<Check> {
        vec![
            self.kernel(),
            self.ignore_msrs(),
            self.nested(),
            self.user(),
            self.ptrace(),
            self.seccomp(),
            self.manager(
                "libvirt",
                &["/usr/sbin/libvirtd", "/usr/sbin/virtqemud", "/etc/libvirt/qemu.conf"],
            ),
            self.manager("proxmox", &["/usr/bin/pveversion", "/etc/pve/storage.cfg"]),
        ]
    }

    /// A line of `/proc/self/status`.
    fn status(&self, key: &str) -> Option<String> {
        let status = self.read("/proc/self/status")?;
        let mut lines = status.lines().filter_map(|line| line.split_once(':'));
        let (_, value) = lines.find(|(name, _)| *name == key)?;
        Some(value.trim().to_owned())
    }

    /// Whether this process has a capability; `None` where that is not known.
    fn capable(&self, number: u32) -> Option<bool> {
        let effective = u64::from_str_radix(&self.status("CapEff")?, 16).ok()?;
        Some(effective >> number & 1 == 1)
    }

    /// Whether `/dev/kvm` opens; what to do goes by the processor.
    fn kvm(&self, failed: Option<&ProbeError>) -> Check {
        const NAME: &str = "/dev/kvm";
        let Some(error) = failed else {
            return Check::new(NAME, Status::Pass, "it opens");
        };
        let check = Check::new(NAME, Status::Fail, with_source(error));
        match error {
            ProbeError::NoKvm => check.remedy(self.module()),
            ProbeError::NoPermission => check.remedy(
                "`ls -l /dev/kvm` shows the group: `usermod -aG kvm USER` and a new login, or `setfacl -m u:USER:rw /dev/kvm`",
            ),
            _ => check,
        }
    }

    /// How to get `/dev/kvm` on this processor.
    fn module(&self) -> String {
        let cpuinfo = self.read("/proc/cpuinfo").unwrap_or_default();
        let find = |key: &str| {
            let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
            let found = lines.find(|(name, _)| name.trim() == key);
            found.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let flags = find("flags");
        let has = |flag: &str| flags.split(' ').any(|name| name == flag);
        let module = match find("vendor_id").as_str() {
            "AuthenticAMD" | "HygonGenuine" => Some("kvm_amd"),
            "GenuineIntel" | "CentaurHauls" | "  Shanghai  " => Some("kvm_intel"),
            _ => None,
        };
        match (module, has("vmx") || has("svm"), has("hypervisor")) {
            (Some(module), true, _) => format!("`modprobe {module}`; in a container, pass /dev/kvm into it"),
            (_, false, true) => {
                "this is a VM whose host shows it no virtualization: turn nested virtualization on there (kvm_intel.nested=1 or \
                 kvm_amd.nested=1, and a CPU model with vmx or svm)"
                    .to_owned()
            }
            (_, false, false) => "turn virtualization (VT-x or AMD-V) on in the firmware".to_owned(),
            (None, true, _) => "load KVM's module for this processor".to_owned(),
        }
    }

    /// What the filter of this kernel does not stop.
    fn kernel(&self) -> Check {
        const NAME: &str = "kernel";
        let release = self.read("/proc/sys/kernel/osrelease");
        let Some((release, linux)) =
            release.and_then(|release| Some((release.clone(), release.parse::<Linux>().ok()?)))
        else {
            return Check::new(NAME, Status::Skipped, "its version is not known");
        };
        if linux < Linux(5, 10) {
            return Check::new(NAME, Status::Fail, format!("Linux {release} has no MSR filters"))
                .remedy("Linux 5.10 and newer has");
        }
        let gaps = msrgate_msrs::bypasses().iter();
        let gaps = gaps.filter(|bypass| bypass.kind == BypassKind::Kernel && bypass.is_of(linux));
        let gaps: Vec<String> = gaps
            .map(|bypass| bypass.says_of(Some(linux), &bypass.of.join(", ")))
            .collect();
        match gaps.is_empty() {
            true => Check::new(
                NAME,
                Status::Pass,
                format!("Linux {release}: no gap is known but x2APIC, which no kernel filters"),
            ),
            false => Check::new(NAME, Status::Warn, format!("Linux {release}: {}", gaps.join("; "))).remedy(
                "`msrgate check POLICY` says whether that matters for a policy; a newer kernel may have it closed",
            ),
        }
    }

    /// Whether KVM answers for all guests what it does not know.
    fn ignore_msrs(&self) -> Check {
        const NAME: &str = "ignore_msrs";
        const PATH: &str = "/sys/module/kvm/parameters/ignore_msrs";
        let on = |path: &str| self.read(path).map(|value| value == "Y" || value == "1");
        let Some(ignores) = on(PATH) else {
            return Check::new(
                NAME,
                Status::Skipped,
                "the kernel has no such parameter, or KVM is not loaded",
            );
        };
        if !ignores {
            return Check::new(NAME, Status::Pass, "off: an MSR that KVM does not know is #GP");
        }
        let reports = on("/sys/module/kvm/parameters/report_ignored_msrs").unwrap_or(true);
        let reported = if reports {
            ""
        } else {
            ", and nothing of it in the kernel's log"
        };
        let says = format!(
            "on: for all guests of this host an MSR that KVM does not know reads as 0 and takes writes{reported}"
        );
        Check::new(NAME, Status::Warn, says).remedy(format!(
            "`msrgate run --ignore-unknown` does that for one VM; then `echo N > {PATH}`, and take `ignore_msrs` out of /etc/modprobe.d"
        ))
    }

    fn nested(&self) -> Check {
        const NAME: &str = "nested";
        let of = |module| Some((module, self.read(&format!("/sys/module/{module}/parameters/nested"))?));
        match of("kvm_intel").or_else(|| of("kvm_amd")) {
            None => Check::new(NAME, Status::Skipped, "neither kvm_intel nor kvm_amd is loaded"),
            Some((module, value)) if value == "Y" || value == "1" => Check::new(
                NAME,
                Status::Pass,
                format!("on ({module}): a guest may run guests, whose accesses the policy decides too"),
            ),
            Some((module, _)) => Check::new(NAME, Status::Pass, format!("off ({module}): a guest runs no guests")),
        }
    }

    /// What the kernel lets this user do.
    fn user(&self) -> Check {
        const NAME: &str = "user";
        const SYS_ADMIN: u32 = 21;
        match self.capable(SYS_ADMIN) {
            None => Check::new(NAME, Status::Skipped, "/proc does not say what this user may do"),
            Some(true) => Check::new(
                NAME,
                Status::Pass,
                "it may administer the system (CAP_SYS_ADMIN), so VMMs keep setuid programs",
            ),
            Some(false) => Check::new(
                NAME,
                Status::Warn,
                "it has no CAP_SYS_ADMIN, so `run` sets no_new_privs: setuid programs that the VMM starts gain nothing",
            )
            .remedy(
                "run as root where the VMM needs such a program, as qemu-bridge-helper; else there is nothing to do",
            ),
        }
    }

    /// Whether the VMM's threads can be stopped.
    fn ptrace(&self) -> Check {
        const NAME: &str = "ptrace";
        const SYS_PTRACE: u32 = 19;
        const PATH: &str = "/proc/sys/kernel/yama/ptrace_scope";
        match self.read(PATH).as_deref() {
            None => Check::new(NAME, Status::Pass, "no Yama restricts it"),
            Some("0" | "1") => Check::new(NAME, Status::Pass, "Yama lets a parent trace its children"),
            Some("2") if self.capable(SYS_PTRACE) == Some(true) => Check::new(
                NAME,
                Status::Pass,
                "Yama lets only CAP_SYS_PTRACE trace, and this user has it",
            ),
            Some("2") => Check::new(
                NAME,
                Status::Fail,
                "Yama lets only CAP_SYS_PTRACE trace (ptrace_scope is 2)",
            )
            .remedy(format!("run msrgate as root, or `echo 1 > {PATH}`")),
            Some(_) => Check::new(
                NAME,
                Status::Fail,
                "Yama lets nobody trace (ptrace_scope is 3) until the machine starts anew",
            )
            .remedy("set kernel.yama.ptrace_scope to 1 in /etc/sysctl.d and restart"),
        }
    }

    /// Whether the VMM's calls can wait.
    fn seccomp(&self) -> Check {
        const NAME: &str = "seccomp";
        let Some(actions) = self.read("/proc/sys/kernel/seccomp/actions_avail") else {
            return Check::new(NAME, Status::Fail, "the kernel has no seccomp filters")
                .remedy("a kernel with CONFIG_SECCOMP_FILTER");
        };
        if !actions.split(' ').any(|action| action == "user_notif") {
            return Check::new(
                NAME,
                Status::Fail,
                "seccomp has no user notification, by which a VMM's calls wait",
            )
            .remedy("Linux 5.0 and newer has it; msrgate needs 5.10");
        }
        match self.status("Seccomp").as_deref() {
            Some("2") => Check::new(NAME, Status::Warn, "a seccomp filter is on msrgate itself, as in a container")
                .remedy("if it has a listener, or forbids ptrace, `run` cannot work in here: `--security-opt seccomp=unconfined`"),
            _ => Check::new(NAME, Status::Pass, "calls can wait for msrgate (user notification)"),
        }
    }

    /// Whether there is something to wrap.
    fn manager(&self, name: &'static str, signs: &[&str]) -> Check {
        match signs.iter().any(|sign| self.has(sign)) {
            true => Check::new(
                name,
                Status::Pass,
                format!("it is here: `msrgate wrap {name}` writes the wrapper for its VMs"),
            ),
            false => Check::new(name, Status::Skipped, "it is not here"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that has these files.
    fn host(name: &str, files: &[(&str, &str)]) -> Host {
        let root = std::env::temp_dir().join(format!("msrgate-doctor-{}-{name}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Host { root }
    }

    fn cpuinfo(vendor: &str, flags: &str) -> String {
        format!("processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} sse\n")
    }

    fn remedy(check: &Check) -> &str {
        check.remedy.as_deref().unwrap_or_default()
    }

    #[test]
    fn the_module_is_that_of_the_processor_and_a_guest_is_told_of_its_host() {
        for (vendor, flags, says) in [
            ("AuthenticAMD", "svm", "modprobe kvm_amd"),
            ("HygonGenuine", "svm", "modprobe kvm_amd"),
            ("GenuineIntel", "vmx", "modprobe kvm_intel"),
            ("GenuineIntel", "hypervisor", "turn nested virtualization on"),
            ("AuthenticAMD", "hypervisor svm", "modprobe kvm_amd"),
            ("AuthenticAMD", "pae", "in the firmware"),
            ("Somebody", "vmx", "for this processor"),
        ] {
            let host = host(
                &format!("{vendor}-{}", flags.replace(' ', "-")),
                &[("/proc/cpuinfo", &cpuinfo(vendor, flags))],
            );
            let check = host.kvm(Some(&ProbeError::NoKvm));
            assert_eq!(check.status, Status::Fail);
            assert!(remedy(&check).contains(says), "{vendor} {flags}: {check:?}");
        }
    }

    #[test]
    fn a_machine_of_which_nothing_is_known_has_nothing_made_up() {
        let host = host("empty", &[]);
        let found: Vec<(&str, Status)> = host
            .without_kvm()
            .iter()
            .map(|check| (check.name, check.status))
            .collect();
        let expected = [
            ("kernel", Status::Skipped),
            ("ignore_msrs", Status::Skipped),
            ("nested", Status::Skipped),
            ("user", Status::Skipped),
            ("ptrace", Status::Pass),
            ("seccomp", Status::Fail),
            ("libvirt", Status::Skipped),
            ("proxmox", Status::Skipped),
        ];
        assert_eq!(found, expected);
        let denied = host.kvm(Some(&ProbeError::NoPermission));
        assert!(remedy(&denied).contains("usermod"));
        assert_eq!(host.kvm(None).status, Status::Pass);
    }

    #[test]
    fn what_a_host_has_set_is_told_with_what_to_do() {
        let user = "Name:\tmsrgate\nUid:\t1000\nCapEff:\t0000000000000000\nSeccomp:\t2\n";
        let busy = host(
            "busy",
            &[
                ("/proc/sys/kernel/osrelease", "6.1.0-48-amd64\n"),
                ("/sys/module/kvm/parameters/ignore_msrs", "Y\n"),
                ("/sys/module/kvm/parameters/report_ignored_msrs", "N\n"),
                ("/sys/module/kvm_amd/parameters/nested", "1\n"),
                ("/proc/self/status", user),
                ("/proc/sys/kernel/yama/ptrace_scope", "2\n"),
                (
                    "/proc/sys/kernel/seccomp/actions_avail",
                    "kill_process user_notif allow\n",
                ),
                ("/usr/sbin/libvirtd", ""),
            ],
        );
        let checks = busy.without_kvm();
        let of = |name: &str| checks.iter().find(|check| check.name == name).unwrap();
        for (name, status, says, todo) in [
            ("kernel", Status::Warn, "lists of MSRs that a VMCS has", "check POLICY"),
            (
                "ignore_msrs",
                Status::Warn,
                "nothing of it in the kernel's log",
                "--ignore-unknown",
            ),
            ("nested", Status::Pass, "on (kvm_amd)", ""),
            ("user", Status::Warn, "no_new_privs", "run as root"),
            ("ptrace", Status::Fail, "CAP_SYS_PTRACE", "echo 1 >"),
            ("seccomp", Status::Warn, "on msrgate itself", "unconfined"),
            ("libvirt", Status::Pass, "wrap libvirt", ""),
        ] {
            let check = of(name);
            assert_eq!(check.status, status, "{check:?}");
            assert!(check.says.contains(says) && remedy(check).contains(todo), "{check:?}");
        }
        let old = host("old", &[("/proc/sys/kernel/osrelease", "5.4.0\n")]);
        assert_eq!(old.kernel().status, Status::Fail);
        let none = host("strict", &[("/proc/sys/kernel/yama/ptrace_scope", "3\n")]);
        assert_eq!(none.ptrace().status, Status::Fail);
    }
}
