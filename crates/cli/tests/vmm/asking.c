/* Processes that are killed while they ask for VMs and CPUIDs, and one that is not: `asking COUNT`. */
#include "guest.h"

static void asks(void) {
    for (;;) {
        struct machine machine = new_machine(0x1000);
        struct vcpu vcpu = new_vcpu(&machine, 0);
        for (int i = 0; i < 20; i++)
            set_vendor(&machine, &vcpu, i % 2 ? "GenuineIntel" : "AuthenticAMD");
        set_mask(machine.vm, 0);
        deny(machine.vm, 0x277, KVM_MSR_FILTER_READ);
        access_of(&vcpu, "r:0x8b");
        close(vcpu.fd);
        close(machine.vm);
        close(machine.kvm);
        munmap(vcpu.run, machine.run_bytes);
        munmap(machine.memory, MEMORY);
    }
}

int main(int count, char **words) {
    (void)count;
    int killed = 0;
    unsigned seed = 1;
    for (int i = 0; i < atoi(words[1]); i++) {
        int ready[2];
        char byte;
        if (pipe(ready) < 0)
            fail("pipe");
        pid_t child = fork();
        if (child == 0) {
            if (write(ready[1], "", 1) == 1)
                asks();
            _exit(0);
        }
        if (read(ready[0], &byte, 1) != 1)
            fail("read");
        /* Somewhere in what it does. */
        seed = seed * 1103515245 + 12345;
        usleep(seed >> 8 & 0x3fff);
        kill(child, SIGKILL);
        int status;
        waitpid(child, &status, 0);
        killed += WIFSIGNALED(status);
        close(ready[0]);
        close(ready[1]);
    }
    printf("killed %d\n", killed);
    struct machine machine = new_machine(0x1000);
    struct vcpu vcpu = new_vcpu(&machine, 0);
    if (set_vendor(&machine, &vcpu, "AuthenticAMD") < 0)
        fail("KVM_SET_CPUID2");
    tell("last", &vcpu, "r:0x8b");
    return 0;
}
