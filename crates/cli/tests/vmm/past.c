/* A VMM that makes each kind of call by another way: `past HOW`, of which KVM_CREATE_VM is made by libc but for `raw`. */
#include "guest.h"

#include <dlfcn.h>

typedef int (*way)(int, unsigned long, unsigned long);

static int by_libc(int fd, unsigned long request, unsigned long argument) {
    return ioctl(fd, request, argument);
}

static int by_syscall(int fd, unsigned long request, unsigned long argument) {
    return syscall(SYS_ioctl, fd, request, argument);
}

/* As 32-bit programs do: it has no pointer. */
static int by_interrupt(int fd, unsigned long request, unsigned long argument) {
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "0"(54), "b"(fd), "c"(request), "d"(argument) : "memory");
    return result;
}

static way found(void) {
    void *libc = dlopen("libc.so.6", RTLD_NOW | RTLD_DEEPBIND);
    way ioctl_of_libc = libc ? (way)dlsym(libc, "ioctl") : 0;
    return ioctl_of_libc ? ioctl_of_libc : by_libc;
}

int main(int count, char **words) {
    const char *how = count > 1 ? words[1] : "raw";
    way by = !strcmp(how, "raw") ? raw_ioctl : !strcmp(how, "syscall") ? by_syscall : found();
    struct machine machine = {.kvm = open_kvm(), .area = 0x1000};
    if (!strcmp(how, "int80")) {
        machine.vm = by_interrupt(machine.kvm, KVM_CREATE_VM, 0);
        printf("int80 %s\n", machine.vm < 0 ? "refused" : "a VM");
        return 0;
    }
    /* One that fails leaves its registers as they are. */
    printf("bad type %d\n", ioctl(machine.kvm, KVM_CREATE_VM, 0xdeadbeef));
    machine.vm = by(machine.kvm, KVM_CREATE_VM, 0);
    if (machine.vm < 0)
        fail("KVM_CREATE_VM");
    set_up(&machine);
    struct vcpu vcpu = {.machine = &machine, .fd = by(machine.vm, KVM_CREATE_VCPU, 0)};
    if (vcpu.fd < 0)
        fail("KVM_CREATE_VCPU");
    place(&vcpu);
    static const char *accesses[] = {"r:0x8b", "r:0x174", "w:0x174=7", "r:0x174", "w:0x10a=1", "w:0x175=1", "w:0x175=2"};
    static const struct kvm_msr_filter open_filter;
    struct kvm_enable_cap no_exits = {.cap = KVM_CAP_X86_USER_SPACE_MSR};
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msrs = {.head.nmsrs = 1, .entry = {.index = 0x8b, .data = 0x5555}};
    for (unsigned i = 0; i < sizeof accesses / sizeof *accesses; i++) {
        by(machine.vm, KVM_X86_SET_MSR_FILTER, (unsigned long)&open_filter);
        by(machine.vm, KVM_ENABLE_CAP, (unsigned long)&no_exits);
        by(vcpu.fd, KVM_SET_MSRS, (unsigned long)&msrs);
        struct request *request = requests_of(&vcpu);
        ask(request, accesses[i]);
        rewind_to(&vcpu, 0);
        int result;
        do
            result = by(vcpu.fd, KVM_RUN, 0);
        while (result < 0 && errno == EINTR);
        if (result < 0)
            fail("KVM_RUN");
        if (vcpu.run->exit_reason != KVM_EXIT_HLT)
            printf("exit %u ", vcpu.run->exit_reason);
        show(request);
    }
    return 0;
}
