/* What the VMMs here have in common: a machine whose vCPUs read and write MSRs in real mode and note what they get.
 *
 * A vCPU works off requests in its own memory, so that one KVM_RUN does all of them, and nothing but KVM_RUN is needed
 * between. With -DINLINE the VMM makes its system calls by instructions of its own, and with -DPACKED its ioctls in a function as
 * that of a C library which is built for size: without a byte between functions. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#pragma GCC diagnostic ignored "-Wunused-function"

/* The instruction, by itself. */
static inline long raw(long number, long first, long second, long third) {
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "0"(number), "D"(first), "S"(second), "d"(third)
                     : "rcx", "r11", "memory");
    return result;
}

static inline int raw_ioctl(int fd, unsigned long request, unsigned long argument) {
    long result = raw(SYS_ioctl, fd, request, argument);
    if (result < 0) {
        errno = -result;
        return -1;
    }
    return result;
}

#ifdef PACKED
/* `mov eax, 16; mov dword ptr [rsp + 8], 16; syscall`, and no byte within reach of a short jump that no code reaches. */
__asm__(".pushsection .text\n"
        ".rept 40; mov $1, %eax; .endr; ret\n"
        "packed_ioctl:\n"
        "   sub $0x58, %rsp\n"
        "   mov %rdx, 0x30(%rsp)\n"
        "   mov $16, %eax\n"
        "   movl $16, 8(%rsp)\n"
        "   syscall\n"
        "   add $0x58, %rsp\n"
        "   ret\n"
        ".rept 40; mov $1, %eax; .endr; ret\n"
        ".popsection\n");
extern long packed_ioctl(int fd, unsigned long request, unsigned long argument);

static int checked_ioctl(int fd, unsigned long request, unsigned long argument) {
    long result = packed_ioctl(fd, request, argument);
    if (result < 0)
        errno = -result;
    return result < 0 ? -1 : result;
}
#define call(fd, request, argument) checked_ioctl(fd, request, (unsigned long)(argument))
#elif defined INLINE
#define call(fd, request, argument) raw_ioctl(fd, request, (unsigned long)(argument))
#else
#define call(fd, request, argument) ioctl(fd, request, (unsigned long)(argument))
#endif

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...) {
    int error = errno;
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    fflush(stdout);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, ": %s\n", strerror(error));
    exit(9);
}

enum { MEMORY = 1 << 20, CODE = 0x1000, AREAS = 0x10000 };
enum op { END, READ, WRITE, AGAIN, STAY, COUNT, WAIT, FIRST };

/* What a guest is to do, and what it got. */
struct request {
    uint32_t msr, op;
    uint32_t low, high;
    uint32_t fault;
    /* AGAIN, COUNT: how many reads or writes there are to be, 0 for 2^32, and how many there were. */
    uint32_t count, done;
    /* The guest is at the next one. WAIT is looked at until it is something else, FIRST leads to the first request. */
    uint32_t finished;
};

/* SI is at the request. A stack is below the first one; a fault is noted, and the two bytes of the instruction are left
 * out. */
