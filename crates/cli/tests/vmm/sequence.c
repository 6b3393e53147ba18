/* VMMs that follow each other, each a process: `sequence exec|fork COUNT ACCESS...`. */
#include "guest.h"

static void one(char **accesses) {
    struct machine machine = new_machine(0x1000);
    struct vcpu vcpu = new_vcpu(&machine, 0);
    for (; *accesses; accesses++)
        access_of(&vcpu, *accesses);
}

int main(int count, char **words) {
    (void)count;
    if (!strcmp(words[1], "one")) {
        one(words + 2);
        return 0;
    }
    int ended = 0, times = atoi(words[2]);
    for (int i = 0; i < times; i++) {
        fflush(stdout);
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (child == 0) {
            if (!strcmp(words[1], "exec")) {
                words[2] = "one";
                execv("/proc/self/exe", words + 1);
                fail("exec");
            }
            one(words + 3);
            _exit(0);
        }
        int status;
        waitpid(child, &status, 0);
        ended += status == 0;
    }
    printf("ended %d\n", ended);
    return 0;
}
