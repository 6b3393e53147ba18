//! How a VMM's instruction that makes KVM_RUN is led to the answerer, while its threads run.
//!
//! A `syscall` instruction has two bytes, so a jump of two bytes takes its place: to five dead bytes near it, which jump on to a
//! trampoline within 2 GiB. The trampoline calls the image for KVM_RUN, and makes every other call itself.

use std::collections::HashMap;
use std::io;

use libc::{MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_PRIVATE, PROT_EXEC, PROT_READ};
use msrgate_answer::layout::{own, private};
use msrgate_core::abi;
use nix::errno::Errno;

use crate::target::{PAGE, WORD};
use crate::tracee::{SYSCALL, Tracee};
use crate::{inject, target};

/// Bytes of a trampoline.
const TRAMPOLINE: usize = 192;

/// How far a jump of five bytes reaches, less what a page may add.
const REACH: u64 = 0x7fff_0000;

/// `cmp eax, 16` and `jne other`.
const TRAMPOLINE_BEGIN: [u8; 7] = [
    0x3d,
    libc::SYS_ioctl as u8,
    0,
    0,
    0,
    0x75,
    (TRAMPOLINE_SYSCALL - 7) as u8,
];

/// Where in a trampoline the address of the image is.
const TRAMPOLINE_IMAGE: usize = 22;

/// Where in a trampoline the `syscall` instruction is for calls that are not KVM_RUN.
const TRAMPOLINE_SYSCALL: usize = 46;

/// Where the VMM's instructions of a process are led to, of one image.
#[derive(Debug)]
pub(crate) struct Trampolines {
    process: i32,
    image: u64,
    private: u64,
    /// By the VMM's instruction.
    in_use: HashMap<u64, u64>,
    /// Those of an earlier policy that no instruction is led to, by the VMM's instruction.
    idle: HashMap<u64, u64>,
    /// Where the last page of them is, and how many are in it.
    page: Option<(u64, usize)>,
}

impl Trampolines {
    pub(crate) fn new(process: i32, image: u64, private: u64) -> Trampolines {
        Trampolines {
            process,
            image,
            private,
            in_use: HashMap::new(),
            idle: HashMap::new(),
            page: None,
        }
    }

    /// Those that an earlier policy has left.
    pub(crate) fn left(process: i32, image: u64, private: u64) -> Trampolines {
        let all = trampolines(process);
        let page_of = |trampoline: &Trampoline| trampoline.at & !(PAGE as u64 - 1);
        let page = all.iter().map(page_of).max();
        let of_image = all.iter().filter(|trampoline| trampoline.image == image);
        Trampolines {
            idle: of_image.map(|trampoline| (trampoline.site, trampoline.at)).collect(),
            page: page.map(|page| (page, all.iter().filter(|other| page_of(other) == page).count())),
            ..Trampolines::new(process, image, private)
        }
    }

    /// Where a KVM_RUN that was to be made goes on, and whether it was found just now that its instruction cannot lead there.
    pub(crate) fn detour(&mut self, tracee: &mut Tracee, site: u64) -> Result<(u64, bool), Errno> {
        if let Some(at) = self.in_use.get(&site) {
            return Ok((*at, false));
        }
        let at = match self.idle.remove(&site) {
            Some(at) => at,
            None => self.add(tracee, site)?,
        };
        self.in_use.insert(site, at);
        Ok((at, !patch(tracee.process, site, at)))
    }

    /// Code that makes KVM_RUN by the image, and every other call itself, and goes on behind `site`.
    fn add(&mut self, tracee: &mut Tracee, site: u64) -> Result<u64, Errno> {
        let room = self
            .page
            .filter(|(at, count)| (count + 1) * TRAMPOLINE <= PAGE && at.abs_diff(site) < REACH);
        let (page, count) = match room {
            Some(room) => room,
            None => (near(tracee, site)?, 0),
        };
        self.page = Some((page, count + 1));
        let at = page + (count * TRAMPOLINE) as u64;
        let code = trampoline_code(at, site, self.image, self.private).ok_or(Errno::ERANGE)?;
        target::write_code(tracee.process, at, &code).map_err(target::errno)?;
        Ok(at)
    }

