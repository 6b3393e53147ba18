# All that is no Rust: from the first instruction to 64-bit mode, into the guest and back, RDMSR and WRMSR that may fault, and
# two small guests.

# PVH: QEMU finds the 32-bit entry in this note and calls it with EBX = hvm_start_info.
.section .note.pvh, "a", @note
.align 4
.long 4, 8, 18
.asciz "Xen"
.quad start32

# Multiboot 2: GRUB calls the ELF's entry with EBX = Multiboot information. A Multiboot 1 header would keep QEMU from PVH.
.section .note.multiboot, "a", @note
.align 8
multiboot:
.long 0xe85250d6, 0, 24, 0x17adaf12
.word 0, 0
.long 8

# To 64-bit mode, with all of memory at its own address. The GDT is loaded already.
.macro to_long_mode
    mov eax, cr4
    or eax, 0x620                   # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset host_pml4
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER: LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffffb             # not CD, NW, EM
    or eax, 0x80000003
    mov cr0, eax
.endm
.macro to_flat_segments
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
.endm

.section .text.boot, "ax"
.code32
.globl start32
start32:
    cli
    cld
    mov esp, offset stacks + 0x10000
    mov edi, ebx
    lgdt [gdt_pointer]
    to_long_mode
    .byte 0xea                      # ljmp 8:start64
    .long start64
    .word 8
.code64
start64:
    to_flat_segments
    call start
    ud2

# Other processors start here, in real mode: a copy at 0x8000, which a start-up IPI can name.
.code16
.globl other_start, other_start_end
other_start:
    cli
    cld
    xor eax, eax
    mov ds, ax
    data32 lgdt [other_gdt_pointer]
    to_long_mode
    .byte 0x66, 0xea                # ljmp 8:other64
    .long other64
    .word 8
.set other_gdt_pointer, 0x8000 + 1f - other_start
1:  .word 23
    .long gdt
other_start_end:
.code64
other64:
    to_flat_segments
    mov edi, 1
    lock xadd [next_processor], edi
    lea rax, [rdi + 1]
    shl rax, 16
    lea rsp, [stacks + rax]
    call start_other
    ud2

.align 8
.globl gdt
gdt:
    .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
    .word 23
    .quad gdt

# A guest's other processor, until Linux wants it: "Multiprocessor Wakeup Mailbox Structure" of ACPI. rsi = mailbox, edi = its
# number.
.globl waiting_guest, waiting_guest_end
waiting_guest:
1:  pause
    cmp word ptr [rsi], 1
    jne 1b
    cmp [rsi + 4], edi
    jne 1b
    mov rax, [rsi + 8]
    mov word ptr [rsi], 0
    jmp rax
waiting_guest_end:

# The guest of the cases: CPUID asks for the next access and tells what came of the one before. r8, r9 = rax, rdx after it;
# r10 = whether it faulted. rbx = what is next: 0 RDMSR, 1 WRMSR, with rcx, rax, rdx.
.globl case_guest, case_guest_end
case_guest:
    lea rsp, [rip + case_guest + 0x1000]
    lea rax, [rip + case_gdt]
    mov [rip + case_gdt_pointer + 2], rax
    lgdt [rip + case_gdt_pointer]
    lea rax, [rip + case_fault]
    mov [rip + case_gate], ax
    shr rax, 16
    mov [rip + case_gate + 6], ax
    lea rax, [rip + case_gate - 13 * 16]
    mov [rip + case_idt_pointer + 2], rax
    lidt [rip + case_idt_pointer]
1:  xor eax, eax
    cpuid
    xor r10d, r10d
    test ebx, ebx
    jnz 2f
    rdmsr
    jmp 3f
2:  wrmsr
3:  mov r8, rax
    mov r9, rdx
    jmp 1b
case_fault:
    add rsp, 8                      # the error code
    inc r10d
    lea r11, [rip + 3b]
    mov [rsp], r11
    iretq
.align 8
case_gdt:
    .quad 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff
case_gate:
    .word 0, 0x10, 0x8e00, 0
    .long 0, 0
case_gdt_pointer:
    .word 31
    .quad 0
case_idt_pointer:
    .word 14 * 16 - 1
    .quad 0
case_guest_end:

# Into the guest. rsi = `processor::Registers`; its address stays on the stack.
.macro enter_guest
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rsi
.endm
.macro load_guest
    fxrstor64 [rsi + 128]
    mov rbx, [rsi + 8]
    mov rcx, [rsi + 16]
    mov rdx, [rsi + 24]
    mov rdi, [rsi + 40]
    mov rbp, [rsi + 48]
    mov r8, [rsi + 56]
    mov r9, [rsi + 64]
    mov r10, [rsi + 72]
    mov r11, [rsi + 80]
    mov r12, [rsi + 88]
    mov r13, [rsi + 96]
    mov r14, [rsi + 104]
    mov r15, [rsi + 112]
    mov rsi, [rsi + 32]