__asm__(".pushsection .rodata\n"
        ".code16\n"
        "guest:\n"
        "   cmpb $6, 4(%si)\n"
        "   je guest\n"
        "   movl (%si), %ecx\n"
        "   movl 8(%si), %eax\n"
        "   movl 12(%si), %edx\n"
        "   cmpb $0, 4(%si)\n"
        "   je 5f\n"
        "   cmpb $2, 4(%si)\n"
        "   je 3f\n"
        "   cmpb $3, 4(%si)\n"
        "   je 6f\n"
        "   cmpb $4, 4(%si)\n"
        "   je 8f\n"
        "   cmpb $5, 4(%si)\n"
        "   je 9f\n"
        "   cmpb $7, 4(%si)\n"
        "   je 7f\n"
        "   rdmsr\n"
        "2: movl %eax, 8(%si)\n"
        "   movl %edx, 12(%si)\n"
        "   jmp 4f\n"
        "3: wrmsr\n"
        "4: movl $1, 28(%si)\n"
        "   addw $32, %si\n"
        "   jmp guest\n"
        "7: movw $64, %si\n"
        "   jmp guest\n"
        "5: hlt\n"
        "   jmp 4b\n"
        "6: movl 20(%si), %edi\n"
        "7: rdmsr\n"
        "   incl 24(%si)\n"
        "   decl %edi\n"
        "   jnz 7b\n"
        "   jmp 2b\n"
        "8: jmp 8b\n"
        "9: movl 20(%si), %edi\n"
        "1: movl 24(%si), %eax\n"
        "   wrmsr\n"
        "   incl 24(%si)\n"
        "   decl %edi\n"
        "   jnz 1b\n"
        "   jmp 4b\n"
        "guest_fault:\n"
        "   pushw %bp\n"
        "   movw %sp, %bp\n"
        "   addw $2, 2(%bp)\n"
        "   popw %bp\n"
        "   movl $1, 16(%si)\n"
        "   iretw\n"
        "guest_elsewhere:\n"
        "   incl %ebx\n"
        "   hlt\n"
        "guest_end:\n"
        ".code64\n"
        ".popsection\n");
extern const char guest[], guest_fault[], guest_elsewhere[], guest_end[];

struct machine {
    int kvm, vm, run_bytes;
    char *memory;
    /* Bytes of each vCPU's area: 64 of stack, and requests. */
    int area;
};

struct vcpu {
    int fd;
    int id;
    struct machine *machine;
    struct kvm_run *run;
};

static int open_kvm(void) {
    /* To a VMM that may not open it, it is handed over. */
    const char *handed = getenv("KVM_FD");
    if (handed)
        return atoi(handed);
    int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail("/dev/kvm");
    return fd;
}