    /// Has each KVM_RUN from here on made by the VMM's own instruction.
    pub(crate) fn remove(&mut self) -> io::Result<()> {
        for (site, trampoline) in self.in_use.drain() {
            // Where it could not be led there it is as it was.
            if is_detoured(self.process, site, trampoline) {
                remove(self.process, site)?;
            }
        }
        Ok(())
    }

    /// A `syscall` instruction that nobody changes.
    pub(crate) fn syscall(&self) -> Option<u64> {
        let at = self.in_use.values().next()?;
        Some(at + TRAMPOLINE_SYSCALL as u64)
    }
}

/// A page for code within reach of `site`.
fn near(tracee: &mut Tracee, site: u64) -> Result<u64, Errno> {
    let (rights, flags) = (PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE);
    let below = (1..REACH >> 20).map(|step| (site & !0xfff).checked_sub(step << 20));
    let above = (1..REACH >> 20).map(|step| (site & !0xfff).checked_add(step << 20));
    for at in below.chain(above).flatten().filter(|at| *at > 0x1_0000) {
        match tracee.map(at, PAGE, rights, flags, -1) {
            Err(Errno::EEXIST) => {}
            result => return result,
        }
    }
    Err(Errno::ENOMEM)
}

/// Code for a VMM's instruction: KVM_RUN is made by the image, and every other call as before. What would take the policy's place is
/// asked for while msrgate's thread is there.
fn trampoline_code(at: u64, site: u64, image: u64, private: u64) -> Option<[u8; TRAMPOLINE]> {
    let back = |end: usize| {
        let distance = (site + 2).wrapping_sub(at + end as u64).cast_signed();
        i32::try_from(distance).ok().map(i32::to_le_bytes)
    };
    // Words behind R11.
    let of_own = |word: usize| ((private::OWN + word - private::KEPT) * WORD) as u8;
    // A short jump to a place that is known.
    let to = |code: &Vec<u8>, place: usize| (place as i64 - (code.len() as i64 + 1)) as i8 as u8;
    let mut code = Vec::with_capacity(TRAMPOLINE);
    code.extend(TRAMPOLINE_BEGIN);
    code.extend([0x81, 0xfe]); // cmp esi, KVM_RUN
    code.extend(abi::RUN.to_le_bytes());
    code.extend([0x75, (TRAMPOLINE_SYSCALL + 7 - 15) as u8]); // jne to what is no KVM_RUN
    code.extend([0x48, 0x8d, 0x64, 0x24, 0x80]); // lea rsp, [rsp - 128], over the red zone
    code.extend([0x49, 0xbb]); // mov r11, image
    code.extend(image.to_le_bytes());
    code.extend([0x41, 0xff, 0xd3]); // call r11
    code.extend([0x48, 0x8d, 0xa4, 0x24, 0x80, 0, 0, 0]); // lea rsp, [rsp + 128]
    code.push(0xe9); // jmp behind the site
    code.extend(back(code.len() + 4)?);
    code.extend(SYSCALL); // other: syscall
    code.push(0xe9);
    code.extend(back(code.len() + 4)?);
    code.extend([0x81, 0xfe]); // cmp esi, KVM_X86_SET_MSR_FILTER
    code.extend(abi::SET_MSR_FILTER.to_le_bytes());
    code.extend([0x74, 8]); // je
    code.extend([0x81, 0xfe]); // cmp esi, KVM_ENABLE_CAP
    code.extend(abi::ENABLE_CAP.to_le_bytes());
    code.push(0x75); // jne other
    code.push(to(&code, TRAMPOLINE_SYSCALL));
    code.extend([0x49, 0xbb]); // mov r11, the word of whether the thread is there
    code.extend((private + (private::KEPT * WORD) as u64).to_le_bytes());
    let take = code.len();
    code.extend([0xf3, 0x90, 0x49, 0x83, 0x3b, 0]); // pause; cmp qword [r11], 0
    code.push(0x74); // je other
    code.push(to(&code, TRAMPOLINE_SYSCALL));
    code.extend([0xf0, 0x41, 0x0f, 0xba, 0x6b, of_own(own::LOCK), 0]); // lock bts dword [LOCK], 0
    code.push(0x72); // jc, while another thread asks
    code.push(to(&code, take));
    code.extend([0x49, 0x89, 0x7b, of_own(own::FD)]); // mov [FD], rdi
    code.extend([0x49, 0x89, 0x73, of_own(own::REQUEST)]); // mov [REQUEST], rsi
    code.extend([0x49, 0x89, 0x53, of_own(own::ARGUMENT)]); // mov [ARGUMENT], rdx
    code.extend([0x41, 0xc7, 0x43, of_own(own::STATE), own::ASKED as u8, 0, 0, 0]); // mov dword [STATE], ASKED
    let wait = code.len();
    code.extend([0xf3, 0x90, 0x49, 0x8b, 0x0b]); // pause; mov rcx, [r11]: looked at first, the last answer comes before the end
    code.extend([0x41, 0x83, 0x7b, of_own(own::STATE), own::ASKED as u8]); // cmp dword [STATE], ASKED
    code.extend([0x75, 15, 0x48, 0x85, 0xc9]); // jne to where there is an answer; test rcx, rcx
    code.push(0x75); // jne
    code.push(to(&code, wait));
    code.extend([0x41, 0xc7, 0x43, of_own(own::LOCK), 0, 0, 0, 0]); // mov dword [LOCK], 0
    code.push(0xeb); // jmp other
    code.push(to(&code, TRAMPOLINE_SYSCALL));
    code.extend([0x49, 0x8b, 0x4b, of_own(own::RESULT)]); // mov rcx, [RESULT]
    code.extend([0x41, 0xc7, 0x43, of_own(own::LOCK), 0, 0, 0, 0]); // mov dword [LOCK], 0
    code.extend([0x83, 0xf9, own::LET as u8]); // cmp ecx, LET
    code.push(0x74); // je other
    code.push(to(&code, TRAMPOLINE_SYSCALL));
    code.extend([0x48, 0x89, 0xc8, 0xe9]); // mov rax, rcx; jmp behind the site
    code.extend(back(code.len() + 4)?);
    code.resize(TRAMPOLINE, 0xcc);
    code.try_into().ok()
}

