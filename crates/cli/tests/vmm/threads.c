/* VMMs whose threads come, go and share in other ways than most: `threads WHAT`. */
#include "guest.h"

#include <limits.h>
#include <sched.h>

static struct machine machine;
static struct vcpu vcpu;
static const char *what;

static int is(const char *name) {
    return !strcmp(what, name);
}

static void in_guest(void) {
    volatile uint32_t *done = &requests_of(&vcpu)->done;
    uint32_t before = *done;
    while (*done - before < 10)
        sched_yield();
}

static void leaves(int number) {
    (void)number;
    pthread_exit(0);
}

static void *runs_for_ever(void *unused) {
    (void)unused;
    int old;
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &old);
    for (;;)
        call(vcpu.fd, KVM_RUN, 0);
    return 0;
}

/* The thread that runs the vCPU ends in the middle of it, and another one goes on. */
static void lost(void) {
    signal(SIGUSR1, leaves);
    for (int i = 0; i < 20; i++) {
        ask(requests_of(&vcpu), "a:0x174=0");
        rewind_to(&vcpu, 0);
        pthread_t thread;
        pthread_create(&thread, 0, runs_for_ever, 0);
        in_guest();
        if (is("cancel"))
            pthread_cancel(thread);
        else
            pthread_kill(thread, SIGUSR1);
        pthread_join(thread, 0);
        /* What the guest was at is over where the VMM says so. */
        vcpu.run->immediate_exit = 1;
        call(vcpu.fd, KVM_RUN, 0);
        vcpu.run->immediate_exit = 0;
        if (i % 5 == 0)
            tell("another", &vcpu, "r:0x174");
        else
            access_of(&vcpu, "r:0x174");
    }
}

static void *does_all(void *unused) {
    (void)unused;
    machine = new_machine(0x1000);
    vcpu = new_vcpu(&machine, 0);
    if (set_vendor(&machine, &vcpu, "GenuineIntel") < 0)
        fail("KVM_SET_CPUID2");
    if (deny(machine.vm, 0x277, KVM_MSR_FILTER_READ) < 0)
        fail("KVM_X86_SET_MSR_FILTER");
    tell("thread", &vcpu, "r:0x174");
    tell("thread", &vcpu, "r:0x277");
    return 0;
}

static void on_small_stack(void) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, PTHREAD_STACK_MIN);
    pthread_t thread;
    if (pthread_create(&thread, &attributes, does_all, 0))
        fail("pthread_create");
    pthread_join(thread, 0);
}

static void *closes_its_own(void *unused) {
    (void)unused;
    if (unshare(CLONE_FILES) < 0)
        fail("unshare");
    close(vcpu.fd);
    close(machine.vm);
    /* Numbers of other files, here alone. */
    open("/dev/null", O_RDONLY);
    open("/dev/null", O_RDONLY);
    struct machine own = new_machine(0x1000);
    struct vcpu its = new_vcpu(&own, 0);
    tell("thread", &its, "r:0x174");
    return 0;
}

static void apart(void) {
    pthread_t thread;
    pthread_create(&thread, 0, closes_its_own, 0);
    pthread_join(thread, 0);
    tell("main", &vcpu, "r:0x174");
    if (set_mask(machine.vm, 0) < 0)
        fail("KVM_ENABLE_CAP");
    tell("main", &vcpu, "r:0x174");
}

/* Another process without libc's knowledge. */
static void cloned(void) {
    pid_t child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        struct machine own = new_machine(0x1000);
        own.vm = dup(own.vm);
        struct vcpu its = new_vcpu(&own, 0);
        its.fd = fcntl(its.fd, F_DUPFD, 40);
        tell("child", &its, "r:0x174");
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    tell("main", &vcpu, "r:0x174");
}

/* One CPU for all; a thread that yields to none makes vCPUs, while another one makes VMs. */
static volatile int over;

static void *makes_vms(void *unused) {
    (void)unused;
    for (int i = 0; i < 50; i++) {
        struct machine own = new_machine(0x1000);
        struct vcpu its = new_vcpu(&own, 0);
        access_of(&its, "r:0x174");
        munmap(its.run, own.run_bytes);
        munmap(own.memory, MEMORY);
        close(its.fd);
        close(own.vm);
        close(own.kvm);
    }
    over = 1;
    return 0;
}

static void fifo(void) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    if (sched_setaffinity(0, sizeof one, &one) < 0)
        fail("sched_setaffinity");
    pthread_t thread;
    pthread_create(&thread, 0, makes_vms, 0);
    struct sched_param parameter = {.sched_priority = 1};
    if (sched_setscheduler(0, SCHED_FIFO, &parameter) < 0)
        fail("sched_setscheduler");
    for (int id = 1; !over; id++) {
        int fd = call(machine.vm, KVM_CREATE_VCPU, 1 + id % 200);
        if (fd >= 0)
            close(fd);
        usleep(1000);
    }
    pthread_join(thread, 0);
    tell("main", &vcpu, "r:0x174");
}

int main(int count, char **words) {
    (void)count;
    what = words[1];
    if (is("stack")) {
        on_small_stack();
        return 0;
    }
    machine = new_machine(0x1000);
    vcpu = new_vcpu(&machine, 0);
    if (is("cancel") || is("exit")) {
        lost();
    } else if (is("unshare")) {
        tell("main", &vcpu, "r:0x174");
        apart();
    } else if (is("clone")) {
        cloned();
    } else if (is("fifo")) {
        fifo();
    } else if (is("badclose")) {
        if (syscall(SYS_close_range, 3, ~0U, 8) == 0)
            fail("close_range");
        tell("main", &vcpu, "r:0x174");
    }
    return 0;
}
