//! The answerer's place in a VMM's process.
//!
//! ```text
//! image     code, with where the rest is                                  the supervisor wrote it
//! private   whether it is there, which vCPUs are being run                a fork's child finds zeros
//! control   which descriptor is which vCPU, and what each vCPU works by   only the supervisor can write it
//! tables    what exits get                                                only the supervisor can write them
//! kvm_run, counts and events of each vCPU
//! stubs     one for each instruction by which the VMM makes KVM_RUN
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use libc::{MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE};
use msrgate_answer::IMAGE;
use msrgate_answer::layout::{control, image, private, slot};
use msrgate_core::abi;
use nix::errno::Errno;

use crate::ledger::Ring;
use crate::memory::Words;
use crate::seccomp::{Marks, Waiting};
use crate::stopped::{SYSCALL, Stopped};
use crate::{frame, target};

const PAGE: usize = 4096;
const WORD: usize = size_of::<u64>();
/// Bytes of a stub.
const STUB: usize = 64;
/// How far a jump of five bytes reaches, less what a page may add.
const REACH: u64 = 0x7fff_0000;
const _: () = assert!(IMAGE.len() <= PAGE);

/// What the supervisor knows of one.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) name: u64,
    /// The process in which it was made.
    pub(crate) process: i32,
    image: u64,
    private: u64,
    control: Words,
    /// Tables that are mapped, and where.
    tables: Vec<(Arc<Table>, u64)>,
    /// By number; there is none of number 0.
    slots: Vec<Option<Slot>>,
    /// By the VMM's instruction.
    stubs: HashMap<u64, u64>,
    /// Where the last page of stubs is, and how many are in it.
    page: Option<(u64, usize)>,
}

/// A vCPU that the process runs.
#[derive(Debug)]
struct Slot {
    vcpu: u64,
    run: u64,
    shared: u64,
    ring: Arc<Ring>,
}

/// What exits of a policy get, and the file that it is.
#[derive(Debug)]
pub(crate) struct Table {
    words: Words,
    file: File,
    /// Words that each vCPU keeps for it.
    pub(crate) cells: usize,
}

impl Table {
    pub(crate) fn new((cells, contents): (usize, Vec<u64>)) -> io::Result<Table> {
        let (words, file) = Words::new(contents.len(), true)?;
        for (at, word) in contents.into_iter().enumerate() {
            words.set(at, word);
        }
        Ok(Table { words, file, cells })
    }

    fn bytes(&self) -> usize {
        (self.words.count() * WORD).next_multiple_of(PAGE)
    }
}

/// What a vCPU's slot is to say.
pub(crate) struct Entry<'a> {
    pub(crate) vcpu: u64,
    pub(crate) fd: u64,
    pub(crate) table: &'a Arc<Table>,
    pub(crate) mask: u64,
    pub(crate) flags: u64,
    pub(crate) who: u64,
}

/// Files that are to be mapped into a process, by their numbers there.
#[derive(Debug, Default)]
pub(crate) struct Handed {
    pub(crate) control: Option<(Words, i32)>,
    pub(crate) table: Option<i32>,
    pub(crate) ring: Option<(Arc<Ring>, i32)>,
}

impl Handed {
    /// Hands over files for a region that is new, and for a vCPU that is; on an error, not all of them.
    pub(crate) fn over(
        waiting: &Waiting<'_>,
        region: Option<&Region>,
        vcpu: u64,
        table: &Arc<Table>,
        ring: impl FnOnce() -> io::Result<(Arc<Ring>, File)>,
    ) -> (Handed, io::Result<()>) {
        let mut handed = Handed::default();
        let done = handed.add(waiting, region, vcpu, table, ring);
        (handed, done)
    }

