/* VMs that change hands, and VMMs that change what they are: `handed WHAT`. */
#include "guest.h"

#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_open 434
#define SYS_pidfd_getfd 438
#endif

static int sent(int fd) {
    int pair[2];
    char byte = 0;
    union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.head = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec part = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    memcpy(CMSG_DATA(&control.head), &fd, sizeof fd);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0 || sendmsg(pair[0], &message, 0) < 0)
        fail("sendmsg");
    close(fd);
    if (recvmsg(pair[1], &message, 0) < 0)
        fail("recvmsg");
    memcpy(&fd, CMSG_DATA(&control.head), sizeof fd);
    close(pair[0]);
    close(pair[1]);
    return fd;
}

static int got(int fd) {
    int self = syscall(SYS_pidfd_open, getpid(), 0);
    int copy = syscall(SYS_pidfd_getfd, self, fd, 0);
    if (copy < 0)
        fail("pidfd_getfd");
    close(fd);
    close(self);
    return copy;
}

static void becomes(const char *what) {
    if (!strcmp(what, "setuid")) {
        if (setgid(65534) < 0 || setuid(65534) < 0)
            fail("setuid");
    } else if (!strcmp(what, "undumpable")) {
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    } else if (!strcmp(what, "chroot")) {
        if (mkdir("empty", 0700) < 0 || chroot("empty") < 0 || chdir("/") < 0)
            fail("chroot");
    } else if (!strcmp(what, "userns")) {
        if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
            fail("unshare");
    }
}

int main(int count, char **words) {
    (void)count;
    const char *what = words[1];
    if (!strcmp(what, "inherited")) {
        int vm = atoi(words[2]);
        printf("vcpu %d mask %d filter %d\n", call(vm, KVM_CREATE_VCPU, 5), set_mask(vm, 0),
               deny(vm, 0x174, KVM_MSR_FILTER_READ));
        printf("%s\n", strerror(errno));
        return 0;
    }
    /* What is opened before is there after. */
    struct machine first = {.kvm = open_kvm(), .area = 0x1000};
    int before = !strncmp(what, "before-", 7), after = !strncmp(what, "after-", 6);
    if (before)
        becomes(what + 7);
    first.vm = call(first.kvm, KVM_CREATE_VM, 0);
    if (first.vm < 0)
        fail("KVM_CREATE_VM");
    set_up(&first);
    if (!strcmp(what, "exec") || !strcmp(what, "vfork")) {
        struct vcpu vcpu = new_vcpu(&first, 0);
        tell("first", &vcpu, "r:0x174");
        int kept = dup(first.vm);
        char number[12];
        snprintf(number, sizeof number, "%d", kept);
        fcntl(kept, F_SETFD, 0);
        pid_t child = !strcmp(what, "exec") ? 0 : vfork();
        if (child == 0) {
            execl("/proc/self/exe", "handed", "inherited", number, (char *)0);
            _exit(7);
        }
        waitpid(child, 0, 0);
        tell("first", &vcpu, "r:0x174");
        return 0;
    }
    if (after) {
        struct vcpu vcpu = new_vcpu(&first, 0);
        tell("before", &vcpu, "r:0x174");
        becomes(what + 6);
        tell("after", &vcpu, "r:0x174");
        tell("after", &vcpu, "r:0x10a");
        int second = call(first.kvm, KVM_CREATE_VM, 0);
        if (second < 0)
            fail("KVM_CREATE_VM");
        first.vm = second;
        set_up(&first);
    }
    if (!strcmp(what, "scm"))
        first.vm = sent(first.vm);
    if (!strcmp(what, "pidfd"))
        first.vm = got(first.vm);
    struct vcpu vcpu = new_vcpu(&first, 0);
    if (!strcmp(what, "scm"))
        vcpu.fd = sent(vcpu.fd);
    if (!strcmp(what, "pidfd"))
        vcpu.fd = got(vcpu.fd);
    tell("last", &vcpu, "r:0x8b");
    tell("last", &vcpu, "w:0x174=5");
    tell("last", &vcpu, "r:0x174");
    tell("last", &vcpu, "r:0x10a");
    if (set_mask(first.vm, 0) < 0 || deny(first.vm, 0x277, KVM_MSR_FILTER_READ) < 0)
        fail("its own filter");
    tell("last", &vcpu, "r:0x277");
    return 0;
}