static void set_up(struct machine *machine) {
    machine->run_bytes = call(machine->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    machine->memory = mmap(0, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (machine->memory == MAP_FAILED)
        fail("mmap");
    struct kvm_userspace_memory_region region = {
        .memory_size = MEMORY,
        .userspace_addr = (uintptr_t)machine->memory,
    };
    if (call(machine->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        fail("KVM_SET_USER_MEMORY_REGION");
    memcpy(machine->memory + CODE, guest, guest_end - guest);
    uint16_t fault = CODE + (guest_fault - guest);
    memcpy(machine->memory + 13 * 4, &fault, sizeof fault);
}

static struct machine new_machine(int area) {
    struct machine machine = {.kvm = open_kvm(), .area = area};
    machine.vm = call(machine.kvm, KVM_CREATE_VM, 0);
    if (machine.vm < 0)
        fail("KVM_CREATE_VM");
    set_up(&machine);
    return machine;
}

static char *area_of(const struct vcpu *vcpu) {
    return vcpu->machine->memory + AREAS + vcpu->id * vcpu->machine->area;
}

static struct request *requests_of(const struct vcpu *vcpu) {
    return (struct request *)(area_of(vcpu) + 64);
}

/* From its first request on. */
static void rewind_to(struct vcpu *vcpu, unsigned number) {
    struct kvm_regs registers = {.rip = CODE, .rsp = 64, .rsi = 64 + number * sizeof(struct request), .rflags = 2};
    if (call(vcpu->fd, KVM_SET_REGS, &registers) < 0)
        fail("KVM_SET_REGS");
}

static void place(struct vcpu *vcpu) {
    struct machine *machine = vcpu->machine;
    vcpu->run = mmap(0, machine->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (vcpu->run == MAP_FAILED)
        fail("mmap");
    struct kvm_sregs special;
    if (call(vcpu->fd, KVM_GET_SREGS, &special) < 0)
        fail("KVM_GET_SREGS");
    special.cs.base = special.cs.selector = 0;
    special.ds.base = special.ss.base = area_of(vcpu) - machine->memory;
    special.ds.selector = special.ss.selector = special.ds.base / 16;
    if (call(vcpu->fd, KVM_SET_SREGS, &special) < 0)
        fail("KVM_SET_SREGS");
    rewind_to(vcpu, 0);
}

static struct vcpu new_vcpu(struct machine *machine, int id) {
    struct vcpu vcpu = {.id = id, .machine = machine, .fd = call(machine->vm, KVM_CREATE_VCPU, id)};
    if (vcpu.fd < 0)
        fail("KVM_CREATE_VCPU");
    place(&vcpu);
    return vcpu;
}

/* Until the guest halts. */
static void run(struct vcpu *vcpu) {
    int result;
    do
        result = call(vcpu->fd, KVM_RUN, 0);
    while (result < 0 && errno == EINTR);
    if (result < 0)
        fail("KVM_RUN");
    if (vcpu->run->exit_reason != KVM_EXIT_HLT) {
        fprintf(stderr, "exit %u\n", vcpu->run->exit_reason);
        exit(8);
    }
}

/* `r:MSR`, `w:MSR=VALUE`, `a:MSR=COUNT` for as many reads, `c:MSR=COUNT` for writes of 0, 1 and so on, `s:` for a guest
 * that goes on for ever. */
static void ask(struct request *request, const char *text) {
    char *rest;
    memset(request, 0, sizeof *request);
    static const char letters[] = " rwasc";
    request->op = strchr(letters, text[0]) - letters;
    request->msr = strtoul(text + 2, &rest, 0);
    uint64_t value = *rest == '=' ? strtoull(rest + 1, 0, 0) : 0;
    if (request->op >= AGAIN) {
        request->count = value;
    } else {
        request->low = value;
        request->high = value >> 32;
    }
}

static void show(const struct request *request) {
    if (request->fault)
        printf("%s %#x fault\n", request->op == WRITE || request->op == COUNT ? "wrmsr" : "rdmsr", request->msr);
    else if (request->op == WRITE || request->op == COUNT)
        printf("wrmsr %#x done\n", request->msr);
    else
        printf("rdmsr %#x 0x%lx\n", request->msr, (uint64_t)request->high << 32 | request->low);
}

/* One access. */
static struct request access_of(struct vcpu *vcpu, const char *text) {
    struct request *request = requests_of(vcpu);
    ask(request, text);
    memset(request + 1, 0, sizeof *request);
    rewind_to(vcpu, 0);
    run(vcpu);
    return *request;
}

/* The same, printed behind a word. */
static void tell(const char *who, struct vcpu *vcpu, const char *text) {
    struct request request = access_of(vcpu, text);
    printf("%s ", who);
    show(&request);
    fflush(stdout);
}

static int set_mask(int vm, uint64_t reasons) {
    struct kvm_enable_cap cap = {.cap = KVM_CAP_X86_USER_SPACE_MSR, .args = {reasons}};
    return call(vm, KVM_ENABLE_CAP, &cap);
}

/* Denies one MSR in these directions. */
static int deny(int vm, uint32_t msr, uint32_t flags) {
    static uint8_t none[8];
    struct kvm_msr_filter filter = {.ranges = {{.flags = flags, .nmsrs = 1, .base = msr, .bitmap = none}}};
    return call(vm, KVM_X86_SET_MSR_FILTER, &filter);
}

/* CPUID of this maker's processor: 12 letters. */
static int set_vendor(struct machine *machine, struct vcpu *vcpu, const char *vendor) {
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid;
    cpuid.head.nent = 256;
    if (call(machine->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) < 0)
        fail("KVM_GET_SUPPORTED_CPUID");
    for (unsigned i = 0; i < cpuid.head.nent; i++)
        if (cpuid.entries[i].function == 0) {
            memcpy(&cpuid.entries[i].ebx, vendor, 4);
            memcpy(&cpuid.entries[i].edx, vendor + 4, 4);
            memcpy(&cpuid.entries[i].ecx, vendor + 8, 4);
        }
    return call(vcpu->fd, KVM_SET_CPUID2, &cpuid);
}
