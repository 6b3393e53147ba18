/* VMMs that close what they do not know, and that reuse its numbers. */
#include "guest.h"

#include <dirent.h>
#include <sys/stat.h>

/* Whatever is above this one is not the VMM's. */
static void close_the_rest(int last) {
    if (syscall(SYS_close_range, last + 1, ~0U, 0) < 0)
        fail("close_range");
}

/* The numbers that are open. */
static void show_open(void) {
    DIR *directory = opendir("/proc/self/fd");
    int own = dirfd(directory), open[256] = {0};
    for (struct dirent *entry; (entry = readdir(directory));) {
        int fd = atoi(entry->d_name);
        if (entry->d_name[0] != '.' && fd != own && fd < 256)
            open[fd] = 1;
    }
    closedir(directory);
    printf("open:");
    for (int fd = 3; fd < 256; fd++)
        if (open[fd])
            printf(" %d", fd);
    printf("\n");
    fflush(stdout);
}

/* Two VMs whose policies depend on their CPUIDs, and the first one's filter. */
static void two(void) {
    struct machine first = new_machine(0x1000);
    close_the_rest(first.vm);
    struct machine second = new_machine(0x1000);
    struct vcpu amd = new_vcpu(&second, 0);
    if (set_vendor(&second, &amd, "AuthenticAMD") < 0)
        fail("KVM_SET_CPUID2");
    tell("amd", &amd, "r:0x277");
    struct vcpu intel = new_vcpu(&first, 0);
    if (set_vendor(&first, &intel, "GenuineIntel") < 0)
        fail("KVM_SET_CPUID2");
    close_the_rest(intel.fd);
    tell("amd", &amd, "r:0x277");
    tell("intel", &intel, "w:0x277=0x0606060606060606");
    tell("intel", &intel, "r:0x277");
    if (deny(first.vm, 0x277, KVM_MSR_FILTER_READ) < 0)
        fail("KVM_X86_SET_MSR_FILTER");
    tell("amd", &amd, "r:0x277");
    tell("intel", &intel, "r:0x277");
    tell("intel", &intel, "w:0x277=0x0606060606060606");
}

/* Files that get the numbers that were closed stay the VMM's. */
static void disks(void) {
    struct machine machine = new_machine(0x1000);
    close_the_rest(machine.vm);
    int files[6];
    struct stat before[6], after;
    for (int i = 0; i < 6; i++) {
        char name[] = "disk0";
        name[4] += i;
        files[i] = open(name, O_RDWR | O_CREAT, 0600);
        if (files[i] < 0 || fstat(files[i], &before[i]) < 0)
            fail("%s", name);
    }
    struct vcpu vcpu = new_vcpu(&machine, 0);
    tell("first", &vcpu, "r:0x8b");
    tell("first", &vcpu, "w:0x175=1");
    show_open();
    close(vcpu.fd);
    munmap(vcpu.run, machine.run_bytes);
    close(machine.vm);
    struct machine next = new_machine(0x1000);
    struct vcpu other = new_vcpu(&next, 0);
    tell("second", &other, "r:0x8b");
    for (int i = 0; i < 6; i++)
        if (fstat(files[i], &after) < 0 || after.st_ino != before[i].st_ino)
            printf("disk%d is another file\n", i);
    show_open();
}

/* Everything above is closed after each step. */
static void each(void) {
    struct machine machine = new_machine(0x1000);
    close_the_rest(machine.vm);
    struct vcpu vcpu = new_vcpu(&machine, 0);
    static const char *accesses[] = {"r:0x8b",      "w:0x175=6", "w:0x175=7",   "r:0x175", "w:0x176=0x33",
                                     "w:0x176=0x34", "r:0x176",   "w:0x174=0x9", "r:0x174", "r:0xdeadbeef"};
    for (unsigned i = 0; i < sizeof accesses / sizeof *accesses; i++) {
        close_the_rest(vcpu.fd);
        tell("each", &vcpu, accesses[i]);
    }
    show_open();
}

/* A vCPU's number becomes another vCPU's, by dup2 and by close. */
static void renumbered(void) {
    struct machine machine = new_machine(0x1000);
    struct vcpu first = new_vcpu(&machine, 0), second = new_vcpu(&machine, 1);
    tell("first", &first, "w:0x174=0x1");
    tell("second", &second, "w:0x174=0x2");
    int kept = dup(first.fd);
    dup2(second.fd, first.fd);
    struct vcpu alias = second;
    alias.fd = first.fd;
    tell("second", &alias, "r:0x174");
    first.fd = kept;
    tell("first", &first, "r:0x174");
    /* The first one's number again, by a vCPU of another VM. */
    close(alias.fd);
    struct machine other = new_machine(0x1000);
    struct vcpu third = new_vcpu(&other, 0);
    if (third.fd != alias.fd) {
        dup2(third.fd, alias.fd);
        third.fd = alias.fd;
    }
    tell("third", &third, "r:0x174");
    tell("first", &first, "r:0x174");
    /* Through dup and F_DUPFD, with the first closed. */
    int copy = fcntl(second.fd, F_DUPFD_CLOEXEC, 100);
    close(second.fd);
    second.fd = copy;
    tell("second", &second, "r:0x174");
    /* A vCPU that is made on a copy of the VM. */
    int vm = dup(machine.vm);
    close(machine.vm);
    machine.vm = vm;
    struct vcpu fourth = new_vcpu(&machine, 2);
    tell("fourth", &fourth, "r:0x174");
    tell("fourth", &fourth, "r:0x8b");
}

int main(int count, char **words) {
    const char *what = count > 1 ? words[1] : "";
    if (!strcmp(what, "two"))
        two();
    else if (!strcmp(what, "disks"))
        disks();
    else if (!strcmp(what, "each"))
        each();
    else
        renumbered();
    return 0;
}
