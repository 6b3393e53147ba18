/* What a VMM hands on to what it starts: `helper fork|exec`. The helper prints its descriptors, and what memory it shares
 * with others and may write, or may be made to. */
#include "guest.h"

#include <dirent.h>
#include <sys/prctl.h>

static void show_shared(void) {
    DIR *directory = opendir("/proc/self/fd");
    int own = dirfd(directory);
    for (struct dirent *entry; (entry = readdir(directory));) {
        char path[300], target[300] = "";
        snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
        if (entry->d_name[0] != '.' && atoi(entry->d_name) > 2 && atoi(entry->d_name) != own &&
            readlink(path, target, sizeof target - 1) > 0)
            printf("fd %s %s\n", entry->d_name, target);
    }
    closedir(directory);
    static char lines[1 << 16];
    int fd = open("/proc/self/maps", O_RDONLY);
    for (ssize_t read_so_far = 0, some; (some = read(fd, lines + read_so_far, sizeof lines - 1 - read_so_far)) > 0;)
        read_so_far += some;
    close(fd);
    for (char *line = strtok(lines, "\n"); line; line = strtok(0, "\n")) {
        unsigned long first, end;
        char rights[5], file[200] = "";
        if (sscanf(line, "%lx-%lx %4s %*s %*s %*s %199[^\n]", &first, &end, rights, file) < 3 || rights[3] != 's')
            continue;
        if (rights[1] != 'w' && mprotect((void *)first, end - first, PROT_READ | PROT_WRITE) < 0)
            continue;
        printf("shared %s\n", file);
    }
}

int main(int count, char **words) {
    if (count < 2) {
        show_shared();
        return 0;
    }
    struct machine machine = new_machine(0x1000);
    struct vcpu vcpu = new_vcpu(&machine, 0);
    tell("vmm", &vcpu, "r:0x8b");
    tell("vmm", &vcpu, "w:0x175=1");
    tell("vmm", &vcpu, "r:0x174");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (!strcmp(words[1], "exec"))
            execl("/proc/self/exe", "helper", (char *)0);
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        /* Not the VMM's own memory and devices, which it may keep to itself. */
        show_shared();
        fflush(stdout);
        /* A VM is the process's that made it. */
        errno = 0;
        int result = call(vcpu.fd, KVM_RUN, 0);
        printf("KVM_RUN %d %s\n", result, strerror(errno));
        printf("mask %d\n", set_mask(machine.vm, 0));
        printf("filter %d\n", deny(machine.vm, 0x174, KVM_MSR_FILTER_READ));
        fflush(stdout);
        /* And a new one has the policy. */
        struct machine own = new_machine(0x1000);
        struct vcpu its = new_vcpu(&own, 0);
        tell("helper", &its, "r:0x8b");
        tell("helper", &its, "r:0x174");
        tell("helper", &its, "w:0x10a=1");
        fflush(stdout);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    printf("status %d\n", status);
    tell("vmm", &vcpu, "r:0x8b");
    tell("vmm", &vcpu, "r:0x174");
    tell("vmm", &vcpu, "w:0x175=2");
    return 0;
}
