/* vCPUs that read and write the same MSRs again and again, each on a thread of its own, until the file `stop` is there:
 * `reloads VCPUS WHAT ACCESS...`. A line is printed for a vCPU where what it gets is another than before. WHAT is `own` for a
 * VMM that has a filter of its own, which denies reads of 0x277; `once` for one thread alone; `cpuid` for vCPUs that are an
 * Intel's; `plain` else. */
#include "guest.h"

static struct machine machine;
static int accesses;
static char **words;
static pthread_mutex_t printing = PTHREAD_MUTEX_INITIALIZER;

static void line(struct vcpu *vcpu, char *last, size_t size) {
    char text[1024], *at = text;
    struct request *requests = requests_of(vcpu);
    at += sprintf(at, "vcpu %d", vcpu->id);
    for (int i = 0; i < accesses; i++) {
        struct request *request = &requests[i];
        if (request->fault)
            at += sprintf(at, " fault");
        else if (request->op == WRITE)
            at += sprintf(at, " done");
        else
            at += sprintf(at, " 0x%lx", (uint64_t)request->high << 32 | request->low);
    }
    if (!strcmp(text, last))
        return;
    snprintf(last, size, "%s", text);
    pthread_mutex_lock(&printing);
    puts(text);
    fflush(stdout);
    pthread_mutex_unlock(&printing);
}

static void *turns(void *argument) {
    struct vcpu *vcpu = argument;
    char last[1024] = "";
    /* Some turns are made once the file is there: what was done to the VMM before that shows. */
    for (int over = 0; !over;) {
        over = access("stop", F_OK) == 0;
        for (int turn = 0; turn < 64; turn++) {
            for (int i = 0; i < accesses; i++)
                ask(&requests_of(vcpu)[i], words[i]);
            rewind_to(vcpu, 0);
            /* An EINTR that no signal brought about would be seen. */
            if (call(vcpu->fd, KVM_RUN, 0) < 0)
                fail("KVM_RUN");
            while (vcpu->run->exit_reason == KVM_EXIT_X86_RDMSR) {
                /* The VMM's own answer. */
                vcpu->run->msr.data = 0x77;
                vcpu->run->msr.error = 0;
                if (call(vcpu->fd, KVM_RUN, 0) < 0)
                    fail("KVM_RUN");
            }
            if (vcpu->run->exit_reason != KVM_EXIT_HLT) {
                fprintf(stderr, "exit %u\n", vcpu->run->exit_reason);
                exit(8);
            }
            line(vcpu, last, sizeof last);
        }
    }
    return 0;
}

int main(int count, char **arguments) {
    int vcpus = atoi(arguments[1]);
    int own = !strcmp(arguments[2], "own");
    words = arguments + 3;
    accesses = count - 3;
    machine = new_machine(0x10000 / vcpus & ~0xf);
    if (own && (set_mask(machine.vm, KVM_MSR_EXIT_REASON_FILTER) < 0 || deny(machine.vm, 0x277, KVM_MSR_FILTER_READ) < 0))
        fail("KVM_X86_SET_MSR_FILTER");
    pthread_t threads[64];
    static struct vcpu made[64];
    for (int id = 0; id < vcpus; id++)
        made[id] = new_vcpu(&machine, id);
    if (!strcmp(arguments[2], "cpuid"))
        for (int id = 0; id < vcpus; id++)
            if (set_vendor(&machine, &made[id], "GenuineIntel") < 0)
                fail("KVM_SET_CPUID2");
    if (!strcmp(arguments[2], "once")) {
        turns(&made[0]);
        return 0;
    }
    for (int id = 0; id < vcpus; id++)
        pthread_create(&threads[id], 0, turns, &made[id]);
    for (int id = 0; id < vcpus; id++)
        pthread_join(threads[id], 0);
    return 0;
}
