/* Makes accesses and prints what the guests got: `accesses [VCPUS] ACCESS...`. vCPUs run one after the other. */
#include "guest.h"

int main(int count, char **words) {
    int vcpus = 1, first = 1;
    if (count > 1 && words[1][1] != ':')
        vcpus = atoi(words[first++]);
    struct machine machine = new_machine(0x10000 / vcpus & ~0xf);
    for (int id = 0; id < vcpus; id++) {
        struct vcpu vcpu = new_vcpu(&machine, id);
        struct request *requests = requests_of(&vcpu);
        for (int i = first; i < count; i++)
            ask(&requests[i - first], words[i]);
        run(&vcpu);
        for (int i = first; i < count; i++)
            show(&requests[i - first]);
    }
    return 0;
}