/// Leads the instruction at `site` to `trampoline`: by a jump of two bytes to five dead bytes near it, which jump on. Whoever is
/// behind the instruction, in a signal's handler or in the kernel, goes on there as before.
fn patch(process: i32, site: u64, trampoline: u64) -> bool {
    const BEFORE: u64 = 128;
    let mut code = [0; 256];
    let start = site.wrapping_sub(BEFORE);
    if !target::read(process, start, &mut code) {
        return false;
    }
    let site_at = BEFORE as usize;
    if code.get(site_at..site_at + 2) != Some(&SYSCALL) {
        return false;
    }
    let reached = |at: &usize| short(site_at, *at).is_some();
    // What a policy that was taken off has left there.
    let left = || {
        (0..code.len())
            .filter(reached)
            .find(|at| is_left(process, &code, *at, start))
    };
    let counts = || counts_arguments(&code, site_at).filter(|at| skip(process, start + *at as u64));
    let dead = dead_bytes(&code, start).find(reached).or_else(left);
    let Some(dead) = dead.or_else(|| Some(counts()? + 2)) else {
        return false;
    };
    let dead_at = start + dead as u64;
    let distance = trampoline.wrapping_sub(dead_at + 5).cast_signed();
    let (Some(short), Ok(distance)) = (short(site_at, dead), i32::try_from(distance)) else {
        return false;
    };
    let mut jump = [0xe9; 5];
    jump.iter_mut()
        .skip(1)
        .zip(distance.to_le_bytes())
        .for_each(|(to, from)| *to = from);
    // First what is led to.
    target::write_code(process, dead_at, &jump).is_ok() && target::write_code(process, site, &[0xeb, short]).is_ok()
}

/// A trampoline, as it lies in a process.
struct Trampoline {
    at: u64,
    /// The VMM's instruction, and the image that it leads to.
    site: u64,
    image: u64,
}

impl Trampoline {
    fn of(at: u64, code: &[u8]) -> Option<Trampoline> {
        let code = code.strip_prefix(&TRAMPOLINE_BEGIN)?;
        let image = code.get(TRAMPOLINE_IMAGE - TRAMPOLINE_BEGIN.len()..)?.first_chunk()?;
        let back = code
            .get(TRAMPOLINE_SYSCALL + 3 - TRAMPOLINE_BEGIN.len()..)?
            .first_chunk()?;
        let behind = (at + TRAMPOLINE_SYSCALL as u64 + 7).wrapping_add_signed(i64::from(i32::from_le_bytes(*back)));
        Some(Trampoline {
            at,
            site: behind.wrapping_sub(2),
            image: u64::from_le_bytes(*image),
        })
    }

