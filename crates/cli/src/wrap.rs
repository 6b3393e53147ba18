//! `msrgate wrap`: the wrapper by which what manages VMs starts them under msrgate.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::args::{Manager, WrapArgs};
use crate::exit::{Exit, Failure};
use crate::output::{self, Existing};
use crate::stream;

/// The VMM of both managers on Debian; a wrapper for another names it.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Where systemd looks for units, the first first.
const UNITS: [&str; 4] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

pub(crate) fn run(args: &WrapArgs) -> Result<Exit, Failure> {
    let own = std::env::current_exe()
        .map_err(|error| Failure::input(format!("the program's own path is not known: {error}")))?;
    let (text, steps) = match args.manager {
        Manager::Libvirt => script(args, &own, LIBVIRT)?,
        Manager::Proxmox => script(args, &own, PROXMOX)?,
        Manager::Systemd => drop_in(args, &own)?,
    };
    match &args.output {
        None => write!(stream::out(), "{text}")?,
        Some(path) => write_file(path, &text, args)?,
    }
    let mut stderr = stream::err();
    for (number, step) in steps.iter().enumerate() {
        writeln!(stderr, "{}. {step}", number + 1)?;
    }
    Ok(Exit::Yes)
}

fn write_file(path: &Path, text: &str, args: &WrapArgs) -> Result<(), Failure> {
    let mode = if args.manager == Manager::Systemd { 0o644 } else { 0o755 };
    let existing = if args.force { Existing::Replaced } else { Existing::Kept };
    output::put(path, text, Some(fs::Permissions::from_mode(mode)), existing).map_err(|error| {
        let path = path.display();
        Failure::input(match error.kind() {
            std::io::ErrorKind::AlreadyExists => format!("`{path}` exists already: --force overwrites it"),
            _ => format!("cannot write `{path}`: {error}"),
        })
    })
}

/// What differs between the managers whose VMM a script wraps.
struct Wrapped {
    /// What it is.
    title: &'static str,
    /// What to do with it: `@` stands for the wrapper's path, `%` for the policies' directory.
    steps: &'static [&'static str],
    /// The options whose word is the VM's name in the manager's own sense, tried after its `-name`.
    id: &'static str,
    /// Whether the id is looked for first.
    id_first: bool,
}

const LIBVIRT: Wrapped = Wrapped {
    title: "libvirt",
    steps: &[
        "Put policies into %: NAME.toml or UUID.toml for a VM, default.toml for the others; each readable for the user that QEMU \
         runs as. `msrgate check` says whether they are right.",
        "Have a VM use it: `virsh edit VM`, and <emulator>@</emulator> within <devices>.",
        "Unless QEMU runs as root: `seccomp_sandbox = 0` in /etc/libvirt/qemu.conf, since msrgate makes calls in QEMU's threads, and \
         restart libvirt's daemon.",
        "With AppArmor: a line `@ rmix,` and one for msrgate, in /etc/apparmor.d/local/abstractions/libvirt-qemu; or \
         `security_driver = \"none\"` in /etc/libvirt/qemu.conf.",
        "Start the VM. /var/log/libvirt/qemu/VM.log has msrgate's summary at the end.",
    ],
    id: "-uuid",
    id_first: false,
};

const PROXMOX: Wrapped = Wrapped {
    title: "Proxmox VE",
    steps: &[
        "Put policies into %: VMID.toml or NAME.toml for a VM, default.toml for the others. `msrgate check` says whether they are right.",
        "Move Proxmox' own aside: `dpkg-divert --local --rename --divert /usr/bin/kvm.distrib --add /usr/bin/kvm`.",
        "Put the wrapper there: `install -m 755 @ /usr/bin/kvm`.",
        "Start a VM: `qm start VMID`. `journalctl -t pvedaemon` and the task's log have what msrgate says.",
        "To undo it: `rm /usr/bin/kvm`, and `dpkg-divert --rename --remove /usr/bin/kvm`.",
    ],
    id: "-id",
    id_first: true,
};

/// A word of a shell.
fn quoted(path: &Path) -> Result<String, Failure> {
    let text = path.to_str().filter(|text| !text.contains(char::is_control));
    let text = text.ok_or_else(|| Failure::input(format!("`{}` cannot be written into a script", path.display())))?;
    Ok(format!("'{}'", text.replace('\'', "'\\''")))
}

fn script(args: &WrapArgs, own: &Path, of: Wrapped) -> Result<(String, Vec<String>), Failure> {
    let vmm = args.vmm.clone().unwrap_or_else(|| QEMU.into());
    let place = args.output.as_deref().unwrap_or(Path::new("WRAPPER"));
    let place = std::path::absolute(place).unwrap_or_else(|_| place.to_owned());
    let place = if args.output.is_some() {
        place.display().to_string()
    } else {
        "WRAPPER".to_owned()
    };
    let steps: Vec<String> = of
        .steps
        .iter()
        .map(|step| {
            step.replace('@', &place)
                .replace('%', &args.policies.display().to_string())
        })
        .collect();
    let comment: String = steps
        .iter()
        .enumerate()
        .map(|(number, step)| format!("# {}. {}\n", number + 1, step.replace(char::is_control, " ")))
        .collect();
    let traces = args.traces.as_deref().map(quoted).transpose()?;
    let order = if of.id_first {
        "\"$id\" \"$name\""
    } else {
        "\"$name\" \"$id\""
    };
    let text = format!(
        r#"#!/bin/sh
# Starts a VM of {title} under msrgate; `msrgate wrap` wrote it.
#
{comment}set -eu

msrgate={own}
vmm={vmm}
policies={policies}
traces={traces}

# Which VM it is.
name=''
id=''
machine=''
before=''
for word in "$@"; do
    case $before in
    -name | --name)
        # `guest=NAME,debug-threads=on` or `NAME,…`. A name with a comma has it twice: then the id tells.
        case ",$word" in
        *,,*,*) ;;
        *,guest=*) name=${{word##*guest=}} name=${{name%%,*}} ;;
        *) name=${{word%%,*}} ;;
        esac
        ;;
    {id} | -{id}) id=$word ;;
    -machine | --machine | -M) machine=${{word#type=}} ;;
    esac
    before=$word
done

# A question of what the VMM can do, and no VM. All else is under msrgate.
case ${{1-}} in
'' | -h | -help | --help | -version | --version) exec "$vmm" "$@" ;;
esac
case $name,$id,$machine in
,,none | ,,none,*) exec "$vmm" "$@" ;;
esac

