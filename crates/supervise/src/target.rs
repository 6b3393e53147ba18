//! What the kernel says of a VMM's threads, descriptors and memory, at the moment of the question.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::RawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

pub(crate) const PAGE: usize = 4096;
pub(crate) const WORD: usize = size_of::<u64>();

/// What a descriptor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Object {
    /// `/dev/kvm`.
    Kvm,
    /// A VM, with its tag; 0 where it has none.
    Vm(u64),
    /// A vCPU, likewise.
    Vcpu(u64),
    /// Something else, or nothing.
    Other,
}

impl Object {
    /// What a thread's descriptor is. One that cannot be looked at is an error.
    pub(crate) fn of(thread: i32, fd: RawFd) -> io::Result<Object> {
        let path = format!("/proc/{thread}/fd/{fd}");
        let link = match fs::read_link(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Object::Other),
            link => link?,
        };
        let name = link.as_os_str().as_encoded_bytes();
        if name == b"anon_inode:kvm-vm" {
            return tag(thread, fd).map(Object::Vm);
        }
        if name.starts_with(b"anon_inode:kvm-vcpu") {
            return tag(thread, fd).map(Object::Vcpu);
        }
        // `KVM_MINOR` in `include/linux/miscdevice.h`, wherever the node is.
        let device = fs::metadata(&path).is_ok_and(|file| file.rdev() == rustix::fs::makedev(10, 232));
        Ok(if device { Object::Kvm } else { Object::Other })
    }
}

/// What the supervisor calls a VM or a vCPU: the start of a lock on its open file.
///
/// A lock belongs to the open file and goes along with it, whichever descriptors and processes have it, keeps nothing
/// alive, and ends with it. KVM's files share one inode, on which a tag is one byte's place (`F_OFD_SETLK`).
fn tag(thread: i32, fd: RawFd) -> io::Result<u64> {
    let info = fs::read_to_string(format!("/proc/{thread}/fdinfo/{fd}"))?;
    let locks = info
        .lines()
        .filter(|line| line.starts_with("lock:") && line.contains(" OFDLCK "));
    let starts = locks.filter_map(|line| line.split_whitespace().rev().nth(1)?.parse().ok());
    Ok(starts.min().unwrap_or(0))
}

/// The descriptors of a process whose files are called so.
pub(crate) fn descriptors_of(process: i32, name: &str) -> Vec<RawFd> {
    let entries = fs::read_dir(format!("/proc/{process}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    let named =
        entries.filter(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with(name)));
    named
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// The open file of a process's descriptor.
pub(crate) fn file(process: i32, fd: RawFd) -> io::Result<fs::File> {
    let pid = rustix::process::Pid::from_raw(process).ok_or(io::ErrorKind::NotFound)?;
    let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let file = rustix::process::pidfd_getfd(process, fd, rustix::process::PidfdGetfdFlags::empty())?;
    Ok(file.into())
}

/// Gives the open file of a descriptor a tag in the place of those that it has, from outside: nothing changes in the process.
pub(crate) fn name(process: i32, fd: RawFd, tag: u64) -> io::Result<()> {
    let tag = tag.cast_signed();
    lock(process, fd, libc::F_WRLCK, tag, 1)?;
    lock(process, fd, libc::F_UNLCK, 0, tag)?;
    lock(process, fd, libc::F_UNLCK, tag + 1, 0)
}

/// A process's descriptors of the open files of these tags, as far as it has any.
pub(crate) fn descriptors(process: i32, tags: impl Iterator<Item = u64>) -> Vec<RawFd> {
    let fds = tags.filter_map(|tag| descriptor(process, tag));
    fds.filter_map(|fd| RawFd::try_from(fd).ok()).collect()
}

/// Takes all tags of the open file of a descriptor away.
pub(crate) fn unname(process: i32, fd: RawFd) -> io::Result<()> {
    lock(process, fd, libc::F_UNLCK, 0, 0)
}

fn lock(process: i32, fd: RawFd, kind: libc::c_int, start: i64, len: i64) -> io::Result<()> {
    let file = file(process, fd)?;
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(())
}

/// The tags of all VMs and vCPUs that a process has descriptors of; an error where its threads do not share them.
pub(crate) fn tags(process: i32) -> io::Result<Vec<u64>> {
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let name = entry?.file_name();
        if let Some(thread) = name.to_str().and_then(|name| name.parse().ok())
            && !share_descriptors(process, thread)
            && !is_kernels(thread)
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
    }
    let mut tags = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let name = entry?.file_name();
        if let Some(fd) = name.to_str().and_then(|name| name.parse().ok())
            && let Object::Vm(tag) | Object::Vcpu(tag) = Object::of(process, fd)?
        {
            tags.push(tag);
        }
    }
    Ok(tags)
}