    fn read(process: i32, at: u64) -> Option<Trampoline> {
        let mut code = [0; TRAMPOLINE];
        target::read(process, at, &mut code).then(|| Trampoline::of(at, &code))?
    }
}

/// All trampolines in a process, whoever brought them there.
fn trampolines(process: i32) -> Vec<Trampoline> {
    let mut found = Vec::new();
    for page in inject::code_pages(process, |begin| begin.starts_with(&TRAMPOLINE_BEGIN)) {
        let mut code = vec![0; PAGE];
        if target::read(process, page, &mut code) {
            let all = (page..).step_by(TRAMPOLINE).zip(code.chunks_exact(TRAMPOLINE));
            found.extend(all.filter_map(|(at, code)| Trampoline::of(at, code)));
        }
    }
    found
}

/// The instructions in a process that an msrgate which was killed has led to trampolines.
pub(crate) fn left(process: i32) -> Vec<u64> {
    let led = trampolines(process)
        .into_iter()
        .filter(|trampoline| is_detoured(process, trampoline.site, trampoline.at));
    led.map(|trampoline| trampoline.site).collect()
}

/// Whether an instruction leads to this trampoline.
fn is_detoured(process: i32, site: u64, trampoline: u64) -> bool {
    let mut now = [0; 2];
    let read = target::read(process, site, &mut now) && now[0] == 0xeb;
    read && jump(process, site, now) == Some(trampoline)
}

/// Has an instruction that was led elsewhere make its call again.
pub(crate) fn remove(process: i32, site: u64) -> io::Result<()> {
    target::write_code(process, site, &SYSCALL)
}

/// Where a jump of two bytes leads that stands in the place of an instruction, by way of another jump.
fn jump(process: i32, site: u64, code: [u8; 2]) -> Option<u64> {
    let at = site
        .wrapping_add(2)
        .wrapping_add_signed(i64::from(code[1].cast_signed()));
    let mut long = [0; 5];
    let read = target::read(process, at, &mut long) && long[0] == 0xe9;
    let [_, operand @ ..] = long;
    read.then(|| {
        at.wrapping_add(5)
            .wrapping_add_signed(i64::from(i32::from_le_bytes(operand)))
    })
}

/// Whether a jump to a trampoline stands there by which no instruction is led.
fn is_left(process: i32, code: &[u8], at: usize, start: u64) -> bool {
    let Some([0xe9, operand @ ..]) = code.get(at..at + 5) else {
        return false;
    };
    let Some(operand) = operand.first_chunk() else {
        return false;
    };
    let to = (start + at as u64 + 5).wrapping_add_signed(i64::from(i32::from_le_bytes(*operand)));
    Trampoline::read(process, to).is_some_and(|trampoline| !is_detoured(process, trampoline.site, to))
}

/// The operand of a jump of two bytes.
fn short(from: usize, to: usize) -> Option<u8> {
    let distance = to as i64 - (from as i64 + 2);
    i8::try_from(distance).ok().map(i8::cast_unsigned)
}

/// Where five bytes or more are that no code reaches: the padding behind a `ret` or a jump, up to where the next function
/// is aligned.
fn dead_bytes(code: &[u8], start: u64) -> impl Iterator<Item = usize> {
    (5..code.len()).filter(move |at| {
        let byte = |back: usize| at.checked_sub(back).and_then(|at| code.get(at)).copied();
        let ret = byte(1) == Some(0xc3);
        let jump = byte(5) == Some(0xe9);
        let mut end = *at;
        while let Some(len) = code.get(end..).and_then(padding) {
            end += len;
        }
        let aligned = (start + end as u64).is_multiple_of(16);
        (ret || jump) && end - at >= 5 && aligned
    })
}

/// `mov dword ptr [rsp + 8], 16`, but for the displacement, behind `mov eax, 16`.
const COUNTS: [u8; 9] = [0xb8, libc::SYS_ioctl as u8, 0, 0, 0, 0xc7, 0x44, 0x24, 0];

const COUNTED: [u8; 4] = 16_u32.to_le_bytes();

