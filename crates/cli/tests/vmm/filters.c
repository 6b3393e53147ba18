/* Gives KVM filters and masks, right ones and wrong ones, and prints what each call gives. No vCPU runs.
 *
 * Two VMs; calls on them from two threads, and by a descriptor that is a copy. */
#include "guest.h"

static int first, second;
static uint8_t bits[1536] = {0x07};

static const char *error(void) {
    switch (errno) {
    case EFAULT:
        return "EFAULT";
    case EINVAL:
        return "EINVAL";
    case EEXIST:
        return "EEXIST";
    case EBADF:
        return "EBADF";
    default:
        return strerror(errno);
    }
}

static void print(const char *what, long result) {
    printf("%s %s\n", what, result < 0 ? error() : "done");
}

static long set(int vm, uint32_t flags, uint32_t nmsrs, uint32_t of_range, const void *bitmap) {
    struct kvm_msr_filter filter = {
        .flags = flags,
        .ranges = {{0}, {.flags = of_range, .nmsrs = nmsrs, .base = 0x174, .bitmap = (__u8 *)bitmap}},
    };
    return call(vm, KVM_X86_SET_MSR_FILTER, &filter);
}

static void *elsewhere(void *unused) {
    (void)unused;
    print("another thread's", set(second, KVM_MSR_FILTER_DEFAULT_DENY, 12288, 3, bits));
    return 0;
}

int main(void) {
    void *const nowhere = (void *)0x10;
    int kvm = open_kvm();
    first = call(kvm, KVM_CREATE_VM, 0);
    print("vm", first);
    print("vm of no type", call(kvm, KVM_CREATE_VM, 0xff));
    second = call(kvm, KVM_CREATE_VM, 0);
    print("second vm", second);
    print("vcpu", call(first, KVM_CREATE_VCPU, 1));
    print("the same vcpu", call(first, KVM_CREATE_VCPU, 1));
    print("mask", set_mask(first, KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_UNKNOWN));
    print("mask of bits that are none", set_mask(first, 1 << 20));
    print("mask nowhere", call(first, KVM_ENABLE_CAP, nowhere));
    struct kvm_enable_cap other = {.cap = KVM_CAP_MSR_PLATFORM_INFO, .args = {1}};
    print("another capability", call(first, KVM_ENABLE_CAP, &other));
    print("filter", set(first, KVM_MSR_FILTER_DEFAULT_ALLOW, 3, KVM_MSR_FILTER_WRITE, bits));
    print("filter of flags", set(first, 2, 3, 3, bits));
    print("range of flags", set(first, 0, 3, 4, bits));
    print("range too long", set(first, 0, 12289, 3, bits));
    print("range of no direction", set(first, 0, 3, 0, bits));
    print("bitmap nowhere", set(first, 0, 3, 3, nowhere));
    print("filter nowhere", call(first, KVM_X86_SET_MSR_FILTER, nowhere));
    print("deny without ranges", set(first, KVM_MSR_FILTER_DEFAULT_DENY, 0, 0, 0));
    print("of no descriptor", set(900, 0, 3, 3, bits));
    print("of another file", set(kvm, 0, 3, 3, bits) < 0 ? -1 : 0);
    pthread_t thread;
    pthread_create(&thread, 0, elsewhere, 0);
    pthread_join(thread, 0);
    print("a copy's", set(dup(first), KVM_MSR_FILTER_DEFAULT_DENY, 3, KVM_MSR_FILTER_READ, bits));
    return 7;
}
