/* Random filters and capabilities, and what a guest gets under them: `fuzz SEED CALLS`. Prints each call's result, and a
 * line of accesses behind each that succeeded: the same with a policy that allows all as without. */
#include "guest.h"

static uint64_t state;

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* One of so many. */
static unsigned of(unsigned many) {
    return next() % many;
}

static const uint32_t MSRS[] = {0x10, 0x8b, 0x174, 0x175, 0x176, 0x277, 0x10a, 0x1a0, 0xc0000080, 0xc0000081, 0x40000000};
enum { COUNT_OF_MSRS = sizeof MSRS / sizeof *MSRS };

static void *half_mapped(void) {
    static char *pages;
    if (!pages) {
        pages = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        munmap(pages + 4096, 4096);
    }
    return pages + 4096 - 8;
}

static int random_filter(int fd) {
    static uint8_t bitmaps[KVM_MSR_FILTER_MAX_RANGES][0x600];
    struct kvm_msr_filter filter = {.flags = of(12) == 0 ? next() : of(2)};
    unsigned ranges = of(4) == 0 ? of(KVM_MSR_FILTER_MAX_RANGES + 1) : of(3);
    for (unsigned i = 0; i < ranges; i++) {
        unsigned bytes = of(16) == 0 ? 0x600 : 8 * (1 + of(8));
        for (unsigned at = 0; at < bytes; at++)
            bitmaps[i][at] = of(3) == 0 ? 0 : next();
        filter.ranges[i] = (struct kvm_msr_filter_range){
            .flags = of(24) == 0 ? of(16) : 1 + of(3),
            .nmsrs = of(24) == 0 ? (uint32_t)next() : of(40) == 0 ? 0x3001 : bytes * 8 - of(8),
            .base = MSRS[of(COUNT_OF_MSRS)] - of(8),
            .bitmap = of(40) == 0 ? 0 : of(40) == 0 ? half_mapped() : bitmaps[i],
        };
    }
    void *address = of(30) == 0 ? 0 : of(30) == 0 ? half_mapped() : &filter;
    return call(fd, KVM_X86_SET_MSR_FILTER, address);
}

static int random_cap(int fd) {
    struct kvm_enable_cap cap = {
        .cap = of(10) == 0 ? of(300) : KVM_CAP_X86_USER_SPACE_MSR,
        .flags = of(20) == 0,
        /* Exits would be this VMM's to answer. */
        .args = {of(4) == 0 ? next() << 3 : 0},
    };
    /* What these change is not looked at, and some end what a VM can do. */
    if (cap.cap != KVM_CAP_X86_USER_SPACE_MSR && cap.cap != KVM_CAP_MSR_PLATFORM_INFO)
        cap.cap += 1000;
    void *address = of(30) == 0 ? 0 : of(30) == 0 ? half_mapped() : &cap;
    return call(fd, KVM_ENABLE_CAP, address);
}

int main(int count, char **words) {
    (void)count;
    state = strtoull(words[1], 0, 0) * 0x9e3779b97f4a7c15 | 1;
    int calls = atoi(words[2]);
    struct machine machine = new_machine(0x10000);
    struct vcpu vcpu = new_vcpu(&machine, 0);
    int others[] = {machine.kvm, vcpu.fd, 1, 999};
    for (int i = 0; i < calls; i++) {
        int fd = of(40) == 0 ? others[of(4)] : machine.vm;
        errno = 0;
        int result = of(4) == 0 ? random_cap(fd) : random_filter(fd);
        printf("%d %d", result, errno);
        if (result == 0) {
            struct request *requests = requests_of(&vcpu);
            for (unsigned at = 0; at < 2 * COUNT_OF_MSRS; at++)
                requests[at] = (struct request){
                    /* What a write does to a machine that goes on is not looked at. */
                    .msr = at < COUNT_OF_MSRS ? MSRS[at] : MSRS[2 + at % 5] + of(3),
                    .op = at < COUNT_OF_MSRS ? READ : WRITE,
                };
            memset(&requests[2 * COUNT_OF_MSRS], 0, sizeof *requests);
            rewind_to(&vcpu, 0);
            run(&vcpu);
            for (unsigned at = 0; at < 2 * COUNT_OF_MSRS; at++)
                /* The time goes on. */
                printf(" %u:%x", requests[at].fault, requests[at].msr == 0x10 ? 0 : requests[at].low);
        }
        printf("\n");
    }
    return 0;
}
