/* A VMM that runs while its guests are asked what they get: `running [VMS [VCPUS [OPTION...]]]`.
 *
 * Each vCPU is in KVM_RUN all the time, in a thread of its own. A line on standard input is one of these, and the answer is a line:
 *
 * VCPU ACCESS   the access, by this vCPU's guest
 * returns       how often KVM_RUN has returned
 * add, start    a vCPU more, and a thread for it
 * drop          the newest vCPU and its thread end
 * lose          the newest thread ends within KVM_RUN, and another one takes its place
 * vm            a VM more
 * move          other descriptors for the first VM and the newest vCPU
 * close         the end of the first VM's descriptors
 * deny MSR      a filter of its own, by which reads of this MSR are denied
 * exits         what the option does, but for the filter
 *
 * A vCPU's exit that is none of this VMM's ends it. Options:
 *
 * filter     reads of 0x175 are denied, and fault
 * exits      reads of 0x175 are denied, and get 7 from this VMM
 * seldom     each vCPU is in KVM_RUN for moments, and never in its guest
 * hidden     may not be traced but by root
 * sandbox    each thread may make the calls that it makes, and no other
 * waits      likewise, and may wait for another thread and wake it, as Firecracker's may
 * whole      likewise, and the first thread may make its own calls, once the VMM is ready
 * tsc        no thread may read the TSC
 * child      the VMs are made by a process that forks this one */
#include "guest.h"
#include "sandbox.h"
#include <linux/futex.h>

enum { MOST = 8, AREA = 0x1000, SLOTS = (AREA - 64) / sizeof(struct request) };

static struct machine machines[MOST];
static struct vcpu vcpus[MOST];
static int next[MOST];
static volatile int returns, dropped = -1;
static pthread_t newest;
static int sandboxed, waits, whole, exits, seldom, vms, all;

/* `read(2)` with a value in every register that a system call leaves alone, in floating point and in the red zone: -4096 where one of
 * them is another afterwards. */
__asm__(".pushsection .text\n"
        "checked_read:\n"
        "   push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
        "   sub $136, %rsp\n"
        "   stmxcsr 128(%rsp)\n"
        "   movl $0x7f80, 132(%rsp)\n"
        "   ldmxcsr 132(%rsp)\n"
        "   mov $0x1122334455667788, %rbx\n"
        "   mov %rbx, %rbp; mov %rbx, %r8; mov %rbx, %r9; mov %rbx, %r10\n"
        "   mov %rbx, %r12; mov %rbx, %r13; mov %rbx, %r14; mov %rbx, %r15\n"
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15\n"
        "   movq %rbx, %xmm\\n\n"
        "   punpcklqdq %xmm\\n, %xmm\\n\n"
        "   mov %rbx, -8*(\\n+1)(%rsp)\n"
        ".endr\n"
        "   xor %eax, %eax\n"
        "   push $0; pop %rcx\n"
        "   mov %rbx, -8(%rsp)\n"
        "   syscall\n"
        "   mov $0x1122334455667788, %rcx\n"
        "   xor %r11d, %r11d\n"
        ".irp n, rbx, rbp, r8, r9, r10, r12, r13, r14, r15\n"
        "   cmp %rcx, %\\n\n"
        "   setne %r11b\n"
        "   jne 1f\n"
        ".endr\n"
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15\n"
        "   cmp %rcx, -8*(\\n+1)(%rsp)\n"
        "   jne 1f\n"
        "   movq %xmm\\n, %r12\n"
        "   cmp %rcx, %r12\n"
        "   jne 1f\n"
        "   psrldq $8, %xmm\\n\n"
        "   movq %xmm\\n, %r12\n"
        "   cmp %rcx, %r12\n"
        "   jne 1f\n"
        ".endr\n"
        "   stmxcsr 132(%rsp)\n"
        "   cmpl $0x7f80, 132(%rsp)\n"
        "   je 2f\n"
        "1: mov $-4096, %rax\n"
        "2: ldmxcsr 128(%rsp)\n"
        "   add $136, %rsp\n"
        "   pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
        "   ret\n"
        ".popsection\n");
extern long checked_read(long fd, void *to, long count);