/// What the descriptors of a process are that can be looked at, in their order.
pub(crate) fn objects(process: i32) -> Vec<(u64, Object)> {
    let entries = fs::read_dir(format!("/proc/{process}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    let fds = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut objects: Vec<(u64, Object)> = fds
        .filter_map(|fd: RawFd| Some((fd as u64, Object::of(process, fd).ok()?)))
        .collect();
    objects.sort_unstable_by_key(|(fd, _)| *fd);
    objects
}

/// The number of the vCPU of a descriptor, which the kernel says from Linux 4.6 on.
pub(crate) fn vcpu_number(process: i32, fd: u64) -> Option<u64> {
    let link = fs::read_link(format!("/proc/{process}/fd/{fd}")).ok()?;
    link.to_str()?.strip_prefix("anon_inode:kvm-vcpu:")?.parse().ok()
}

/// Whether a thread of a process is the kernel's, such as KVM's for a VM (`PF_USER_WORKER`): it has no descriptors.
pub(crate) fn is_kernels(thread: i32) -> bool {
    stat(thread, 9).is_some_and(|flags| flags & 0x4000 != 0)
}

/// The CPU that runs a thread, or ran it last.
pub(crate) fn cpu(thread: i32) -> Option<usize> {
    usize::try_from(stat(thread, 39)?).ok()
}

/// A field of `proc_pid_stat(5)`, from the third on.
fn stat(thread: i32, field: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{thread}/stat")).ok()?;
    // The second field may have blanks in it, and ends at the last parenthesis.
    let rest = stat.rsplit(')').next()?;
    rest.split_whitespace().nth(field.checked_sub(3)?)?.parse().ok()
}

/// Whether a process was stopped by a signal and has not gone on.
pub(crate) fn is_stopped(process: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status"));
    status.is_ok_and(|status| status.lines().any(|line| line == "State:\tT (stopped)"))
}

/// Whether two threads have the same descriptors.
fn share_descriptors(one: i32, other: i32) -> bool {
    const KCMP_FILES: libc::c_int = 2;
    is_same(one, other, KCMP_FILES, 0, 0)
}

/// Whether two processes have the same memory.
pub(crate) fn share_memory(one: i32, other: i32) -> bool {
    const KCMP_VM: libc::c_int = 1;
    is_same(one, other, KCMP_VM, 0, 0)
}

/// Whether two descriptors of a process are one open file.
pub(crate) fn is_same_file(process: i32, one: RawFd, other: RawFd) -> bool {
    const KCMP_FILE: libc::c_int = 0;
    is_same(process, process, KCMP_FILE, one, other)
}

/// `kcmp(2)`.
fn is_same(one: i32, other: i32, kind: libc::c_int, first: RawFd, second: RawFd) -> bool {
    #![expect(unsafe_code, reason = "a system call without a wrapper")]
    // SAFETY: takes numbers and touches no memory of ours.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one, other, kind, first, second) };
    order == 0
}

/// A field of a thread's status (`proc_pid_status(5)`).
pub(crate) fn status(thread: i32, field: &str) -> Option<i64> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let mut lines = status.lines();
    lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.trim().parse().ok())
}

