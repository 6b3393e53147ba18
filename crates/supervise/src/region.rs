//! The answerer's place in a VMM's process.
//!
//! ```text
//! image        code, with where the rest is                                  the supervisor wrote it
//! private      whether it is there, which vCPUs are being run                a fork's child finds zeros
//! control      which descriptor is which vCPU, and what each vCPU works by   only the supervisor can write it
//! tables       what exits get                                                only the supervisor can write them
//! kvm_run, counts and events of each vCPU
//! trampolines  one for each instruction by which the VMM makes KVM_RUN
//! ```

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use libc::{MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE};
use msrgate_answer::IMAGE;
use msrgate_answer::layout::{control, image, own, private, slot, table, vcpu};
use nix::errno::Errno;
use rustix::fs::SealFlags;

use crate::detour::Trampolines;
use crate::ledger::Ring;
use crate::memory::Words;
use crate::remote::RemoteCalls;
use crate::seccomp::{Cookies, Waiting};
use crate::target::{PAGE, WORD};
use crate::tracee::Tracee;
use crate::{frame, inject, target};

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
    /// Where that is in the process.
    control_at: u64,
    /// Tables that are mapped, and where.
    tables: Vec<(Arc<Table>, u64)>,
    /// By number; there is none of number 0.
    slots: Vec<Option<Slot>>,
    pub(crate) trampolines: Trampolines,
}

/// A vCPU that the process runs.
#[derive(Debug)]
struct Slot {
    vcpu: u64,
    /// Where its memory is, with `kvm_run` behind it.
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

    /// Whether some access is left to the supervisor.
    pub(crate) fn asks(&self) -> bool {
        let entry = |at: usize| self.words.get(at + table::KIND) & 0xff == table::ASK;
        let defaults = (table::DEFAULTS..table::COUNTS).step_by(table::ENTRY);
        defaults
            .chain((table::ENTRIES..self.words.count()).step_by(table::ENTRY))
            .any(entry)
    }

    fn bytes(&self) -> usize {
        (self.words.count() * WORD).next_multiple_of(PAGE)
    }