/* A call with one of two values as its second argument, and every other call. */
static void limit(unsigned number, const unsigned values[2], unsigned action) {
    struct sock_filter steps[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, values[0], 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, values[1], 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, action),
    };
    struct sock_fprog program = {.len = sizeof steps / sizeof *steps, .filter = steps};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0)
        fail("seccomp");
}

/* One request behind the other, and the first one again at the end. */
static void wait_at(int id, int slot) {
    struct request *request = &requests_of(&vcpus[id])[slot];
    memset(request, 0, sizeof *request);
    request->op = slot == SLOTS - 1 ? FIRST : WAIT;
}

static void *runs(void *argument) {
    struct vcpu *vcpu = argument;
    static const int calls[] = {CALL(write), CALL(exit_group), CALL(rt_sigreturn), 0};
    static const int calls_and_futex[] = {CALL(write), CALL(exit_group), CALL(rt_sigreturn), CALL(futex), 0};
    static const unsigned requests[] = {KVM_RUN, 0};
    if (waits) {
        static const unsigned operations[] = {FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE};
        limit(SYS_futex, operations, SECCOMP_RET_KILL_PROCESS);
    }
    if (sandboxed)
        sandbox(waits ? calls_and_futex : calls, requests, SECCOMP_RET_KILL_PROCESS, 0);
    for (;;) {
        int result = call(vcpu->fd, KVM_RUN, 0);
        returns++;
        if (result < 0) {
            if (errno != EINTR)
                fail("KVM_RUN");
            if (dropped == vcpu - vcpus)
                return 0;
        } else if (exits && vcpu->run->exit_reason == KVM_EXIT_X86_RDMSR && vcpu->run->msr.index == 0x175) {
            vcpu->run->msr.data = 7;
            vcpu->run->msr.error = 0;
        } else {
            fprintf(stderr, "exit %u\n", vcpu->run->exit_reason);
            _exit(8);
        }
    }
}

static void *runs_seldom(void *argument) {
    struct vcpu *vcpu = argument;
    for (;;) {
        vcpu->run->immediate_exit = 1;
        usleep(50);
        if (call(vcpu->fd, KVM_RUN, 0) < 0 && errno != EINTR)
            fail("KVM_RUN");
    }
}

static void new_one(int id) {
    vcpus[id] = new_vcpu(&machines[id % vms], id);
    for (int slot = 0; slot < (int)SLOTS; slot++)
        wait_at(id, slot);
}

static void start(int id) {
    pthread_create(&newest, 0, seldom ? runs_seldom : runs, &vcpus[id]);
}

static void nothing(int number) { (void)number; }

/* The next vCPU gets the same descriptor, and another number. */
static void drop(int id) {
    struct sigaction action = {.sa_handler = nothing};
    sigaction(SIGUSR1, &action, 0);
    dropped = id;
    while (pthread_tryjoin_np(newest, 0)) {
        pthread_kill(newest, SIGUSR1);
        usleep(1000);
    }
    munmap(vcpus[id].run, vcpus[id].machine->run_bytes);
    close(vcpus[id].fd);
}

static void leave(int number) {
    (void)number;
    syscall(SYS_exit, 0);
}

static void lose(int id) {
    signal(SIGUSR2, leave);
    pthread_kill(newest, SIGUSR2);
    pthread_join(newest, 0);
    start(id);
}

