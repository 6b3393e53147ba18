/* seccomp filters that allow a list of calls, with ioctls by their requests. */
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>

/* Both lists end with 0. */
static void sandbox(const int *calls, const unsigned *requests, unsigned action, unsigned flags) {
    static __thread struct sock_filter steps[256];
    unsigned count = 0;
#define STEP(code, k, jt, jf) steps[count++] = (struct sock_filter)BPF_JUMP(code, k, jt, jf)
    unsigned load = BPF_LD | BPF_W | BPF_ABS, equal = BPF_JMP | BPF_JEQ | BPF_K, end = BPF_RET | BPF_K;
    STEP(load, offsetof(struct seccomp_data, nr), 0, 0);
    for (; *calls; calls++) {
        STEP(equal, *calls - 1, 0, 1);
        STEP(end, SECCOMP_RET_ALLOW, 0, 0);
    }
    STEP(equal, SYS_ioctl, 1, 0);
    STEP(end, action, 0, 0);
#ifdef __GLIBC__
    /* All 64 bits, as libseccomp compares; musl's `ioctl` takes an `int`, and its sign is there. */
    STEP(load, offsetof(struct seccomp_data, args[1]) + 4, 0, 0);
    STEP(equal, 0, 1, 0);
    STEP(end, action, 0, 0);
#endif
    STEP(load, offsetof(struct seccomp_data, args[1]), 0, 0);
    for (; *requests; requests++) {
        STEP(equal, *requests, 0, 1);
        STEP(end, SECCOMP_RET_ALLOW, 0, 0);
    }
    STEP(end, action, 0, 0);
#undef STEP
    struct sock_fprog program = {.len = count, .filter = steps};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program) < 0)
        fail("seccomp");
}

/* In a list of calls: number 0 is one. */
#define CALL(name) (SYS_##name + 1)