    fn add(
        &mut self,
        waiting: &Waiting<'_>,
        region: Option<&Region>,
        vcpu: u64,
        table: &Arc<Table>,
        ring: impl FnOnce() -> io::Result<(Arc<Ring>, File)>,
    ) -> io::Result<()> {
        if region.is_none() {
            let (words, file) = Words::new(control::WORDS, true)?;
            self.control = Some((words, waiting.hand_over(&file)?));
        }
        if region.is_none_or(|region| region.table(table).is_none()) {
            self.table = Some(waiting.hand_over(&table.file)?);
        }
        if region.is_none_or(|region| region.slot(vcpu).is_none()) {
            let (ring, file) = ring()?;
            self.ring = Some((ring, waiting.hand_over(&file)?));
        }
        Ok(())
    }

    /// Takes them out of the process's descriptors again.
    pub(crate) fn close(&self, stopped: &mut Stopped) {
        let fds = [
            self.control.as_ref().map(|(_, fd)| *fd),
            self.table,
            self.ring.as_ref().map(|(_, fd)| *fd),
        ];
        fds.into_iter().flatten().for_each(|fd| stopped.close(fd));
    }
}

/// The image that an instruction is in, and its parameters; `None` for an instruction of something else.
pub(crate) fn image_of(process: i32, instruction: u64, marks: &Marks) -> Option<(u64, [u64; image::COUNT])> {
    let at = instruction & !(PAGE as u64 - 1);
    let mut bytes = [0; image::COUNT * WORD];
    let read = target::read(process, at + image::PARAMETERS as u64, &mut bytes);
    let mut parameters = [0; image::COUNT];
    for (to, from) in parameters.iter_mut().zip(bytes.as_chunks().0) {
        *to = u64::from_le_bytes(*from);
    }
    (read && parameters[image::ASK] == marks.ask && parameters[image::RUN] == marks.run).then_some((at, parameters))
}

/// Whether what an image calls private is there: not in the child of a fork.
pub(crate) fn is_alive(process: i32, parameters: &[u64; image::COUNT]) -> bool {
    let mut alive = [0; WORD];
    target::read(process, parameters[image::PRIVATE], &mut alive) && u64::from_le_bytes(alive) == 1
}

impl Region {
    /// Makes one in the process of a thread; where `inherited`, in the place of that of the process's parent.
    pub(crate) fn new(
        stopped: &mut Stopped,
        (words, fd): (Words, i32),
        name: u64,
        marks: &Marks,
        stacks: bool,
        inherited: Option<(u64, [u64; image::COUNT])>,
    ) -> Result<Region, Errno> {
        let bytes = control::WORDS * WORD;
        let (image_at, private_at, control_at) = match inherited {
            Some((at, parameters)) => {
                let old = parameters[image::CONTROL];
                let control = stopped.map(old, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd)?;
                (at, parameters[image::PRIVATE], control)
            }
            None => {
                let rights = PROT_READ | PROT_WRITE;
                let len = (private::WORDS * WORD).next_multiple_of(PAGE);
                let private = stopped.map(0, len, rights, MAP_PRIVATE | MAP_ANONYMOUS, -1)?;
                let advice = [private, len as u64, libc::MADV_WIPEONFORK as u64, 0, 0, 0];
                stopped.call(libc::SYS_madvise, advice)?;
                let control = stopped.map(0, bytes, PROT_READ, MAP_SHARED, fd)?;
                let image = stopped.map(0, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1)?;
                (image, private, control)
            }
        };
        let mut code = IMAGE.to_vec();
        let mut parameters = [0; image::COUNT];
        parameters[image::PRIVATE] = private_at;
        parameters[image::CONTROL] = control_at;
        parameters[image::RUN] = marks.run;
        parameters[image::ASK] = marks.ask;
        parameters[image::FRAME] = if stacks { frame::bytes() } else { 0 };
        parameters[image::NAME] = name;
        let places = code
            .get_mut(image::PARAMETERS..)
            .unwrap_or_default()
            .chunks_exact_mut(WORD);
        for (place, parameter) in places.zip(parameters) {
            place.copy_from_slice(&parameter.to_le_bytes());
        }
        target::write_code(stopped.process, image_at, &code).map_err(errno)?;
        if !target::write(stopped.process, private_at, &1_u64.to_le_bytes()) {
            return Err(Errno::EFAULT);
        }
        Ok(Region {
            name,
            process: stopped.process,
            image: image_at,
            private: private_at,
            control: words,
            tables: Vec::new(),
            slots: vec![None],
            stubs: HashMap::new(),
            page: None,
        })
    }

