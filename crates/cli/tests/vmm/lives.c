/* One process that makes and lets go of many: `lives vms COUNT`, `lives vcpus COUNT`, `lives touches COUNT`,
 * `lives platform`. */
#include "guest.h"

#include <dirent.h>

static int entries(const char *path) {
    int count = 0;
    DIR *directory = opendir(path);
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static int maps(void) {
    int lines = 0, byte;
    FILE *file = fopen("/proc/self/maps", "r");
    while ((byte = getc(file)) != EOF)
        lines += byte == '\n';
    fclose(file);
    return lines;
}

static int wrong;

static void expect(struct vcpu *vcpu) {
    struct request request = access_of(vcpu, "w:0x10a=1");
    wrong += !request.fault;
    request = access_of(vcpu, "r:0x174");
    wrong += request.fault;
}

int main(int count, char **words) {
    (void)count;
    int times = count > 2 ? atoi(words[2]) : 0;
    if (!strcmp(words[1], "vms")) {
        int before = 0;
        for (int i = 0; i < times; i++) {
            struct machine machine = new_machine(0x1000);
            struct vcpu vcpu = new_vcpu(&machine, 0);
            expect(&vcpu);
            munmap(vcpu.run, machine.run_bytes);
            munmap(machine.memory, MEMORY);
            close(vcpu.fd);
            close(machine.vm);
            close(machine.kvm);
            if (i == 10)
                before = maps();
        }
        printf("wrong %d open %d grown %s\n", wrong, entries("/proc/self/fd"), maps() - before > 20 ? "yes" : "no");
    } else if (!strcmp(words[1], "vcpus")) {
        struct machine machine = new_machine(0x800);
        for (int id = 0; id < times; id++) {
            struct vcpu vcpu = new_vcpu(&machine, id);
            expect(&vcpu);
        }
        printf("wrong %d open %d\n", wrong, entries("/proc/self/fd"));
    } else if (!strcmp(words[1], "touches")) {
        struct machine machine = new_machine(0x10000);
        struct vcpu vcpu = new_vcpu(&machine, 0);
        struct request *requests = requests_of(&vcpu);
        int faults = 0;
        for (int done = 0; done < times; done += 1000) {
            for (int at = 0; at < 1000; at++)
                requests[at] = (struct request){.msr = 0x10000 + 3 * (done + at), .op = READ};
            memset(&requests[1000], 0, sizeof *requests);
            rewind_to(&vcpu, 0);
            run(&vcpu);
            for (int at = 0; at < 1000; at++)
                faults += requests[at].fault;
        }
        printf("faults %d\n", faults);
    } else {
        struct machine machine = new_machine(0x1000);
        struct vcpu vcpu = new_vcpu(&machine, 0);
        tell("on", &vcpu, "r:0xce");
        struct kvm_enable_cap off = {.cap = KVM_CAP_MSR_PLATFORM_INFO, .args = {0}};
        if (call(machine.vm, KVM_ENABLE_CAP, &off) < 0)
            fail("KVM_ENABLE_CAP");
        tell("off", &vcpu, "r:0xce");
    }
    return 0;
}