static void answer(const char *line) {
    if (!strcmp(line, "returns")) {
        printf("%d\n", returns);
        return;
    }
    if (!strcmp(line, "add")) {
        new_one(all);
        printf("%d\n", all);
        return;
    }
    if (!strcmp(line, "start")) {
        start(all++);
        printf("%d\n", all);
        return;
    }
    if (!strncmp(line, "deny ", 5)) {
        printf("%d\n", deny(machines[0].vm, strtoul(line + 5, 0, 0), KVM_MSR_FILTER_READ));
        return;
    }
    if (!strcmp(line, "exits")) {
        exits = 1;
        printf("%d\n", set_mask(machines[0].vm, KVM_MSR_EXIT_REASON_FILTER));
        return;
    }
    if (!strcmp(line, "vm")) {
        printf("%d\n", new_machine(AREA).vm);
        return;
    }
    if (!strcmp(line, "lose")) {
        lose(all - 1);
        printf("lost\n");
        return;
    }
    if (!strcmp(line, "move")) {
        struct vcpu *vcpu = &vcpus[all - 1];
        struct sigaction action = {.sa_handler = nothing};
        sigaction(SIGUSR1, &action, 0);
        int vm = machines[0].vm, fd = vcpu->fd;
        machines[0].vm = fcntl(vm, F_DUPFD, 100);
        vcpu->fd = fcntl(fd, F_DUPFD, 100);
        close(vm);
        close(fd);
        pthread_kill(newest, SIGUSR1);
        printf("moved\n");
        return;
    }
    if (!strcmp(line, "close")) {
        close(machines[0].vm);
        printf("closed\n");
        return;
    }
    if (!strcmp(line, "drop")) {
        drop(all - 1);
        printf("%d\n", vcpus[all - 1].fd);
        return;
    }
    char *access;
    int id = strtol(line, &access, 10), slot = next[id];
    next[id] = slot == SLOTS - 2 ? 0 : slot + 1;
    wait_at(id, next[id]);
    struct request *request = &requests_of(&vcpus[id])[slot], asked;
    ask(&asked, access + 1);
    request->msr = asked.msr;
    request->low = asked.low;
    request->high = asked.high;
    __atomic_store_n(&request->op, asked.op, __ATOMIC_SEQ_CST);
    while (!__atomic_load_n(&request->finished, __ATOMIC_SEQ_CST))
        usleep(100);
    show(request);
}

int main(int count, char **words) {
    int filters = 0, child = 0;
    vms = count > 1 ? atoi(words[1]) : 1;
    all = count > 2 ? atoi(words[2]) : 1;
    for (int i = 3; i < count; i++) {
        if (!strcmp(words[i], "hidden") && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
            fail("prctl");
        whole |= !strcmp(words[i], "whole");
        waits |= whole || !strcmp(words[i], "waits");
        sandboxed |= waits || !strcmp(words[i], "sandbox");
        exits |= !strcmp(words[i], "exits");
        seldom |= !strcmp(words[i], "seldom");
        if (!strcmp(words[i], "tsc") && prctl(PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0) < 0)
            fail("PR_SET_TSC");
        filters |= !strcmp(words[i], "filter");
        child |= !strcmp(words[i], "child");
    }
    for (int vm = 0; vm < vms; vm++) {
        machines[vm] = new_machine(AREA);
        if (exits && set_mask(machines[vm].vm, KVM_MSR_EXIT_REASON_FILTER) < 0)
            fail("KVM_ENABLE_CAP");
        if ((filters || exits) && deny(machines[vm].vm, 0x175, KVM_MSR_FILTER_READ) < 0)
            fail("KVM_X86_SET_MSR_FILTER");
    }
    if (child) {
        printf("ready %d\n", machines[0].vm);
        fflush(stdout);
        pid_t forked = fork();
        if (forked == 0)
            pause();
        printf("%d\n", forked);
        fflush(stdout);
    }
    for (int id = 0; id < all; id++) {
        new_one(id);
        start(id);
    }
    printf("ready");
    for (int vm = 0; vm < vms; vm++)
        printf(" %d", machines[vm].vm);
    printf("\n");
    fflush(stdout);
    if (whole) {
        static const int calls[] = {CALL(read), CALL(write),        CALL(exit_group), CALL(exit),
                                    CALL(rt_sigreturn), CALL(clock_nanosleep), CALL(nanosleep),  0};
        static const unsigned requests[] = {0};
        sandbox(calls, requests, SECCOMP_RET_KILL_PROCESS, 0);
    }
    for (;;) {
        fflush(stdout);
        char line[256];
        for (unsigned at = 0; at < sizeof line; at++) {
            long got = checked_read(0, &line[at], 1);
            if (got == 0)
                return 0;
            if (got != 1 && got != -EINTR) {
                fprintf(stderr, "read gives %ld\n", got);
                return 7;
            }
            if (got == -EINTR) {
                at--;
            } else if (line[at] == '\n') {
                line[at] = 0;
                break;
            }
        }
        answer(line);
    }
}