    /// Whether it is still there: not after an exec.
    pub(crate) fn is_there(&self, process: i32, marks: &Marks) -> bool {
        image_of(process, self.image, marks)
            .is_some_and(|(_, parameters)| parameters[image::NAME] == self.name && is_alive(process, &parameters))
    }

    fn slot(&self, vcpu: u64) -> Option<usize> {
        self.slots
            .iter()
            .position(|slot| slot.as_ref().is_some_and(|slot| slot.vcpu == vcpu))
    }

    fn table(&self, table: &Arc<Table>) -> Option<u64> {
        let mut tables = self.tables.iter();
        tables.find(|(known, _)| Arc::ptr_eq(known, table)).map(|(_, at)| *at)
    }

    /// Where a word of a vCPU's slot is.
    fn word(number: usize, word: usize) -> usize {
        control::LIMIT + number * control::SLOT + word
    }

    /// Has the vCPU of a descriptor answered here.
    pub(crate) fn enter(&mut self, stopped: &mut Stopped, handed: &mut Handed, entry: &Entry<'_>) -> Result<(), Errno> {
        let fd = usize::try_from(entry.fd)
            .ok()
            .filter(|fd| *fd < control::LIMIT)
            .ok_or(Errno::EMFILE)?;
        let table = match (self.table(entry.table), handed.table) {
            (Some(at), _) => at,
            (None, Some(fd)) => {
                let at = stopped.map(0, entry.table.bytes(), PROT_READ, MAP_SHARED, fd)?;
                self.tables.push((Arc::clone(entry.table), at));
                at
            }
            (None, None) => return Err(Errno::EBADF),
        };
        let number = match self.slot(entry.vcpu) {
            // It may have got another policy meanwhile, for which it has no room.
            Some(_)
                if self
                    .ring(entry.vcpu)
                    .is_none_or(|ring| ring.cells() < entry.table.cells) =>
            {
                return Err(Errno::ENOSPC);
            }
            Some(number) => number,
            None => self.put(stopped, handed, entry)?,
        };
        self.control.set(Self::word(number, slot::TABLE), table);
        self.control.set(Self::word(number, slot::READY), 1);
        self.control
            .at(control::DESCRIPTORS + fd)
            .store(number as u64, Ordering::SeqCst);
        Ok(())
    }

    fn put(&mut self, stopped: &mut Stopped, handed: &mut Handed, entry: &Entry<'_>) -> Result<usize, Errno> {
        let number = match self.slots.iter().skip(1).position(Option::is_none) {
            Some(at) => at + 1,
            None if self.slots.len() < control::SLOTS => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            None => return Err(Errno::EMFILE),
        };
        let (ring, file) = handed.ring.as_ref().ok_or(Errno::EBADF)?;
        let rights = PROT_READ | PROT_WRITE;
        let shared = stopped.map(0, ring.bytes(), rights, MAP_SHARED, *file)?;
        let fd = i32::try_from(entry.fd).map_err(|_| Errno::EBADF)?;
        let run = stopped.map(0, PAGE, rights, MAP_SHARED, fd)?;
        // What a VMM starts is not to write there.
        for (at, bytes) in [(shared, ring.bytes()), (run, PAGE)] {
            let advice = [at, bytes as u64, libc::MADV_DONTFORK as u64, 0, 0, 0];
            stopped.call(libc::SYS_madvise, advice)?;
        }
        let words = [
            (slot::RUN, run),
            (slot::VCPU, shared),
            (slot::MASK, entry.mask),
            (slot::FLAGS, entry.flags),
            (slot::WHO, entry.who),
        ];
        for (word, value) in words {
            self.control.set(Self::word(number, word), value);
        }
        if let Some(slot) = self.slots.get_mut(number) {
            *slot = Some(Slot {
                vcpu: entry.vcpu,
                run,
                shared,
                ring: Arc::clone(ring),
            });
        }
        Ok(number)
    }