.endm
.macro store_guest
    push rdi
    mov rdi, [rsp + 8]
    mov [rdi + 8], rbx
    mov [rdi + 16], rcx
    mov [rdi + 24], rdx
    mov [rdi + 32], rsi
    pop qword ptr [rdi + 40]
    mov [rdi + 48], rbp
    mov [rdi + 56], r8
    mov [rdi + 64], r9
    mov [rdi + 72], r10
    mov [rdi + 80], r11
    mov [rdi + 88], r12
    mov [rdi + 96], r13
    mov [rdi + 104], r14
    mov [rdi + 112], r15
    fxsave64 [rdi + 128]
    fninit                          # the host's own, by the calling convention
    ldmxcsr [rip + host_mxcsr]
    cld
.endm
.macro leave_guest
    pop rsi
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
.endm

# enter_svm(VMCB, registers): the guest until its next exit. RAX and RSP are the VMCB's.
.section .text
.globl enter_svm
enter_svm:
    enter_guest
    mov rax, rdi
    load_guest
    vmrun rax
    store_guest
    leave_guest

# enter_vmx(whether it was entered before, registers) -> 0, or 1 where it was not entered. RSP is the VMCS's.
.globl enter_vmx
enter_vmx:
    enter_guest
    mov eax, 0x6c14                 # host RSP
    vmwrite rax, rsp
    mov eax, 0x6c16                 # host RIP
    lea rcx, [rip + left_vmx]
    vmwrite rax, rcx
    test edi, edi
    mov rax, [rsi]
    load_guest
    jnz 1f
    vmlaunch
    jmp 2f
1:  vmresume
2:  mov eax, 1
    leave_guest
left_vmx:
    store_guest
    mov [rdi], rax
    xor eax, eax
    leave_guest

# try_rdmsr(MSR, where to) and try_wrmsr(MSR, value) -> 0, or 1 where it faulted.
.globl try_rdmsr, try_wrmsr
try_rdmsr:
    mov ecx, edi
guarded_rdmsr:
    rdmsr
    mov [rsi], eax
    mov [rsi + 4], edx
    xor eax, eax
    ret
try_wrmsr:
    mov ecx, edi
    mov eax, esi
    mov rdx, rsi
    shr rdx, 32
guarded_wrmsr:
    wrmsr
    xor eax, eax
    ret
msr_faulted:
    mov eax, 1
    ret

.globl on_gp, on_nmi, on_other
on_gp:
    push rax
    lea rax, [rip + guarded_rdmsr]
    cmp [rsp + 16], rax
    je 1f
    lea rax, [rip + guarded_wrmsr]
    cmp [rsp + 16], rax
    jne 2f
1:  lea rax, [rip + msr_faulted]
    mov [rsp + 16], rax
    pop rax
    add rsp, 8
    iretq
2:  mov edi, 13
    mov rsi, [rsp + 16]
    mov rdx, [rsp + 8]
    and rsp, -16
    call fatal_exception
on_nmi:
    iretq
on_other:
    mov edi, 255
    mov rsi, [rsp]
    mov rdx, [rsp + 8]
    and rsp, -16
    call fatal_exception

# What the compiler calls and no library is there for.
.globl memcpy, memmove, memset, memcmp, bcmp
memmove:
    mov rcx, rdi
    sub rcx, rsi
    cmp rcx, rdx
    jb 1f
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
1:  mov rax, rdi
    mov rcx, rdx
    lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    mov rcx, rdx
    cmp rcx, rcx                    # equal, where there is nothing
    repe cmpsb
    je 1f
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub eax, ecx
    neg eax
1:  ret
# `core` was compiled to unwind, and nothing here does.
.globl rust_eh_personality, _Unwind_Resume
rust_eh_personality:
_Unwind_Resume:
    ud2

.section .data
.align 8
next_processor: .long 1
host_mxcsr: .long 0x1f80
.align 4096
host_pml4:
    .quad host_pdpt + 3
    .fill 511, 8, 0
host_pdpt:
    .set i, 0
    .rept 512
    .quad (i << 30) + 0x83
    .set i, i + 1
    .endr

# 64 KiB for each processor.
.section .bss.stack, "aw", @nobits
.align 16
stacks: .skip 0x10000 * 8
