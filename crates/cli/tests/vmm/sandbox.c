/* VMMs whose threads are sandboxed to exactly what they do: `sandbox ACTION KIND ACCESS...`.
 *
 * early   the thread that makes the VM is so before it does, and may not set MSR filters (Cloud Hypervisor)
 * vcpu    the thread that runs the vCPU is, and reads MSRs besides (Firecracker)
 * whole   all threads are, from when the VM is made on (Solo5, QEMU)
 * caps    the one that sets capabilities and filters is
 * wrong   the vCPU's thread makes a call that is not on its list */
#include "guest.h"
#include "sandbox.h"

static pthread_barrier_t step, never;
static struct machine machine;
static struct vcpu vcpu;
static unsigned action;
static const char *kind;
static uint64_t vmms;

static int is(const char *name) {
    return !strcmp(kind, name);
}

static const int MAKER_CALLS[] = {CALL(openat), CALL(open),   CALL(mmap), CALL(munmap), CALL(mprotect), CALL(brk),
                                  CALL(futex),  CALL(madvise), CALL(rt_sigprocmask), CALL(fcntl), 0};
static const unsigned MAKER_REQUESTS[] = {KVM_CREATE_VM,
                                          KVM_GET_VCPU_MMAP_SIZE,
                                          KVM_SET_USER_MEMORY_REGION,
                                          KVM_CREATE_VCPU,
                                          KVM_GET_SREGS,
                                          KVM_SET_SREGS,
                                          KVM_SET_REGS,
                                          KVM_ENABLE_CAP,
                                          0};
static const int VCPU_CALLS[] = {CALL(futex), 0};
static const unsigned VCPU_REQUESTS[] = {KVM_RUN, KVM_GET_MSRS, 0};
static const int WHOLE_CALLS[] = {CALL(futex), CALL(write),  CALL(exit_group), CALL(brk),       CALL(mmap),
                                  CALL(fstat), CALL(lseek),  CALL(munmap),     CALL(newfstatat), CALL(writev), 0};
static const unsigned WHOLE_REQUESTS[] = {KVM_RUN, KVM_GET_MSRS, TIOCGWINSZ, 0};
static const unsigned CAPS_REQUESTS[] = {KVM_ENABLE_CAP, KVM_X86_SET_MSR_FILTER, KVM_CREATE_VCPU, KVM_GET_SREGS,
                                         KVM_SET_SREGS,  KVM_SET_REGS,           0};

/* A thread's end takes calls of its own. */
static void stay(void) {
    pthread_barrier_wait(&never);
}

static void *makes(void *unused) {
    (void)unused;
    pthread_setname_np(pthread_self(), "vmm");
    if (is("early"))
        sandbox(MAKER_CALLS, MAKER_REQUESTS, action, 0);
    machine = new_machine(0x10000);
    if (is("caps"))
        sandbox(MAKER_CALLS, CAPS_REQUESTS, action, 0);
    vcpu = new_vcpu(&machine, 0);
    struct kvm_enable_cap platform = {.cap = KVM_CAP_MSR_PLATFORM_INFO, .args = {1}};
    if (is("early") || is("caps")) {
        if (call(machine.vm, KVM_ENABLE_CAP, &platform) < 0)
            fail("KVM_ENABLE_CAP");
        if (set_mask(machine.vm, 0) < 0)
            fail("KVM_ENABLE_CAP of KVM_CAP_X86_USER_SPACE_MSR");
    }
    if (is("caps") && deny(machine.vm, 0x277, KVM_MSR_FILTER_READ) < 0)
        fail("KVM_X86_SET_MSR_FILTER");
    pthread_barrier_wait(&step);
    stay();
    return 0;
}

static void *runs(void *unused) {
    (void)unused;
    pthread_setname_np(pthread_self(), "vcpu0");
    pthread_barrier_wait(&step);
    if (is("vcpu") || is("early") || is("wrong"))
        sandbox(VCPU_CALLS, VCPU_REQUESTS, action, 0);
    if (is("whole"))
        sandbox(WHOLE_CALLS, WHOLE_REQUESTS, action, SECCOMP_FILTER_FLAG_TSYNC);
    run(&vcpu);
    struct kvm_regs registers;
    if (is("wrong") && call(vcpu.fd, KVM_GET_REGS, &registers) < 0)
        fail("KVM_GET_REGS");
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msrs = {.head.nmsrs = 1, .entry.index = 0x8b};
    if (call(vcpu.fd, KVM_GET_MSRS, &msrs) != 1)
        fail("KVM_GET_MSRS");
    vmms = msrs.entry.data;
    pthread_barrier_wait(&step);
    stay();
    return 0;
}

int main(int count, char **words) {
    action = !strcmp(words[1], "trap")   ? SECCOMP_RET_TRAP
             : !strcmp(words[1], "errno") ? SECCOMP_RET_ERRNO | EPERM
             : !strcmp(words[1], "thread") ? SECCOMP_RET_KILL_THREAD
                                          : SECCOMP_RET_KILL_PROCESS;
    kind = words[2];
    pthread_barrier_init(&step, 0, 2);
    pthread_barrier_init(&never, 0, 3);
    pthread_t maker, runner;
    pthread_create(&maker, 0, makes, 0);
    pthread_barrier_wait(&step);
    struct request *requests = requests_of(&vcpu);
    for (int i = 3; i < count; i++)
        ask(&requests[i - 3], words[i]);
    pthread_create(&runner, 0, runs, 0);
    pthread_barrier_wait(&step);
    pthread_barrier_wait(&step);
    for (int i = 3; i < count; i++)
        show(&requests[i - 3]);
    printf("vmm 0x8b 0x%lx\n", vmms);
    fflush(stdout);
    _exit(0);
}