/// Whether a thread of a process has a shadow stack (`map_shadow_stack(2)`), by the text of its status: a signal's frame that the
/// kernel did not write itself ends it (`restore_signal_shadow_stack`).
pub(crate) fn has_shadow_stack(status: &str) -> bool {
    let features = status
        .lines()
        .find_map(|line| line.strip_prefix("x86_Thread_features:"));
    features.is_some_and(|features| features.split_whitespace().any(|feature| feature == "shstk"))
}

/// The process that traces a thread.
pub(crate) fn tracer(thread: i32) -> Option<i32> {
    // A thread of it traces.
    let tracer = status(thread, "TracerPid").filter(|tracer| *tracer != 0)?;
    Some(process(i32::try_from(tracer).ok()?)).filter(|process| *process != 0)
}

/// The process of a thread; 0 where it has ended.
pub(crate) fn process(thread: i32) -> i32 {
    status(thread, "Tgid")
        .and_then(|process| i32::try_from(process).ok())
        .unwrap_or(0)
}

/// The program that a thread runs; `None` where it runs none any more.
pub(crate) fn program(thread: i32) -> Option<String> {
    match fs::read_link(format!("/proc/{thread}/exe")) {
        Ok(path) => Some(path.display().to_string()),
        // A process that has ended has no memory (`proc_exe_link`).
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(String::new()),
    }
}

/// How another thread of a process stands to a vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Other {
    /// One is in KVM_RUN on it.
    Runs,
    /// One is on a CPU, in the guest or elsewhere: the kernel does not say.
    May,
    /// None is.
    None,
}

