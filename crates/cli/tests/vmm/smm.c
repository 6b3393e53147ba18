/* Reads an MSR in system management mode, and then outside of it: `smm MSR`. */
#include "guest.h"

int main(int count, char **words) {
    if (count < 2)
        return 9;
    uint32_t msr = strtoul(words[1], 0, 0);
    struct machine machine = new_machine(0x1000);
    struct vcpu vcpu = new_vcpu(&machine, 0);
    char text[64];
    snprintf(text, sizeof text, "r:%#x", msr);
    struct request *request = requests_of(&vcpu);
    ask(request, text);
    memset(request + 1, 0, sizeof *request);
    /* "SMI Handler Execution Environment": from SMBASE 0x30000 + 0x8000 on. MOV ECX, RDMSR, RSM, which restores what these
     * change. */
    uint8_t handler[] = {0x66, 0xb9, 0, 0, 0, 0, 0x0f, 0x32, 0x0f, 0xaa};
    memcpy(handler + 2, &msr, sizeof msr);
    memcpy(machine.memory + 0x38000, handler, sizeof handler);
    if (call(machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_X86_SMM) <= 0) {
        printf("no SMM\n");
        return 0;
    }
    /* The address space that it has there. */
    struct kvm_userspace_memory_region region = {
        .slot = 1 << 16,
        .memory_size = MEMORY,
        .userspace_addr = (uintptr_t)machine.memory,
    };
    if (call(machine.vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        fail("KVM_SET_USER_MEMORY_REGION");
    if (call(vcpu.fd, KVM_SMI, 0) < 0)
        fail("KVM_SMI");
    run(&vcpu);
    show(request);
    return 0;
}
