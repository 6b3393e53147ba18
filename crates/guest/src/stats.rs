//! The kernel's statistics of a vCPU (KVM_GET_STATS_FD).

#![expect(unsafe_code, reason = "a system call")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;
use msrgate_core::abi::GET_STATS_FD;

/// Bytes of `struct kvm_stats_desc` before the name.
const DESCRIPTOR: usize = 16;

/// The `exits` statistic.
#[derive(Debug)]
pub(crate) struct Exits {
    file: File,
    offset: u64,
}

impl Exits {
    pub(crate) fn open(vcpu: &VcpuFd) -> io::Result<Exits> {
        // SAFETY: takes no argument and touches no memory of ours.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), libc::c_ulong::from(GET_STATS_FD)) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor that the kernel just made, and nobody else knows of it.
        let file = unsafe { File::from_raw_fd(fd) };
        // `struct kvm_stats_header`: flags, name_size, num_desc, id_offset, desc_offset, data_offset.
        let header: [u32; 6] = read_words(&file, 0)?;
        let [_, name_size, descriptors, _, descriptors_at, data_at] = header;
        let mut descriptor = vec![0; DESCRIPTOR + name_size as usize];
        for index in 0..u64::from(descriptors) {
            let at = u64::from(descriptors_at) + index * descriptor.len() as u64;
            file.read_exact_at(&mut descriptor, at)?;
            let name = descriptor.get(DESCRIPTOR..).unwrap_or_default();
            if name.split(|byte| *byte == 0).next() == Some(b"exits") {
                // `struct kvm_stats_desc`: flags, exponent and size, offset, bucket_size.
                let [_, _, offset, _]: [u32; 4] = read_words(&file, at)?;
                return Ok(Exits {
                    file,
                    offset: u64::from(data_at) + u64::from(offset),
                });
            }
        }
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn read(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, self.offset)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

fn read_words<const N: usize>(file: &File, at: u64) -> io::Result<[u32; N]> {
    let mut words = [0; N];
    for (word, at) in words.iter_mut().zip((at..).step_by(4)) {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at)?;
        *word = u32::from_le_bytes(bytes);
    }
    Ok(words)
}
