/* `many VCPUS ACCESS...`: so many vCPUs at a time, 100 to a VM, each on a thread of its own. */
#include "guest.h"

#include <sys/resource.h>

static pthread_barrier_t all_there;
static char **accesses;

static void *runs(void *vcpu) {
    struct request *requests = requests_of(vcpu);
    int count = 0;
    for (; accesses[count]; count++)
        ask(&requests[count], accesses[count]);
    pthread_barrier_wait(&all_there);
    run(vcpu);
    pthread_barrier_wait(&all_there);
    return 0;
}

int main(int count, char **words) {
    int vcpus = atoi(words[1]);
    accesses = words + 2;
    (void)count;
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    struct machine *machines = calloc(vcpus / 100 + 1, sizeof *machines);
    struct vcpu *all = calloc(vcpus, sizeof *all);
    pthread_t *threads = calloc(vcpus, sizeof *threads);
    pthread_barrier_init(&all_there, 0, vcpus);
    for (int i = 0; i < vcpus; i++) {
        struct machine *machine = &machines[i / 100];
        if (i % 100 == 0)
            *machine = new_machine(0x800);
        all[i] = new_vcpu(machine, i % 100);
        if (pthread_create(&threads[i], 0, runs, &all[i]))
            fail("pthread_create");
    }
    for (int i = 0; i < vcpus; i++)
        pthread_join(threads[i], 0);
    int faults = 0;
    for (int i = 0; i < vcpus; i++)
        for (int at = 0; accesses[at]; at++)
            faults += requests_of(&all[i])[at].fault;
    printf("vcpus %d faults %d\n", vcpus, faults);
    return 0;
}
