/* A VMM that stops a vCPU by signals, while its guest does nothing but read one MSR: `kicks HOW COUNT MSR`.
 *
 * signal     an empty handler: the thread is in KVM_RUN, as the guest's progress shows, so that each signal ends it
 * altstack   likewise, with the handler on a stack of its own
 * moved      likewise, and the VMM has the vCPU do something else between, as after a reset
 * stay       likewise, and the guest makes a few reads only and then nothing
 * immediate  the handler sets `immediate_exit`
 * mask       the signal is blocked but in KVM_RUN */
#include "guest.h"

#include <sched.h>
#include <time.h>

enum { FEW = 50 };

static struct vcpu vcpu;
static volatile int returned;
static int sets_immediate, blocks, moves, stays, disturbed;

static void handler(int number) {
    (void)number;
    if (sets_immediate)
        vcpu.run->immediate_exit = 1;
}

/* Nothing is left over of what the guest did before. */
static void move_and_return(void) {
    struct kvm_regs before, after, registers = {.rflags = 2, .rsp = 64, .rax = 0x55aa, .rdx = 0xaa55};
    registers.rip = CODE + (guest_elsewhere - guest);
    if (call(vcpu.fd, KVM_GET_REGS, &before) < 0 || call(vcpu.fd, KVM_SET_REGS, &registers) < 0)
        fail("KVM_SET_REGS");
    run(&vcpu);
    if (call(vcpu.fd, KVM_GET_REGS, &after) < 0 || call(vcpu.fd, KVM_SET_REGS, &before) < 0)
        fail("KVM_SET_REGS");
    disturbed += after.rbx != 1 || after.rax != registers.rax || after.rdx != registers.rdx;
}

static void *runs(void *uses_stack) {
    static char stack[1 << 16];
    stack_t alternative = {.ss_sp = stack, .ss_size = sizeof stack};
    if (uses_stack && sigaltstack(&alternative, 0) < 0)
        fail("sigaltstack");
    sigset_t kick, none;
    sigemptyset(&none);
    sigemptyset(&kick);
    sigaddset(&kick, SIGUSR1);
    if (blocks) {
        pthread_sigmask(SIG_BLOCK, &kick, 0);
        struct {
            struct kvm_signal_mask head;
            uint64_t set;
        } mask = {.head.len = 8};
        if (call(vcpu.fd, KVM_SET_SIGNAL_MASK, &mask) < 0)
            fail("KVM_SET_SIGNAL_MASK");
    }
    for (;;) {
        int result = call(vcpu.fd, KVM_RUN, 0);
        if (result == 0) {
            fprintf(stderr, "exit %u\n", vcpu.run->exit_reason);
            exit(8);
        }
        if (errno != EINTR)
            fail("KVM_RUN");
        vcpu.run->immediate_exit = 0;
        if (blocks) {
            struct timespec now = {0, 0};
            sigtimedwait(&kick, 0, &now);
        }
        if (moves)
            move_and_return();
        if (stays) {
            requests_of(&vcpu)->done = 0;
            rewind_to(&vcpu, 0);
        }
        returned++;
    }
}

/* Whether it comes to be before one gives up waiting: by this thread's own time, since a busy machine may run neither. */
static int changes(volatile uint32_t *what, uint32_t from, uint32_t by) {
    struct timespec start, now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
    do {
        if (*what - from >= by)
            return 1;
        sched_yield();
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    } while (now.tv_sec - start.tv_sec < 60);
    return 0;
}

int main(int count, char **words) {
    (void)count;
    const char *how = words[1];
    int kicks = atoi(words[2]), lost = 0;
    int on_stack = !strcmp(how, "altstack");
    sets_immediate = !strcmp(how, "immediate");
    blocks = !strcmp(how, "mask");
    moves = !strcmp(how, "moved");
    stays = !strcmp(how, "stay");
    struct sigaction action = {.sa_handler = handler, .sa_flags = on_stack ? SA_ONSTACK : 0};
    sigaction(SIGUSR1, &action, 0);
    struct machine machine = new_machine(0x1000);
    vcpu = new_vcpu(&machine, 0);
    struct request *request = requests_of(&vcpu);
    char text[64];
    snprintf(text, sizeof text, "a:%s", words[3]);
    ask(request, text);
    request[1].op = stays ? STAY : END;
    if (stays)
        request->count = FEW;
    pthread_t thread;
    pthread_create(&thread, 0, runs, on_stack ? &machine : 0);
    for (int i = 0; i < kicks && lost < 3; i++) {
        /* It is in the guest again. */
        if (!changes(&request->done, stays ? 0 : request->done, stays ? 1 + i % FEW : 2)) {
            fprintf(stderr, "the guest stands still\n");
            exit(7);
        }
        int before = returned;
        pthread_kill(thread, SIGUSR1);
        lost += !changes((volatile uint32_t *)&returned, before, 1);
    }
    printf("lost %d disturbed %d\n", lost, disturbed);
    fflush(stdout);
    return 0;
}
