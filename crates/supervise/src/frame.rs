//! What the kernel puts on a stack where a signal is delivered, and takes from there where its handler returns.

#![expect(unsafe_code, reason = "instructions")]

use core::arch::x86_64::{__cpuid, __cpuid_count};

use libc::user_regs_struct;

/// CPUID.1:ECX.OSXSAVE.
const OSXSAVE: u32 = 1 << 27;
/// XTILEDATA, which a process has to ask for (`XFEATURE_MASK_USER_DYNAMIC`).
const DYNAMIC: u64 = 1 << 18;

/// Bytes of the extended state in a signal's frame, `FP_XSTATE_MAGIC2` included (`xstate_sigframe_size`); 0 on a
/// processor without XSAVE, whose frames say nothing.
pub(crate) fn bytes() -> u64 {
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: XGETBV of XCR0 exists where OSXSAVE is set, and changes these registers alone.
    unsafe { core::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    let enabled = (u64::from(high) << 32 | u64::from(low)) & !DYNAMIC;
    // Leaf 0xd: for each component from 2 on, its size and its place in the standard format.
    let end = |component: u32| {
        let leaf = __cpuid_count(0xd, component);
        u64::from(leaf.eax) + u64::from(leaf.ebx)
    };
    let components = (2..63).filter(|component| enabled >> component & 1 == 1);
    let state = components.map(end).max().unwrap_or(0).max(512 + 64);
    state + 4
}

/// Bytes before `struct rt_sigframe`: what makes the call.
const BEFORE: u64 = 16;
/// `struct rt_sigframe` up to the extended state: return address, `struct ucontext` with `struct sigcontext_64`, siginfo.
const STATE: u64 = BEFORE + 440;
/// `UC_FP_XSTATE`, `UC_SIGCONTEXT_SS` and `UC_STRICT_RESTORE_SS`.
const FLAGS: u64 = 7;
/// No mode of `sigaltstack(2)`: the kernel leaves the one that is set.
const NO_STACK: u64 = 7;
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
/// Where `struct _fpx_sw_bytes` is in the extended state, and where its header is.
const SOFTWARE: usize = 464;
const HEADER: usize = 512;

/// What a thread is to go on with, where it does so by itself.
pub(crate) struct Frame<'a> {
    pub(crate) registers: &'a user_regs_struct,
    pub(crate) blocked: u64,
    /// The extended state as `NT_X86_XSTATE` has it.
    pub(crate) state: &'a [u8],
    /// The addresses of `syscall` with `ret`, and of `pop rax` with `ret`.
    pub(crate) code: (u64, u64),
}

impl Frame<'_> {
    /// Where RSP has to be for `rt_sigreturn(2)`, from the frame on.
    pub(crate) const RETURNED: u64 = BEFORE + 8;

    /// Bytes of the extended state that count, `FP_XSTATE_MAGIC2` not among them.
    fn kept(&self) -> usize {
        let header = self
            .state
            .get(HEADER..HEADER + 8)
            .and_then(|header| header.first_chunk());
        let in_use = header.map_or(0, |bits| u64::from_le_bytes(*bits));
        let usual = (bytes() as usize).saturating_sub(4);
        match in_use & DYNAMIC == 0 && usual > 0 {
            true => usual.min(self.state.len()),
            false => self.state.len(),
        }
    }

    /// How long the frame is at most.
    pub(crate) fn room(&self) -> u64 {
        STATE + 64 + self.kept() as u64 + 4
    }

    /// The frame for this address: a `ret` with RSP there gives the thread its registers back.
    pub(crate) fn bytes(&self, at: u64) -> Vec<u8> {
        let state_at = (at + STATE).next_multiple_of(64);
        let r = self.registers;
        let segments = r.cs & 0xffff | (r.gs & 0xffff) << 16 | (r.fs & 0xffff) << 32 | (r.ss & 0xffff) << 48;
        let (syscall, pop) = self.code;
        // `pop` takes the number of the call.
        let mut words = vec![pop, libc::SYS_rt_sigreturn.cast_unsigned(), syscall];
        words.extend([FLAGS, 0, 0, NO_STACK, 0]);
        words.extend([r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15]);
        words.extend([r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx, r.rsp, r.rip, r.eflags]);
        // Behind the segments: error, trap, the old mask, CR2, and where the extended state is.
        words.extend([segments, 0, 0, 0, 0, state_at]);
        words.extend([0; 8]);
        words.push(self.blocked);
        let mut frame: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        frame.resize((state_at - at) as usize, 0);
        let mut state = self.state.get(..self.kept()).unwrap_or_default().to_vec();
        // As `save_sw_bytes` has it; a processor without XSAVE has no header.
        if state.len() > HEADER {
            let size = state.len() as u32;
            let mut software: Vec<u8> = [MAGIC1, size + 4].into_iter().flat_map(u32::to_le_bytes).collect();
            let features = state.get(SOFTWARE..SOFTWARE + 8).and_then(|bits| bits.first_chunk());
            let features = features.map_or(0, |bits| u64::from_le_bytes(*bits));
            let dynamic = if self.kept() == self.state.len() { 0 } else { DYNAMIC };
            software.extend((features & !dynamic).to_le_bytes());
            software.extend(size.to_le_bytes());
            software.resize(HEADER - SOFTWARE, 0);
            if let Some(place) = state.get_mut(SOFTWARE..HEADER) {
                place.copy_from_slice(&software);
            }
            state.extend(MAGIC2.to_le_bytes());
        }
        frame.extend(state);
        frame
    }
}