/// Whether another thread of the process runs the vCPU of this tag, or waits by `futex(2)` at `answer`; `running` looks at one that is on
/// a CPU, where the kernel does not say.
pub(crate) fn other_runs(
    process: i32,
    thread: i32,
    vcpu: u64,
    answer: u64,
    running: impl Fn(i32) -> Other,
) -> io::Result<Other> {
    let number = |word: Option<&str>| u64::from_str_radix(word?.trim_start_matches("0x"), 16).ok();
    let mut found = Other::None;
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let name = entry?.file_name();
        let other = name.to_str().and_then(|name| name.parse().ok());
        let Some(other) = other.filter(|other| *other != thread) else {
            continue;
        };
        // The number of the call and its arguments, or `running`.
        let Ok(call) = fs::read_to_string(format!("/proc/{process}/task/{other}/syscall")) else {
            continue;
        };
        let mut words = call.split_whitespace();
        match words.next() {
            Some("running") => match running(other) {
                Other::Runs => return Ok(Other::Runs),
                Other::May => found = Other::May,
                Other::None => {}
            },
            Some("202") if number(words.next()) == Some(answer) => return Ok(Other::Runs),
            Some("16") => {
                let (fd, request) = (number(words.next()), number(words.next()));
                let is_run = request.is_some_and(|request| request as u32 == msrgate_core::abi::RUN);
                let is_this = |fd: u64| Object::of(other, fd as RawFd).is_ok_and(|object| object == Object::Vcpu(vcpu));
                if is_run && fd.is_some_and(is_this) {
                    return Ok(Other::Runs);
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Reads a process's memory: all of it, or nothing.
pub(crate) fn read(process: i32, address: u64, to: &mut [u8]) -> bool {
    let remote = RemoteIoVec {
        base: address as usize,
        len: to.len(),
    };
    let len = to.len();
    let read = process_vm_readv(Pid::from_raw(process), &mut [IoSliceMut::new(to)], &[remote]);
    read == Ok(len)
}

/// Words of a process from an address on; `None` where they cannot be read.
pub(crate) fn words<const N: usize>(process: i32, address: u64) -> Option<[u64; N]> {
    let mut bytes = [[0; WORD]; N];
    read(process, address, bytes.as_flattened_mut()).then(|| bytes.map(u64::from_le_bytes))
}

/// The first bytes at each of these places in a process; zeros where there is nothing to be read.
pub(crate) fn begins<const N: usize>(process: i32, places: &[u64]) -> Vec<[u8; N]> {
    /// `UIO_MAXIOV`.
    const MOST: usize = 1024;
    let mut found = vec![[0; N]; places.len()];
    let mut done = 0;
    while let Some(rest) = places.get(done..).filter(|rest| !rest.is_empty()) {
        let remote = |place: &u64| RemoteIoVec {
            base: *place as usize,
            len: N,
        };
        let remote: Vec<RemoteIoVec> = rest.iter().take(MOST).map(remote).collect();
        let to = found.get_mut(done..done + remote.len()).unwrap_or_default();
        let read = process_vm_readv(
            Pid::from_raw(process),
            &mut [IoSliceMut::new(to.as_flattened_mut())],
            &remote,
        );
        // It ends before the first one that cannot be read.
        let read = read.unwrap_or(0) / N;
        done += if read < remote.len() { read + 1 } else { read };
    }
    found
}

/// A mapping of a process.
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) rights: String,
    pub(crate) name: String,
}

/// The mappings of a process, in their order.
pub(crate) fn mappings(process: i32) -> Vec<Mapping> {
    let text = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    let mapping = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let number = |word| u64::from_str_radix(word, 16).ok();
        Some(Mapping {
            start: number(start)?,
            end: number(end)?,
            rights: words.next()?.to_owned(),
            name: words.nth(3).unwrap_or_default().to_owned(),
        })
    };
    text.lines().filter_map(mapping).collect()
}

/// Writes a process's memory, where the process may.
pub(crate) fn write(process: i32, address: u64, bytes: &[u8]) -> bool {
    let remote = RemoteIoVec {
        base: address as usize,
        len: bytes.len(),
    };
    let written = process_vm_writev(Pid::from_raw(process), &[IoSlice::new(bytes)], &[remote]);
    written == Ok(bytes.len())
}

/// Writes a process's memory, code too: what is mapped from a file becomes the process's own.
pub(crate) fn write_code(process: i32, address: u64, bytes: &[u8]) -> io::Result<()> {
    let memory = fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/{process}/mem"))?;
    memory.write_all_at(bytes, address)
}

/// The kernel's number of an error, EIO where it has none.
pub(crate) fn errno(error: io::Error) -> nix::errno::Errno {
    nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// A thread's descriptor of the open file of a tag.
pub(crate) fn descriptor(thread: i32, tag: u64) -> Option<u64> {
    for entry in fs::read_dir(format!("/proc/{thread}/fd")).ok()? {
        let fd: Option<RawFd> = entry.ok()?.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(fd) = fd
            && let Ok(Object::Vm(found) | Object::Vcpu(found)) = Object::of(thread, fd)
            && found == tag
        {
            return u64::try_from(fd).ok();
        }
    }
    None
}

/// Whether a process runs a Go program: its threads have stacks that lie in the heap, and below them is memory in use.
pub(crate) fn is_go(process: i32) -> bool {
    let mut start = vec![0; 1 << 14];
    let program = fs::File::open(format!("/proc/{process}/exe"));
    let read = program.and_then(|file| file.read_at(&mut start, 0)).unwrap_or(0);
    start.truncate(read);
    // A note's type 4 and its name, which the linker puts near the start: `ELF_NOTE_GOBUILDID_TAG`.
    start.windows(8).any(|window| window == b"\x04\0\0\0Go\0\0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shadow_stack_is_known_by_its_name_among_the_features() {
        let status = |features: &str| {
            format!("Name:\tvmm\nx86_Thread_features:\t{features}\nx86_Thread_features_locked:\tshstk\n")
        };
        assert!(has_shadow_stack(&status("shstk wrss ")));
        for without in ["", "wrss ", "noshstk "] {
            assert!(!has_shadow_stack(&status(without)), "{without}");
        }
        assert!(!has_shadow_stack("Name:\tvmm\n"));
    }
}