    /// The vCPU of a slot.
    pub(crate) fn vcpu(&self, number: usize) -> Option<u64> {
        Some(self.slots.get(number)?.as_ref()?.vcpu)
    }

    /// The memory of a vCPU that is answered here.
    pub(crate) fn ring(&self, vcpu: u64) -> Option<&Arc<Ring>> {
        let slot = self.slots.get(self.slot(vcpu)?)?.as_ref()?;
        Some(&slot.ring)
    }

    /// Sets what the slot of each vCPU has in one word, where `value` knows it.
    pub(crate) fn tell(&self, word: usize, value: impl Fn(u64) -> Option<u64>) {
        for (number, slot) in self.slots.iter().enumerate() {
            if let Some(value) = slot.as_ref().and_then(|slot| value(slot.vcpu)) {
                self.control.set(Self::word(number, word), value);
            }
        }
    }

    /// A descriptor is another file's from here on.
    pub(crate) fn forget(&self, fd: u64) {
        if let Ok(fd) = usize::try_from(fd)
            && fd < control::LIMIT
        {
            self.control.at(control::DESCRIPTORS + fd).store(0, Ordering::SeqCst);
        }
    }

    /// Whether a thread runs the vCPU, or was lost while it did.
    fn is_busy(&self, number: usize) -> bool {
        let mut busy = [0; WORD];
        let at = self.private + ((private::BUSY + number) * WORD) as u64;
        !target::read(self.process, at, &mut busy) || busy != [0; WORD]
    }

    /// Whoever ran the vCPU is lost.
    pub(crate) fn release(&self, vcpu: u64) {
        if let Some(number) = self.slot(vcpu) {
            let at = self.private + ((private::BUSY + number) * WORD) as u64;
            target::write(self.process, at, &[0; WORD]);
        }
    }

    /// How many vCPUs it answers for.
    pub(crate) fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Lets go of vCPUs of which the process has no descriptor any more: their mappings would keep the VMs.
    pub(crate) fn collect(&mut self, stopped: &mut Stopped, alive: &[u64]) {
        for number in 1..self.slots.len() {
            let gone = self.slots.get(number).and_then(Option::as_ref);
            let Some(gone) = gone.filter(|slot| !alive.contains(&slot.vcpu)) else {
                continue;
            };
            // First the descriptors, then a look at whoever found the slot by one.
            for fd in 0..control::LIMIT {
                if self.control.get(control::DESCRIPTORS + fd) == number as u64 {
                    self.control.at(control::DESCRIPTORS + fd).store(0, Ordering::SeqCst);
                }
            }
            if self.is_busy(number) {
                continue;
            }
            for (at, bytes) in [(gone.run, PAGE), (gone.shared, gone.ring.bytes())] {
                // A mapping that stays is a leak and no more.
                let _ = stopped.call(libc::SYS_munmap, [at, bytes as u64, 0, 0, 0, 0]);
            }
            gone.ring.end();
            if let Some(slot) = self.slots.get_mut(number) {
                *slot = None;
            }
        }
    }

    /// The process is gone.
    pub(crate) fn end(&self) {
        self.slots.iter().flatten().for_each(|slot| slot.ring.end());
    }

    /// Where a KVM_RUN that was to be made goes on, and whether it was found just now that its instruction cannot lead there.
    pub(crate) fn lead(&mut self, stopped: &mut Stopped) -> Result<(u64, bool), Errno> {
        let site = stopped.site();
        if let Some(at) = self.stubs.get(&site) {
            return Ok((*at, false));
        }
        let at = self.stub(stopped, site)?;
        self.stubs.insert(site, at);
        Ok((at, !patch(stopped.process, site, at)))
    }

    /// A `syscall` instruction that nobody changes.
    pub(crate) fn syscall(&self) -> Option<u64> {
        self.stubs.values().next().map(|at| at + STUB_SYSCALL as u64)
    }