/// Where the instruction is before a call of a C library's `ioctl`, built for size as musl is in Rust's static programs, by which the
/// function notes that two of its arguments have a name (`gp_offset` of its `va_list`). It has taken the third one already, and
/// nobody reads the note. No such program has dead bytes.
fn counts_arguments(code: &[u8], call: usize) -> Option<usize> {
    let [before @ .., _displacement] = COUNTS;
    let at = call.checked_sub(COUNTS.len() + COUNTED.len())?;
    let counted = code.get(at + COUNTS.len()..call)?;
    (code.get(at..)?.starts_with(&before) && counted == COUNTED).then_some(call - 8)
}

/// Has an instruction of eight bytes that nobody needs jumped over, so that six of them are dead.
fn skip(process: i32, at: u64) -> bool {
    target::write_code(process, at, &[0xeb, 6]).is_ok()
}

/// Bytes of the instruction that begins here, if it is one that compilers fill up with.
fn padding(code: &[u8]) -> Option<usize> {
    let prefixes = code.iter().take_while(|byte| matches!(byte, 0x66 | 0x2e)).count();
    let rest = match code.get(prefixes..)? {
        [0xcc, ..] if prefixes == 0 => 1,
        [0x90, ..] => 1,
        [0x0f, 0x1f, 0x00, ..] => 3,
        [0x0f, 0x1f, 0x40, _, ..] => 4,
        [0x0f, 0x1f, 0x44, _, _, ..] => 5,
        [0x0f, 0x1f, 0x80, _, _, _, _, ..] => 7,
        [0x0f, 0x1f, 0x84, _, _, _, _, _, ..] => 8,
        _ => return None,
    };
    (prefixes + rest <= code.len()).then_some(prefixes + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_bytes_are_padding_behind_the_end_of_a_function() {
        // mov eax, 16; syscall; ret; ten bytes of `nop`; a function.
        let mut code = vec![0xb8, 0x10, 0, 0, 0, 0x0f, 0x05, 0xc3];
        code.extend([
            0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0, 0x66, 0x90, 0x66, 0x90, 0x90, 0x90, 0x90, 0x90,
        ]);
        code.truncate(16);
        code.extend([0x55; 16]);
        assert_eq!(
            dead_bytes(&code, 0x1000).collect::<Vec<_>>(),
            Vec::<usize>::new(),
            "the padding is cut"
        );
        let mut whole = vec![0xb8, 0x10, 0, 0, 0, 0x0f, 0x05, 0xc3, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];
        whole.extend([0x55; 16]);
        assert_eq!(dead_bytes(&whole, 0x1000).collect::<Vec<_>>(), [8]);
        // A loop's alignment is reached by what is before it.
        whole[7] = 0x58;
        assert_eq!(dead_bytes(&whole, 0x1000).count(), 0);
    }

    #[test]
    fn what_counts_arguments_stands_right_before_the_call() {
        let code = [
            0xb8, 0x10, 0, 0, 0, 0xc7, 0x44, 0x24, 0x08, 0x10, 0, 0, 0, 0x0f, 0x05, 0x48, 0x63, 0xf8,
        ];
        assert_eq!(counts_arguments(&code, 13), Some(5));
        // Each of these bytes but the displacement counts.
        for at in (0..13).filter(|at| *at != 8) {
            let mut other = code;
            other[at] ^= 1;
            assert_eq!(counts_arguments(&other, 13), None, "{at}");
        }
        assert_eq!(counts_arguments(&code[1..], 12), None, "the start is missing");
    }

    #[test]
    fn a_trampoline_is_as_long_as_its_jumps_say() {
        let code = trampoline_code(0x10_0000, 0x20_0000, 0x7000_0000_0000, 0).unwrap();
        assert_eq!((code[5], 7 + usize::from(code[6])), (0x75, TRAMPOLINE_SYSCALL));
        // Behind the jump back.
        assert_eq!((code[13], 15 + usize::from(code[14])), (0x75, TRAMPOLINE_SYSCALL + 7));
        assert_eq!(code[TRAMPOLINE_SYSCALL..TRAMPOLINE_SYSCALL + 2], SYSCALL);
        let trampoline = Trampoline::of(0x10_0000, &code).unwrap();
        assert_eq!((trampoline.site, trampoline.image), (0x20_0000, 0x7000_0000_0000));
        assert!(trampoline_code(0x10_0000, 1 << 40, 0, 0).is_none());
    }
}