policy=
for key in {order} default; do
    case $key in
    '' | .* | */*) continue ;;
    esac
    if [ -e "$policies/$key.toml" ]; then
        policy=$policies/$key.toml
        break
    fi
done
if [ -z "$policy" ]; then
    echo "msrgate: no policy for the VM '$name' ($id): $policies/default.toml would be it" >&2
    exit 1
fi

if [ -n "$traces" ]; then
    set -- --trace "$traces/%n-%p-%t.jsonl" -- "$vmm" "$@"
else
    set -- -- "$vmm" "$@"
fi
exec "$msrgate" run -p "$policy" "$@"
"#,
        title = of.title,
        id = of.id,
        own = quoted(own)?,
        vmm = quoted(&vmm)?,
        policies = quoted(&args.policies)?,
        traces = traces.unwrap_or_default(),
    );
    Ok((text, steps))
}

/// A drop-in in which a service's command line stands behind msrgate.
fn drop_in(args: &WrapArgs, own: &Path) -> Result<(String, Vec<String>), Failure> {
    let named = args.service.as_deref();
    let service = named.ok_or_else(|| Failure::input("name the service: --service NAME, or the file of its unit"))?;
    let (file, text) = unit(service)?;
    let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let commands = commands(&text);
    let [command] = commands.as_slice() else {
        return Err(Failure::input(format!(
            "{} has {} lines `ExecStart=`, and a VMM's service has one",
            file.display(),
            commands.len()
        )));
    };
    // What systemd makes of the line's beginning goes before msrgate.
    let rest = command.trim_start_matches(['-', ':', '+', '!']);
    let prefix = command.strip_suffix(rest).unwrap_or_default();
    if rest.starts_with('@') {
        return Err(Failure::input(format!(
            "{}: with `@` the command's own name is another, which msrgate does not pass on",
            file.display()
        )));
    }
    let policy = args.policies.join(format!("{stem}.toml"));
    let word = |path: &Path| {
        let text = path.display().to_string();
        match text.contains(|c: char| c.is_control() || c.is_whitespace() || "\"'\\$%".contains(c)) {
            true => Err(Failure::input(format!("`{text}` cannot be written into a unit"))),
            false => Ok(text),
        }
    };
    let traces = match &args.traces {
        // A percent sign of msrgate's is two in a unit.
        Some(traces) => format!(" --trace {}/%%n-%%p-%%t.jsonl", word(traces)?),
        None => String::new(),
    };
    let place = format!("/etc/systemd/system/{stem}.service.d/msrgate.conf");
    let steps = vec![
        format!(
            "Put the policy into {}. `msrgate check` says whether it is right.",
            policy.display()
        ),
        format!("Put this into {place}, and `systemctl daemon-reload`."),
        format!("`systemctl restart {stem}`; `journalctl -u {stem}` has msrgate's summary at the end."),
        "A service with SystemCallFilter= has to allow ptrace, seccomp, process_vm_readv and process_vm_writev."
            .to_owned(),
    ];
    let comment: String = steps.iter().map(|step| format!("# {step}\n")).collect();
    let text = format!(
        "# The VMM of {stem}.service under msrgate; `msrgate wrap` wrote it.\n{comment}[Service]\nExecStart=\nExecStart={prefix}{} run -p {}{traces} -- {rest}\n",
        word(own)?,
        word(&policy)?,
    );
    Ok((text, steps))
}

/// The file of a service's unit, and its text.
fn unit(service: &str) -> Result<(PathBuf, String), Failure> {
    let unreadable = |path: &Path, error| Failure::input(format!("cannot read `{}`: {error}", path.display()));
    if service.contains('/') {
        let path = PathBuf::from(service);
        let text = fs::read_to_string(&path).map_err(|error| unreadable(&path, error))?;
        return Ok((path, text));
    }
    let name = format!("{}.service", service.trim_end_matches(".service"));
    for folder in UNITS {
        let path = Path::new(folder).join(&name);
        match fs::read_to_string(&path) {
            Ok(text) => return Ok((path, text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(unreadable(&path, error)),
        }
    }
    let folders = UNITS.join(", ");
    Err(Failure::input(format!(
        "no unit `{name}` in {folders}: --service takes the file of a unit too"
    )))
}

/// The commands of `ExecStart=`; an empty one takes back those before it.
fn commands(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let mut commands = Vec::new();
    for line in joined.lines() {
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        match (key.trim(), value.trim()) {
            ("ExecStart", "") => commands.clear(),
            ("ExecStart", command) => commands.push(command.split_whitespace().collect::<Vec<_>>().join(" ")),
            _ => {}
        }
    }
    commands
}