    /// Code that makes KVM_RUN by the image, and every other call itself, and goes on behind `site`.
    fn stub(&mut self, stopped: &mut Stopped, site: u64) -> Result<u64, Errno> {
        let room = self
            .page
            .filter(|(at, count)| (count + 1) * STUB <= PAGE && at.abs_diff(site) < REACH);
        let (page, count) = match room {
            Some(room) => room,
            None => (near(stopped, site)?, 0),
        };
        self.page = Some((page, count + 1));
        let at = page + (count * STUB) as u64;
        let code = stub_code(at, site, self.image).ok_or(Errno::ERANGE)?;
        target::write_code(stopped.process, at, &code).map_err(errno)?;
        Ok(at)
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// A page for code within reach of `site`.
fn near(stopped: &mut Stopped, site: u64) -> Result<u64, Errno> {
    let (rights, flags) = (PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE);
    let below = (1..REACH >> 20).map(|step| (site & !0xfff).checked_sub(step << 20));
    let above = (1..REACH >> 20).map(|step| (site & !0xfff).checked_add(step << 20));
    for at in below.chain(above).flatten().filter(|at| *at > 0x1_0000) {
        match stopped.map(at, PAGE, rights, flags, -1) {
            Err(Errno::EEXIST) => {}
            result => return result,
        }
    }
    Err(Errno::ENOMEM)
}

/// Where in a stub the `syscall` instruction is for calls that are not KVM_RUN.
const STUB_SYSCALL: usize = 51;

fn stub_code(at: u64, site: u64, image: u64) -> Option<[u8; STUB]> {
    let back = |end: usize| {
        let distance = (site + 2).wrapping_sub(at + end as u64).cast_signed();
        i32::try_from(distance).ok().map(i32::to_le_bytes)
    };
    let mut code = Vec::with_capacity(STUB);
    code.extend([0x3d, libc::SYS_ioctl as u8, 0, 0, 0]); // cmp eax, 16
    code.extend([0x75, 44]); // jne other
    code.extend([0x81, 0xfe]); // cmp esi, KVM_RUN
    code.extend(abi::RUN.to_le_bytes());
    code.extend([0x75, 36]); // jne other
    code.extend([0x48, 0x8d, 0x64, 0x24, 0x80]); // lea rsp, [rsp - 128], over the red zone
    code.extend([0x49, 0xbb]); // mov r11, image
    code.extend(image.to_le_bytes());
    code.extend([0x41, 0xff, 0xd3]); // call r11
    code.extend([0x48, 0x8d, 0xa4, 0x24, 0x80, 0, 0, 0]); // lea rsp, [rsp + 128]
    code.extend([0xe9]); // jmp behind the site
    code.extend(back(code.len() + 4)?);
    code.resize(STUB_SYSCALL, 0xcc);
    code.extend(SYSCALL); // other: syscall
    code.extend([0xe9]);
    code.extend(back(code.len() + 4)?);
    code.resize(STUB, 0xcc);
    code.try_into().ok()
}

/// Leads the instruction at `site` to `stub`: by a jump of two bytes to five dead bytes near it, which jump on. Whoever is
/// behind the instruction, in a signal's handler or in the kernel, goes on there as before.
fn patch(process: i32, site: u64, stub: u64) -> bool {
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
    let Some(dead) = dead_bytes(&code, start).find(|at| short(site_at, *at).is_some()) else {
        return false;
    };
    let dead_at = start + dead as u64;
    let distance = stub.wrapping_sub(dead_at + 5).cast_signed();
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
    fn a_stub_is_as_long_as_its_jumps_say() {
        let code = stub_code(0x10_0000, 0x20_0000, 0x7000_0000_0000).unwrap();
        assert_eq!((code[5], 7 + usize::from(code[6])), (0x75, STUB_SYSCALL));
        assert_eq!((code[13], 15 + usize::from(code[14])), (0x75, STUB_SYSCALL));
        assert_eq!(code[STUB_SYSCALL..STUB_SYSCALL + 2], SYSCALL);
        assert!(stub_code(0x10_0000, 1 << 40, 0).is_none());
    }
}