    /// Writes all of it into another file, which can be written no more.
    fn copy_to(&self, file: &File) -> io::Result<()> {
        let words = (0..self.words.count()).map(|at| self.words.get(at));
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        file.set_len(self.bytes() as u64)?;
        file.write_all_at(&bytes, 0)?;
        rustix::fs::fcntl_add_seals(
            file,
            SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL,
        )?;
        Ok(())
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

/// What answerers ring.
#[derive(Clone, Copy)]
pub(crate) struct Bell {
    /// Where it is in the process.
    pub(crate) at: u64,
    pub(crate) rung: u32,
    /// How often it was wanted that it is looked which vCPUs there are.
    pub(crate) wanted: u64,
}

/// What is asked through memory.
pub(crate) struct Asked {
    number: usize,
    pub(crate) vcpu: u64,
    /// The VMM's descriptor of the vCPU.
    pub(crate) fd: u64,
    asked: u32,
    /// The CPU that asks.
    pub(crate) cpu: usize,
    pub(crate) question: (u64, u64),
}

/// Files that are to be mapped into a process, by their numbers there.
#[derive(Debug, Default)]
pub(crate) struct HandedFiles {
    pub(crate) control: Option<(Words, i32)>,
    pub(crate) table: Option<i32>,
    pub(crate) ring: Option<(Arc<Ring>, i32)>,
}

impl HandedFiles {
    /// Hands over files for a region that is new, and for a vCPU that is; on an error, not all of them.
    pub(crate) fn over(
        waiting: &Waiting<'_>,
        region: Option<&Region>,
        vcpu: u64,
        table: &Arc<Table>,
        ring: impl FnOnce() -> io::Result<(Arc<Ring>, File)>,
    ) -> (HandedFiles, io::Result<()>) {
        let mut handed = HandedFiles::default();
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
    pub(crate) fn close(&self, tracee: &mut Tracee) {
        let fds = [
            self.control.as_ref().map(|(_, fd)| *fd),
            self.table,
            self.ring.as_ref().map(|(_, fd)| *fd),
        ];
        fds.into_iter().flatten().for_each(|fd| tracee.close(fd));
    }
}

/// The image that an instruction is in, and its parameters; `None` for an instruction of something else.
pub(crate) fn image_of(process: i32, instruction: u64, cookies: &Cookies) -> Option<(u64, [u64; image::COUNT])> {
    let at = instruction & !(PAGE as u64 - 1);
    let parameters: [u64; image::COUNT] = target::words(process, at + image::PARAMETERS as u64)?;
    (parameters[image::ASK] == cookies.ask && parameters[image::RUN] == cookies.run).then_some((at, parameters))
}

/// Whether what an image calls private is there: not in the child of a fork.
pub(crate) fn is_alive(process: i32, parameters: &[u64; image::COUNT]) -> bool {
    target::words(process, parameters[image::PRIVATE]) == Some([1])
}

impl Region {
    /// Makes one in the process of a thread; where `inherited`, in the place of that of the process's parent.
    pub(crate) fn new(
        tracee: &mut Tracee,
        (words, fd): (Words, i32),
        name: u64,
        cookies: &Cookies,
        stacks: bool,
        inherited: Option<(u64, [u64; image::COUNT])>,
    ) -> Result<Region, Errno> {
        let bytes = control::WORDS * WORD;
        let (image_at, private_at, control_at) = match inherited {
            Some((at, parameters)) => {
                let old = parameters[image::CONTROL];
                let control = tracee.map(old, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd)?;
                (at, parameters[image::PRIVATE], control)
            }
            None => {
                let rights = PROT_READ | PROT_WRITE;
                let len = (private::WORDS * WORD).next_multiple_of(PAGE);
                let private = tracee.map(0, len, rights, MAP_PRIVATE | MAP_ANONYMOUS, -1)?;
                let advice = [private, len as u64, libc::MADV_WIPEONFORK as u64, 0, 0, 0];
                tracee.call(libc::SYS_madvise, advice)?;
                let control = tracee.map(0, bytes, PROT_READ, MAP_SHARED, fd)?;
                let image = tracee.map(0, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1)?;
                (image, private, control)
            }
        };
        let mut code = IMAGE.to_vec();
        let mut parameters = [0; image::COUNT];
        parameters[image::PRIVATE] = private_at;
        parameters[image::CONTROL] = control_at;
        parameters[image::RUN] = cookies.run;
        parameters[image::ASK] = cookies.ask;
        parameters[image::FRAME] = if stacks { frame::bytes() } else { 0 };
        parameters[image::NAME] = name;
        let places = code
            .get_mut(image::PARAMETERS..)
            .unwrap_or_default()
            .chunks_exact_mut(WORD);
        for (place, parameter) in places.zip(parameters) {
            place.copy_from_slice(&parameter.to_le_bytes());
        }
        target::write_code(tracee.process, image_at, &code).map_err(target::errno)?;
        if !target::write(tracee.process, private_at, &1_u64.to_le_bytes()) {
            return Err(Errno::EFAULT);
        }
        Ok(Region {
            name,
            process: tracee.process,
            image: image_at,
            private: private_at,
            control: words,
            control_at,
            tables: Vec::new(),
            slots: vec![None],
            trampolines: Trampolines::new(tracee.process, image_at, private_at),
        })
    }

    /// Makes one in the place of what an earlier policy has left. Code stays for ever, since nobody can tell whether a thread will
    /// come back to it, out of a signal's handler for example: so there is one image, and one trampoline for each instruction. The memory of
    /// a vCPU goes that no thread runs there, as in [`Region::collect`].
    pub(crate) fn instead(
        tracee: &mut Tracee,
        (words, fd): (Words, i32),
        name: u64,
        cookies: &Cookies,
        stacks: bool,
        left: Left,
    ) -> Result<Region, Errno> {
        // Whoever has found a slot by its descriptor finds the slot.
        for (at, word) in (control::LIMIT..).zip(&left.slots) {
            words.set(at, *word);
        }
        let at = (left.image, left.parameters);
        let mut region = Region::new(tracee, (words, fd), name, cookies, stacks, Some(at))?;
        region.trampolines = left.trampolines;
        let mut kept = BTreeSet::from([region.control_at]);
        let mut ends = HashMap::new();
        for (number, slot) in left.slots.chunks_exact(control::SLOT).enumerate().skip(1) {
            let (run, table, vcpu) = (slot[slot::RUN], slot[slot::TABLE], slot[slot::VCPU]);
            match region.is_busy(number) {
                true => kept.extend([table, vcpu]),
                false => _ = ends.insert((vcpu, run), run + PAGE as u64),
            }
        }
        for mapping in target::mappings(tracee.process) {
            if mapping.name.starts_with(MEMORY) && !kept.contains(&mapping.start) {
                // Its `kvm_run` is behind it.
                let end = ends.get(&(mapping.start, mapping.end)).unwrap_or(&mapping.end);
                unmap(tracee, mapping.start, end - mapping.start);
            }
        }
        let mut descriptors = target::descriptors_of(tracee.process, MEMORY);
        descriptors.retain(|other| *other != fd);
        descriptors.into_iter().for_each(|fd| tracee.close(fd));
        Ok(region)
    }

    /// Whether it is still there: not after an exec.
    pub(crate) fn is_there(&self, process: i32, cookies: &Cookies) -> bool {
        image_of(process, self.image, cookies)
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

    /// Where a table is in the process; it is brought there where it is not yet, by a thread that waits for no call: by a file
    /// that the process makes itself.
    pub(crate) fn map_table(
        &mut self,
        tracee: &mut Tracee,
        remote: &mut RemoteCalls,
        table: &Arc<Table>,
    ) -> Result<u64, Errno> {
        if let Some(at) = self.table(table) {
            return Ok(at);
        }
        let name = remote.lay_out(tracee, b"msrgate\0")?;
        let flags = u64::from(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        let fd = tracee.call(libc::SYS_memfd_create, [name, flags, 0, 0, 0, 0])? as i32;
        let filled = target::file(tracee.process, fd).and_then(|file| table.copy_to(&file));
        let at = match filled {
            Ok(()) => tracee.map(0, table.bytes(), PROT_READ, MAP_SHARED, fd),
            Err(error) => Err(target::errno(error)),
        };
        tracee.close(fd);
        self.tables.push((Arc::clone(table), at?));
        at
    }

    /// Takes tables away that are not used.
    pub(crate) fn unmap_tables(&mut self, tracee: &mut Tracee, used: impl Fn(&Arc<Table>) -> bool) {
        self.tables.retain(|(table, at)| {
            let used = used(table);
            if !used {
                unmap(tracee, *at, table.bytes() as u64);
            }
            used
        });
    }

    /// Whether it answers for one of these vCPUs.
    pub(crate) fn has(&self, vcpu: impl Fn(u64) -> bool) -> bool {
        self.slots.iter().flatten().any(|slot| vcpu(slot.vcpu))
    }

    /// The memory of all vCPUs.
    pub(crate) fn rings(&self) -> impl Iterator<Item = &Arc<Ring>> {
        self.slots.iter().flatten().map(|slot| &slot.ring)
    }

    /// The slots of these vCPUs, and how often each answerer went into KVM_RUN and came out of it.
    pub(crate) fn runs(&self, vcpu: impl Fn(u64) -> bool) -> impl Iterator<Item = (usize, u64)> {
        let numbered = self.slots.iter().enumerate();
        let numbered = numbered.filter_map(|(number, slot)| Some((number, slot.as_ref()?)));
        let of = numbered.filter(move |(_, slot)| vcpu(slot.vcpu));
        of.map(|(number, slot)| (number, slot.ring.runs()))
    }

    /// Whether a slot's answerer is at work and has not counted so far yet.
    pub(crate) fn is_before(&self, number: usize, runs: u64) -> bool {
        let slot = self.slots.get(number).and_then(Option::as_ref);
        slot.is_some_and(|slot| slot.ring.runs() < runs && self.is_busy_for_sure(number))
    }

    /// Where a word of a vCPU's slot is.
    fn word(number: usize, word: usize) -> usize {
        control::LIMIT + number * control::SLOT + word
    }

    /// Has the vCPU of a descriptor answered here.
    pub(crate) fn enter(
        &mut self,
        tracee: &mut Tracee,
        handed: &mut HandedFiles,
        entry: &Entry<'_>,
    ) -> Result<(), Errno> {
        let fd = usize::try_from(entry.fd)
            .ok()
            .filter(|fd| *fd < control::LIMIT)
            .ok_or(Errno::EMFILE)?;
        let table = match (self.table(entry.table), handed.table) {
            (Some(at), _) => at,
            (None, Some(fd)) => {
                let at = tracee.map(0, entry.table.bytes(), PROT_READ, MAP_SHARED, fd)?;
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
            None => self.put(tracee, handed, entry)?,
        };
        self.control.set(Self::word(number, slot::TABLE), table);
        self.control.set(Self::word(number, slot::READY), 1);
        self.control
            .at(control::DESCRIPTORS + fd)
            .store(number as u64, Ordering::SeqCst);
        Ok(())
    }

    fn put(&mut self, tracee: &mut Tracee, handed: &mut HandedFiles, entry: &Entry<'_>) -> Result<usize, Errno> {
        // An earlier policy's may still be run.
        let is_free = |number: &usize| self.slots.get(*number).is_none_or(Option::is_none) && !self.is_busy(*number);
        let number = (1..control::SLOTS).find(is_free).ok_or(Errno::EMFILE)?;
        self.slots.resize_with(self.slots.len().max(number + 1), || None);
        let (ring, file) = handed.ring.as_ref().ok_or(Errno::EBADF)?;
        let rights = PROT_READ | PROT_WRITE;
        // One with the other, so that both go at once, whoever takes them away.
        let shared = tracee.map(0, ring.bytes() + PAGE, rights, MAP_SHARED, *file)?;
        let fd = i32::try_from(entry.fd).map_err(|_| Errno::EBADF)?;
        let run = shared + ring.bytes() as u64;
        let words = [
            (slot::RUN, run),
            (slot::VCPU, shared),
            (slot::ANSWER, 0),
            (slot::MASK, entry.mask),
            (slot::FLAGS, entry.flags),
            (slot::WHO, entry.who),
        ];
        for (word, value) in words {
            self.control.set(Self::word(number, word), value);
        }
        let mapped = tracee.map(run, PAGE, rights, MAP_SHARED | MAP_FIXED, fd);
        let bytes = (ring.bytes() + PAGE) as u64;
        // What a VMM starts is not to write there.
        let advice = [shared, bytes, libc::MADV_DONTFORK as u64, 0, 0, 0];
        if let Err(error) = mapped.and_then(|_| tracee.call(libc::SYS_madvise, advice)) {
            unmap(tracee, shared, bytes);
            return Err(error);
        }
        if let Some(slot) = self.slots.get_mut(number) {
            *slot = Some(Slot {
                vcpu: entry.vcpu,
                shared,
                ring: Arc::clone(ring),
            });
        }
        Ok(number)
    }

    /// Has questions asked through memory as long as this thread is there.
    pub(crate) fn keep(&self, tracee: &mut Tracee) -> Result<(), Errno> {
        let at = self.private_word(private::KEPT);
        // Whoever asked somebody else has seen that there is no answer, or was lost.
        let words = [0; own::WORDS * WORD];
        target::write(self.process, self.private_word(private::OWN), &words);
        // The kernel writes a 0 there where the thread ends.
        tracee.call(libc::SYS_set_tid_address, [at, 0, 0, 0, 0, 0])?;
        match target::write(self.process, at, &1_u64.to_le_bytes()) {
            true => Ok(()),
            false => Err(Errno::EFAULT),
        }
    }

    /// What the VMM itself asks of a VM, and has no answer yet: descriptor, request and argument.
    pub(crate) fn own_call(&self) -> Option<[u64; 3]> {
        let words: [u64; own::WORDS] = target::words(self.process, self.private_word(private::OWN))?;
        let asked = words[own::STATE] & 0xffff_ffff == own::ASKED;
        asked.then_some([words[own::FD], words[own::REQUEST], words[own::ARGUMENT]])
    }

    /// Gives such a call its result.
    pub(crate) fn give_own(&self, result: i64) {
        let words = [(own::RESULT, result.cast_unsigned()), (own::STATE, 0)];
        for (word, value) in words {
            target::write(
                self.process,
                self.private_word(private::OWN + word),
                &value.to_le_bytes(),
            );
        }
    }

    /// The bell that answerers ring; `None` where the process has ended.
    pub(crate) fn bell(&self) -> Option<Bell> {
        const _: () = assert!(private::WANTED == private::BELL + 1);
        let at = self.private_word(private::BELL);
        let [rung, wanted] = target::words(self.process, at)?;
        Some(Bell {
            at,
            rung: rung as u32,
            wanted,
        })
    }

    /// Has threads wait where they do not know which vCPU a descriptor is.
    pub(crate) fn let_wait(&self) {
        let at = self.private_word(private::KEPT);
        // Where it cannot be written the process has ended.
        let _ = target::write(self.process, at, &private::WAITS.to_le_bytes());
    }

    /// It was looked which vCPUs there are, as often as was wanted; says where threads wait for that.
    pub(crate) fn looked(&self, wanted: u64) -> u64 {
        self.control.at(control::LOOKED).store(wanted, Ordering::SeqCst);
        self.control_at + (control::LOOKED * WORD) as u64
    }

    /// What is asked through memory and has no answer yet.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        let mut found = Vec::new();
        for (number, slot) in self.slots.iter().enumerate() {
            let Some(slot) = slot else { continue };
            let (asked, question) = slot.ring.asked();
            if asked as u32 != self.control.get(Self::word(number, slot::ANSWER)) as u32 {
                found.push(Asked {
                    number,
                    vcpu: slot.vcpu,
                    fd: asked >> vcpu::FD,
                    asked: asked as u32,
                    cpu: (asked >> vcpu::CPU & 0xfff) as usize,
                    question,
                });
            }
        }
        found
    }

    /// Gives a question its answer, and says where the thread waits for it.
    pub(crate) fn answer(&self, asked: &Asked, code: i64) -> u64 {
        let word = Self::word(asked.number, slot::ANSWER);
        let answer = u64::from(asked.asked) | code.cast_unsigned() << 32;
        self.control.at(word).store(answer, Ordering::SeqCst);
        self.control_at + (word * WORD) as u64
    }

    /// Whether some vCPU is being run by the image.
    pub(crate) fn is_any_run(&self) -> bool {
        let numbered = self.slots.iter().enumerate();
        numbered
            .filter(|(_, slot)| slot.is_some())
            .any(|(number, _)| self.is_busy_for_sure(number))
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

    /// These descriptors are of a vCPU that is answered here.
    pub(crate) fn called(&self, vcpu: u64, descriptors: &[i32]) {
        let Some(number) = self.slot(vcpu) else { return };
        let fds = descriptors.iter().filter_map(|fd| usize::try_from(*fd).ok());
        for fd in fds.filter(|fd| *fd < control::LIMIT) {
            self.control
                .at(control::DESCRIPTORS + fd)
                .store(number as u64, Ordering::SeqCst);
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
        self.busy(number).is_none_or(is_odd)
    }

    /// Whether a thread runs the vCPU, in a process that is there.
    fn is_busy_for_sure(&self, number: usize) -> bool {
        self.busy(number).is_some_and(is_odd)
    }

    fn busy(&self, number: usize) -> Option<u64> {
        target::words(self.process, self.private_word(private::BUSY + number)).map(|[word]| word)
    }

    /// Where a word of what the process keeps for itself is.
    fn private_word(&self, word: usize) -> u64 {
        self.private + (word * WORD) as u64
    }

    /// Lets go of a vCPU where whoever ran it is lost; `is_run` looks whether some thread runs it, which makes other calls besides at
    /// the address that it is given. Tells whether one does.
    pub(crate) fn release(&self, vcpu: u64, is_run: impl FnOnce(u64) -> bool) -> bool {
        let Some(number) = self.slot(vcpu) else { return false };
        let Some(busy) = self.busy(number).filter(|busy| is_odd(*busy)) else {
            return false;
        };
        let answer = self.control_at + (Self::word(number, slot::ANSWER) * WORD) as u64;
        // Where one lets go of it and another takes it meanwhile, neither may be seen.
        if is_run(answer) || self.busy(number) != Some(busy) {
            return true;
        }
        let at = self.private_word(private::BUSY + number);
        target::write(self.process, at, &busy.wrapping_add(1).to_le_bytes());
        false
    }

    /// The vCPUs that threads run, or were lost while they did.
    pub(crate) fn busy_vcpus(&self) -> Vec<u64> {
        let numbered = self.slots.iter().enumerate();
        let busy = numbered.filter(|(number, _)| self.is_busy_for_sure(*number));
        busy.filter_map(|(_, slot)| Some(slot.as_ref()?.vcpu)).collect()
    }

    /// How many vCPUs it answers for.
    pub(crate) fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Lets go of vCPUs of which the process has no descriptor any more: their mappings would keep the VMs.
    pub(crate) fn collect(&mut self, tracee: &mut Tracee, alive: &[u64]) {
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
            unmap(tracee, gone.shared, (gone.ring.bytes() + PAGE) as u64);
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

    /// Whether an instruction is the image's.
    pub(crate) fn is_image(&self, instruction: u64) -> bool {
        (self.image..self.image + PAGE as u64).contains(&instruction)
    }

    /// Whether a thread runs the vCPU, by the image.
    pub(crate) fn is_run(&self, vcpu: u64) -> bool {
        self.slot(vcpu).is_some_and(|number| self.is_busy_for_sure(number))
    }
}

fn is_odd(word: u64) -> bool {
    word & 1 != 0
}

/// Takes memory out of a process. What stays is taken by the next policy.
fn unmap(tracee: &mut Tracee, at: u64, bytes: u64) {
    let _ = tracee.call(libc::SYS_munmap, [at, bytes, 0, 0, 0, 0]);
}

/// What an earlier policy has left in a process.
pub(crate) struct Left {
    image: u64,
    parameters: [u64; image::COUNT],
    /// The words of its slots.
    slots: Vec<u64>,
    trampolines: Trampolines,
}

impl Left {
    /// `None` where there is no image, or none of this build.
    pub(crate) fn of(process: i32) -> Option<Left> {
        let mappings = target::mappings(process);
        let is_there = |at: u64, bytes: usize, rights: &str, name: &str| {
            mappings.iter().any(|mapping| {
                let is_within = mapping.start <= at && at + bytes as u64 <= mapping.end;
                is_within && mapping.rights.starts_with(rights) && mapping.name.starts_with(name)
            })
        };
        let images = inject::code_pages(process, is_image_begin);
        let (image, parameters) = images.into_iter().find_map(|at| {
            let mut code = [0; IMAGE.len()];
            let (begin, end) = (image::PARAMETERS, image::PARAMETERS + image::COUNT * WORD);
            let is_same = target::read(process, at, &mut code) && code[..begin] == IMAGE[..begin];
            let parameters: [u64; image::COUNT] = target::words(process, at + begin as u64)?;
            let (private, control) = (parameters[image::PRIVATE], parameters[image::CONTROL]);
            let is_whole = is_there(private, private::WORDS * WORD, "rw-p", "")
                && is_there(control, control::WORDS * WORD, "r--s", MEMORY);
            (is_same && code[end..] == IMAGE[end..] && is_whole).then_some((at, parameters))
        })?;
        let mut slots = Vec::new();
        let from = parameters[image::CONTROL] + (control::LIMIT * WORD) as u64;
        // Those that were in use lie together.
        for page in (from..)
            .step_by(PAGE)
            .take(control::SLOTS * control::SLOT * WORD / PAGE)
        {
            match target::words::<{ PAGE / WORD }>(process, page) {
                Some(words) if words != [0; PAGE / WORD] => slots.extend(words),
                _ => break,
            }
        }
        Some(Left {
            image,
            parameters,
            slots,
            trampolines: Trampolines::left(process, image, parameters[image::PRIVATE]),
        })
    }
}

/// How the mappings are called that are the supervisor's.
const MEMORY: &str = "/memfd:msrgate";

/// Whether a page begins as an image does, of whichever build.
fn is_image_begin(begin: &[u8]) -> bool {
    begin.get(2..).is_some_and(|begin| begin.starts_with(image::KIND))
}

/// Whether an instruction is an image's, whoever brought it there.
pub(crate) fn is_some_image(process: i32, instruction: u64) -> bool {
    let mut begin = [0; image::PARAMETERS];
    target::read(process, instruction & !(PAGE as u64 - 1), &mut begin) && is_image_begin(&begin)
}

/// Whether some image, whoever brought it there, is running a vCPU, or has somebody who could be asked.
pub(crate) fn is_some_run(process: i32) -> bool {
    let mut images = inject::code_pages(process, is_image_begin).into_iter();
    let is_busy = |word: &[u8]| word.first().is_some_and(|low| low & 1 != 0);
    images.any(|page| {
        let parameter = page + (image::PARAMETERS + image::PRIVATE * WORD) as u64;
        let mut private = vec![0; private::WORDS * WORD];
        let read = target::words(process, parameter).is_some_and(|[at]| target::read(process, at, &mut private));
        let mut words = private.chunks_exact(WORD);
        let is_kept = words.nth(private::KEPT).is_some_and(|word| word != [0; WORD]);
        read && (is_kept || words.skip(private::BUSY - private::KEPT - 1).any(is_busy))
    })
}
